"""Room for keys and values: in the memory of a device, or in files that are mapped into memory.

Shapes: B batch, g key-value heads of this tensor rank, C capacity in tokens, K head dim.
Source: the narrow storage is symmetric, with one fp32 scale per token and head, as KIVI (arXiv 2402.02750) does for
        values.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megayoco.errors import UserError

STORAGES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Narrow dtypes of a cache, by the names that users give."""

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Place:
    """Where keys and values lie."""

    device: torch.device
    directory: Path | None = None
    """A folder for files that are mapped into the memory of the CPU, and may be larger than it. A file has no name any
    more once it is mapped, so nothing is left behind however the process ends. None: no files."""


@dataclass(eq=False)
class Buffer:
    """Room for (B, g, C, K): a head's tokens are neighbours, which decoding reads twice as fast."""

    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    """(B, g, C, 1) fp32 for narrow storage."""
    value_scale: Tensor | None = None
    filled: int = 0
    """Tokens written; only a cache that ends here may append in place."""
    indexes: dict[Hashable, Any] = field(default_factory=dict)
    """What a search has made of the keys; tokens that were written never change."""

    @staticmethod
    def allocate(shape: tuple[int, int, int, int], storage: torch.dtype, place: Place) -> Buffer:
        """No token yet.

        Args:
            shape: (B, g, C, K).
            storage: dtype to keep keys and values in.
            place: where.

        Raises:
            UserError: the folder of `place` cannot be written, or its disk has no room.
        """
        narrow = storage in _LARGEST
        key, value = (_room(shape, storage, place) for _ in range(2))
        key_scale, value_scale = (_room((*shape[:3], 1), torch.float32, place) if narrow else None for _ in range(2))
        return Buffer(key, value, key_scale, value_scale)

    @property
    def capacity(self) -> int:
        """C."""
        return self.key.shape[2]

    def tensors(self) -> list[Tensor]:
        """All tensors: keys, values, and the scales of both where the storage is narrow."""
        return [x for x in (self.key, self.value, self.key_scale, self.value_scale) if x is not None]

    def write(self, start: int, key: Tensor, value: Tensor) -> None:
        """The tokens from number `start` on, both (B, T, g, K), rounded to what they are stored in."""
        end = start + key.shape[1]
        for target, scale, x in ((self.key, self.key_scale, key), (self.value, self.value_scale, value)):
            x = x.transpose(1, 2)
            if scale is not None:
                largest = _LARGEST[target.dtype]
                unit = x.float().abs().amax(-1, keepdim=True).clamp_(min=1e-12) / largest
                scale[:, :, start:end] = unit
                x = (x.float() / unit).clamp_(-largest, largest)
                x = x.round_() if target.dtype == torch.int8 else x
            target[:, :, start:end] = x.to(target.dtype)
        self.filled = end

    def copy(self, end: int, capacity: int, place: Place, start: int = 0) -> Buffer:
        """The tokens number start .. end - 1 in a buffer of their own."""
        B, g, _, K = self.key.shape
        made = Buffer.allocate((B, g, capacity, K), self.key.dtype, place)
        for target, source in zip(made.tensors(), self.tensors(), strict=True):
            target[:, :, : end - start] = source[:, :, start:end]
        made.filled = end - start
        return made

    def keys(self, start: int, end: int, dtype: torch.dtype, batch: slice = slice(None)) -> Tensor:
        """(B', g, end - start, K) in `dtype` if the storage is narrow, else a view."""
        return _widened(self.key[batch], self.key_scale, start, end, dtype, batch)

    def values(self, start: int, end: int, dtype: torch.dtype, batch: slice = slice(None)) -> Tensor:
        """The same of the values."""
        return _widened(self.value[batch], self.value_scale, start, end, dtype, batch)

    def gather(self, numbers: Tensor, batch: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (B', g, n, K), widened to `dtype` if the storage is narrow, of the tokens (B', g, n) int64
        of some rows; on the buffer's device, where `numbers` are."""
        B, g, C, _ = self.key.shape
        rows = torch.arange(B, device=numbers.device)[batch, None] * g + torch.arange(g, device=numbers.device)
        flat = (rows[..., None] * C + numbers).flatten()

        def take(x: Tensor, scale: Tensor | None) -> Tensor:
            if scale is None:
                return x.view(-1, x.shape[3]).index_select(0, flat).view(*numbers.shape, -1)
            # torch selects no fp8
            taken = x.view(torch.uint8).view(-1, x.shape[3]).index_select(0, flat).view(x.dtype)
            wide = taken.float() * scale.view(-1, 1).index_select(0, flat)
            return wide.to(dtype).view(*numbers.shape, -1)

        return take(self.key, self.key_scale), take(self.value, self.value_scale)


def _widened(x: Tensor, scale: Tensor | None, start: int, end: int, dtype: torch.dtype, batch: slice) -> Tensor:
    x = x[:, :, start:end]
    return x if scale is None else (x.float() * scale[batch, :, start:end]).to(dtype)


def _room(shape: tuple[int, ...], dtype: torch.dtype, place: Place) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if place.directory is None or size == 0:
        return torch.empty(shape, dtype=dtype, device=place.device)
    try:
        with tempfile.NamedTemporaryFile(dir=place.directory, prefix="memory-") as file:
            # a hole in the file would kill the process when the disk is full, not raise
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8).view(dtype).view(shape)
    except OSError as error:
        raise UserError(
            f"a memory of {size:,} more bytes cannot be kept in {place.directory}: {error.strerror}. Make room, or"
            " choose another folder."
        ) from error
