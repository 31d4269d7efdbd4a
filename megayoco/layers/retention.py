"""Gated retention, the recurrent self-decoder mixer of YOCO.

Shapes: B batch, T tokens of the chunk, D model dim, H heads (h of one tensor rank), K head dim.
Left context: RetentionState, state (B, h, K, K) in fp32 and the sum of log-decays (B, h).
Output path: weightless RMSNorm per head, `silu(g) * o`, output projection. No bias, no clamp.
Source: YOCO, arXiv 2405.05254, section 2.2 "gated retention", equations 5-8; constants of the official code: decay
        sigmoid(.) ** (1/16), the scale K ** -0.5 on the keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megayoco.layers.context import Positions, Rotary
from megayoco.layers.linear import Builder, ColumnLinear, Init, RowLinear
from megayoco.ops.norm import rms_norm
from megayoco.ops.retention import RetentionState, gated_retention, retention_state
from megayoco.parallel.collectives import sum_gradient

GATE_TEMPERATURE = 16
"""tau: the decay is sigmoid(gate) ** (1/tau)."""


class GatedRetention(nn.Module):
    """(x, positions, left) -> (y, right) with right = the state after the chunk.

    On a sequence axis: left is the state before the band and right the one after it, the same on all its ranks.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        norm_eps: float,
        rotary: Rotary,
        name: str,
        init_in: Init,
        init_gate: Init,
        init_out: Init,
        builder: Builder,
    ) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.local_heads = heads // builder.ranks
        self.norm_eps = norm_eps
        self.rotary = rotary
        self.group = builder.group
        self.sequence = builder.sequence
        self.q_proj = ColumnLinear(dim, dim, f"{name}.q_proj", init_in, builder)
        self.k_proj = ColumnLinear(dim, dim, f"{name}.k_proj", init_in, builder)
        self.v_proj = ColumnLinear(dim, dim, f"{name}.v_proj", init_in, builder)
        self.g_proj = ColumnLinear(dim, dim, f"{name}.g_proj", init_in, builder)
        self.gt_proj = ColumnLinear(dim, heads, f"{name}.gt_proj", init_gate, builder)
        self.out_proj = RowLinear(dim, dim, f"{name}.out_proj", init_out, builder)

    def empty_context(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> RetentionState:
        """The context of a sequence's first chunk; fp32 whatever the activations' dtype (float64 stays)."""
        wide = torch.promote_types(dtype, torch.float32)
        return RetentionState(
            torch.zeros(batch_size, self.local_heads, self.head_dim, self.head_dim, dtype=wide, device=device),
            torch.zeros(batch_size, self.local_heads, dtype=wide, device=device),
        )

    def forward(self, x: Tensor, positions: Positions, left: RetentionState) -> tuple[Tensor, RetentionState]:
        x = sum_gradient(x, self.group)
        q_BThK = self.rotary(self.q_proj(x), positions)
        k_BThK = self.rotary(self.k_proj(x), positions)
        v_BThK = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        # the gate leaves the matrix product in x's dtype; the decay must not (a bf16 decay near 1 never fades)
        gate_BTh = self.gt_proj(x).to(left.state.dtype)
        log_decay_BTh = F.logsigmoid(gate_BTh) / GATE_TEMPERATURE
        k_BThK, first_token = k_BThK * self.head_dim**-0.5, positions.first_in_chunk()
        if self.sequence is not None:
            # first what this rank's chunk adds to the state; a correction of y afterwards would round it twice
            local = retention_state(k_BThK, v_BThK, log_decay_BTh, first_token=first_token)
            left, carry = self.sequence.prefix(left, local)
        y_BThK, right = gated_retention(q_BThK, k_BThK, v_BThK, log_decay_BTh, left, first_token=first_token)
        if self.sequence is not None:
            right = carry
        y_BThK = rms_norm(y_BThK, None, self.norm_eps)
        return self.out_proj(F.silu(self.g_proj(x)) * y_BThK.flatten(2)), right
