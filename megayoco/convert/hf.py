"""YOCO folders for transformers: config.json, weights, and the two Python files of megayoco/hf that bring the model.

A model of pattern `llama` needs no code: it goes out as a LlamaForCausalLM, see llama.py; with memory layers it needs
some, see longllama.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megayoco.config import ModelConfig, model_config_from_dict
from megayoco.convert import llama, longllama
from megayoco.convert.names import foreign_names, refuse_memory
from megayoco.convert.transformers_folder import HubConfig, find_tokenizer, open_hub_weights, write_hub_folder
from megayoco.convert.weights import Renamed, Weights
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError
from megayoco.hf import CODE_FILES

ARCHITECTURE, MODEL_TYPE = "MegaYocoForCausalLM", "megayoco"

_OUTSIDE = {
    "embed_tokens": "model.embed_tokens",
    "shared_kv.norm": "model.kv_norm",
    "shared_kv.k_proj": "model.k_proj",
    "shared_kv.v_proj": "model.v_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
_INSIDE = {
    "mixer_norm": "input_layernorm",
    "mixer.q_proj": "self_attn.q_proj",
    "mixer.k_proj": "self_attn.k_proj",
    "mixer.v_proj": "self_attn.v_proj",
    "mixer.g_proj": "self_attn.g_proj",
    "mixer.gt_proj": "self_attn.gt_proj",
    "mixer.out_proj": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}
_LAYER_TYPES = {"retention": "linear_attention", "window": "sliding_attention"}
_EXAMPLE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)  # it reads the config
"""


def names(model: ModelConfig) -> dict[str, str]:
    """Canonical name -> name in the folder."""
    return foreign_names(model, _OUTSIDE, _INSIDE, "model.layers.{}".format)


def read(folder: Path, tokenizer: Tokenizer | None = None) -> Weights:
    """The model of a folder that `write` or the model's own `save_pretrained` made; `tokenizer` in place of its own.

    Raises:
        UserError: another architecture, incomplete or damaged.
    """
    config = HubConfig.of(folder)
    if config.values.get("model_type") == llama.MODEL_TYPE:
        return llama.read(folder, tokenizer)
    if config.values.get("model_type") == longllama.MODEL_TYPE:
        return longllama.read(folder, tokenizer)
    model = _model(config)
    own = names(model)
    tensors = open_hub_weights(folder, model, own)
    return Weights(model, Renamed(tensors, own), find_tokenizer(folder, model, tokenizer), config.facts())


def check_writable(model: ModelConfig) -> None:
    """Raises UserError if the format cannot express the model."""
    if model.pattern == "llama" and model.memory_layers:
        longllama.check_writable(model)
        return
    refuse_memory(model, "the model for transformers")
    if model.window == 1:
        raise UserError("a window of one token has no cache in transformers: this model cannot go --to hf.")


def write(directory: Path, weights: Weights, shard_bytes: int) -> None:
    """Write a folder that transformers loads with trust_remote_code=True; a LLaMA without memory needs no code.

    Raises:
        UserError: something cannot be written.
    """
    model = weights.model
    if model.pattern == "llama":
        (longllama if model.memory_layers else llama).write(directory, weights, shard_bytes)
        return
    check_writable(model)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_megayoco.MegaYocoConfig",
            "AutoModel": "modeling_megayoco.MegaYocoModel",
            "AutoModelForCausalLM": "modeling_megayoco.MegaYocoForCausalLM",
        },
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.hidden_dim,
        "num_hidden_layers": model.layers,
        "num_self_layers": model.num_self_layers,
        "self_mixer": model.self_mixer,
        "num_self_heads": model.num_self_heads,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "sliding_window": model.window,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "layer_types": _layer_types(model),
    }
    tensors = Renamed(weights.tensors, {foreign: name for name, foreign in names(model).items()})
    write_hub_folder(
        directory, config, weights, tensors, shard_bytes=shard_bytes, code=CODE_FILES, example=_EXAMPLE.lstrip()
    )


def _model(config: HubConfig) -> ModelConfig:
    config.require_type(MODEL_TYPE, ARCHITECTURE)
    heads, layers = config.integer("num_attention_heads"), config.integer("num_hidden_layers")
    config.refuse("quantization_config", (None,), "quantised weights cannot be converted")
    for key in ("rope_scaling", "rope_parameters"):
        config.refuse(key, (None,), "the model has rope_theta alone")
    config.refuse("hidden_act", (None, "silu"), "the feed-forward is SwiGLU")
    config.refuse("attention_bias", (None, False), "no projection has a bias")
    window = config.values.get("sliding_window")
    model = model_config_from_dict(
        {
            "pattern": "yoco",
            "self_mixer": config.values.get("self_mixer", "retention"),
            "dim": config.integer("hidden_size"),
            "layers": layers,
            "self_layers": config.integer("num_self_layers", layers // 2),
            "hidden_dim": config.integer("intermediate_size"),
            "heads": heads,
            "self_heads": config.integer("num_self_heads", heads),
            "kv_heads": config.integer("num_key_value_heads", heads),
            "vocab_size": config.integer("vocab_size"),
            **({} if window is None else {"window": window}),
            "rope_theta": config.number("rope_theta", 10000.0),
            "norm_eps": config.number("rms_norm_eps", 1e-5),
            "tie_embeddings": bool(config.values.get("tie_word_embeddings", False)),
        },
        config.where,
    )
    config.refuse("layer_types", (None, _layer_types(model)), "that is not what the other fields say")
    return model


def _layer_types(model: ModelConfig) -> list[str]:
    return [_LAYER_TYPES[model.self_mixer]] * model.num_self_layers + ["full_attention"] * (
        model.layers - model.num_self_layers
    )
