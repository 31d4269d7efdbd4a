"""The export: a model's weights as one folder, whole tensors under canonical names, for generation and conversion.

    DIRECTORY/model*.safetensors  every parameter once, in the dtype it was trained in; a tied head is absent
    DIRECTORY/config.json         format, version, model (every field of ModelConfig), facts (step, tokens seen, ...)
    DIRECTORY/tokenizer/          what Tokenizer.from_dir reads, and tokenizer.json for transformers if there can be one

The folder does not depend on the parallel layout of the run, holds no pickle, and can be moved. Version 1 had always a
tokenizer and one file of weights; version 2 may lack the first and have several of the second.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megayoco.config import ModelConfig, model_config_from_dict, model_config_to_dict
from megayoco.convert.folder import strangers, whole_folder
from megayoco.convert.names import HEAD, check_tensors
from megayoco.convert.names import tensor_shapes as tensor_shapes
from megayoco.convert.stored import open_weights
from megayoco.convert.weights import Cast, LazyTensors, Weights
from megayoco.convert.writing import INDEX_FILE, SHARD_BYTES, SINGLE_FILE, write_safetensors
from megayoco.data.files import read_json_object, write_text_atomically
from megayoco.data.tokenizer import Tokenizer
from megayoco.data.tokenizer.export import write_for_transformers
from megayoco.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = "megayoco"
VERSION = 2
CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"
_ENTRIES = (SINGLE_FILE, "model-*-of-*.safetensors", INDEX_FILE, CONFIG_FILE, TOKENIZER_FOLDER)


def write_export(
    directory: str | os.PathLike[str],
    model: ModelConfig,
    tensors: Mapping[str, Tensor] | LazyTensors,
    tokenizer: Tokenizer | None,
    *,
    facts: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write an export; it appears complete or not at all, and replaces an older export of ours.

    Args:
        directory: the folder to write; its parents are made.
        model: the shape of the weights; `rope_theta` is the base they were trained with last.
        tensors: full tensors by canonical name, on any device. Each is asked for once, in the order of
            `tensor_shapes(model)`, and let go before the next. A mapping that makes them on demand tells their dtypes
            by a method `dtype(name)`.
        tokenizer: the one that the model's tokens come from; None only where nobody knows it.
        facts: what else is worth knowing of the weights, JSON-able: step, tokens seen, sequence_length, loss.
        dtype: what floating-point numbers to store; None keeps each tensor's own.
        shard_bytes: the most data in one file.

    Raises:
        ValueError: the tensors are not those of `model`.
        UserError: `directory` holds something else, or cannot be written; values do not fit `dtype`.
    """
    given: LazyTensors = _Given(model, tensors)
    target = Path(directory)
    check_replaceable(target)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "model": model_config_to_dict(model),
        "tokenizer": None if tokenizer is None else TOKENIZER_FOLDER,
        "facts": dict(facts or {}),
    }
    with whole_folder(target, "the export") as folder:
        write_safetensors(folder, given if dtype is None else Cast(given, dtype), shard_bytes=shard_bytes)
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER_FOLDER)
            try:
                write_for_transformers(tokenizer, folder / TOKENIZER_FOLDER)
            except UserError as error:  # its own files are there: nothing of ours needs those of transformers
                logger.warning("%s: the tokenizer has no files for transformers. %s", target, error)
        write_text_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def read_export(directory: str | os.PathLike[str]) -> Weights:
    """What an export holds, its tensors checked by name and shape, none of them read yet.

    Raises:
        UserError: not an export of ours, of a later version, incomplete, damaged, or its parts do not fit.
    """
    folder = Path(directory)
    path = folder / CONFIG_FILE
    config = read_json_object(path, remedy="Give the folder of an export, or a run directory that has one.")
    if config.get("format") != FORMAT:
        raise UserError(f"{path} does not describe an export of MegaYOCO. Give a folder that a training run wrote.")
    if config.get("version") not in (1, VERSION):
        raise UserError(
            f"{path} has version {config.get('version')!r}, this release reads 1 and {VERSION}. Export again."
        )
    if not isinstance(config.get("model"), dict):
        raise UserError(f"{path} has no section `model`. Export again.")
    model = model_config_from_dict(config["model"], f"{path}, model")
    has_tokenizer = config["version"] == 1 or config.get("tokenizer") is not None
    tokenizer = Tokenizer.from_dir(folder / TOKENIZER_FOLDER) if has_tokenizer else None
    check_tokenizer(folder, tokenizer, model)
    weights_file, tensors = open_weights(folder)
    check_tensors(weights_file, tensors, tensor_shapes(model), CONFIG_FILE)
    facts = config.get("facts")
    return Weights(model, tensors, tokenizer, facts if isinstance(facts, dict) else {})


def is_export(directory: Path) -> bool:
    """Whether a folder has the config of an export, complete or not."""
    try:
        config = json.loads((directory / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def check_replaceable(target: Path) -> None:
    """Raises UserError unless `target` is absent, an empty folder, or an export with nothing else in it."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file, where the export's folder should go. Move it away, or choose another.")
    found = sorted(path.name for path in target.iterdir())
    if found and not is_export(target):
        raise UserError(f"{target} is not empty and not an export of ours. Move it away, or choose another folder.")
    if strange := strangers(found, _ENTRIES):
        raise UserError(f"{target} holds an export and {strange[0]}, which replacing it would delete. Move that away.")


def check_tokenizer(folder: Path, tokenizer: Tokenizer | None, model: ModelConfig) -> None:
    """Raises UserError if the tokenizer gives ids that the model's embedding has no row for."""
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model's vocabulary {model.vocab_size:,}. "
            "They belong to two models: copy the whole folder again, or name the right tokenizer."
        )


class _Given(Mapping[str, Tensor]):
    """The caller's tensors under the names, and with the shapes, that the model asks for."""

    def __init__(self, model: ModelConfig, tensors: Mapping[str, Tensor] | LazyTensors) -> None:
        self._tensors, self._shapes = tensors, tensor_shapes(model)
        names = {name for name in tensors if not (model.tie_embeddings and name == HEAD)}
        if wrong := sorted(names ^ self._shapes.keys()):
            what = "is missing" if wrong[0] in self._shapes else "is none of the model's"
            raise ValueError(f"the tensors do not fit the model, first {wrong[0]}: it {what}")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape by the model's config; the writer compares the tensor with it."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as told; a tensor that is held tells itself."""
        told = getattr(self._tensors, "dtype", None)
        return self._tensors[name].dtype if told is None else told(name)  # type: ignore[no-any-return]
