"""What a mixer is told about its chunk and remembers of everything before it.

Every mixer is `forward(x, positions, left) -> (y, right)`. Contexts are plain tuples of tensors, passed as arguments
through every call, checkpoint and stage: never kept on a module.

Shapes: B batch, T tokens of the chunk, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megayoco.ops.key_values import KeyValues as KeyValues  # the context of attention
from megayoco.ops.rotary import apply_rotary, rotary_frequencies, rotary_table
from megayoco.ops.windows import WindowRule

Made = TypeVar("Made")


class Positions:
    """Where the tokens of a chunk stand: their global indices and, in packed data, where their documents began.

    Args:
        index: (T,) or (B, T) int64, ascending along T.
        start: (B, T) int64, global index of the first token of each token's document. None: no borders, everything to
            the left is visible.
        consecutive: whether the indices follow one another without gaps, which every mixer but cross attention needs.
        windows: where the windows of memory attention begin. None: as in training.
    """

    def __init__(
        self,
        index: Tensor,
        start: Tensor | None = None,
        consecutive: bool = True,
        windows: WindowRule | None = None,
    ) -> None:
        if start is not None and start.shape[-1] != index.shape[-1]:
            raise ValueError(f"document starts {tuple(start.shape)} do not match positions {tuple(index.shape)}")
        self.index = index
        self.start = start
        self.consecutive = consecutive
        self.windows = windows
        self._made: dict[Any, Any] = {}

    @staticmethod
    def of_chunk(offset: int, length: int, device: torch.device, start: Tensor | None = None) -> Positions:
        """`length` tokens from global index `offset`."""
        return Positions(torch.arange(offset, offset + length, device=device), start)

    def rotary(self, head_dim: int, theta: float, layout: str) -> tuple[Tensor, Tensor]:
        """cos and sin, each index.shape + (K/2,) in fp32, for one rotary base and layout."""

        def make() -> tuple[Tensor, Tensor]:
            return rotary_table(self.index, rotary_frequencies(head_dim, theta, layout).to(self.index.device))

        return self.once((head_dim, theta, layout), make)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What follows from the positions alone, made for the first layer that asks and kept for the others."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[no-any-return]

    def first_visible(self, remembered: int) -> Tensor | None:
        """(B, T) int64 >= 0: number of the earliest key of each token's document, counted from the first of the
        `remembered` keys that precede the chunk. None without document borders."""
        if self.start is None:
            return None
        return (self.start - self.index[..., :1] + remembered).clamp(min=0)

    def first_in_chunk(self) -> Tensor | None:
        """(B, T) int64: number within the chunk of the first token of each token's document; negative where the
        document began before the chunk. None without document borders."""
        return None if self.start is None else self.start - self.index[..., :1]

    def last(self, count: int) -> Positions:
        """The last `count` tokens."""
        start = None if self.start is None else self.start[:, -count:]
        return Positions(self.index[..., -count:], start)

    def rows(self, rows: slice | Tensor) -> Positions:
        """A stretch of the tokens, or those at the numbers (B, R) int64 within the chunk."""
        if isinstance(rows, slice):
            return Positions(self.index[..., rows], None if self.start is None else self.start[:, rows])
        index = self.index.expand(rows.shape[0], -1).gather(1, rows)
        return Positions(index, None if self.start is None else self.start.gather(1, rows), consecutive=False)


@dataclass
class Rotary:
    """Rotary embedding of one layer's queries and keys. `theta` may change between the phases of a run."""

    head_dim: int
    theta: float
    layout: str
    """`interleaved` (official YOCO) or `half_split` (LLaMA); it also decides the frequencies."""

    def __call__(self, x: Tensor, positions: Positions) -> Tensor:
        """(B, T, h K) as a projection gives it -> (B, T, h, K), rotated by the tokens' global positions."""
        cos, sin = positions.rotary(self.head_dim, self.theta, self.layout)
        return apply_rotary(x.unflatten(-1, (-1, self.head_dim)), cos, sin, self.layout)
