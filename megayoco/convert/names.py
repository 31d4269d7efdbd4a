"""Canonical names and shapes of a model's parameters, and how a format's own names are matched with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from megayoco.config import ModelConfig
from megayoco.convert.weights import LazyTensors
from megayoco.errors import UserError

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
_LISTED = 6


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter of a model by canonical name; a tied head stands under the embedding's alone.

    Arithmetic, not a built model: layers need seconds to import, and inside a parallel run they only come in shards.
    The order is that of the stack, so that a layer's tensors are neighbours in files.
    """
    D, hidden, kv = model.dim, model.hidden_dim, model.num_kv_heads * model.head_dim
    square, memory = (D, D), model.memory_kv_dim
    mixers = {
        "retention": {**dict.fromkeys("q k v g out".split(), square), "gt": (model.num_self_heads, D)},
        "window": dict.fromkeys("q k v out".split(), square),
        "full": {"q": square, "k": (kv, D), "v": (kv, D), "out": square},
        "cross": {"q": square, "out": square},
        "memory": {"q": square, "k": (memory, D), "v": (memory, D), "out": square},
        "block": {"q": square, "k": (memory, D), "v": (memory, D), "out": square},
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, D)}
    layers = 0
    for kind in model.layer_pattern():
        if kind == "shared_kv":
            part = {"norm": (D,), "k_proj": (kv, D), "v_proj": (kv, D)}
            shapes |= {f"shared_kv.{name}.weight": shape for name, shape in part.items()}
            continue
        layer: dict[str, tuple[int, ...]] = {"mixer_norm": (D,)}
        layer |= {f"mixer.{name}_proj": shape for name, shape in mixers[kind].items()}
        layer |= {"ffn_norm": (D,)}
        layer |= {"ffn.gate_proj": (hidden, D), "ffn.up_proj": (hidden, D), "ffn.down_proj": (D, hidden)}
        shapes |= {f"layers.{layers}.{name}.weight": shape for name, shape in layer.items()}
        layers += 1
    shapes["norm.weight"] = (D,)
    if not model.tie_embeddings:
        shapes[HEAD] = (model.vocab_size, D)
    return shapes


def foreign_names(
    model: ModelConfig, outside: Mapping[str, str], inside: Mapping[str, str], layer: Callable[[int], str]
) -> dict[str, str]:
    """A format's name of every parameter of a model, by canonical name.

    Args:
        model: whose parameters.
        outside: canonical name -> the format's, of what is no layer's, both without `.weight`.
        inside: the same within a layer.
        layer: what the format calls a layer, by its place in the stack.
    """
    names = {}
    for name in tensor_shapes(model):
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, place, part = stem.split(".", 2)
            names[name] = f"{layer(int(place))}.{inside[part]}.weight"
        else:
            names[name] = f"{outside[stem]}.weight"
    return names


def refuse_memory(model: ModelConfig, format: str) -> None:
    """Raises UserError for a model with memory layers, whose weights another format would hold and read as another
    model's."""
    if model.memory_layers:
        raise UserError(
            f"{format} has no memory layers, and this model has (model.memory_layers"
            f" {', '.join(map(str, model.memory_layers))}): written so it would be another model. Write it by"
            f" --to {'longllama or --to ' if model.pattern == 'llama' else ''}megayoco."
        )


def check_tensors(where: object, tensors: LazyTensors, shapes: Mapping[str, tuple[int, ...]], config: str) -> None:
    """Compare what a file holds with what its config asks for.

    Args:
        where: the file or folder, for the message.
        tensors: what is there.
        shapes: what must be there, by the same names.
        config: the file that says so, for the message.

    Raises:
        UserError: tensors that are missing, left over, of another shape or no floating-point numbers; lists them.
    """
    remedy = "Weights and config belong to two models: copy the whole folder again, or export again."
    found = set(tensors.keys())
    for what, names in (
        ("lacks the tensor", shapes.keys() - found),
        ("holds what the model lacks,", found - shapes.keys()),
    ):
        if names:
            raise UserError(f"{where} {what} {listed(names)}. {remedy}")
    for name, shape in shapes.items():
        if tensors.shape(name) != shape:
            raise UserError(f"{where}: {name} has shape {tensors.shape(name)}, {config} asks for {shape}. {remedy}")
        if not tensors.dtype(name).is_floating_point:
            raise UserError(f"{where}: {name} has dtype {tensors.dtype(name)}; quantised weights cannot be converted.")


def listed(names: Iterable[str]) -> str:
    """The first names in alphabetic order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return ", ".join(ordered[:_LISTED]) + more
