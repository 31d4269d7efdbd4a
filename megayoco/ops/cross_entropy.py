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

from megayoco.traffic import TRAFFIC

IGNORED = -100
"""Target of a token without loss."""

# Logits of one chunk in fp32. On CPU fewer tokens than fit are kinder to the cache; far fewer would add to the
# gradient of the weight too often.
CHUNK_BYTES_CPU = 64 * 2**20
CHUNK_TOKENS_CPU = 512
CHUNK_BYTES = 1024 * 2**20


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    rank_offset: int = 0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the cross entropy of softmax(x weight^T), without keeping the logits.

    Args:
        x: (M, D), the same on every rank of the group.
        weight: (V, D), the same dtype: this rank's rows of the output matrix, as many on every rank.
        targets: (M,) int64, the same on every rank: entries of the whole vocabulary, -100 for tokens without loss.
        weights: (M,) floating-point factors of the tokens' losses, the same on every rank, without gradient; None: 1.
        group: ranks that share the vocabulary; None: this rank has all of it.
        rank_offset: vocabulary entry of this rank's first row.
        chunk_tokens: tokens whose logits exist at a time; None: at most 512 tokens and 64 MiB of fp32 logits on CPU.

    Returns:
        loss_sum, 0-d fp32 (float64 for float64 inputs), and count, 0-d int64, of the tokens with loss; both the same on
        every rank. Divide by the count of the whole batch (or what its weights add up to): a mean taken here would
        weigh ranks unevenly.

    Raises:
        ValueError: shapes or dtypes do not fit, or a target lies outside the vocabulary (on CUDA the latter is a
            device-side assertion, since looking would stop the queue).
        RuntimeError: backward is called twice; the gradients are made in forward, and scaled in place.

    Logits are rounded to x's dtype; the softmax, and the gradient of weight until it is scaled, are fp32 or wider. The
    gradient of x is summed over the group inside, once, so x needs no all-reducing copy in front.
    """
    _check_shapes(x, weight, targets)
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"expected a weight for each of {targets.shape[0]} targets, got {tuple(weights.shape)}")
    size = 1 if group is None else dist.get_world_size(group)
    if not 0 <= rank_offset <= (size - 1) * weight.shape[0]:
        raise ValueError(f"rank_offset {rank_offset} does not fit {size} ranks with {weight.shape[0]} rows each")
    _check_targets(targets, size * weight.shape[0])
    if chunk_tokens is None:
        chunk_tokens = _default_chunk_tokens(x.device, weight.shape[0])
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    differentiate = torch.is_grad_enabled()
    wanted = (differentiate and x.requires_grad, differentiate and weight.requires_grad)
    group = group if size > 1 else None
    loss = _LinearCrossEntropy.apply(x, weight, targets, weights, group, rank_offset, chunk_tokens, wanted)
    return loss, (targets != IGNORED).sum()


def linear_cross_entropy_naive(
    x: Tensor, weight: Tensor, targets: Tensor, *, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same with all logits at once: the reference."""
    logits = x @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return (losses if weights is None else losses * weights).sum(), (targets != IGNORED).sum()


def row_weights(targets: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Factors with which the sum of losses is a sum of the means of rows of `length` tokens.

    Args:
        targets: (B, T) int64 of whole rows, -100 for tokens without loss.
        length: tokens of a row; T is a multiple of it.

    Returns:
        (B, T): 1 / the number of targets of the token's row. A row without any counts with a loss of 0, as in the
        released code of Focused Transformer.
    """
    counts = (targets.unflatten(1, (-1, length)) != IGNORED).sum(-1, keepdim=True).clamp(min=1)
    return (1 / counts.to(dtype)).expand(-1, -1, length).flatten(1)


@torch.no_grad()
def linear_token_losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    rank_offset: int = 0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The cross entropy of each token by itself, for evaluation: no gradient, and no logits of more than a chunk.

    Args:
        x, weight, targets, group, rank_offset, chunk_tokens: as `linear_cross_entropy`; no target is -100.

    Returns:
        (M,) -log softmax(x weight^T)[target], fp32 (float64 for float64 inputs), and (M,) bool, whether the target is
        the entry of the largest logit (among equal ones the first). Both the same on every rank.

    Raises:
        ValueError: shapes or dtypes do not fit, or a target lies outside the vocabulary.
    """
    _check_shapes(x, weight, targets)
    group = None if group is None or group.size() == 1 else group
    _check_targets(targets, (1 if group is None else group.size()) * weight.shape[0])
    if bool((targets == IGNORED).any()):
        raise ValueError("every token needs a target here")
    step = _default_chunk_tokens(x.device, weight.shape[0]) if chunk_tokens is None else chunk_tokens
    parts = [
        _token_losses(x[i : i + step], weight, targets[i : i + step], group, rank_offset)
        for i in range(0, x.shape[0], step)
    ]
    if not parts:
        return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32)), targets.new_empty(0).bool()
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _token_losses(
    x: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup | None, rank_offset: int
) -> tuple[Tensor, Tensor]:
    logits = x @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    column = targets - rank_offset
    mine = (column >= 0) & (column < weight.shape[0])
    column = column.clamp(0, weight.shape[0] - 1)[:, None]
    best, first = logits.max(-1)
    maximum = best
    if group is not None:
        maximum = best.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    target = logits.gather(1, column).squeeze(1).masked_fill_(~mine, 0)
    first = (first + rank_offset).masked_fill_(best < maximum, torch.iinfo(torch.int64).max)
    total = logits.sub_(maximum[:, None]).exp_().sum(-1)
    if group is not None:
        sums = torch.stack([total, target])
        dist.all_reduce(sums, group=group)
        total, target = sums
        dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    return total.log() + maximum - target, first == targets


