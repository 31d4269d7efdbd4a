"""Causal attention of a chunk of queries over all keys so far: full, windowed, or stopped at document borders.

Shapes: B batch, T queries of the chunk, S keys so far (the chunk's included), H query heads, G key-value heads,
        K head dim, W window. Query t of the chunk is token number S - T + t: the mask is aligned bottom-right.
Parts:  the work is cut into rectangles of (queries x keys) that a tile operator computes one after the other, each
        without a mask, with a square's causal flag, or with a small mask of its own. Parts that share queries are
        merged by their log-sum-exp; the backward of every part is given the *merged* output and log-sum-exp, which
        makes its share of dq, dk, dv exact. Nothing of T x S elements is ever allocated.
Source: YOCO, arXiv 2405.05254, "Cross-Decoder" and "Sliding-Window Attention"; FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megayoco.ops.attention_tiles import tile_backward, tile_forward
from megayoco.ops.backends import attention_backend, flash_attn_attention

MASKED_BLOCK = 128
"""Queries of a part that needs a mask: smaller parts cost calls, larger ones compute more masked scores."""


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
    backend = attention_backend(q, window, square=T == S and window is None, documents=first_key is not None)
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
    T, S = q.shape[1], k.shape[1]
    square = T == S and window is None
    if first_key is None and backend == "flash_attn":
        return flash_attn_attention(q, k, v, scale, window)
    # one query sees all S keys, since a window is cut off before; a square has the causal flag of its own, except
    # where SDPA would answer GQA with a dense mask
    if first_key is None and (T == 1 or (square and backend != "math")):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=scale, enable_gqa=True)
        return y.transpose(1, 2)
    parts = _plan(T, S, window, first_key, backend)
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


class Part(NamedTuple):
    """A rectangle of scores: some queries of the chunk against some keys."""

    rows: slice
    keys: slice
    kind: str
    """"all": no mask. "causal": bottom-right. "masked": a mask from causality, window and documents."""

    batch: slice = slice(None)
    merge: bool = False
    """An earlier part has written these rows; the two are merged by their log-sum-exp."""


def _plan(T: int, S: int, window: int | None, first_key: Tensor | None, backend: str) -> list[Part]:
    """The parts that together hold every visible (query, key) once."""
    if backend == "torch_flash" and first_key is None:
        return [Part(slice(0, T), slice(0, S), "causal")]  # this kernel knows windows and bottom-right masks
    if window is not None or backend == "math":
        return _masked_parts(T, S, window, first_key, slice(None))
    if first_key is None:
        return [Part(slice(0, T), slice(S - T, S), "causal"), Part(slice(0, T), slice(0, S - T), "all", merge=True)]
    return _document_parts(T, S, first_key)


def _document_parts(T: int, S: int, first_key: Tensor) -> list[Part]:
    """Every document by itself: a causal square and, for one that began before the chunk, a rectangle.

    Short documents share masked parts: one call for each would cost more than the scores that a mask wastes.
    """
    parts = []
    for b, row in enumerate(first_key.cpu()):
        batch = slice(b, b + 1)
        starts, lengths = (x.tolist() for x in row.unique_consecutive(return_counts=True))
        short, query = 0, 0  # first query of the short documents collected so far, and of the document at hand
        for start, length in zip(starts, lengths, strict=True):
            if length >= MASKED_BLOCK:
                parts += _masked_parts(query - short, S - T + query, None, row[None, short:query], batch, short)
                rows, key = slice(query, query + length), S - T + query
                parts.append(Part(rows, slice(key, key + length), "causal", batch))
                if start < key:
                    parts.append(Part(rows, slice(start, key), "all", batch, merge=True))
                short = query + length
            query += length
        parts += _masked_parts(T - short, S, None, row[None, short:], batch, short)
    return parts


def _masked_parts(
    T: int, S: int, window: int | None, first_key: Tensor | None, batch: slice, first_row: int = 0
) -> list[Part]:
    """Blocks of the T queries that end at key S, each against every key that one of them sees; no row is empty."""
    # a block of n queries computes n + window - 1 keys for each: large enough for the kernel, small beside the window
    block = MASKED_BLOCK if window is None else min(max(window // 4, MASKED_BLOCK // 2), 2 * MASKED_BLOCK)
    parts = []
    for query in range(0, T, block):
        query_end = min(query + block, T)
        key = 0 if window is None else max(S - T + query - window + 1, 0)
        if first_key is not None:
            key = max(key, int(first_key[:, query:query_end].min()))
        rows = slice(first_row + query, first_row + query_end)
        parts.append(Part(rows, slice(key, S - T + query_end), "masked", batch))
    return parts


def _part_mask(part: Part, T: int, S: int, window: int | None, first_key: Tensor | None, like: Tensor) -> Tensor | None:
    """What a masked part adds to its scores, 0 or -inf: (1 or B, 1, queries, keys) in the dtype of `like`."""
    if part.kind != "masked":
        return None
    query = torch.arange(S - T + part.rows.start, S - T + part.rows.stop, device=like.device)[:, None]
    key = torch.arange(part.keys.start, part.keys.stop, device=like.device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    hidden = hidden[None, None]
    if first_key is not None:
        hidden = hidden | (key < first_key[part.batch, None, part.rows, None])
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


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
        (B, T, H, _), S = q.shape, k.shape[1]
        q, k, v = (_dense_heads(x) for x in (q, k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse_BHT = q.new_empty((B, H, T), dtype=wide)
        for part in parts:
            at = (part.batch, part.rows)
            keys, values = k[part.batch, part.keys], v[part.batch, part.keys]
            mask = _part_mask(part, T, S, window, first_key, q)
            out_part, lse = tile_forward(q[at], keys, values, scale, part.kind == "causal", window, mask, backend)
            lse = lse.to(wide)
            if part.merge:
                before = lse_BHT[part.batch, :, part.rows]
                merged = torch.logaddexp(before, lse)
                weight, weight_part = ((x - merged).exp().transpose(1, 2)[..., None] for x in (before, lse))
                out_part, lse = (weight * out[at]).addcmul_(weight_part, out_part.to(wide)), merged
            out[at] = out_part
            lse_BHT[part.batch, :, part.rows] = lse
        ctx.save_for_backward(q, k, v, first_key, out, lse_BHT)
        ctx.options = scale, window, parts, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first_key, out, lse = ctx.saved_tensors
        scale, window, parts, backend = ctx.options
        T, S, dout = q.shape[1], k.shape[1], _dense_heads(dout)
        # parts overlap, and bf16 sums of many parts would lose digits
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        for part in parts:
            at, at_keys = (part.batch, part.rows), (part.batch, part.keys)
            mask = _part_mask(part, T, S, window, first_key, q)
            lse_part = lse[part.batch, :, part.rows]
            dq_part, dk_part, dv_part = tile_backward(
                dout[at], q[at], k[at_keys], v[at_keys], out[at], lse_part, scale, part.kind == "causal", window, mask,
                backend,
            )  # fmt: skip
            dq[at] += dq_part
            dk[at_keys] += dk_part
            dv[at_keys] += dv_part
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def _dense_heads(x: Tensor) -> Tensor:
    # kernels read a head as K neighbours without asking for strides; the gradient of a sum has stride 0
    return x if x.stride(-1) == 1 else x.contiguous()


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
