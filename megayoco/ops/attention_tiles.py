"""One rectangle of attention scores, forward and backward, with the log-sum-exp of every row as in- and output.

Shapes: q, out (B, T, H, K); k, v (B, S, G, K); lse (B, H, T) in fp32 (float64 for float64 inputs), natural log.
The backward takes out and lse as arguments: given those of a larger softmax, it returns this rectangle's exact share.
Backends, by the names of backends.py; conventions are translated here, once for each:

    cpu_flash       torch's CPU kernel: squares, rectangles, added masks
    torch_flash     torch's CUDA kernel for fp16 and bf16, FlashAttention-2 or, activated through torch's hook, -3:
                    causal aligned bottom-right, windows, no masks
    flash_attn      the same from the flash-attn package
    torch_cudnn     torch's cuDNN kernel: squares and rectangles, no windows, no masks
    cudnn_frontend  cuDNN through its own package: causal aligned bottom-right, windows, no masks
    math            matrix products in fp32 or wider: everything, and what the kernels leave

CUDA kernels want head dims that are multiples of 8; others (100 in OpenLLaMA-3B) are filled up with zeros, which
changes no score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

REGULAR = 256
"""cuDNN plans every new shape for tenths of a second: rectangles that are no multiples of this go to torch_flash."""
LONG_KEYS = 1 << 14
"""Keys from which on a single query of grouped heads is faster on a CPU as several rows: they outgrow its caches."""
BOTTOM_RIGHT = ("torch_flash", "fa3", "flash_attn", "cudnn_frontend")
"""Backends that serve causal rectangles of any shape, and windows in them, by themselves."""
HEAD_DIMS = 8
"""Head dims are multiples of this for CUDA kernels."""
ANY_HEAD_DIM = ("cpu_flash", "math")
"""Backends that take any head dim."""


class Tile(NamedTuple):
    """What applies to the scores of one rectangle."""

    scale: float
    causal: bool = False
    """Aligned bottom-right; for cpu_flash and torch_cudnn squares only."""
    window: int | None = None
    """Tokens that a row sees, itself included. Only with causal, and only for kernels that know windows."""
    mask: Tensor | None = None
    """(1 or B, 1, T, S), added to the scores; not together with causal."""


def tile_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile, backend: str) -> tuple[Tensor, Tensor]:
    """(out in q's dtype, lse) of a rectangle in which every row sees a key."""
    backend = _serving(q, k, tile, backend)
    forward, K = OPERATORS[backend][0], q.shape[-1]
    if backend in ANY_HEAD_DIM or K % HEAD_DIMS == 0:
        return forward(q, k, v, tile)
    out, lse = forward(_filled(q), _filled(k), _filled(v), tile)
    return out[..., :K], lse


def tile_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the rectangle in the layouts of q, k, v; dk and dv summed over the query heads of each group.

    They come in the inputs' dtype, from math in fp32 or wider.
    """
    backend = _serving(q, k, tile, backend)
    backward, K = OPERATORS[backend][1], q.shape[-1]
    if backend in ANY_HEAD_DIM or K % HEAD_DIMS == 0:
        return backward(dout, q, k, v, out, lse, tile)
    dq, dk, dv = backward(_filled(dout), _filled(q), _filled(k), _filled(v), _filled(out), lse, tile)
    return dq[..., :K], dk[..., :K], dv[..., :K]


Gradients = tuple[Tensor, Tensor, Tensor]
Forward = Callable[[Tensor, Tensor, Tensor, Tile], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tile], Gradients]


def _serving(q: Tensor, k: Tensor, tile: Tile, backend: str) -> str:
    """The backend, or the one that serves what it leaves."""
    T, S = q.shape[1], k.shape[1]
    if tile.mask is not None and backend != "cpu_flash":
        return "math"
    if backend in ("torch_cudnn", "cudnn_frontend") and (T % REGULAR or S % REGULAR) and not (tile.causal and T < S):
        return "torch_flash"
    return backend


def _filled(x: Tensor) -> Tensor:
    """With zeros behind its last dimension, up to a multiple of HEAD_DIMS."""
    return F.pad(x, (0, -x.shape[-1] % HEAD_DIMS))


def _cpu_flash_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    if T == 1 and k.shape[2] < H and k.shape[1] >= LONG_KEYS and tile.mask is None:
        # the heads of a group as rows of one head: its keys are read once, not once for each of them
        out, lse = _cpu_flash_forward(q.reshape(B, k.shape[2], -1, K).transpose(1, 2), k, v, Tile(tile.scale))
        return out.transpose(1, 2).reshape(q.shape), lse.reshape(B, H, 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, tile.causal, attn_mask=tile.mask, scale=tile.scale
    )
    return out.transpose(1, 2), lse


def _cpu_flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile
) -> Gradients:
    heads = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads, lse, 0.0, tile.causal, attn_mask=tile.mask, scale=tile.scale
    )
    return tuple(x.transpose(1, 2) for x in gradients)


def _torch_flash_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, tile.causal, False, scale=tile.scale,
        **_flash_window(tile.window),
    )  # fmt: skip
    return out, lse


def _torch_flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile
) -> Gradients:
    no_dropout = q.new_empty(2, dtype=torch.uint64)  # state of a random generator that is not used
    return aten._flash_attention_backward(
        dout.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0,
        tile.causal, no_dropout, no_dropout, scale=tile.scale, **_flash_window(tile.window),
    )  # fmt: skip


def _flash_window(window: int | None) -> dict[str, int | None]:
    # flash counts the tokens left of the query, a window of W tokens counts the query too
    if window is None:
        return {"window_size_left": None, "window_size_right": None}
    return {"window_size_left": window - 1, "window_size_right": 0}


def _flash_attn_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_interface as package  # type: ignore[import-not-found]

    left, right = (-1, -1) if tile.window is None else (tile.window - 1, 0)
    out, lse, *_ = package._wrapped_flash_attn_forward(
        q, k, v, 0.0, tile.scale, causal=tile.causal, window_size_left=left, window_size_right=right, softcap=0.0,
        alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return out, lse


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile
) -> Gradients:
    from flash_attn import flash_attn_interface as package

    left, right = (-1, -1) if tile.window is None else (tile.window - 1, 0)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    package._wrapped_flash_attn_backward(
        dout.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), dq, dk, dv, 0.0, tile.scale, tile.causal, left,
        right, 0.0, None, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def _torch_cudnn_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, tile.causal, scale=tile.scale)
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


def _torch_cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile
) -> Gradients:
    no_dropout = q.new_zeros((), dtype=torch.int64)
    T, S = q.shape[1], k.shape[1]
    dout, out = dout.contiguous(), out.contiguous()
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.contiguous().unsqueeze(-1), no_dropout, no_dropout, None, None, None, T, S, 0.0,
        tile.causal, scale=tile.scale,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in gradients)


def _cudnn_bounds(tile: Tile) -> dict[str, int | bool]:
    # alignment 1 is bottom-right; the left bound counts the query itself, as our windows do
    if not tile.causal:
        return {"is_causal": False}
    return {
        "is_causal": True,
        "diagonal_alignment": 1,
        "left_bound": -1 if tile.window is None else tile.window,
        "right_bound": 0,
    }


def _cudnn_frontend_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    import cudnn.experimental.ops  # type: ignore[import-not-found]  # noqa: F401  (registers the operators)

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.cudnn.sdpa(q, k, v, tile.scale, **_cudnn_bounds(tile))
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


def _cudnn_frontend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile
) -> Gradients:
    # its plans are kept by the strides of q, k and v alone, so those of out and dout must never differ
    dout, out = dout.contiguous(), out.contiguous()
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    gradients = torch.ops.cudnn.sdpa_bwd(
        dout, q, k, v, out, lse.contiguous().unsqueeze(-1), tile.scale, **_cudnn_bounds(tile),
        is_deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in gradients)


def _math_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    _, scores = _scores(q, k, tile)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp_() @ _by_group(v, v.shape[2])
    return out.flatten(1, 2).transpose(1, 2).to(q.dtype), lse.flatten(1, 2)


def _math_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile) -> Gradients:
    q_BGRTK, scores = _scores(q, k, tile)
    G = k.shape[2]
    p_BGRTS = scores.sub_(lse.reshape(scores.shape[:-1])[..., None]).exp_()
    dout_, out_ = _by_group(dout, G), _by_group(out, G)
    dv = torch.einsum("bgrts,bgrtk->bsgk", p_BGRTS, dout_)
    dp = dout_ @ _by_group(v, G).transpose(-1, -2)
    ds = dp.sub_((dout_ * out_).sum(-1, keepdim=True)).mul_(p_BGRTS).mul_(tile.scale)
    dq = (ds @ _by_group(k, G)).flatten(1, 2).transpose(1, 2)
    dk = torch.einsum("bgrts,bgrtk->bsgk", ds, q_BGRTK)
    return dq, dk, dv


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, tokens, heads, K) to (B, groups, heads / groups, tokens, K) in fp32 or wider."""
    B, tokens, heads, K = x.shape
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.transpose(1, 2).reshape(B, groups, heads // groups, tokens, K)


def _scores(q: Tensor, k: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """q by group and the scores (B, G, H / G, T, S), both fp32 or wider."""
    T, S, G = q.shape[1], k.shape[1], k.shape[2]
    q_BGRTK = _by_group(q, G)
    scores = q_BGRTK @ _by_group(k, G).transpose(-1, -2) * tile.scale
    if tile.causal:
        future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T)
        scores.masked_fill_(future, -torch.inf)
    if tile.mask is not None:
        scores += tile.mask[:, :, None]
    return q_BGRTK, scores


OPERATORS: dict[str, tuple[Forward, Backward]] = {
    "cpu_flash": (_cpu_flash_forward, _cpu_flash_backward),
    "torch_flash": (_torch_flash_forward, _torch_flash_backward),
    "fa3": (_torch_flash_forward, _torch_flash_backward),
    "flash_attn": (_flash_attn_forward, _flash_attn_backward),
    "torch_cudnn": (_torch_cudnn_forward, _torch_cudnn_backward),
    "cudnn_frontend": (_cudnn_frontend_forward, _cudnn_frontend_backward),
    "math": (_math_forward, _math_backward),
}
