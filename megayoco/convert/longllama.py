"""LongLLaMA folders of Hugging Face: those of the released code, and ours with a model for transformers 5.

Tensors are those of a LLaMA, byte for byte. Only the config tells which layers have a memory (`mem_layers`), and the
window (`max_position_embeddings`). What it says of inference alone, how inputs are cut and memory is stored, is kept
beside the facts of the training, so that it comes back when the model is written in this format again.

Without memory layers the model is a plain LLaMA: the window then is no window, but the length that it was trained for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megayoco.config import ModelConfig, model_config_from_dict, model_config_to_dict
from megayoco.convert import llama
from megayoco.convert.transformers_folder import HubConfig, find_tokenizer, open_hub_weights, write_hub_folder
from megayoco.convert.weights import Renamed, Weights
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError
from megayoco.hf import LONGLLAMA_CODE_FILES

ARCHITECTURE, MODEL_TYPE = "LongLlamaForCausalLM", "longllama"

SETTINGS = "longllama"
"""Key of the facts for what the config says of inference."""
_KEPT = (
    "last_context_length",
    "mem_dtype",
    "mem_attention_grouping",
    "torch_attention",
    "gradient_checkpoint_every_ith",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
MEM_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
"""What the model of our folders can store its memory in."""

_WINDOW = 2048
"""max_position_embeddings where a folder leaves it out, as in the released code."""

_EXAMPLE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)  # it reads the config
"""


def read(folder: Path, tokenizer: Tokenizer | None = None) -> Weights:
    """The model of a LongLLaMA folder; `tokenizer` in place of the folder's own.

    Raises:
        UserError: not a LongLLaMA, one that our layers cannot express, incomplete or damaged.
    """
    config = HubConfig.of(folder)
    model = _model(config)
    own = llama.names(model)
    tensors = open_hub_weights(folder, model, own, llama.is_table)
    # the window is the length of a memory model's windows, not of its training
    facts = config.recorded_facts() if model.memory_layers else config.facts()
    facts[SETTINGS] = {key: config.values[key] for key in _KEPT if key in config.values}
    return Weights(model, Renamed(tensors, own), find_tokenizer(folder, model, tokenizer), facts)


def check_writable(model: ModelConfig) -> None:
    """Raises UserError if the format cannot express the model."""
    if model.pattern != "llama":
        raise UserError(
            f"a model of pattern {model.pattern} is no LongLLaMA. Write it by"
            f" --to {'megayoco' if model.memory_layers else 'hf'}."
        )
    refuse_grouped_heads(model, "LongLLaMA")


def refuse_grouped_heads(model: ModelConfig, format: str) -> None:
    """Raises UserError for a model with fewer key-value heads than heads, which the released code has no name for."""
    if model.num_kv_heads != model.heads:
        raise UserError(
            f"{format} has a key-value head for every head, and this model has model.kv_heads {model.num_kv_heads} for"
            f" {model.heads} heads. Write it by --to megayoco"
            f"{'' if model.memory_layers else ' or --to llama'}, or train with kv_heads {model.heads}."
        )


def write(directory: Path, weights: Weights, shard_bytes: int) -> None:
    """Write a folder that transformers 5 loads with trust_remote_code=True, and as a LlamaForCausalLM for inputs of one
    window.

    Raises:
        UserError: the format cannot express the model, or something cannot be written.
    """
    model = weights.model
    check_writable(model)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_longllama.LongLlamaConfig",
            "AutoModel": "modeling_longllama.LongLlamaModel",
            "AutoModelForCausalLM": "modeling_longllama.LongLlamaForCausalLM",
        },
        **llama.shape_fields(model),
        "pad_token_id": None,
        "rope_scaling": None,
        **_inference_fields(weights),
    }
    facts = {key: value for key, value in weights.facts.items() if key != SETTINGS}
    write_hub_folder(
        directory,
        config,
        weights._replace(facts=facts),
        llama.foreign_tensors(weights),
        shard_bytes=shard_bytes,
        code=LONGLLAMA_CODE_FILES,
        example=_EXAMPLE.lstrip(),
    )


