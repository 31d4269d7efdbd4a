"""YOCO folders of flash-linear-attention: self-decoder of gated retention, or of sliding windows.

Rotary frequencies there are `yoco`, theta ** -linspace(0, 1, K/2) as ours, or `fla`, theta ** -(2j/K). Both are
geometric series from 1 on, so the second is the first with the base theta ** (1 - 2/K). Windows there turn channels
(j, j + K/2) of a head, with `fla` frequencies: rows of q and k change places.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from megayoco.config import ModelConfig, model_config_from_dict
from megayoco.convert.names import foreign_names, refuse_memory
from megayoco.convert.rotary_rows import to_half_split, to_interleaved
from megayoco.convert.stored import open_weights
from megayoco.convert.transformers_folder import HubConfig, find_tokenizer, open_hub_weights, write_hub_folder
from megayoco.convert.weights import Renamed, Weights
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError

ARCHITECTURE, MODEL_TYPE = "YOCOForCausalLM", "yoco"

_OUTSIDE = {
    "embed_tokens": "model.embeddings",
    "shared_kv.norm": "model.shared_kv_builder.kv_norm",
    "shared_kv.k_proj": "model.shared_kv_builder.k_proj",
    "shared_kv.v_proj": "model.shared_kv_builder.v_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
_INSIDE = {
    "mixer_norm": "attn_norm",
    "mixer.q_proj": "attn.q_proj",
    "mixer.k_proj": "attn.k_proj",
    "mixer.v_proj": "attn.v_proj",
    "mixer.g_proj": "attn.g_proj",
    "mixer.gt_proj": "attn.gk_proj",
    "mixer.out_proj": "attn.o_proj",
    "ffn_norm": "mlp_norm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}
_MIXERS = {"gated_retention": "retention", "swa": "window"}
_GATE_TEMPERATURE = 16
_SAME_BASE = 1e-9
"""Relative difference of two bases that rounding explains: at a million tokens it turns no pair by more than 1e-4."""

_EXAMPLE = """
import fla  # flash-linear-attention brings the model
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""


def names(model: ModelConfig) -> dict[str, str]:
    """Canonical name -> name in the folder."""
    half = model.num_self_layers
    return foreign_names(
        model, _OUTSIDE, _INSIDE, lambda i: f"model.self_layers.{i}" if i < half else f"model.cross_layers.{i - half}"
    )


def read(folder: Path, tokenizer: Tokenizer | None = None) -> Weights:
    """The model of a folder of flash-linear-attention; `tokenizer` in place of its own.

    Raises:
        UserError: not a YOCO, one that our pattern cannot express, incomplete or damaged.
    """
    config = HubConfig.of(folder)
    model = _model(config, folder)
    own = names(model)
    tensors = open_hub_weights(folder, model, own)
    return Weights(
        model,
        Renamed(tensors, own, dict.fromkeys(_turned(model), partial(to_interleaved, heads=model.num_self_heads))),
        find_tokenizer(folder, model, tokenizer),
        config.facts(),
    )


def check_writable(model: ModelConfig) -> None:
    """Raises UserError if the format cannot express the model."""
    if model.pattern != "yoco":
        raise UserError(f"flash-linear-attention's YOCO has no pattern {model.pattern}. Write it by --to llama.")
    refuse_memory(model, "flash-linear-attention's YOCO")


def write(directory: Path, weights: Weights, shard_bytes: int) -> None:
    """Write a folder that flash-linear-attention loads.

    Raises:
        UserError: the model is no YOCO, or something cannot be written.
    """
    model = weights.model
    check_writable(model)
    attention: dict[str, Any] = {
        "type": next(name for name, mixer in _MIXERS.items() if mixer == model.self_mixer),
        "num_heads": model.num_self_heads,
        "num_v_heads": model.num_self_heads,
        "qkv_bias": False,
        "gate_logit_normalizer": float(_GATE_TEMPERATURE),
        "window_size": model.window,
        "rope_theta": model.rope_theta,
        "rope_inv_freq": "yoco",
    }
    if model.self_mixer == "window":
        base = model.rope_theta if model.self_head_dim == 2 else model.rope_theta ** (1 / (1 - 2 / model.self_head_dim))
        attention |= {"rope_theta": base, "rope_inv_freq": "fla"}
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.hidden_dim,
        "hidden_act": "swish",
        "num_hidden_layers": model.layers,
        "num_self_decoder_layers": model.num_self_layers,
        "self_decoder_attn": attention,
        "cross_decoder_attn": {
            "num_heads": model.heads,
            "num_kv_heads": model.num_kv_heads,
            "qkv_bias": False,
            "qk_norm": False,
            "window_size": None,
            "rope_theta": model.rope_theta,
            "rope_inv_freq": "yoco",
        },
        "norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        # its defaults, 1 and 2, are tokens of another vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
    }
    own = names(model)
    turn = partial(to_half_split, heads=model.num_self_heads)
    tensors = Renamed(
        weights.tensors,
        {foreign: name for name, foreign in own.items()},
        {own[name]: turn for name in _turned(model)},
    )
    write_hub_folder(directory, config, weights, tensors, shard_bytes=shard_bytes, example=_EXAMPLE.lstrip())


