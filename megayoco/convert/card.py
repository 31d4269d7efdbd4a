"""README.md of an exported model: what is known of it, and nothing that is not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megayoco.config import ModelConfig


def model_card(
    model: ModelConfig, facts: Mapping[str, Any], dtype: torch.dtype, name: str, has_code: bool, example: str
) -> str:
    """The card as Markdown, with the header that the Hugging Face hub reads.

    Args:
        model: the shape of the model.
        facts: what is known of its training.
        dtype: of the weights; sizes of caches are told for it.
        name: title.
        has_code: whether the folder brings code of its own.
        example: lines of Python that load the model from FOLDER.
    """
    tags = [*(["custom_code"] if has_code else []), model.pattern, "megayoco"]
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    length = facts.get("sequence_length")
    trained = "not recorded" if length is None else f"{length:,} tokens"
    parts = [
        "\n".join(["---", *header, "---"]),
        f"# {name}",
        _introduction(model),
        "## Use\n\n```python\n" + example.rstrip() + "\n```" if example else "",
        "## Architecture\n\n" + _table(("field", "value"), _architecture(model)),
        "## Context\n\n" + _table(("", ""), [("length trained", trained), ("length evaluated", "not recorded")]),
        "## Memory of generation\n\n" + _table(("cache", f"bytes in {_short(dtype)}"), cache_sizes(model, dtype)),
        "## Training\n\n" + _training(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def cache_sizes(model: ModelConfig, dtype: torch.dtype) -> list[tuple[str, str]]:
    """What generation keeps per token and, whatever the length, per sequence; in bytes, with what it consists of."""
    per_layer = 2 * model.num_kv_heads * model.head_dim * dtype.itemsize
    if model.memory_window is not None and model.pattern != "yoco":
        remembered, windows = len(model.memory_layers), model.layers * model.memory_window * per_layer
        return [
            ("memory, per token", f"{remembered * per_layer:,} ({remembered} layers)"),
            ("windows, per sequence", f"{windows:,}"),
        ]
    if model.pattern != "yoco":
        return [("keys and values, per token", f"{model.layers * per_layer:,} ({model.layers} layers)")]
    layers = model.num_self_layers
    rows = [("shared keys and values, per token", f"{per_layer:,} (one pair for all {model.layers - layers} layers)")]
    if model.self_mixer == "retention":
        size = layers * model.num_self_heads * model.self_head_dim**2 * torch.float32.itemsize
        return [*rows, ("retention states, per sequence", f"{size:,} (fp32)")]
    assert model.window is not None
    size = layers * 2 * (model.window - 1) * model.dim * dtype.itemsize
    return [*rows, ("windows, per sequence", f"{size:,}")]


def _introduction(model: ModelConfig) -> str:
    if model.pattern == "llama" and model.memory_layers:
        return (
            "A decoder-only language model with memory (LongLLaMA, arXiv 2307.03170), written by MegaYOCO. All layers"
            f" see a window of {model.memory_window:,} tokens; layers {', '.join(map(str, model.memory_layers))} also"
            " everything before it."
        )
    if model.pattern == "llama":
        return "A decoder-only language model (LLaMA), written by MegaYOCO."
    mixer = "gated retention" if model.self_mixer == "retention" else "sliding-window attention"
    return (
        f"A decoder-decoder language model (YOCO, arXiv 2405.05254), written by MegaYOCO. Its self-decoder uses"
        f" {mixer}; all layers of its cross-decoder read one pair of keys and values, which are made once."
    )


def _architecture(model: ModelConfig) -> list[tuple[str, str]]:
    counts = model.parameter_count()
    rows = [
        ("parameters", f"{counts['total']:,} ({counts['body']:,} without embedding and head)"),
        ("width", f"{model.dim:,}"),
        ("feed-forward width", f"{model.hidden_dim:,}"),
        ("layers", f"{model.layers}"),
        ("attention heads", f"{model.heads} of {model.head_dim}, {model.num_kv_heads} for keys and values"),
    ]
    if model.pattern == "yoco":
        rows[3] = (
            "layers",
            f"{model.num_self_layers} self-decoder, {model.layers - model.num_self_layers} cross-decoder",
        )
        rows.append((f"{model.self_mixer} heads", f"{model.num_self_heads} of {model.self_head_dim}"))
    if model.window is not None:
        rows.append(("window", f"{model.window:,} tokens"))
    return [
        *rows,
        ("vocabulary", f"{model.vocab_size:,}{', tied head' if model.tie_embeddings else ''}"),
        ("RoPE theta", f"{model.rope_theta:g}"),
    ]


def _training(facts: Mapping[str, Any]) -> str:
    phases = facts.get("phases")
    plain = [(key, _value(value)) for key, value in facts.items() if key != "phases"]
    parts = [_table(("fact", "value"), plain)] if plain else ["Nothing was recorded."]
    if isinstance(phases, list) and phases and all(isinstance(phase, dict) for phase in phases):
        keys = list(phases[0])
        parts.append(
            _table(("phase", *keys), [(str(i), *(_value(p.get(k)) for k in keys)) for i, p in enumerate(phases)])
        )
    return "\n\n".join(parts)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
