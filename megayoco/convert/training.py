"""The tensors of a training checkpoint by canonical name, whatever layout wrote it, at whatever layout they are wanted.

DeepSpeed's files hold flat buffers whose cut depends on the ranks of every axis and on the ZeRO stage. `layout.json`
says of every parameter in which file, where in the pickled structure, and from which element on its pieces lie; a piece
is a run of elements of one tensor rank's shard. So any part of any parameter can be put together from the pieces that
overlap it, and only those are read: the files are mapped, not loaded.

    {"optimizer_step": 20, "files": [NAME, ...],
     "sources": [{"weight": PLACE, "exp_avg": PLACE, "exp_avg_sq": PLACE}, ...],   PLACE: number of a file, keys in it
     "parameters": {NAME: {"shape": [...], "pieces": [[source, offset, dim, start, stop, begin, length], ...]}}}

A piece: `length` elements from `offset` on in the flattened tensor of the source are those from `begin` on in the
flattened shard that covers start..stop along dim (-1: the whole parameter).

Files are opened by torch's restricted unpickler: nothing in them can run code.
"""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megayoco.config import model_config_from_dict
from megayoco.convert.checkpoints import (
    LATEST,
    LAYOUT,
    NOTE,
    Checkpoint,
    find_latest,
    open_checkpoint,
    saved_steps,
    verify,
)
from megayoco.convert.weights import Weights
from megayoco.data.files import read_json_object
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError
from megayoco.parallel.shards import Shard

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""The fp32 master weight and the running means of the gradient and of its square."""


class _Piece(NamedTuple):
    source: int
    offset: int
    begin: int
    length: int


class _Rectangle(NamedTuple):
    """A shard as rows and columns of the parameter seen as a matrix; a vector is one column."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def width(self) -> int:
        return self.right - self.left


class TrainingState:
    """Weights and moments of a checkpoint, read where they are asked for.

    Args:
        folder: the checkpoint's.
        unverified: the checkpoint, where its files have not been compared with their checksums yet: each then is when
            it is opened.

    Attributes:
        shapes: full shape of every parameter by canonical name.
        optimizer_step: updates since the optimizer started afresh; None where it made none yet.

    Raises:
        UserError: layout.json is missing or not what `save` writes.
    """

    def __init__(self, folder: Path, unverified: Checkpoint | None = None) -> None:
        self.folder = folder
        self._unverified = unverified
        if unverified is not None:
            verify(unverified, [LAYOUT])
        path = folder / LAYOUT
        layout = read_json_object(path, f"Without it {folder} cannot be read: use another checkpoint.")
        try:
            self.optimizer_step: int | None = layout["optimizer_step"]
            self._files: list[str] = layout["files"]
            self._sources: list[dict[str, list[Any]]] = layout["sources"]
            self.shapes = {name: tuple(entry["shape"]) for name, entry in layout["parameters"].items()}
            self._pieces: dict[str, dict[_Rectangle, list[_Piece]]] = {}
            for name, entry in layout["parameters"].items():
                shards: dict[_Rectangle, list[_Piece]] = defaultdict(list)
                for source, offset, dim, start, stop, begin, length in entry["pieces"]:
                    shard = Shard(self.shapes[name], None if dim < 0 else dim, start, stop)
                    shards[_rectangle(shard)].append(_Piece(source, offset, begin, length))
                self._pieces[name] = dict(shards)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error!r}). Use another checkpoint.") from error
        self._open: dict[int, Any] = {}

    def read(self, name: str, kind: str, shard: Shard, begin: int = 0, length: int | None = None) -> Tensor:
        """Elements `begin` .. `begin + length` (default: all) of the flattened shard, (length,) fp32 on the CPU.

        Args:
            name: canonical name of a parameter.
            kind: one of `KINDS`.
            shard: the part of the parameter, of the layout that asks.

        Raises:
            UserError: the checkpoint lacks the parameter, has another shape of it, or does not hold all of the part.
        """
        if self.shapes.get(name) != shard.full:
            raise UserError(f"{self.folder}: {name} has shape {self.shapes.get(name)}, the model wants {shard.full}.")
        target = _rectangle(shard)
        if length is None:
            length = (target.bottom - target.top) * target.width
        # whole rows around what is asked for, absolute
        top, bottom = target.top + begin // target.width, target.top - (-(begin + length) // target.width)
        rows = torch.empty(bottom - top, target.width)
        filled = 0
        for source, pieces in self._pieces[name].items():
            upper, lower = max(top, source.top), min(bottom, source.bottom)
            left, right = max(target.left, source.left), min(target.right, source.right)
            if upper >= lower or left >= right:
                continue
            part = self._run(
                name, kind, pieces, (upper - source.top) * source.width, (lower - source.top) * source.width
            )
            block = part.view(lower - upper, source.width)[:, left - source.left : right - source.left]
            rows[upper - top : lower - top, left - target.left : right - target.left] = block
            filled += block.numel()
        if filled != rows.numel():
            raise UserError(f"{self.folder} holds {filled:,} of {rows.numel():,} elements of a part of {name}.")
        first = begin - (top - target.top) * target.width
        return rows.flatten()[first : first + length]

    def _run(self, name: str, kind: str, pieces: list[_Piece], begin: int, end: int) -> Tensor:
        """Elements begin..end of a shard of the checkpoint's own layout."""
        run, covered = torch.empty(end - begin), 0
        for piece in pieces:
            low, high = max(begin, piece.begin), min(end, piece.begin + piece.length)
            if low >= high:
                continue
            values = self._tensor(piece.source, kind).flatten()
            offset = piece.offset + low - piece.begin
            if offset + high - low > values.numel():
                raise UserError(f"{self.folder / LAYOUT} points beyond the end of a tensor for {name}.")
            run[low - begin : high - begin] = values[offset : offset + high - low]
            covered += high - low
        if covered != end - begin:
            raise UserError(f"{self.folder} holds {covered:,} of {end - begin:,} elements of a shard of {name}.")
        return run

    def _tensor(self, source: int, kind: str) -> Tensor:
        try:
            file, *keys = self._sources[source][kind]
            path = self.folder / self._files[file]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder / LAYOUT} does not say where {kind} lies ({error!r}).") from error
        if file not in self._open:
            if self._unverified is not None:
                verify(self._unverified, [path.name])
            self._open[file] = load_deepspeed_file(path)
        value = self._open[file]
        try:
            for key in keys:
                value = value[key]
            if not isinstance(value, Tensor):
                raise TypeError(f"a {type(value).__name__} where a tensor should be")
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{path} has no {kind} where {LAYOUT} says ({error!r}).") from error
        return value