def _model(config: HubConfig, folder: Path) -> ModelConfig:
    config.require_type(MODEL_TYPE, ARCHITECTURE)
    own, cross = config.section("self_decoder_attn"), config.section("cross_decoder_attn")
    no_bias = "our layers have no bias"
    config.refuse("hidden_act", ("swish", "silu", None), "our feed-forward is SwiGLU, with silu")
    config.refuse("attnres_block_size", (None,), "we have no attention over residuals")
    config.refuse("quantization_config", (None,), "quantised weights cannot be converted")
    if own.values.get("type") not in _MIXERS:
        raise UserError(
            f"{own.where}: type is {own.values.get('type', 'gated_deltanet')!r}; we have {' and '.join(_MIXERS)}."
        )
    mixer = _MIXERS[own.values["type"]]
    heads, self_heads = cross.integer("num_heads"), own.integer("num_heads")
    if mixer == "retention":
        own.refuse("gate_logit_normalizer", (_GATE_TEMPERATURE,), f"our decay has the exponent 1/{_GATE_TEMPERATURE}")
    else:
        own.refuse("qkv_bias", (False, None), no_bias)
        own.refuse("num_v_heads", (self_heads, None), "our windows have as many key-value heads as query heads")
    cross.refuse("qkv_bias", (False, None), no_bias)
    cross.refuse("qk_norm", (False, None), "we do not normalise queries")
    cross.refuse("window_size", (None,), "our cross-decoder sees all tokens")
    values: dict[str, Any] = {
        "pattern": "yoco",
        "self_mixer": mixer,
        "dim": config.integer("hidden_size"),
        "layers": config.integer("num_hidden_layers"),
        "self_layers": config.integer("num_self_decoder_layers"),
        "hidden_dim": _hidden_dim(config, folder),
        "heads": heads,
        "self_heads": self_heads,
        "kv_heads": cross.integer("num_kv_heads", heads),
        "vocab_size": config.integer("vocab_size"),
        "norm_eps": config.number("norm_eps", 1e-6),
        "tie_embeddings": bool(config.values.get("tie_word_embeddings", False)),
    }
    if mixer == "window":
        values["window"] = own.integer("window_size")
    model = model_config_from_dict(values, config.where)  # checks the head dims that the bases depend on
    values["rope_theta"] = _rope_theta(own, cross, model)
    return model_config_from_dict(values, config.where)


def _rope_theta(own: HubConfig, cross: HubConfig, model: ModelConfig) -> float:
    """The one base of our frequencies that gives those of both halves."""
    kinds = {
        own.where: "fla" if model.self_mixer == "window" else own.values.get("rope_inv_freq", "fla"),
        cross.where: cross.values.get("rope_inv_freq", "fla"),
    }
    bases = []
    for section, head_dim in ((own, model.self_head_dim), (cross, model.head_dim)):
        theta, kind = section.number("rope_theta", 10000.0), kinds[section.where]
        if kind not in ("yoco", "fla"):
            raise UserError(f"{section.where}: rope_inv_freq is {kind!r}, which must be yoco or fla.")
        if head_dim > 2:  # a single pair turns by the position, whatever the base
            bases.append((kind, theta if kind == "yoco" else theta ** (1 - 2 / head_dim)))
    if not bases:
        return 10000.0
    low, high = min(base for _, base in bases), max(base for _, base in bases)
    if high - low > _SAME_BASE * high:
        raise UserError(
            f"{own.where} and {cross.where} have different rotary frequencies: in our form their bases are"
            f" {bases[0][1]:.9g} and {bases[1][1]:.9g}, while both halves of our models share one."
        )
    return max(bases, key=lambda entry: entry[0] == "yoco")[1]  # as it was written, where it was not computed


def _hidden_dim(config: HubConfig, folder: Path) -> int:
    """Where the config leaves it to a ratio, the weights tell it."""
    if config.values.get("intermediate_size") is not None:
        return config.integer("intermediate_size")
    weights_file, tensors = open_weights(folder)
    name = "model.self_layers.0.mlp.gate_proj.weight"
    if name not in tensors:
        raise UserError(f"{weights_file} lacks the tensor {name}. Copy the whole folder again.")
    return tensors.shape(name)[0]


def _turned(model: ModelConfig) -> list[str]:
    """Canonical names of the matrices whose rows change places."""
    layers = range(model.num_self_layers) if model.self_mixer == "window" else ()
    return [f"layers.{i}.mixer.{name}_proj.weight" for i in layers for name in "qk"]
