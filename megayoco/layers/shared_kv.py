"""The shared-KV layer: makes, once, the keys and values that every layer of the cross-decoder reads.

Shapes: B batch, T tokens of the chunk, S tokens so far (the chunk's included), D model dim, G key-value heads (g of one
        tensor rank), K head dim of the cross-decoder.
Left context: KeyValues of everything before the chunk, both (B, S - T, g, K), keys rotated; a KeyValueCache of them in
        inference.
Source: YOCO, arXiv 2405.05254, equation 2. Its own RMSNorm and two projections; the residual stream passes untouched.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megayoco.layers.context import KeyValues, Positions, Rotary
from megayoco.layers.linear import Builder, Init, KeyValueLinear, RMSNorm
from megayoco.ops.key_value_cache import KeyValueCache
from megayoco.parallel.collectives import sum_gradient


class SharedKeyValues(nn.Module):
    """(x, positions, left) -> (x, right): right is left followed by the chunk's keys and values."""

    def __init__(
        self,
        dim: int,
        kv_heads: int,
        head_dim: int,
        norm_eps: float,
        rotary: Rotary,
        name: str,
        init: Init,
        builder: Builder,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.local_kv_heads = max(kv_heads // builder.ranks, 1)
        self.rotary = rotary
        self.group = builder.group
        self.norm = RMSNorm(dim, norm_eps, f"{name}.norm", builder)
        self.k_proj = KeyValueLinear(dim, kv_heads, head_dim, f"{name}.k_proj", init, builder)
        self.v_proj = KeyValueLinear(dim, kv_heads, head_dim, f"{name}.v_proj", init, builder)

    def empty_context(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> KeyValues:
        """The context of a sequence's first chunk."""
        return KeyValues.empty(batch_size, self.local_kv_heads, self.head_dim, dtype, device)

    def forward(
        self, x: Tensor, positions: Positions, left: KeyValues | KeyValueCache
    ) -> tuple[Tensor, KeyValues | KeyValueCache]:
        h = sum_gradient(self.norm(x), self.group)
        k_BTgK = self.rotary(self.k_proj(h), positions)
        v_BTgK = self.v_proj(h).unflatten(-1, (-1, self.head_dim))
        return x, left.combine(KeyValues(k_BTgK, v_BTgK))
