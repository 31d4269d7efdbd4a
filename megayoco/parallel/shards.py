"""A parameter that knows its slice of the whole: gathering, cutting and counting then need no table of rules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """Where the tensor of one rank lies in the full one.

    `full` is the full shape; `dim` the axis that is cut (None: every tensor rank holds the whole); `start`, `stop` this
    rank's range along it. `counted` is False on all but one of the tensor ranks that hold the same values, so that
    norms and parameter counts see each number once.
    """

    full: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    stop: int = 0
    counted: bool = True

    def cut(self, tensor: Tensor) -> Tensor:
        """This rank's part of the full `tensor`."""
        return tensor if self.dim is None else tensor.narrow(self.dim, self.start, self.stop - self.start)

    @property
    def local(self) -> tuple[int, ...]:
        """Shape of this rank's part."""
        if self.dim is None:
            return self.full
        return (*self.full[: self.dim], self.stop - self.start, *self.full[self.dim + 1 :])


def mark(parameter: nn.Parameter, name: str, shard: Shard) -> None:
    """Attaches the canonical name and the shard to a parameter, and tells DeepSpeed's gradient norm whether it counts.

    DeepSpeed adds a parameter to the norm on every rank where `tensor_model_parallel` is set, and otherwise on what it
    takes for model rank 0 (with a pipeline that is the first stage only). So the flag is set exactly where we count.
    """
    if tuple(parameter.shape) != shard.local:
        raise ValueError(f"{name}: shape {tuple(parameter.shape)} is not the shard {shard.local} of {shard.full}")
    parameter.canonical_name = name  # type: ignore[attr-defined]
    parameter.shard = shard  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = shard.counted  # type: ignore[attr-defined]


def shard_of(parameter: nn.Parameter) -> Shard:
    """The shard of a parameter of ours."""
    return parameter.shard  # type: ignore[attr-defined, no-any-return]


def name_of(parameter: nn.Parameter) -> str:
    """The canonical name of a parameter of ours; it does not depend on the parallel layout."""
    return parameter.canonical_name  # type: ignore[attr-defined, no-any-return]


def whole(full: tuple[int, ...], rank: int) -> Shard:
    """A tensor that every tensor rank holds; the first counts it."""
    return Shard(full, counted=rank == 0)


def row_shard(rows: int, columns: int, rank: int, ranks: int) -> Shard:
    """Rows of a (rows, columns) matrix cut evenly."""
    size = rows // ranks
    return Shard((rows, columns), 0, rank * size, (rank + 1) * size)


def column_shard(rows: int, columns: int, rank: int, ranks: int) -> Shard:
    """Columns of a (rows, columns) matrix cut evenly."""
    size = columns // ranks
    return Shard((rows, columns), 1, rank * size, (rank + 1) * size)


def fill(parameter: nn.Parameter, full: Tensor) -> None:
    """Copies this rank's part of a full tensor into the parameter."""
    with torch.no_grad():
        parameter.copy_(shard_of(parameter).cut(full))
