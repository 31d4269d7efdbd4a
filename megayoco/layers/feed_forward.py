"""SwiGLU feed-forward: down(silu(gate x) * (up x)).

Shapes: B batch, T tokens, D model dim, F feed-forward dim (f of one tensor rank).
The official YOCO code calls these fc1 (here gate), gate (here up) and fc2 (here down): SiLU is applied to its fc1.
Source: Shazeer, arXiv 2002.05202; names of LLaMA.
"""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megayoco.layers.linear import Builder, ColumnLinear, Init, RowLinear
from megayoco.parallel.collectives import sum_gradient


class FeedForward(nn.Module):
    """(B, T, D) -> (B, T, D)."""

    group: dist.ProcessGroup | None

    def __init__(self, dim: int, hidden_dim: int, name: str, init_in: Init, init_out: Init, builder: Builder) -> None:
        super().__init__()
        self.group = builder.group
        self.gate_proj = ColumnLinear(dim, hidden_dim, f"{name}.gate_proj", init_in, builder)
        self.up_proj = ColumnLinear(dim, hidden_dim, f"{name}.up_proj", init_in, builder)
        self.down_proj = RowLinear(hidden_dim, dim, f"{name}.down_proj", init_out, builder)

    def forward(self, x: Tensor) -> Tensor:
        x = sum_gradient(x, self.group)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
