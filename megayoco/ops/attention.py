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

from megayoco.ops.attention_tiles import tile_backward, tile_forward

MASKED_BLOCK = 128
"""Queries of a part that needs a mask, at least: smaller parts cost calls, larger ones compute more masked scores."""


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
    if window is not None and S > T + window - 1:
        skipped = S - (T + window - 1)
        k, v, S = k[:, skipped:], v[:, skipped:], T + window - 1
        first_key = None if first_key is None else (first_key - skipped).clamp(min=0)
    if first_key is None and (T == 1 or (T == S and window is None)):
        # one query sees all S keys (a window has been cut off above); a square has the causal flag of its own
        y_BHTK = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=T > 1, scale=scale, enable_gqa=True
        )
        return y_BHTK.transpose(1, 2)
    if window is None and first_key is None:
        parts = [Part(0, T, 0, S - T, "all"), Part(0, T, S - T, S, "causal")]
    else:
        parts = _masked_parts(T, S, window, first_key)
    return _PartwiseAttention.apply(q, k, v, first_key, scale, window, parts)  # type: ignore[no-any-return, no-untyped-call]


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
    """A rectangle of scores: queries [query, query_end) of the chunk against keys [key, key_end)."""

    query: int
    query_end: int
    key: int
    key_end: int
    kind: str
    """"all": no mask. "causal": a square on the diagonal. "masked": a mask from causality, window and documents."""


def _masked_parts(T: int, S: int, window: int | None, first_key: Tensor | None) -> list[Part]:
    """Blocks of queries, each against every key that one of them sees: no row is in two parts, none is empty."""
    block = max(MASKED_BLOCK, window or 0)
    parts = []
    for query in range(0, T, block):
        query_end = min(query + block, T)
        key = 0 if window is None else max(S - T + query - window + 1, 0)
        if first_key is not None:
            key = max(key, int(first_key[:, query:query_end].min()))
        parts.append(Part(query, query_end, key, S - T + query_end, "masked"))
    return parts


def _part_mask(part: Part, T: int, S: int, window: int | None, first_key: Tensor | None, like: Tensor) -> Tensor | None:
    """What a masked part adds to its scores, 0 or -inf: (1 or B, 1, queries, keys) in the dtype of `like`."""
    if part.kind != "masked":
        return None
    query = torch.arange(S - T + part.query, S - T + part.query_end, device=like.device)[:, None]
    key = torch.arange(part.key, part.key_end, device=like.device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    hidden = hidden[None, None]
    if first_key is not None:
        hidden = hidden | (key < first_key[:, None, part.query : part.query_end, None])
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
    ) -> Tensor:
        (B, T, H, _), S = q.shape, k.shape[1]
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, tokens, K) is the tiles' layout
        wide = torch.promote_types(q.dtype, torch.float32)
        out_BTHK = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse_BHT = q.new_empty((B, H, T), dtype=wide)
        done = 0  # rows before it have been written by an earlier part
        for part in parts:
            rows, keys = slice(part.query, part.query_end), slice(part.key, part.key_end)
            mask = _part_mask(part, T, S, window, first_key, q)
            out, lse = tile_forward(q_[:, :, rows], k_[:, :, keys], v_[:, :, keys], scale, part.kind == "causal", mask)
            out, lse = out.transpose(1, 2), lse.to(wide)
            if part.query >= done:
                out_BTHK[:, rows], lse_BHT[:, :, rows], done = out, lse, part.query_end
                continue
            before = lse_BHT[:, :, rows]
            merged = torch.logaddexp(before, lse)
            weights = ((x - merged).exp().transpose(1, 2)[..., None] for x in (before, lse))
            out_BTHK[:, rows] = next(weights) * out_BTHK[:, rows].to(wide) + next(weights) * out.to(wide)
            lse_BHT[:, :, rows] = merged
        ctx.save_for_backward(q, k, v, first_key, out_BTHK, lse_BHT)
        ctx.scale, ctx.window, ctx.parts = scale, window, parts
        return out_BTHK

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, first_key, out, lse = ctx.saved_tensors
        T, S = q.shape[1], k.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        # parts overlap, and bf16 sums of many parts would lose digits
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        q_, k_, v_, out_, dout_ = (x.transpose(1, 2) for x in (q, k, v, out, dout))
        for part in ctx.parts:
            rows, keys = slice(part.query, part.query_end), slice(part.key, part.key_end)
            mask = _part_mask(part, T, S, ctx.window, first_key, q)
            dq_part, dk_part, dv_part = tile_backward(
                dout_[:, :, rows],
                q_[:, :, rows],
                k_[:, :, keys],
                v_[:, :, keys],
                out_[:, :, rows],
                lse[:, :, rows],
                ctx.scale,
                part.kind == "causal",
                mask,
            )
            dq[:, rows] += dq_part.transpose(1, 2)
            dk[:, keys] += dk_part.transpose(1, 2)
            dv[:, keys] += dv_part.transpose(1, 2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


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
    if window is not None and window < 1:
        raise ValueError(f"a window counts the query itself and is at least 1, got {window}")
    if first_key is not None and (first_key.shape != (B, T) or first_key.dtype != torch.int64):
        raise ValueError(f"first_key must be int64 ({B}, {T}), got {first_key.dtype} {tuple(first_key.shape)}")
