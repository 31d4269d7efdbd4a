"""Keys and values of some tokens: what attention remembers of everything before a chunk.

Shapes: B batch, S tokens remembered, g key-value heads of this tensor rank, K head dim, W window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyValues(NamedTuple):
    """Keys (rotated, but for memory attention) and values (B, S, g, K) of the tokens so far; of the last W-1 where a
    window bounds them.

    A monoid: `combine` puts the right operand's tokens after the left one's (a window then keeps the `last` W-1);
    S = 0 is the empty element.
    """

    key: Tensor
    value: Tensor

    @staticmethod
    def empty(batch_size: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> KeyValues:
        """No token remembered."""
        shape = (batch_size, 0, heads, head_dim)
        return KeyValues(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))

    def combine(self, right: KeyValues) -> KeyValues:
        """These tokens, then `right`'s."""
        if self.key.shape[1] == 0:
            return right
        return self.followed_by(right)

    def followed_by(self, right: KeyValues) -> KeyValues:
        """`combine` whose result hangs on both operands even where this one is empty: an operand that a collective
        made must receive its gradient, of no token, or the other ranks wait for its backward."""
        return KeyValues(torch.cat([self.key, right.key], 1), torch.cat([self.value, right.value], 1))

    def first(self, count: int) -> KeyValues:
        """The first `count` tokens, a view."""
        return KeyValues(self.key[:, :count], self.value[:, :count])

    def last(self, count: int) -> KeyValues:
        """The last `count` tokens, or all where there are fewer. A copy where a view would keep more than twice as many
        tokens alive: contexts are kept for long."""
        tokens = self.key.shape[1]
        first = max(tokens - count, 0)
        kept = KeyValues(self.key[:, first:], self.value[:, first:])
        if tokens - first > first:
            return kept
        return KeyValues(kept.key.clone(), kept.value.clone())
