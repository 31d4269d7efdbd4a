"""Named model shapes: the paper's YOCO family, decoders of matching size to compare with, and two for a laptop.

A preset fills every field of `model` that the run's config does not give itself. Shapes are those of YOCO,
arXiv 2405.05254, appendix D; the published shapes give the attention heads, gated retention has head dim 256 there.
`model.self_mixer=window` turns any of the YOCO shapes into the paper's YOCO-SWA (window 1024).

`llama-*` have the same depth, width and attention heads as the YOCO of the same name, and the feed-forward width
8 D / 3 that makes them equally large, rounded to the nearest multiple of 8 so that tensor parallelism of 2, 4 and 8
divides it; that moves a parameter count by at most 0.07 %. `llama-3b` (which the paper only uses for its cache size)
and `llama-tiny` take the feed-forward width that comes nearest to the size of `yoco-3b` and `yoco-tiny`.
"""

from typing import Any

PAPER_VOCABULARY = 100_288
"""cl100k with 18 further specials and 4 leading symbols, rounded up to a multiple of 8."""

_PAPER_SHAPES = {  # name: (dim, layers, heads of gated retention, heads of attention)
    "160m": (768, 12, 3, 12),
    "400m": (1024, 24, 4, 16),
    "830m": (1536, 24, 6, 12),
    "1.4b": (2048, 24, 8, 16),
    "2.7b": (2560, 32, 10, 20),
    "6.8b": (4096, 32, 16, 32),
    "13b": (5120, 40, 20, 40),
}


def _paper_presets() -> dict[str, dict[str, Any]]:
    presets: dict[str, dict[str, Any]] = {}
    for size, (dim, layers, self_heads, heads) in _PAPER_SHAPES.items():
        shape = {"dim": dim, "layers": layers, "heads": heads, "vocab_size": PAPER_VOCABULARY}
        yoco = {"hidden_dim": 3 * dim, "self_heads": self_heads, "self_mixer": "retention", "window": 1024}
        presets[f"yoco-{size}"] = {"pattern": "yoco", **shape, **yoco}
        presets[f"llama-{size}"] = {"pattern": "llama", **shape, "hidden_dim": 8 * round(dim / 3)}
    return presets


_SHAPE_3B = {"dim": 3072, "layers": 26, "heads": 24, "kv_heads": 8, "vocab_size": PAPER_VOCABULARY}
_SHAPE_TINY = {"dim": 256, "layers": 4, "heads": 4, "kv_heads": 2, "vocab_size": 4352}

PRESETS: dict[str, dict[str, Any]] = {
    "yoco-tiny": {"pattern": "yoco", **_SHAPE_TINY, "hidden_dim": 768, "self_heads": 4, "window": 128},
    "llama-tiny": {"pattern": "llama", **_SHAPE_TINY, "hidden_dim": 832},
    **_paper_presets(),
    "yoco-3b": {"pattern": "yoco", **_SHAPE_3B, "hidden_dim": 8192, "self_heads": 24, "window": 1024},
    "llama-3b": {"pattern": "llama", **_SHAPE_3B, "hidden_dim": 9072},
}
"""Field values of `ModelConfig` by preset name. `window` and `self_heads` are used only where the model has them."""
