"""Which implementation serves an operation, decided from the device, the dtype, installed packages and one variable.

MEGAYOCO_ATTENTION = auto, or a backend of attention_tiles.py by name. A name asks for that backend wherever it can
serve; what it cannot (fp32, a window, a head dim) falls to the order of auto. Importing this module imports no optional
package.

A CUDA kernel serves only after a small forward and backward agreed with fp32 math, because a wrong kernel shows no
error. One that disagrees stops the run; one that does not run is passed over with a warning, or stops the run if asked
for by name. Every choice holds for the process.
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
CPU_BACKENDS = ("cpu_flash", "math")
CUDA_BACKENDS = ("fa3", "torch_cudnn", "torch_flash", "flash_attn", "cudnn_frontend", "math")
CHOICES = ("auto", *dict.fromkeys((*CPU_BACKENDS, *CUDA_BACKENDS)))
PACKAGES = {"fa3": "flash_attn_interface", "flash_attn": "flash_attn", "cudnn_frontend": "cudnn"}
"""The module that a backend needs beside torch."""
COMPANIONS = {"torch_cudnn": ("torch_flash",), "cudnn_frontend": ("torch_flash",)}
"""Backends that serve what one of these leaves to them."""
BY_NAME_ONLY = ("flash_attn", "cudnn_frontend")
"""Not taken by auto: the kernels of flash-attn are in torch too; nobody has measured the other one here."""
OPTIONAL_PACKAGES = ("flash_attn", "flash_attn_interface", "cudnn", "fla", "liger_kernel", "triton", "apex")
TOLERANCE = 2e-2
"""Largest relative error of out, dq, dk or dv in the self-check: several times the rounding of bf16."""


def is_installed(package: str) -> bool:
    """Whether the package can be found; it is not imported."""
    return importlib.util.find_spec(package) is not None


def requested_attention(device: str | torch.device) -> str:
    """The value of MEGAYOCO_ATTENTION. Raises UserError if it is unknown, or can never serve on this device."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise UserError(f"{VARIABLE}={choice} is unknown: set it to one of {', '.join(CHOICES)}, or leave it unset.")
    on_gpu = torch.device(device).type == "cuda"
    serving = CUDA_BACKENDS if on_gpu else CPU_BACKENDS
    if choice != "auto" and choice not in serving:
        needs = "the CPU" if choice in CPU_BACKENDS else "a CUDA device"
        raise UserError(
            f"{VARIABLE}={choice} needs {needs}, the run uses {device}: set it to one of auto, {', '.join(serving)}."
        )
    if choice in PACKAGES and not is_installed(PACKAGES[choice]):
        raise UserError(
            f"{VARIABLE}={choice}, but its module {PACKAGES[choice]} is not installed: install or unset it."
        )
    if choice == "fa3" and not _has_flash_hook():
        raise UserError(
            f"{VARIABLE}=fa3 needs a torch with activate_flash_attention_impl: take 2.11 or later, or unset it."
        )
    return choice


def describe_backends(device: str | torch.device = "cpu") -> dict[str, str]:
    """What serves each operation on this device, and which optional packages are installed, for the start of a run.

    Raises UserError for a MEGAYOCO_ATTENTION that cannot be followed.
    """
    choice = requested_attention(device)
    if torch.device(device).type == "cuda":
        known = _candidates(choice, True)
        narrow = [x for x in known if x == "math" or _fits(x, torch.device(device), torch.bfloat16, 64, False)]
        attention = f"{', else '.join(narrow)} (fp16, bf16); math (fp32)"
    else:
        attention = _candidates(choice, False)[0]
    installed = [package for package in OPTIONAL_PACKAGES if is_installed(package)]
    return {
        "attention": attention if choice == "auto" else f"{attention}, by {VARIABLE}",
        "retention": "torch matrix products",
        "cross entropy": "torch matrix products, chunked",
        "rotary and norm": "torch",
        "optional packages": ", ".join(installed) or "none",
    }


