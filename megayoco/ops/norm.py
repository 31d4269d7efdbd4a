"""Root-mean-square norm over the last dimension, statistics in fp32.

On CUDA torch's fused kernel normalises; it gets no weight, because it would multiply before the cast. On CPU its
backward is composed of a dozen passes, so there the closed form below runs, which also saves only x and one number
per row.
Source: RMSNorm, arXiv 1910.07467; the order of cast and weight is that of LLaMA and YOCO.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), cast back to x's dtype, then times weight.

    Args:
        x: (..., D) of any floating dtype; statistics are fp32 (float64 for float64 x).
        weight: (D,) or None for a norm without weight.
        eps: added to the mean square.

    Returns:
        x's shape, in x's dtype, or the wider of x's and weight's.

    Raises:
        ValueError: weight does not have x's last dimension.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"the weight of a norm over {x.shape[-1]} channels has shape {tuple(weight.shape)}")
    if x.device.type == "cpu":
        if not torch.is_grad_enabled():  # autograd's bookkeeping costs half as much again for one row
            return _normalise(x, weight, eps)[0]
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]
    y: Tensor = F.rms_norm(x, x.shape[-1:], None, eps)
    return y if weight is None else y * weight


def rms_norm_naive(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The same, written as the formula."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
    return y if weight is None else y * weight


def _normalise(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and 1 / rms (..., 1) in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = (wide * r).to(x.dtype)
    if weight is None:
        return y, r
    return y.mul_(weight) if torch.promote_types(y.dtype, weight.dtype) == y.dtype else y * weight, r


class _RMSNorm(torch.autograd.Function):
    """With n = x r, r = 1 / rms and g = dy weight: dx = r (g - n mean(g n)) and dweight = sum of dy n over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y, r = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        channels = x.shape[-1]
        # few temporaries: on CPU a fresh tensor costs as much as the arithmetic that fills it
        dy = dy.to(r.dtype)
        n = x * r
        product, dweight = dy * n, None
        if weight is None:
            mean = product.mean(-1, keepdim=True)
            g = dy
        else:
            rows = product.reshape(-1, channels)
            dweight = rows.sum(0).to(weight.dtype)
            mean = torch.mv(rows, weight.to(r.dtype)).div_(channels).view(r.shape)
            g = torch.mul(dy, weight, out=product)
        dx = torch.addcmul(g, n, mean, value=-1, out=product).mul_(r)
        return dx.to(x.dtype), dweight, None
