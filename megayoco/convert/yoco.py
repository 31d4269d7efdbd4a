"""The layout of the official YOCO code: checkpoint.pth and params.json, and checkpoints of its training script.

checkpoint.pth holds the state dict alone; a training checkpoint (checkpoint_last.pt, ...) has it under `model`, with
`decoder.model.` before every name, beside settings and the optimizer. params.json is needed with both.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megayoco.config import ModelConfig, model_config_from_dict
from megayoco.convert.export import TOKENIZER_FOLDER, check_tokenizer
from megayoco.convert.folder import check_room, whole_folder
from megayoco.convert.names import EMBEDDING, check_tensors, foreign_names, refuse_memory, tensor_shapes
from megayoco.convert.stored import PickledTensors, load_restricted
from megayoco.convert.weights import Renamed, Weights
from megayoco.convert.writing import tensor_bytes
from megayoco.data.files import read_json_object, write_text_atomically
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError

logger = logging.getLogger(__name__)

WEIGHTS_FILE, PARAMS_FILE = "checkpoint.pth", "params.json"

_OUTSIDE = {
    "embed_tokens": "embed_tokens",
    "shared_kv.norm": "cross_decoder.kv_layer_norm",
    "shared_kv.k_proj": "cross_decoder.k_proj",
    "shared_kv.v_proj": "cross_decoder.v_proj",
    "norm": "layer_norm",
    "lm_head": "output_projection",
}
_INSIDE = {
    "mixer_norm": "mixer_layer_norm",
    "mixer.q_proj": "mixer.q_proj",
    "mixer.k_proj": "mixer.k_proj",
    "mixer.v_proj": "mixer.v_proj",
    "mixer.g_proj": "mixer.g_proj",
    "mixer.gt_proj": "mixer.gt_proj",
    "mixer.out_proj": "mixer.out_proj",
    "ffn_norm": "final_layer_norm",
    # `gate` is the linear branch there, and silu acts on fc1
    "ffn.gate_proj": "ffn.fc1",
    "ffn.up_proj": "ffn.gate",
    "ffn.down_proj": "ffn.fc2",
}
_FOREIGN_HEAD = "output_projection.weight"
_GATE = "self_decoder.layers.0.mixer.gt_proj.weight"
_TRAINING_PREFIX = "decoder.model."

_REQUIRED = {
    "dim": "dim",
    "n_layers": "layers",
    "hidden_dim": "hidden_dim",
    "n_self_heads": "self_heads",
    "n_attn_heads": "heads",
    "n_attn_kv_heads": "kv_heads",
    "vocab_size": "vocab_size",
}
_OPTIONAL = {"rope_theta": "rope_theta", "norm_eps": "norm_eps", "sliding_window": "window"}
_OF_A_RUN = ("max_batch_size", "max_seq_len", "model_parallel_size", "load_checkpoint")


def names(model: ModelConfig) -> dict[str, str]:
    """Canonical name -> name in the state dict."""
    half = model.num_self_layers
    return foreign_names(
        model,
        _OUTSIDE,
        _INSIDE,
        lambda i: f"self_decoder.layers.{i}" if i < half else f"cross_decoder.layers.{i - half}",
    )


def read(path: Path, tokenizer: Tokenizer | None = None) -> Weights:
    """The model of a folder with checkpoint.pth and params.json, or of a checkpoint file with params.json beside it.

    The number of retention heads is that of the weights' decay gates. A head that is stored as one with the embedding
    is tied. The tokenizer is that of the folder `tokenizer` beside them, if it is ours; `tokenizer` goes before it.

    Raises:
        UserError: incomplete, damaged, with code in it, or weights and params.json do not fit.
    """
    file = path / WEIGHTS_FILE if path.is_dir() else path
    params = file.with_name(PARAMS_FILE)
    values = _read_params(params)
    tensors = PickledTensors(file, _state_dict(file))
    if values["self_mixer"] == "retention" and _GATE in tensors:
        found = tensors.shape(_GATE)[0]
        if found != values["self_heads"]:
            logger.warning(
                "%s says n_self_heads %s, but %s has %d rows: %d heads it is.",
                params,
                values["self_heads"],
                _GATE,
                found,
                found,
            )
            values["self_heads"] = found
    tied = _FOREIGN_HEAD in tensors and tensors.are_one(_FOREIGN_HEAD, "embed_tokens.weight")
    model = model_config_from_dict(values | {"tie_embeddings": tied}, str(params))
    own = names(model)
    shapes = {own[name]: shape for name, shape in tensor_shapes(model).items()}
    if tied:
        shapes[_FOREIGN_HEAD] = shapes[own[EMBEDDING]]
    check_tensors(file, tensors, shapes, PARAMS_FILE)
    saved = file.parent / TOKENIZER_FOLDER
    if tokenizer is None and saved.is_dir():
        tokenizer = Tokenizer.from_dir(saved)
    check_tokenizer(file.parent, tokenizer, model)
    return Weights(model, Renamed(tensors, own), tokenizer, {})


def check_writable(model: ModelConfig) -> None:
    """Raises UserError if the format cannot express the model."""
    if model.pattern != "yoco":
        raise UserError(f"the official YOCO code has no pattern {model.pattern}. Write it by --to llama.")
    refuse_memory(model, "the official YOCO code")
    if 2 * model.num_self_layers != model.layers:
        raise UserError(
            f"the official YOCO code has halves of equal depth; this model has {model.num_self_layers} self-decoder"
            f" layers of {model.layers}. Write it by --to hf."
        )


def write(directory: Path, weights: Weights, shard_bytes: int) -> None:
    """Write checkpoint.pth, params.json and our tokenizer's folder; the format has no shards.

    Every tensor goes through a file of its own first, so that torch.save finds them mapped and not in memory.

    Raises:
        UserError: the model is none of the format's, or something cannot be written.
    """
    model = weights.model
    check_writable(model)
    own = names(model)
    tensors = Renamed(weights.tensors, {foreign: name for name, foreign in own.items()})
    ours = {ours: theirs for theirs, ours in _REQUIRED.items()}
    params: dict[str, Any] = {
        ours["dim"]: model.dim,
        ours["layers"]: model.layers,
        ours["hidden_dim"]: model.hidden_dim,
        ours["self_heads"]: model.num_self_heads,
        ours["heads"]: model.heads,
        ours["kv_heads"]: model.num_kv_heads,
        ours["vocab_size"]: model.vocab_size,
        "rope_theta": model.rope_theta,
        "norm_eps": model.norm_eps,
    }
    if model.window is not None:
        params["sliding_window"] = model.window
    total = sum(math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors)
    with whole_folder(directory, "the checkpoint") as folder:
        check_room(folder, 2 * total, f"{WEIGHTS_FILE}, written by way of temporary files,")
        scratch = folder / "scratch"
        scratch.mkdir()
        state: dict[str, Tensor] = {}
        for number, name in enumerate(tensors):
            (scratch / str(number)).write_bytes(tensor_bytes(name, tensors))
            shape = tensors.shape(name)
            mapped = torch.from_file(str(scratch / str(number)), size=math.prod(shape), dtype=tensors.dtype(name))
            state[name] = mapped.view(shape)
        if model.tie_embeddings:
            state[_FOREIGN_HEAD] = state[own[EMBEDDING]]
        torch.save(state, folder / WEIGHTS_FILE)
        shutil.rmtree(scratch)
        write_text_atomically(folder / PARAMS_FILE, json.dumps(params, indent=2) + "\n")
        if weights.tokenizer is not None:
            weights.tokenizer.save(folder / TOKENIZER_FOLDER)


def _state_dict(file: Path) -> Mapping[str, Any]:
    """The tensors of either kind of checkpoint, by the names of the bare one."""
    content = load_restricted(file)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        return content  # type: ignore[no-any-return]
    found = content["model"]
    if strange := [name for name in found if not str(name).startswith(_TRAINING_PREFIX)]:
        raise UserError(
            f"{file}: under `model` there is {strange[0]}, where names begin with {_TRAINING_PREFIX}. It is no"
            " checkpoint of the official YOCO training script."
        )
    return {name.removeprefix(_TRAINING_PREFIX): tensor for name, tensor in found.items()}


def _read_params(path: Path) -> dict[str, Any]:
    """The fields of a ModelConfig that params.json tells."""
    params = read_json_object(
        path, "The official layout needs it beside the checkpoint: write one with the seven sizes."
    )
    if missing := [name for name in _REQUIRED if params.get(name) is None]:
        raise UserError(f"{path} lacks {', '.join(missing)}. Add what the model was built with.")
    known = (*_REQUIRED, *_OPTIONAL, *_OF_A_RUN)
    if unknown := [name for name in params if name not in known]:
        raise UserError(f"{path}: unknown key {unknown[0]}. Known are {', '.join(known)}.")
    if params.get("model_parallel_size") not in (None, 1):
        raise UserError(
            f"{path}: model_parallel_size is {params['model_parallel_size']}, so that the file holds one part of the"
            " model. Give a checkpoint with whole tensors."
        )
    renamed = _REQUIRED | _OPTIONAL
    values = {renamed[name]: value for name, value in params.items() if name in renamed and value is not None}
    if not isinstance(values["layers"], int) or values["layers"] < 2:
        raise UserError(f"{path}: n_layers must be a number of at least 2, got {json.dumps(values['layers'])}.")
    half = values["layers"] // 2  # the official code builds two halves of n_layers // 2
    mixer = "window" if "window" in values else "retention"
    return values | {"pattern": "yoco", "self_mixer": mixer, "layers": 2 * half, "self_layers": half}
