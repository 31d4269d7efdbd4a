"""Output projection and cross entropy in one: logits exist for a few tokens at a time, never for all of them.

Shapes: M tokens, D model dim, V vocabulary rows of this tensor rank.
Each chunk of tokens makes its logits, its loss and both its gradients, and forgets the logits: 2048 tokens against
100k vocabulary entries would otherwise hold 0.8 GB in fp32, and as much again for their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Target of a token without loss."""

# fp32 logits of one chunk
CHUNK_BYTES_CPU = 64 * 2**20
CHUNK_BYTES = 1024 * 2**20


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    rank_offset: int = 0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the cross entropy of softmax(x weight^T), without keeping the logits.

    Args:
        x: (M, D), the same on every rank of the group.
        weight: (V, D), the same dtype: this rank's rows of the output matrix, as many on every rank.
        targets: (M,) int64 vocabulary entries of the whole vocabulary, -100 for tokens without loss; the same everywhere.
        group: ranks that share the vocabulary; None: this rank has all of it.
        rank_offset: vocabulary entry of this rank's first row.
        chunk_tokens: tokens whose logits exist at a time; None: about 64 MiB of fp32 logits on CPU.

    Returns:
        loss_sum, 0-d fp32 (float64 for float64 inputs), and count, 0-d int64, of the tokens with loss; both the same on
        every rank. Divide by the count of the whole batch: a mean taken here would weigh ranks unevenly.

    Raises:
        ValueError: shapes or dtypes do not fit, or a target lies outside the vocabulary (on CUDA the latter is a
            device-side assertion, since looking would stop the queue).
        RuntimeError: backward is called twice; the gradients are made in forward, and scaled in place.

    Logits are rounded to x's dtype, softmax and the sum over chunks of weight's gradient are fp32 or wider. x's gradient is
    summed over the group inside, once, so x needs no all-reducing copy in front.
    """
    _check_shapes(x, weight, targets)
    size = 1 if group is None else dist.get_world_size(group)
    if not 0 <= rank_offset <= (size - 1) * weight.shape[0]:
        raise ValueError(f"rank_offset {rank_offset} does not fit {size} ranks with {weight.shape[0]} rows each")
    _check_targets(targets, size * weight.shape[0])
    if chunk_tokens is None:
        budget = CHUNK_BYTES_CPU if x.device.type == "cpu" else CHUNK_BYTES
        chunk_tokens = max(1, budget // (4 * max(1, weight.shape[0])))
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    differentiate = torch.is_grad_enabled()
    wanted = (differentiate and x.requires_grad, differentiate and weight.requires_grad)
    group = group if size > 1 else None
    loss = _LinearCrossEntropy.apply(x, weight, targets, group, rank_offset, chunk_tokens, wanted)
    return loss, (targets != IGNORED).sum()


def linear_cross_entropy_naive(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same with all logits at once: the reference."""
    logits = x @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return loss, (targets != IGNORED).sum()


def _check_shapes(x: Tensor, weight: Tensor, targets: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, targets))
        raise ValueError(f"expected x (M, D), weight (V, D), targets (M,), got {shapes}")
    if x.dtype != weight.dtype or targets.dtype != torch.int64:
        raise ValueError(
            f"expected x and weight of one dtype, int64 targets: {x.dtype}, {weight.dtype}, {targets.dtype}"
        )


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    wrong = ((targets < 0) & (targets != IGNORED)) | (targets >= vocabulary)
    if targets.device.type == "cpu":
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"target {int(targets[row])} of token {row} is not in the vocabulary (0..{vocabulary - 1})"
            )
    elif targets.device.type == "cuda":
        torch._assert_async(~wrong.any(), f"a target is not in the vocabulary (0..{vocabulary - 1})")


class _LinearCrossEntropy(torch.autograd.Function):
    """(x, weight, targets, group, rank_offset, chunk_tokens, wanted) -> loss_sum; gradients are made in forward.

    The gradient of the logits is softmax - onehot. The onehot part is a row of weight (for x) and a row of x (for weight):
    it is added there, so the (chunk x V) matrix is written by nothing but the exponential.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup | None,
        rank_offset: int,
        chunk_tokens: int,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        accumulator = torch.promote_types(x.dtype, torch.float32)
        # Finding the rows with loss needs their number, which on CUDA would stop the queue: there they are weighed with 0.
        rows = None
        if x.device.type == "cpu" and bool((targets == IGNORED).any()):
            rows = (targets != IGNORED).nonzero().squeeze(1)
            x_kept, targets = x[rows], targets[rows]
        else:
            x_kept = x
        dx = torch.empty_like(x_kept, memory_format=torch.contiguous_format) if wanted[0] else None
        dweight = torch.zeros_like(weight, dtype=accumulator) if wanted[1] else None
        loss = torch.zeros((), dtype=accumulator, device=x.device)
        for start in range(0, x_kept.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            loss += _chunk(
                x_kept[part], weight, targets[part], group, rank_offset, None if dx is None else dx[part], dweight
            )
        if dx is not None and group is not None:
            dist.all_reduce(dx, group=group)
        if dx is not None and rows is not None:
            dx = torch.zeros_like(x, memory_format=torch.contiguous_format).index_copy_(0, rows, dx)
        # Attributes, not saved tensors: they are neither inputs nor outputs, and backward scales them in place.
        ctx.gradients, ctx.weight_dtype = (dx, dweight), weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy can be differentiated only once per forward")
        (dx, dweight), ctx.gradients = ctx.gradients, None
        if dx is not None:
            dx.mul_(dloss)
        if dweight is not None:
            dweight = dweight.mul_(dloss).to(ctx.weight_dtype)
        return dx, dweight, None, None, None, None, None


def _chunk(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None,
    rank_offset: int,
    dx: Tensor | None,
    dweight: Tensor | None,
) -> Tensor:
    """Loss of one chunk; writes dx (tokens, D) and adds to dweight (V, D)."""
    logits = x @ weight.t()
    low = logits if logits.dtype != torch.promote_types(logits.dtype, torch.float32) else None
    if low is not None:
        logits = logits.float()
    weighs = targets != IGNORED
    column = targets - rank_offset
    mine = (column >= 0) & (column < weight.shape[0])
    column = column.clamp(0, weight.shape[0] - 1)
    maximum = logits.amax(-1)
    if group is not None:
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    target = logits.gather(1, column[:, None]).squeeze(1).masked_fill_(~mine, 0)
    logits.sub_(maximum[:, None]).exp_()
    sums = torch.stack([logits.sum(-1), target])
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, target = sums
    losses = total.log() + maximum - target
    if dx is not None or dweight is not None:
        scale = weighs / total
        if low is not None:
            torch.mul(logits, scale[:, None], out=low)
            probabilities = low
        else:
            probabilities = logits.mul_(scale[:, None])
        own = mine[:, None].to(x.dtype)
        if dx is not None:
            torch.mm(probabilities, weight, out=dx)
            dx.sub_(weight[column] * own)
        if dweight is not None:
            x_wide = x.to(dweight.dtype)
            dweight.addmm_(probabilities.t().to(dweight.dtype), x_wide)
            dweight.index_add_(0, column, x_wide * own, alpha=-1)
    return losses.masked_fill(~weighs, 0).sum()
