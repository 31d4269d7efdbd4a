"""Collectives that autograd sees. Each pairs a forward with the backward that makes sharded equal unsharded.

The reductions work on copies: autograd may hand the same gradient tensor to several consumers, and megatron-core's own
`_reduce` loses the result when its input is not contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.group), None


def sum_gradient(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Identity forward, sum of the gradients over `group` backward.

    In front of column-parallel layers (the input is replicated, each rank's columns contribute a part of its gradient),
    and around weights that several ranks hold in common. `group` None or of one rank: the tensor itself.
    """
    if group is None or group.size() == 1:
        return tensor
    return _SumGradient.apply(tensor, group)


def gather_last_dim(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(..., n) on every rank -> (..., n * ranks), in rank order. Without gradient: for logits at inference."""
    if group is None or group.size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, -1)
