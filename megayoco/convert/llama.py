"""LLaMA folders of Hugging Face: config.json of LlamaForCausalLM, weights in safetensors or pytorch_model.bin.

Their rotary embedding turns channels (j, j + K/2), as our pattern `llama` does: no rows change places.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megayoco.config import ModelConfig, model_config_from_dict
from megayoco.convert.names import foreign_names, refuse_memory
from megayoco.convert.transformers_folder import HubConfig, find_tokenizer, open_hub_weights, write_hub_folder
from megayoco.convert.weights import Renamed, Weights
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError

ARCHITECTURE, MODEL_TYPE = "LlamaForCausalLM", "llama"

_OUTSIDE = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_INSIDE = {
    "mixer_norm": "input_layernorm",
    "mixer.q_proj": "self_attn.q_proj",
    "mixer.k_proj": "self_attn.k_proj",
    "mixer.v_proj": "self_attn.v_proj",
    "mixer.out_proj": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}
_TABLES = ".self_attn.rotary_emb.inv_freq"
"""Rotary tables that old versions of transformers stored; they follow from the config."""

_EXAMPLE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""


def names(model: ModelConfig) -> dict[str, str]:
    """Canonical name -> name in the folder."""
    return foreign_names(model, _OUTSIDE, _INSIDE, "model.layers.{}".format)


def read(folder: Path, tokenizer: Tokenizer | None = None) -> Weights:
    """The model of a LLaMA folder; `tokenizer` in place of the folder's own.

    Raises:
        UserError: not a LLaMA, one that our pattern cannot express, incomplete or damaged.
    """
    config = HubConfig.of(folder)
    model = _model(config)
    own = names(model)
    tensors = open_hub_weights(folder, model, own, is_table)
    return Weights(model, Renamed(tensors, own), find_tokenizer(folder, model, tokenizer), config.facts())


def check_writable(model: ModelConfig) -> None:
    """Raises UserError if the format cannot express the model."""
    if model.pattern != "llama":
        raise UserError(f"a model of pattern {model.pattern} is no LLaMA. Write it by --to hf, or --to yoco.")
    refuse_memory(model, "a LLaMA of transformers")


def write(directory: Path, weights: Weights, shard_bytes: int) -> None:
    """Write a folder that transformers loads as LlamaForCausalLM, without code of ours.

    Raises:
        UserError: the model is no LLaMA, or something cannot be written.
    """
    model = weights.model
    check_writable(model)
    config = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, **shape_fields(model)}
    write_hub_folder(
        directory, config, weights, foreign_tensors(weights), shard_bytes=shard_bytes, example=_EXAMPLE.lstrip()
    )


def foreign_tensors(weights: Weights) -> Renamed:
    """The tensors of a LLaMA under the names of its folders."""
    return Renamed(weights.tensors, {foreign: name for name, foreign in names(weights.model).items()})


def shape_fields(model: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that a LLaMA's shape decides, and no ids of special tokens."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.hidden_dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        # its defaults, 1 and 2, are tokens of LLaMA's own vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
    }


def is_table(name: str) -> bool:
    """Whether a tensor is no parameter, but a table that follows from the config."""
    return name.endswith(_TABLES)


def _model(config: HubConfig) -> ModelConfig:
    config.require_type(MODEL_TYPE, ARCHITECTURE)
    config.refuse(
        "mem_layers", (None, []), "a LLaMA has no memory layers; take it out, and give model.memory_layers in the run"
    )
    return model_config_from_dict(read_shape(config), config.where)


def read_shape(config: HubConfig) -> dict[str, Any]:
    """Fields of ModelConfig that the config.json of a LLaMA describes.

    Raises:
        UserError: a field is missing, or our layers cannot express it.
    """
    dim, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    no_bias = "our layers have no bias"
    config.refuse("attention_bias", (False, None), no_bias)
    config.refuse("mlp_bias", (False, None), no_bias)
    config.refuse("hidden_act", ("silu", "swish", None), "our feed-forward is SwiGLU, with silu")
    config.refuse(
        "head_dim", (None, dim // heads), f"our heads have hidden_size / num_attention_heads = {dim // heads}"
    )
    config.refuse("quantization_config", (None,), "quantised weights cannot be converted")
    return {
        "pattern": "llama",
        "dim": dim,
        "layers": config.integer("num_hidden_layers"),
        "hidden_dim": config.integer("intermediate_size"),
        "heads": heads,
        "kv_heads": config.integer("num_key_value_heads", heads),
        "vocab_size": config.integer("vocab_size"),
        "rope_theta": _rope_theta(config),
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(config.values.get("tie_word_embeddings", False)),
    }


def _rope_theta(config: HubConfig) -> float:
    """The rotary base, from transformers 5's `rope_parameters` or 4's `rope_theta`; any scaling is refused."""
    theta = config.number("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        parameters = config.values.get(key)
        if parameters is None:
            continue
        kind = parameters.get("rope_type", parameters.get("type", "default")) if isinstance(parameters, dict) else None
        if kind != "default" or parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(
                f"{config.where}: {key} scales the rotary embedding ({parameters}); ours has a plain base, rope_theta."
            )
        theta = HubConfig(f"{config.where}, {key}", parameters).number("rope_theta", theta)
    return theta
