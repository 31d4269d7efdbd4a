"""Safetensors files that tell when they are damaged: a CRC-32 of each tensor and of the header, and mapped reading.

The checksums are the last tensor: that of metadata, names, shapes and dtypes first, then those of the tensors in the
order of their names.
"""

from __future__ import annotations

import json
import mmap
import warnings
import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megayoco.convert.writing import DTYPES, Entry, write_file
from megayoco.errors import UserError

_CHECKSUMS = "checksums"
_PIECE = 1 << 24
"""Bytes that are summed at a time."""
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def tensor_entry(tensor: Tensor) -> Entry:
    """A tensor of any device, to be written in one piece."""
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: [raw_bytes(tensor)])


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in C order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def write_checked(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """One file, piece by piece. Raises OSError where writing fails."""
    header = _sum_of_header({name: (entry.shape, entry.dtype) for name, entry in entries.items()}, metadata)
    sums: dict[str, int] = {}

    def summed(name: str) -> Iterable[memoryview]:
        sums[name] = 0
        for piece in entries[name].pieces():
            sums[name] = zlib.crc32(piece, sums[name])
            yield piece

    def checksums() -> list[memoryview]:
        return [raw_bytes(torch.tensor([header, *(sums[name] for name in sorted(sums))]))]

    checked = {name: entry._replace(pieces=partial(summed, name)) for name, entry in entries.items()}
    # of the narrowest dtype, or another tensor would not be aligned
    last = Entry((8 * (len(entries) + 1),), torch.uint8, checksums)
    write_file(path, {**checked, _CHECKSUMS: last}, metadata)


def _sum_of_header(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]) -> int:
    told = [dict(metadata), {name: [list(shape), str(dtype)] for name, (shape, dtype) in tensors.items()}]
    return zlib.crc32(json.dumps(told, sort_keys=True).encode())


class CheckedFile:
    """The tensors of a file by name, mapped into memory, not read. Raises UserError for a file that is damaged, as far
    as its header and its size tell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:  # it checks the header against the size of the file
                metadata = file.metadata() or {}
            with path.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                self._header = {name: x for name, x in json.loads(raw.read(length)).items() if name != "__metadata__"}
                self._data = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        except SafetensorError as error:
            raise self._damaged(str(error)) from error
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}.") from error
        self._begin, self.metadata = 8 + length, metadata
        self._check_header()

    def names(self) -> list[str]:
        """All tensors but the checksums."""
        return [name for name in self._header if name != _CHECKSUMS]

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def __getitem__(self, name: str) -> Tensor:
        """A view of the mapped file, which must not be written to."""
        entry = self._header[name]
        first, end = entry["data_offsets"]
        dtype = _BY_NAME[entry["dtype"]]
        if first == end:
            return torch.empty(entry["shape"], dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            raw = torch.frombuffer(self._data, dtype=torch.uint8, count=end - first, offset=self._begin + first)
        return raw.view(dtype).view(entry["shape"])

    def check(self) -> None:
        """Raises UserError unless every tensor is what was written."""
        sums = dict(zip(sorted(self.names()), self._sums()[1:], strict=True))
        for name in self.names():
            first, end = self._header[name]["data_offsets"]
            value, whole = 0, memoryview(self._data)
            for start in range(first, end, _PIECE):
                piece = whole[self._begin + start : self._begin + min(start + _PIECE, end)]
                value = zlib.crc32(piece, value)
            if value != sums[name]:
                raise self._damaged(f"{name} is not what was written")

    def _check_header(self) -> None:
        if _CHECKSUMS not in self._header or any(x["dtype"] not in _BY_NAME for x in self._header.values()):
            raise self._damaged("its header is not what was written")
        sums = self._sums()
        tensors = {
            name: (tuple(self._header[name]["shape"]), _BY_NAME[self._header[name]["dtype"]]) for name in self.names()
        }
        if len(sums) != len(tensors) + 1 or sums[0] != _sum_of_header(tensors, self.metadata):
            raise self._damaged("its header is not what was written")

    def _sums(self) -> list[int]:
        raw = self[_CHECKSUMS]
        return [] if raw.numel() % 8 else raw.clone().view(torch.int64).tolist()

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self.path} is damaged or no file of ours ({why}). Copy it again, or save it again.")