def _default_chunk_tokens(device: torch.device, vocabulary: int) -> int:
    row_bytes = 4 * max(1, vocabulary)
    if device.type == "cpu":
        return max(1, min(CHUNK_BYTES_CPU // row_bytes, CHUNK_TOKENS_CPU))
    return max(1, CHUNK_BYTES // row_bytes)


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
    """(x, weight, targets, weights, group, rank_offset, chunk_tokens, wanted) -> loss_sum; gradients are made in
    forward.

    All ranks of the group see the same targets, hence the same chunks and the same number of collectives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        group: dist.ProcessGroup | None,
        rank_offset: int,
        chunk_tokens: int,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        accumulator = torch.promote_types(x.dtype, torch.float32)
        # Leaving out the rows without loss needs their number, which on CUDA would stop the queue; there they weigh 0.
        rows = None
        if x.device.type == "cpu" and bool((targets == IGNORED).any()):
            rows = (targets != IGNORED).nonzero().squeeze(1)
            x_kept, targets = x[rows], targets[rows]
            weights = None if weights is None else weights[rows]
        else:
            x_kept = x
        dx = torch.empty_like(x_kept, memory_format=torch.contiguous_format) if wanted[0] else None
        dweight = torch.zeros_like(weight, dtype=accumulator) if wanted[1] else None
        loss = torch.zeros((), dtype=accumulator, device=x.device)
        weights = None if weights is None else weights.to(accumulator)
        for start in range(0, x_kept.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            dx_part = None if dx is None else dx[part]
            factors = None if weights is None else weights[part]
            loss_part, dweight = _chunk(
                x_kept[part], weight, targets[part], factors, group, rank_offset, dx_part, dweight
            )
            loss += loss_part
        if dx is not None and group is not None:
            TRAFFIC.all_reduce("tensor/gradient", dx, group.size())
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
        return dx, dweight, None, None, None, None, None, None


def _chunk(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: Tensor | None,
    group: dist.ProcessGroup | None,
    rank_offset: int,
    dx: Tensor | None,
    dweight: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Loss of one chunk, and dweight (V, D) with its part added, perhaps in place; dx (tokens, D) is written."""
    logits = x @ weight.t()
    low = None if logits.dtype == torch.promote_types(logits.dtype, torch.float32) else logits
    if low is not None:
        logits = low.float()
    has_loss = targets != IGNORED
    column = targets - rank_offset
    mine = (column >= 0) & (column < weight.shape[0])
    column = column.clamp(0, weight.shape[0] - 1)[:, None]
    maximum = logits.amax(-1)
    if group is not None:
        TRAFFIC.all_reduce("tensor/loss", maximum, group.size())
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    target = logits.gather(1, column).squeeze(1).masked_fill_(~mine, 0)
    logits.sub_(maximum[:, None]).exp_()
    sums = torch.stack([logits.sum(-1), target])
    if group is not None:
        TRAFFIC.all_reduce("tensor/loss", sums, group.size())
        dist.all_reduce(sums, group=group)
    total, target = sums
    losses = (total.log() + maximum - target).masked_fill(~has_loss, 0)
    factors = has_loss.to(losses.dtype) if factors is None else factors * has_loss
    loss = (losses * factors).sum()
    if dx is None and dweight is None:
        return loss, None

    # (softmax - onehot) = dlogits * scale. The scale goes to the thin factors: one pass less over (chunk x V).
    scale = (factors / total)[:, None]
    dlogits = logits.scatter_add_(1, column, -(total * mine)[:, None])
    if low is not None:
        torch.mul(dlogits, scale, out=low)
    if dx is not None:
        if low is None:
            torch.mm(dlogits, weight, out=dx).mul_(scale)
        else:
            torch.mm(low, weight, out=dx)
    if dweight is not None:
        if low is not None and low.device.type == "cuda":
            # tensor cores with fp32 sums and an fp32 result; cuBLAS has no such in-place form
            dweight = torch.addmm(dweight, low.t(), x, out_dtype=dweight.dtype)
        else:
            dweight.addmm_(dlogits.t(), x.to(dlogits.dtype) * scale)
    return loss, dweight
