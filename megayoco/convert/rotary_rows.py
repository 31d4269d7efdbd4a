"""Rows of query and key projections in the two layouts of rotary pairs; exact, there and back."""

from __future__ import annotations

from torch import Tensor


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head, interleaved pairs (0, 1), (2, 3) ... -> first of all pairs, then second of all pairs.

    Args:
        weight: (H K, D), rows as a projection gives them.
        heads: H.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The way back."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
