"""Causal attention of a chunk of queries over all keys so far: full, windowed, or stopped at document borders.

Shapes: B batch, T queries of the chunk, S keys so far (the chunk's included), H query heads, G key-value heads,
        K head dim, W window. Query t of the chunk is token number S - T + t: the mask is aligned bottom-right.
        The work is cut into parts (attention_parts.py); nothing of T x S elements is ever allocated.
Source: YOCO, arXiv 2405.05254, "Cross-Decoder" and "Sliding-Window Attention"; FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megayoco.ops.attention_parts import (
    Part,
    Rows,
    backward_by_parts,
    dense_heads,
    forward_by_parts,
    plan_parts,
    window_parts,
)
from megayoco.ops.attention_tiles import BOTTOM_RIGHT, Tile, tile_backward
from megayoco.ops.backends import attention_backend


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, first_key: Tensor | None = None
) -> Tensor:
    """Softmax attention of the last T tokens over the S tokens so far, differentiable in q, k and v.

    Args:
        q: (B, T, H, K), rotary applied.
        k, v: (B, S, G, K) with S >= T, in q's dtype; query head h reads key-value head h // (H // G).
        scale: factor of the scores, usually K ** -0.5.
        window: tokens a query sees, itself included; None sees everything before it. Costs O(T * window), and only the
            last T + window - 1 keys are read.
        first_key: (B, T) int64, number in 0 .. S-1 of the earliest key each query may see (its document's start); at
            most the query's own number.

    Returns:
        (B, T, H, K) in q's dtype. Scores, softmax and merging are fp32 or wider.

    Raises:
        ValueError: the shapes, dtypes or devices disagree, S < T, H is no multiple of G, or window < 1.
    """
    _check(q, k, v, window, first_key)
    T, S = q.shape[1], k.shape[1]
    if window is not None and window >= S:
        window = None
    skipped = 0 if window is None else S - (T + window - 1)
    if skipped > 0:
        k, v, S = k[:, skipped:], v[:, skipped:], S - skipped
        first_key = None if first_key is None else (first_key - skipped).clamp(min=0)
    backend = attention_backend(q, window)
    return attention_with_backend(q, k, v, scale=scale, window=window, first_key=first_key, backend=backend)


def attention_with_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    first_key: Tensor | None = None,
    backend: str,
) -> Tensor:
    """causal_attention by a backend of ops/backends.py, without checks; a window must not reach past the first key."""
    if q.shape[1] == 1 and first_key is None:  # it sees all S keys, since a window is cut off before
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)
    parts = causal_parts(q.shape[1], k.shape[1], window, first_key, backend)
    return _PartwiseAttention.apply(q, k, v, first_key, scale, window, parts, backend)  # type: ignore[no-any-return, no-untyped-call]


def causal_attention_naive(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, first_key: Tensor | None = None
) -> Tensor:
    """The same with a dense (B, H, T, S) mask and a softmax in fp32 or wider: the reference of every other form."""
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(group, dim=2) for x in (k, v))
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q.to(wide), k) * scale
    query_T1 = torch.arange(S - T, S, device=q.device)[:, None]
    key_S = torch.arange(S, device=q.device)
    visible = key_S <= query_T1
    if window is not None:
        visible = visible & (key_S > query_T1 - window)
    if first_key is not None:
        visible = visible & (key_S >= first_key[:, None, :, None])
    p_BHTS = scores_BHTS.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", p_BHTS, v).to(q.dtype)


def causal_parts(T: int, S: int, window: int | None, first_key: Tensor | None, backend: str) -> list[Part]:
    """The parts that together hold every visible (query, key) once; queries are the last T of S tokens, and a window
    must not reach past the first key."""
    if backend in BOTTOM_RIGHT and first_key is None:
        return [Part(slice(0, T), slice(0, S), "causal")]
    rows = Rows(S, first_key=first_key)
    return plan_parts(T, rows) if window is None else window_parts(T, rows, window)


class _PartwiseAttention(torch.autograd.Function):
    """Attention as a list of parts. Saves q, k, v, the output and the log-sum-exp of every row, never scores."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first_key: Tensor | None,
        scale: float,
        window: int | None,
        parts: list[Part],
        backend: str,
    ) -> Tensor:
        q, k, v = (dense_heads(x) for x in (q, k, v))
        rows = Rows(k.shape[1], first_key=first_key)
        ctx.options = dict(scale=scale, window=window, parts=parts, backend=backend)
        out, lse = forward_by_parts(q, k, v, rows, **ctx.options)
        ctx.save_for_backward(q, k, v, first_key, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first_key, out, lse = ctx.saved_tensors
        dout, S = dense_heads(dout), k.shape[1]
        if ctx.options["parts"] == [Part(slice(0, q.shape[1]), slice(0, S), "causal")]:  # nothing to add up
            tile = Tile(ctx.options["scale"], causal=True, window=ctx.options["window"])
            dq, dk, dv = tile_backward(dout, q, k, v, out, lse, tile, ctx.options["backend"])
            return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None
        wide = torch.promote_types(k.dtype, torch.float32)
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        rows = Rows(S, first_key=first_key)
        dq = backward_by_parts(dout, q, k, v, out, lse, dk, dv, rows, **ctx.options)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, first_key: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"q is (B, T, H, K), k and v are (B, S, G, K); got {[tuple(x.shape) for x in (q, k, v)]}")
    (B, T, H, K), (_, S, G, _) = q.shape, k.shape
    if k.shape[0] != B or k.shape[3] != K:
        raise ValueError(f"batch and head dim of q {tuple(q.shape)} and k {tuple(k.shape)} differ")
    if not 1 <= T <= S:
        raise ValueError(f"the {T} queries are the last of the {S} keys: 1 <= T <= S")
    if H % G:
        raise ValueError(f"{H} query heads cannot share {G} key-value heads: no multiple")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if window is not None and window < 1:
        raise ValueError(f"a window counts the query itself and is at least 1, got {window}")
    if first_key is not None and (first_key.shape != (B, T) or first_key.dtype != torch.int64):
        raise ValueError(f"first_key must be int64 ({B}, {T}), got {first_key.dtype} {tuple(first_key.shape)}")
