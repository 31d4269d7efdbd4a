"""Softmax self-attention: over a sliding window (YOCO's self-decoder) or over everything (LLaMA).

Shapes: B batch, T tokens of the chunk, S tokens remembered, D model dim, H query heads, G key-value heads, K head dim,
        W window (the query itself included); h and g count the heads of one tensor rank.
Left context: KeyValues, both (B, S, g, K), keys rotated: the last W-1 tokens with a window, else all, which inference
        keeps in a KeyValueCache.
Source: YOCO, arXiv 2405.05254, section 2.2 "sliding-window attention"; LLaMA, arXiv 2302.13971.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megayoco.layers.context import KeyValues, Positions, Rotary
from megayoco.layers.linear import Builder, ColumnLinear, Init, KeyValueLinear, RowLinear
from megayoco.ops.attention import causal_attention
from megayoco.ops.key_value_cache import KeyValueCache, attention_over_cache
from megayoco.parallel.collectives import sum_gradient


class SelfAttention(nn.Module):
    """(x, positions, left) -> (y, right) with right = left followed by the chunk's own keys and values.

    On a sequence axis: left is what this rank carries over from the bands before (with a window its own tokens of them,
    else all ranks'), right the same after this band.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        window: int | None,
        rotary: Rotary,
        name: str,
        init: Init,
        builder: Builder,
    ) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.local_kv_heads = max(kv_heads // builder.ranks, 1)
        self.window = window
        self.rotary = rotary
        self.group = builder.group
        self.sequence = builder.sequence
        self.q_proj = ColumnLinear(dim, dim, f"{name}.q_proj", init, builder)
        self.k_proj = KeyValueLinear(dim, kv_heads, self.head_dim, f"{name}.k_proj", init, builder)
        self.v_proj = KeyValueLinear(dim, kv_heads, self.head_dim, f"{name}.v_proj", init, builder)
        self.out_proj = RowLinear(dim, dim, f"{name}.out_proj", init, builder)

    def empty_context(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> KeyValues:
        """The context of a sequence's first chunk."""
        return KeyValues.empty(batch_size, self.local_kv_heads, self.head_dim, dtype, device)

    def forward(
        self, x: Tensor, positions: Positions, left: KeyValues | KeyValueCache
    ) -> tuple[Tensor, KeyValues | KeyValueCache]:
        x = sum_gradient(x, self.group)
        q_BThK = self.rotary(self.q_proj(x), positions)
        k_BTgK = self.rotary(self.k_proj(x), positions)
        v_BTgK = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        own, scale = KeyValues(k_BTgK, v_BTgK), self.head_dim**-0.5
        right: KeyValues | KeyValueCache
        if isinstance(left, KeyValueCache):
            right = left.combine(own)
            first_key = positions.first_visible(left.tokens)
            y_BThK = attention_over_cache(q_BThK, right, scale=scale, first_key=first_key)
        else:
            seen, right = self._seen(left, own)
            first_key = positions.first_visible(seen.key.shape[1] - x.shape[1])
            y_BThK = causal_attention(
                q_BThK, seen.key, seen.value, scale=scale, window=self.window, first_key=first_key
            )
        return self.out_proj(y_BThK.flatten(2)), right

    def _seen(self, left: KeyValues, own: KeyValues) -> tuple[KeyValues, KeyValues]:
        """What the chunk attends to, its own keys and values last, and the right context."""
        axis, T = self.sequence, own.key.shape[1]
        if axis is None:
            seen = left.combine(own)
            return seen, seen if self.window is None else seen.last(self.window - 1)
        if self.window is not None:
            before, carry = axis.halo(left, own, self.window - 1)
            return before.followed_by(own), carry
        right = left.combine(axis.gather(own))
        return right.first(left.key.shape[1] + (axis.rank + 1) * T), right
