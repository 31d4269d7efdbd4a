"""Every format by name: what a path holds, reading it, writing it. The names of its tensors stand in its own file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from megayoco.config import ModelConfig
from megayoco.convert import canonical, easylm, fla, hf, llama, longllama, yoco
from megayoco.convert.folder import check_destination
from megayoco.convert.weights import Cast, Weights
from megayoco.convert.writing import SHARD_BYTES
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError


class Format(NamedTuple):
    """One format, both directions."""

    recognises: Callable[[Path], bool]
    """Whether a path that exists holds it, complete or not."""
    looks_for: str
    """What that is decided by, for the error when nothing fits."""
    read: Callable[[Path, Tokenizer | None], Weights]
    check_writable: Callable[[ModelConfig], None]
    """Raises UserError if it cannot express a model."""
    write: Callable[[Path, Weights, int], None]
    """To a folder, with a number of bytes per shard."""


def _has_model_type(model_type: str) -> Callable[[Path], bool]:
    def recognises(path: Path) -> bool:
        try:
            config = json.loads((path / "config.json").read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(config, dict) and config.get("model_type") == model_type

    return recognises


def _is_official(path: Path) -> bool:
    return (path / yoco.PARAMS_FILE if path.is_dir() else path.with_name(yoco.PARAMS_FILE)).is_file()


FORMATS = {
    "megayoco": Format(
        canonical.is_ours,
        "config.json of an export, or checkpoints/global_step*/",
        canonical.read,
        canonical.check_writable,
        canonical.write,
    ),
    "hf": Format(
        _has_model_type(hf.MODEL_TYPE),
        f"config.json with model_type {hf.MODEL_TYPE}",
        hf.read,
        hf.check_writable,
        hf.write,
    ),
    "yoco": Format(
        _is_official,
        f"{yoco.PARAMS_FILE} beside {yoco.WEIGHTS_FILE}",
        yoco.read,
        yoco.check_writable,
        yoco.write,
    ),
    "llama": Format(
        _has_model_type(llama.MODEL_TYPE),
        f"config.json with model_type {llama.MODEL_TYPE}",
        llama.read,
        llama.check_writable,
        llama.write,
    ),
    "longllama": Format(
        _has_model_type(longllama.MODEL_TYPE),
        f"config.json with model_type {longllama.MODEL_TYPE}",
        longllama.read,
        longllama.check_writable,
        longllama.write,
    ),
    "easylm": Format(
        easylm.recognises,
        f"a file {easylm.WEIGHTS_FILE}* beside {easylm.CONFIG_FILE}",
        easylm.read,
        easylm.check_writable,
        easylm.write,
    ),
    "fla": Format(
        _has_model_type(fla.MODEL_TYPE),
        f"config.json with model_type {fla.MODEL_TYPE}",
        fla.read,
        fla.check_writable,
        fla.write,
    ),
}


def recognise(path: Path) -> str | None:
    """Name of the format that a path holds, None if it is none of ours."""
    return next((name for name, kind in FORMATS.items() if kind.recognises(path)), None)


def read_weights(path: Path, format: str | None = None, tokenizer: Tokenizer | None = None) -> Weights:
    """What a path holds; no tensor is read yet.

    Args:
        path: a folder, or a file of the format `yoco`.
        format: one of `FORMATS`; None recognises it.
        tokenizer: in place of the one that comes with the weights.

    Raises:
        UserError: nothing there, unknown, incomplete, damaged, or its parts do not fit.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a folder with a model.")
    name = format or recognise(path)
    if name is None:
        looked_for = "; ".join(f"{kind.looks_for} ({name})" for name, kind in FORMATS.items())
        raise UserError(f"{path} holds no model of a format that we know. Looked for: {looked_for}.")
    return FORMATS[name].read(path, tokenizer)


def write_weights(
    directory: Path,
    format: str,
    weights: Weights,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a model in a format; the folder appears complete or not at all.

    Args:
        directory: the folder to make.
        format: one of `FORMATS`.
        weights: read tensor by tensor as they are written.
        dtype: what to round them to; None keeps each tensor's own.
        shard_bytes: the most data in one file, where the format has shards.
        overwrite: replace a folder that holds nothing but what we write.

    Raises:
        UserError: the format cannot express the model, `directory` holds something else or cannot be written.
    """
    FORMATS[format].check_writable(weights.model)
    check_destination(directory, overwrite)
    if dtype is not None:
        weights = weights._replace(tensors=Cast(weights.tensors, dtype))
    FORMATS[format].write(directory, weights, shard_bytes)
