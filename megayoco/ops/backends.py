"""Which implementation serves an operation, decided from the device, the dtype, installed packages and one variable.

MEGAYOCO_ATTENTION = auto | torch | flash_attn. auto takes the flash-attn package where it is installed, but leaves
causal squares to torch, whose cuDNN kernel is faster on Hopper. Importing this module imports no optional package.
A CUDA kernel serves only after a small forward and backward agreed with fp32 math; a wrong kernel shows no error.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from megayoco.errors import UserError

VARIABLE = "MEGAYOCO_ATTENTION"
CHOICES = ("auto", "torch", "flash_attn")
OPTIONAL_PACKAGES = ("flash_attn", "fla", "liger_kernel", "triton", "apex")
TOLERANCE = 2e-2
"""Largest relative error of out, dq, dk or dv in the self-check: several times the rounding of bf16."""


def is_installed(package: str) -> bool:
    """Whether the package can be found; it is not imported."""
    return importlib.util.find_spec(package) is not None


def requested_attention() -> str:
    """The value of MEGAYOCO_ATTENTION. Raises UserError if it is unknown or names a package that is missing."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise UserError(f"{VARIABLE}={choice} is unknown: set it to one of {', '.join(CHOICES)}, or leave it unset.")
    if choice == "flash_attn" and not is_installed("flash_attn"):
        raise UserError(f"{VARIABLE}=flash_attn, but the package is not installed: install flash-attn, or unset it.")
    return choice


def describe_backends(device: str | torch.device = "cpu") -> dict[str, str]:
    """What serves each operation on this device, and which optional packages are installed, for the start of a run.

    Raises UserError for a MEGAYOCO_ATTENTION that cannot be followed.
    """
    choice, on_gpu = requested_attention(), torch.device(device).type == "cuda"
    if choice == "flash_attn" and not on_gpu:
        raise UserError(f"{VARIABLE}=flash_attn needs a CUDA device, the run uses {device}: set it to auto or torch.")
    if not on_gpu:
        attention = "torch CPU flash kernel"
    elif choice == "flash_attn":
        attention = "flash_attn for fp16 and bf16, torch for fp32 and documents"
    elif choice == "auto" and is_installed("flash_attn"):
        attention = "torch SDPA for squares, flash_attn for windows and prefixes in fp16 and bf16, torch otherwise"
    else:
        attention = "torch flash kernel for fp16 and bf16, math for fp32"
    installed = [package for package in OPTIONAL_PACKAGES if is_installed(package)]
    return {
        "attention": attention,
        "retention": "torch matrix products",
        "cross entropy": "torch matrix products, chunked",
        "rotary and norm": "torch",
        "optional packages": ", ".join(installed) or "none",
    }


def attention_backend(q: Tensor, window: int | None, *, square: bool = False, documents: bool = False) -> str:
    """ "cpu_flash", "torch_flash", "flash_attn" or "math": what serves queries q (B, T, H, K)."""
    if q.device.type == "cpu":
        return "cpu_flash"
    head_dim = q.shape[-1]
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256:
        return "math"
    choice, windowed = requested_attention(), window is not None
    if not documents and (choice == "flash_attn" or (choice == "auto" and not square and is_installed("flash_attn"))):
        if _passes_check("flash_attn", q.device, q.dtype, head_dim, windowed):
            return "flash_attn"
        if choice == "flash_attn":
            raise UserError(
                f"{VARIABLE}=flash_attn, but it failed its self-check for {q.dtype}, head dim {head_dim}: unset it."
            )
    return "torch_flash" if _passes_check("torch_flash", q.device, q.dtype, head_dim, windowed) else "math"


def flash_attn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """causal_attention by the flash-attn package: causal, bottom-right, no documents."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    # flash counts the tokens left of the query, a window of W tokens counts the query too
    left = -1 if window is None else window - 1
    right = -1 if window is None else 0
    out: Tensor = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=(left, right))
    return out


@cache
def _passes_check(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool) -> bool:
    """Runs the self-check once per kernel, dtype, head dim and kind of mask; a failure is a warning."""
    from megayoco.ops.attention import attention_with_backend  # here, because attention imports this module

    try:
        error = self_check_error(
            lambda q, k, v, scale, window: attention_with_backend(q, k, v, scale=scale, window=window, backend=name),
            device, dtype, head_dim, 100 if windowed else None,
        )  # fmt: skip
    except (RuntimeError, ImportError, NotImplementedError, TypeError) as exception:
        warnings.warn(f"attention backend {name} does not run here and is not used: {exception}", stacklevel=2)
        return False
    if not error <= TOLERANCE:
        warnings.warn(f"attention backend {name} is off by {error:.1e} relative and is not used", stacklevel=2)
    return error <= TOLERANCE


def self_check_error(
    form: Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    window: int | None,
) -> float:
    """Largest relative error of out, dq, dk, dv of 256 queries over 384 keys, against fp32 math. NaN counts as inf."""
    from megayoco.ops.attention import causal_attention_naive

    generator = torch.Generator().manual_seed(0)
    shapes = [(1, T, heads, head_dim) for T, heads in ((256, 4), (384, 2), (384, 2), (256, 4))]
    inputs = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]
    scale, results = head_dim**-0.5, []
    with torch.enable_grad():
        for wide in (True, False):
            q, k, v = ((x.float() if wide else x).detach().requires_grad_() for x in inputs[:3])
            if wide:
                out = causal_attention_naive(q, k, v, scale=scale, window=window)
            else:
                out = form(q, k, v, scale, window)
            results.append([out, *torch.autograd.grad(out, (q, k, v), inputs[3].to(out.dtype))])
    errors = [((got.float() - wanted).norm() / wanted.norm()).item() for wanted, got in zip(*results, strict=True)]
    return max(error if error == error else float("inf") for error in errors)
