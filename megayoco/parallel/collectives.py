"""Collectives that autograd sees. Each pairs a forward with the backward that makes sharded equal unsharded.

The reductions work on copies: autograd may hand the same gradient tensor to several consumers, and megatron-core's own
`_reduce` loses the result when its input is not contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megayoco.traffic import TRAFFIC


def _sum(tensor: Tensor, group: dist.ProcessGroup, kind: str) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    TRAFFIC.all_reduce(kind, total, group.size())
    dist.all_reduce(total, group=group)
    return total


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup, kind: str) -> Tensor:
        ctx.group, ctx.kind = group, kind
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _sum(gradient, ctx.group, ctx.kind), None, None


def sum_gradient(tensor: Tensor, group: dist.ProcessGroup | None, kind: str = "tensor/gradient") -> Tensor:
    """Identity forward, sum of the gradients over `group` backward.

    In front of column-parallel layers (the input is replicated, each rank's columns contribute a part of its gradient),
    and around weights that several ranks hold in common. `group` None or of one rank: the tensor itself.
    `kind`: what the bytes are counted under.
    """
    if group is None or group.size() == 1:
        return tensor
    return _SumGradient.apply(tensor, group, kind)


def gather_last_dim(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(..., n) on every rank -> (..., n * ranks), in rank order. Without gradient: for logits at inference."""
    if group is None or group.size() == 1:
        return tensor
    TRAFFIC.all_gather("tensor/logits", tensor, group.size())
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, -1)