def attention_backend(q: Tensor, window: int | None) -> str:
    """The backend, by its name in attention_tiles.py, that serves queries q (B, T, H, K), with a window or without.

    Raises UserError if the one asked for cannot be had, or if a kernel disagrees with fp32 math.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _serving(q.device, q.dtype, q.shape[-1], window is not None, deterministic)


@cache
def _serving(device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool, deterministic: bool) -> str:
    choice = requested_attention(device)
    if device.type != "cuda":
        return _candidates(choice, False)[0] if device.type == "cpu" else "math"
    for name in _candidates(choice, True):
        if name == "math":
            break
        if not _fits(name, device, dtype, head_dim, windowed) or (deterministic and name == "torch_cudnn"):
            continue
        if all(_passes_check(x, device, dtype, head_dim, windowed) for x in (name, *COMPANIONS.get(name, ()))):
            return name
        if name == choice:
            raise UserError(f"{VARIABLE}={choice} does not run here for {dtype}, head dim {head_dim}: unset it.")
    return "math"


def _candidates(choice: str, on_gpu: bool) -> list[str]:
    """Backends in the order in which they are asked: the chosen one, then what auto takes of those that are there."""
    if choice == "math":
        return ["math"]
    known = [name for name in (CUDA_BACKENDS if on_gpu else CPU_BACKENDS) if name not in BY_NAME_ONLY]
    # the hook replaces torch's flash kernel for the whole process, so who asks for that one must not get the other
    if choice == "torch_flash" or not (is_installed(PACKAGES["fa3"]) and _has_flash_hook()):
        known = [name for name in known if name != "fa3"]
    return known if choice == "auto" else list(dict.fromkeys([choice, *known]))


def _fits(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool) -> bool:
    """Whether the kernel is made for such inputs."""
    if dtype not in (torch.float16, torch.bfloat16) or head_dim > 256:
        return False
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    if name == "fa3":
        return hopper
    if name == "torch_cudnn":  # elsewhere it has not been measured
        return hopper and head_dim <= 128 and not windowed
    return True


def _has_flash_hook() -> bool:
    import torch.nn.attention

    return hasattr(torch.nn.attention, "activate_flash_attention_impl")


@cache
def _passes_check(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool) -> bool:
    """Runs the self-check once per kernel, dtype, head dim and kind of mask; False if the kernel does not run."""
    from megayoco.ops.attention import attention_with_backend  # here, because attention imports this module

    try:
        if name == "fa3":
            torch.nn.attention.activate_flash_attention_impl("FA3")  # for the whole process
        error = self_check_error(
            lambda q, k, v, scale, window: attention_with_backend(q, k, v, scale=scale, window=window, backend=name),
            device, dtype, head_dim, 100 if windowed else None,
        )  # fmt: skip
    except (RuntimeError, ImportError, AttributeError, NotImplementedError, TypeError, ValueError) as exception:
        if name == "fa3":
            torch.nn.attention.restore_flash_attention_impl()
        warnings.warn(f"attention backend {name} does not run here and is not used: {exception}", stacklevel=2)
        return False
    if not error <= TOLERANCE:
        instead = "math" if name in ("cpu_flash", "torch_flash") else "torch_flash"
        raise UserError(
            f"attention backend {name} is wrong here (relative error {error:.1e} for {dtype}, head dim {head_dim}): "
            f"set {VARIABLE}={instead}."
        )
    return True


def self_check_error(
    form: Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    window: int | None,
) -> float:
    """Largest relative error of out, dq, dk, dv of 256 queries over 512 keys, against fp32 math. NaN counts as inf."""
    from megayoco.ops.attention import causal_attention_naive

    generator = torch.Generator().manual_seed(0)
    # multiples of 256, so that cuDNN gets its parts too
    shapes = [(1, T, heads, head_dim) for T, heads in ((256, 4), (512, 2), (512, 2), (256, 4))]
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]
        scale, results = head_dim**-0.5, []
        for wide in (True, False):
            q, k, v = ((x.float() if wide else x).detach().requires_grad_() for x in inputs[:3])
            if wide:
                out = causal_attention_naive(q, k, v, scale=scale, window=window)
            else:
                out = form(q, k, v, scale, window)
            results.append([out, *torch.autograd.grad(out, (q, k, v), inputs[3].to(out.dtype))])
    errors = [((got.float() - wanted).norm() / wanted.norm()).item() for wanted, got in zip(*results, strict=True)]
    return max(error if error == error else float("inf") for error in errors)