def load_deepspeed_file(path: Path) -> Any:
    """A file of DeepSpeed's, mapped, on the CPU; only the classes that DeepSpeed puts there are made.

    Raises:
        UserError: the file is damaged, or asks for anything else.
    """
    # by import, not by name: these classes hold numbers, and unpickling them runs nothing
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # the rest is torch's advice to load it all the same
        reason = named[1] if named else type(error).__name__
        raise UserError(f"{path} holds objects that a checkpoint of ours does not have: {reason}") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


class _MasterWeights(Mapping[str, Tensor]):
    """Full fp32 weights by canonical name."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        shape = self._state.shapes[name]
        return self._state.read(name, "weight", Shard(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state.shapes)

    def __len__(self) -> int:
        return len(self._state.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a parameter."""
        return self._state.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Master weights are fp32."""
        return torch.float32


def is_training_checkpoint(path: Path) -> bool:
    """Whether `path` is a run directory with checkpoints, its folder of checkpoints, or one checkpoint."""
    return (path / NOTE).is_file() or bool(saved_steps(path)) or bool(saved_steps(path / "checkpoints"))


def read_training_checkpoint(path: Path) -> Weights:
    """The fp32 master weights of a run directory's newest checkpoint, of a folder of checkpoints', or of one. Each file
    is compared with its checksum when it is opened.

    The tokenizer is that of the run directory; None where the checkpoint lies elsewhere.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    checkpoint = _find(path)
    note = checkpoint.note
    if not isinstance(note.get("model"), dict):
        raise UserError(f"{checkpoint.folder / NOTE} has no section `model`.")
    model = model_config_from_dict(note["model"], f"{checkpoint.folder / NOTE}, model")
    saved_tokenizer = checkpoint.folder.parent.parent / "tokenizer"
    tokenizer = Tokenizer.from_dir(saved_tokenizer) if saved_tokenizer.is_dir() else None
    return Weights(
        model, _MasterWeights(TrainingState(checkpoint.folder, checkpoint)), tokenizer, dict(note.get("facts", {}))
    )


def _find(path: Path) -> Checkpoint:
    if (path / NOTE).is_file():
        return open_checkpoint(path)
    for directory in (path, path / "checkpoints"):
        if (directory / LATEST).is_file() or saved_steps(directory):
            found = find_latest(directory)
            if found is not None:
                return found
    raise UserError(f"{path} is neither a checkpoint nor a run directory with checkpoints.")


def _rectangle(shard: Shard) -> _Rectangle:
    rows, columns = shard.full if len(shard.full) == 2 else (shard.full[0], 1)
    if shard.dim is None:
        return _Rectangle(0, rows, 0, columns)
    if shard.dim == 0:
        return _Rectangle(shard.start, shard.stop, 0, columns)
    return _Rectangle(0, rows, shard.start, shard.stop)
