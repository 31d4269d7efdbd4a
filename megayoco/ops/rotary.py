"""Rotary position embedding: pairs of channels turned by position times frequency.

Shapes: B batch, T tokens, H heads, K head dim (even), pairs K/2. Angles, cos and sin are fp32
        (of float64 positions: float64).
Layouts: "interleaved" turns channels (2j, 2j+1), frequencies theta ** -linspace(0, 1, K/2), as YOCO does;
         "half_split" turns channels (j, j + K/2), frequencies theta ** -(2j/K), as LLaMA in Hugging Face layout does.
Source: YOCO, arXiv 2405.05254, and its released code; RoFormer, arXiv 2104.09864.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LAYOUTS = ("interleaved", "half_split")


def rotary_frequencies(head_dim: int, theta: float, layout: str) -> Tensor:
    """(K/2,) fp32 radians per position. Raises ValueError for an odd head_dim, theta <= 0 or an unknown layout."""
    _check_layout(layout)
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rotary pairs the channels of a head: head_dim must be even, got {head_dim}")
    if theta <= 0:
        raise ValueError(f"rope theta must be positive, got {theta}")
    pairs = head_dim // 2
    if layout == "interleaved":
        exponent = torch.linspace(0, 1, pairs, dtype=torch.float64)
    else:
        exponent = torch.arange(pairs, dtype=torch.float64) / pairs
    return (theta**-exponent).float()


def rotary_table(index: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), each index.shape + (K/2,), of the angles index * frequencies.

    index counts tokens from the start of the sequence. Of an integer dtype: the product is formed in fp32, which is
    what the tables are, too. float64: both are float64, so that the difference of two angles depends on nothing else.
    """
    wide = torch.float64 if index.dtype == torch.float64 else torch.float32
    angle = index.to(wide)[..., None] * frequencies.to(device=index.device, dtype=wide)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Turn every pair of channels of x (B, T, H, K) by its angle; cos and sin are (T, K/2) or (B, T, K/2).

    Returns x's dtype; the arithmetic is fp32 (float64 for float64 x). Differentiable in x only.
    Raises ValueError for tables that do not fit x.
    """
    _check_layout(layout)
    B, T, _, K = x.shape
    if cos.shape != sin.shape or cos.shape not in ((T, K // 2), (1, T, K // 2), (B, T, K // 2)):
        raise ValueError(
            f"x (B, T, H, K) {tuple(x.shape)} needs cos and sin of (T, K/2) or (B, T, K/2),"
            f" got {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    if layout == "half_split":
        if not torch.is_grad_enabled():
            return _turn_halves(x, cos, sin)
        return _HalfSplitRotary.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]
    # neighbours are a complex number: one pass, while channels of stride 2 are ten times slower on CPU
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turn = torch.complex(cos, sin).unsqueeze(-2).to(wide.dtype.to_complex())
    turned = torch.view_as_complex(wide.reshape(B, T, -1, K // 2, 2).contiguous()) * turn
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def apply_rotary_naive(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """The same, as the formula is written."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = (wide[..., 0::2], wide[..., 1::2]) if layout == "interleaved" else wide.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    y = (a * cos - b * sin, a * sin + b * cos)
    return (torch.stack(y, -1).flatten(-2) if layout == "interleaved" else torch.cat(y, -1)).to(x.dtype)


class _HalfSplitRotary(torch.autograd.Function):
    """Turns in place of one output, without the temporaries of the formula; the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn_halves(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn_halves(dy, cos, -sin), None, None


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos.unsqueeze(-2).to(wide.dtype), sin.unsqueeze(-2).to(wide.dtype)
    y = torch.empty_like(wide, memory_format=torch.contiguous_format)
    (a, b), (ya, yb) = wide.chunk(2, -1), y.chunk(2, -1)
    torch.mul(a, cos, out=ya).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=yb).addcmul_(a, sin)
    return y.to(x.dtype)


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown rotary layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