def with_memory(weights: Weights, layers: Sequence[int], window: int | None) -> Weights:
    """A LLaMA whose layers with these numbers have a memory, the others attention inside windows; all tensors as they
    are. No layers: a LLaMA with full attention.

    Raises:
        UserError: not a LLaMA, layers that it has not, a window without layers or layers without window.
    """
    if weights.model.pattern != "llama":
        raise UserError(
            f"memory layers can be added to a LLaMA, not to the weights of a {weights.model.pattern} model, which were"
            " trained for other layers. Train one with model.memory_layers from its seed instead."
        )
    values = model_config_to_dict(weights.model) | {"memory_layers": list(layers), "memory_window": window}
    return weights._replace(model=model_config_from_dict(values, "model"))


def _inference_fields(weights: Weights) -> dict[str, Any]:
    """Windows and memory: what the model has, what a folder said before, else what suits the model."""
    model, given = weights.model, weights.facts.get(SETTINGS)
    window = model.memory_window or weights.facts.get("sequence_length") or _WINDOW
    widest = max((weights.tensors.dtype(name) for name in weights.tensors), key=lambda dtype: dtype.itemsize)
    fields: dict[str, Any] = {
        "max_position_embeddings": window,
        # room for as many new tokens, before the window is full; without memory nothing may be cut off
        "last_context_length": max(window // 2, 1) if model.memory_layers else window,
        "mem_layers": list(model.memory_layers),
        "mem_positionals": True,
        "mem_dtype": str(widest).removeprefix("torch."),
        "mem_attention_grouping": None,
        "torch_attention": False,
        "gradient_checkpoint_every_ith": 1,
    }
    if isinstance(given, dict):
        fields |= {key: given[key] for key in _KEPT if key in given}
        fields["last_context_length"] = min(fields["last_context_length"], window)
    return fields


def _model(config: HubConfig) -> ModelConfig:
    config.require_type(MODEL_TYPE, ARCHITECTURE)
    values = llama.read_shape(config)
    if values["kv_heads"] != values["heads"]:
        raise UserError(
            f"{config.where}: num_key_value_heads is {values['kv_heads']} of {values['heads']}; a LongLLaMA has as many"
            " as heads. Correct the config, or give --from llama if the model has no memory."
        )
    config.refuse("mem_positionals", (True, None), "our memory layers have rotary positions")
    layers = config.values.get("mem_layers") or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise UserError(f"{config.where}: mem_layers must be a list of numbers of layers, got {layers!r}.")
    if outside := [layer for layer in layers if not 0 <= layer < values["layers"]]:
        raise UserError(
            f"{config.where}: mem_layers names layer {outside[0]}, but the layers are 0 to {values['layers'] - 1}."
            " Correct mem_layers."
        )
    window = config.integer("max_position_embeddings", _WINDOW)
    last = config.integer("last_context_length", min(1024, window))
    if last > window:
        raise UserError(
            f"{config.where}: last_context_length is {last}, more than a window, max_position_embeddings {window};"
            " positions would be stretched. Set it to that at most."
        )
    _check_inference(config)
    if layers:
        values |= {"memory_layers": layers, "memory_window": window}
    return model_config_from_dict(values, config.where)


def _check_inference(config: HubConfig) -> None:
    """Raises UserError for what would be written on into a folder that does not load."""
    name = config.values.get("mem_dtype", "bfloat16")
    if name not in MEM_DTYPES:
        raise UserError(
            f"{config.where}: mem_dtype is {name!r}, which stores no floating-point numbers of ours. Set it to one of"
            f" {', '.join(MEM_DTYPES)}."
        )
    grouping = config.values.get("mem_attention_grouping")
    numbers = grouping if isinstance(grouping, list) else []
    if grouping is not None and (len(numbers) != 2 or any(type(n) is not int or n < 1 for n in numbers)):
        raise UserError(
            f"{config.where}: mem_attention_grouping is {grouping!r}. Set it to two positive numbers, heads and"
            " queries, or to null."
        )
    config.integer("gradient_checkpoint_every_ith", 1)
