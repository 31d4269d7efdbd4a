"""Root-mean-square norm over the last dimension, statistics in fp32.

Source: RMSNorm, arXiv 1910.07467; the order of cast and weight is that of LLaMA and YOCO.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), cast back to x's dtype, then times weight.

    Args:
        x: (..., D) of any floating dtype; statistics are fp32 (float64 for float64 x).
        weight: (D,) or None for a norm without weight.
        eps: added to the mean square.

    Returns:
        x's shape, in the dtype of x * weight.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight is None else y * weight


def rms_norm_naive(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The same, written as the formula."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
    return y if weight is None else y * weight
