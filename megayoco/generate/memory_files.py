"""Everything that a model remembers of a text, in a file: read once, continued as often as wanted.

A file is safetensors. Its tensors are those of the context's layers (`layers.3.key`, ...), the tokens, and a CRC-32 of
each tensor and of all that is said about them. Its metadata says which model and which rank it belongs to. Several
ranks write one file each: NAME.rank-0-of-4, ... A file is written under a temporary name and renamed, and is never
changed: keys and values that were loaded are read where they lie in the mapped file, new tokens lie elsewhere.

Shapes: B batch, S tokens so far, g key-value heads of this tensor rank, K head dim.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megayoco.config import ModelConfig
from megayoco.convert.folder import check_room
from megayoco.convert.writing import Entry
from megayoco.errors import UserError
from megayoco.generate.checked_file import CheckedFile, raw_bytes, tensor_entry, write_checked
from megayoco.generate.finding import saved_files
from megayoco.model.inference import DecoderContext, InferenceModel
from megayoco.ops.key_value_cache import KeyValueCache
from megayoco.ops.key_value_storage import STORAGES, Buffer
from megayoco.parallel.agreement import all_ranks_agree
from megayoco.parallel.shards import name_of

_FORMAT, _VERSION = "megayoco-memory", 1
_PIECE = 1 << 24
"""Numbers that are brought to the CPU and written at a time."""
_SAMPLE = 256
"""Numbers of each parameter that tell one model from another."""
_CACHE_TENSORS = ("key", "value", "key_scale", "value_scale")


class SavedMemory(NamedTuple):
    """What a file holds."""

    context: DecoderContext
    tokens: tuple[int, ...]
    """The tokens of the context, for a repetition penalty; empty if they were not saved."""


def check_target(path: str | os.PathLike[str], model: InferenceModel) -> None:
    """Raises UserError, on every rank, if the memory could not be written to `path`: for before the text is read."""
    with all_ranks_agree():
        _check_target(_file_of(Path(path), model))


def save_memory(
    path: str | os.PathLike[str], context: DecoderContext, model: InferenceModel, tokens: Sequence[int] = ()
) -> None:
    """Write a context. Every rank of the model makes the same call, each with its own part of the context.

    Args:
        path: the file; of several ranks, the beginning of their files' names.
        context: of this model.
        model: what made it.
        tokens: those of the context, if it has one row.

    Raises:
        UserError: something is there, the folder is not, or the disk has no room; the same on all ranks.
        ValueError: several copies of the model run, or the context holds what a file cannot.
    """
    target = _file_of(Path(path), model)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    entries, told = _entries(context, tokens)
    about = {**_about(model), "set": model.agree(uuid.uuid4().hex), "context": told}
    metadata = {"format": _FORMAT, "version": str(_VERSION), "about": json.dumps(about, sort_keys=True)}
    try:
        with all_ranks_agree():
            _check_target(target)
            size = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries.values())
            check_room(target.parent, size, f"the memory {target}")
            try:
                write_checked(temporary, entries, metadata)
            except OSError as error:
                raise UserError(f"cannot write {target}: {error.strerror}. Choose another place.") from error
        with all_ranks_agree():
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load_memory(path: str | os.PathLike[str], model: InferenceModel, *, mapped: bool = True) -> SavedMemory:
    """Read a context, for this model on the same layout. Every rank of the model makes the same call.

    Every byte is read once, to compare it with the checksums.

    Args:
        path: what it was saved to.
        model: the same weights, in the same dtype, with the same storage of keys and values.
        mapped: leave keys and values in the file, which may be larger than the memory, where they are kept on the CPU;
            else they are copied to where new ones go.

    Raises:
        UserError: there is no such file, it is damaged, or belongs to another model or layout; the same on all ranks.
        ValueError: several copies of the model run.
    """
    file = _file_of(Path(path), model)
    with all_ranks_agree():
        _check_layout(Path(path), file, model)
        stored = CheckedFile(file)
        about = _read_about(stored)
        _compare(file, about, _about(model))
    lead = model.agree(about["set"])
    with all_ranks_agree():
        if lead != about["set"]:
            raise UserError(f"{file} was not saved together with the other ranks' files. Save all of them again.")
        stored.check()
        return _context(stored, about["context"], model, mapped)


# Names


def _file_of(path: Path, model: InferenceModel) -> Path:
    if model.replicas > 1:
        raise ValueError("a memory is saved and loaded by one copy of the model: here are several")
    at = model.topology
    ranks = 1 if at is None else at.tensor * at.pipeline
    if at is None or ranks == 1:
        return path
    return path.with_name(f"{path.name}.rank-{at.pipeline_rank * at.tensor + at.tensor_rank}-of-{ranks}")


def _check_target(file: Path) -> None:
    if file.exists():
        raise UserError(f"{file} exists. Delete it, or give another name to the memory.")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is no folder, so {file.name} cannot be written there. Make it first.")


def _check_layout(path: Path, file: Path, model: InferenceModel) -> None:
    if file.is_file():
        return
    found = saved_files(path)
    if not found:
        raise UserError(f"there is no memory {file}. Make it with --save-memory, or give another.")
    ranks = 1 if found[0] == path else int(found[0].name.rpartition("-")[2])
    here = 1 if model.topology is None else model.topology.tensor * model.topology.pipeline
    raise UserError(
        f"the memory {path} was saved by {ranks} process(es), and {here} run here. Start as many, with the same"
        " --tensor and --pipeline."
        if ranks != here
        else f"{file} is missing beside {found[0].name}. Copy the files of all ranks."
    )


# What a memory belongs to


def _about(model: InferenceModel) -> dict[str, Any]:
    at = model.topology
    return {
        "model": _config(model.config),
        "weights": _weights(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "storage": next((name for name, dtype in STORAGES.items() if dtype == model.storage), "model"),
        "windows": _windows(model),
        "layout": [0, 1, 0, 1] if at is None else [at.tensor_rank, at.tensor, at.pipeline_rank, at.pipeline],
    }


def _config(config: ModelConfig) -> dict[str, Any]:
    """The shape of a model; where it was taken from does not matter."""
    fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in fields.items() if name not in ("preset", "init_from")}


def _windows(model: InferenceModel) -> str | None:
    """The flags that say which tokens a context of memory layers holds; None: there are no memory layers."""
    if model.config.memory_window is None:
        return None
    given = {"--memory-eviction": model.config.memory_window, **model.windows.given()}
    if "--last-context" in given:
        del given["--memory-eviction"]
    return " ".join(f"{flag} {value}" for flag, value in given.items())


def _weights(model: InferenceModel) -> str:
    """A hash of a sample of this rank's weights: cheap, and never the same for two trained models."""
    digest = hashlib.sha256()
    for parameter in model.stage.parameters():
        values = parameter.detach().flatten()
        places = torch.arange(min(_SAMPLE, len(values)), device=values.device) * (len(values) // _SAMPLE or 1)
        digest.update(f"{name_of(parameter)} {tuple(parameter.shape)}".encode())
        digest.update(values[places].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _compare(file: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises UserError for a memory that another model, precision or layout has made."""
    differing: dict[str, Any] = {x: (saved.get(x), here[x]) for x in here if saved.get(x) != here[x]}
    if "layout" in differing:
        (tensor_rank, tensor, stage, stages), (_, tensor_here, _, stages_here) = differing["layout"]
        raise UserError(
            f"{file} was saved by tensor rank {tensor_rank} of {tensor}, stage {stage} of {stages}; here are --tensor"
            f" {tensor_here} --pipeline {stages_here}. Start the layout that it was saved on."
        )
    if "model" in differing:
        first, second = differing["model"]
        names = sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
        told = ", ".join(f"{name} {first.get(name)}, here {second.get(name)}" for name in names[:3])
        raise UserError(f"{file} is the memory of another model ({told}). Give --model that one, or save it again.")
    for name, flag in (("dtype", "--dtype"), ("storage", "--kv-dtype")):
        if name in differing:
            first, second = differing[name]
            raise UserError(
                f"{file} was saved with {flag} {first}, here it is {second}. Give the same, or save it again."
            )
    if "windows" in differing:
        first, second = differing["windows"]
        raise UserError(f"{file} was saved with {first}, here it is {second}. Give the same, or save it again.")
    if "weights" in differing:
        raise UserError(f"{file} is the memory of a model with other weights. Give --model that one, or save it again.")


# Writing


def _entries(context: DecoderContext, tokens: Sequence[int]) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The tensors of a context, and what else is to be known of it."""
    entries: dict[str, Entry] = {"tokens": tensor_entry(torch.tensor(list(tokens), dtype=torch.int64))}
    told: dict[str, Any] = {"rows": 1, "layers": [type(layer).__name__ for layer in context.layers]}
    for name, value in context._asdict().items():
        if isinstance(value, Tensor):
            entries[f"context.{name}"] = tensor_entry(value)
        elif name == "prompts" and context.prompts is not None:
            told["window_begin"] = context.prompts.begin
        elif name not in ("layers", "prompts"):
            told[name] = value
    for number, layer in enumerate(context.layers):
        if isinstance(layer, KeyValueCache):
            told["rows"] = layer.batch_size
            entries |= {f"layers.{number}.{name}": entry for name, entry in _cache_entries(layer)}
        elif isinstance(layer, tuple) and all(isinstance(x, Tensor) for x in layer):
            told["rows"] = layer[0].shape[0]
            entries |= {f"layers.{number}.{place}": tensor_entry(x) for place, x in enumerate(layer)}
        else:
            raise ValueError(f"a context of layer {number} of type {type(layer).__name__} cannot be saved")
    return entries, told


def _cache_entries(cache: KeyValueCache) -> Iterable[tuple[str, Entry]]:
    """The stored numbers of a cache (B, g, S, ...) as they are, in pieces."""
    spans = cache.spans(0, cache.tokens)
    for name in _CACHE_TENSORS:
        parts = [(getattr(buffer, name), begin, end) for buffer, begin, end, _ in spans]
        like = parts[0][0]
        if like is not None:
            shape = (*like.shape[:2], cache.tokens, like.shape[3])
            yield name, Entry(shape, like.dtype, partial(_pieces, parts))


def _pieces(parts: Sequence[tuple[Tensor, int, int]]) -> Iterable[memoryview]:
    """Row by row and head by head, the tokens begin .. end - 1 of each part (B, g, C, ...)."""
    B, g, _, width = parts[0][0].shape
    step = max(_PIECE // width, 1)
    for row, head in itertools.product(range(B), range(g)):
        for tensor, begin, end in parts:
            for start in range(begin, end, step):
                yield raw_bytes(tensor[row, head, start : min(start + step, end)])


# Reading


def _read_about(stored: CheckedFile) -> dict[str, Any]:
    """What `save_memory` has said of itself."""
    if stored.metadata.get("format") != _FORMAT:
        raise UserError(f"{stored.path} holds no memory. Give a file of --save-memory.")
    if stored.metadata.get("version") != str(_VERSION):
        raise UserError(
            f"{stored.path} has version {stored.metadata.get('version')} of the format, this release reads {_VERSION}."
            " Save it again."
        )
    about: dict[str, Any] = json.loads(stored.metadata["about"])
    return about


def _context(stored: CheckedFile, told: dict[str, Any], model: InferenceModel, mapped: bool) -> SavedMemory:
    rows, kinds, begin = told.pop("rows"), told.pop("layers"), told.pop("window_begin", None)
    empty = model.empty_context(rows)
    templates, prompts = empty.layers, empty.prompts
    if prompts is not None:
        prompts = prompts._replace(begin=begin)
    if kinds != [type(template).__name__ for template in templates]:
        raise UserError(f"{stored.path} holds layers of another kind than this release has. Save it again.")
    layers = [_layer(stored, number, template, mapped) for number, template in enumerate(templates)]
    tensors = {
        name.removeprefix("context."): stored[name].to(model.device, copy=True)
        for name in stored.names()
        if name.startswith("context.")
    }
    fields: dict[str, Any] = {**told, **tensors, "layers": tuple(layers), "prompts": prompts}
    return SavedMemory(DecoderContext(**fields), tuple(stored["tokens"].tolist()))


def _layer(stored: CheckedFile, number: int, template: Any, mapped: bool) -> Any:
    """A context like the template, an empty one."""
    if not isinstance(template, KeyValueCache):
        parts = (stored[f"layers.{number}.{place}"] for place in range(len(template)))
        return type(template)(*(x.to(like.device, copy=True) for x, like in zip(parts, template, strict=True)))
    names = {name: f"layers.{number}.{name}" for name in _CACHE_TENSORS}
    tensors: dict[str, Any] = {name: stored[place] for name, place in names.items() if place in stored}
    tokens = tensors["key"].shape[2]
    base = Buffer(**tensors, filled=tokens)
    if not mapped or template.place.device.type != "cpu":
        base = base.copy(tokens, tokens, template.place)
    return template.over(base)
