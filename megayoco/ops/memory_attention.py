"""Attention inside windows and over a memory of everything before them: one softmax over both.

A query sees the keys of its own window up to its own, rotated by their places in the window, and remembered keys
without rotation, whatever their distance. So the scores are cut into segments: some queries of one window, the keys of
that window that they may see, and the keys that they remember. Local and remembered part of a segment are merged by
their log-sum-exp; the backward of each is given the merged output and log-sum-exp, which makes its gradients exact
(attention_parts.py). Nothing is padded, masked or copied, the memory least of all.

In inference, windows may overlap (windows.py). Local keys then count their places from the first window of the chunk,
and so do the queries for the local part: scores depend on the difference of two places only. Queries of several short
windows share a segment, in which masks cut the edges.

Shapes: B batch, T queries of the chunk, S keys so far (the chunk's last), L the last of them, which queries see as
        local keys, R queries of a segment, H query heads, G key-value heads, K head dim, W window. Keys are counted
        from 0 to S - 1.
Source: Focused Transformer (LongLLaMA), arXiv 2307.03170; cross-batch ranges as in its released code for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megayoco.ops.attention import causal_parts
from megayoco.ops.attention_parts import Part, Rows, backward_by_parts, dense_heads, forward_by_parts
from megayoco.ops.attention_store import KEYS_PER_SLICE, KEYS_PER_SLICE_CUDA
from megayoco.ops.backends import attention_backend
from megayoco.ops.key_value_cache import KeyValueCache
from megayoco.ops.key_values import KeyValues
from megayoco.ops.memory_search import attention_over_nearest
from megayoco.ops.memory_segments import NOTHING as NOTHING
from megayoco.ops.memory_segments import Segment as Segment
from megayoco.ops.memory_segments import local_edge, memory_edges, remembered_by_all, single_windows
from megayoco.ops.memory_segments import window_segments as window_segments
from megayoco.ops.shared_memory import SharedMemory

Remembered = Callable[[slice, slice], Iterable[tuple[Tensor, Tensor]]]
"""(batch entries, key numbers) -> keys and values (B', S', G, K) of these, piece by piece."""
Nearest = Callable[[Tensor, slice, slice], tuple[Tensor, Tensor] | None]
"""(queries (B', R, H, K), batch entries, key numbers) -> attention over some of these keys and its log-sum-exp, both in
fp32 or wider. None: all of them are to be read."""


def cross_batch_segments(
    samples: int,
    length: int,
    window: int,
    reach: int,
    stepping: bool,
    *,
    before: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> list[Segment]:
    """The segments of cross-batch training, for `samples` sequences of `length` tokens laid end to end.

    Window number i of all sees the windows i - 1, ..., i - (n_i - 1) before it, of its own sequence and of others, with
    n_i as in the released code (FoT, "cross-batch"): n = reach + 1; with stepping and k > 1 windows per sequence at
    most (i mod k) ceil(n / (k - 1)) + 1; never more than there are.

    Args:
        before: windows of other micro-batches, whose keys come before those of the samples.
        rank, ranks: the queries are this rank's part of every sample, one of `ranks` equal ones. With several parts the
            keys of all samples are followed by those of the queries once more, which are then the local ones.

    Raises:
        ValueError: length is no multiple of window, or a rank's part of it is none.
    """
    if length % (window * ranks):
        parts = f" in {ranks} parts" if ranks > 1 else ""
        raise ValueError(f"sequences of {length} tokens are no packs of windows of {window}{parts}")
    pack = length // window
    share = pack // ranks
    own_at = (before + (samples * pack if ranks > 1 else 0)) * window
    segments = []
    for number in range(samples * share):
        sample, place = divmod(number, share)
        place += rank * share
        i = before + sample * pack + place
        seen = min(_windows_seen(place, pack, reach, stepping), i)
        rows = slice(number * window, (number + 1) * window)
        memory = slice((i - seen) * window, i * window) if seen else NOTHING
        segments.append(Segment(rows, _moved(rows, own_at), memory))
    return segments


def windows_before(pack: int, reach: int, stepping: bool) -> int:
    """How many windows before the first sample of a micro-batch its windows see at most, in cross-batch training with
    samples of `pack` windows."""
    return max(max(_windows_seen(place, pack, reach, stepping) - place, 0) for place in range(pack))


def _windows_seen(place: int, pack: int, reach: int, stepping: bool) -> int:
    """n_i - 1 of the window at this place of its sample, where there are as many before it."""
    if stepping and pack > 1:
        return min(place * -(-(reach + 1) // (pack - 1)), reach)
    return reach


def memory_attention(
    q: Tensor, rotated: Tensor, key: Tensor | None, value: Tensor, segments: Sequence[Segment], scale: float
) -> Tensor:
    """Softmax attention by segments, differentiable in q, rotated, key and value.

    Args:
        q: (B, T, H, K), rotated by the places in the windows; query head h reads key-value head h // (H // G).
        rotated: (B, L, G, K), the keys number S - L .. S - 1 rotated by their places in the windows.
        key: (B, S, G, K) without rotation. None where nothing is remembered.
        value: (B, S, G, K).
        segments: every query in exactly one.
        scale: factor of the scores.

    Returns:
        (B, T, H, K) in q's dtype. Scores, softmax and merging are fp32 or wider. Kept for backward: the arguments, the
        result and the log-sum-exps.

    Raises:
        ValueError: a segment remembers keys, and there are none; or it has steps, whose gradient nothing asks for.
    """
    if any(segment.steps for segment in segments):
        raise ValueError("windows that overlap are for inference: there is no gradient")
    if key is None and any(segment.memory != NOTHING for segment in segments):
        raise ValueError("segments remember keys, but no keys were given")
    backend = attention_backend(q, None)
    return _MemoryAttention.apply(q, rotated, key, value, list(segments), scale, backend)  # type: ignore[no-any-return, no-untyped-call]


def memory_attention_over_context(
    q: Tensor,
    q_local: Tensor,
    rotated: Tensor,
    context: KeyValueCache | KeyValues | SharedMemory,
    segments: Sequence[Segment],
    scale: float,
) -> Tensor:
    """The same over the tokens of a context, its keys without rotation, and without gradient. The memory is read where
    it lies, never copied; a narrow cache is widened in blocks. Of a memory with a search, the best keys of each query
    are read (memory_search.py); a memory that ranks share is read by all of them together (shared_memory.py).

    Args:
        q: (B, T, H, K), rotated by the places in the windows, for the memory.
        q_local: the same, rotated by the places that `rotated` counts.
        rotated: (B, L, G, K).
        context: S tokens.
        segments: every query in exactly one; steps are welcome.
        scale: factor of the scores.
    """

    def remembered(batch: slice, keys: slice) -> Iterable[tuple[Tensor, Tensor]]:
        if isinstance(context, KeyValueCache):
            return ((key[batch], value[batch]) for key, value in context.pieces(keys.start, keys.stop))
        assert isinstance(context, KeyValues)
        return [(context.key[batch, keys], context.value[batch, keys])] if keys != NOTHING else []

    if isinstance(context, KeyValues):
        first = context.key.shape[1] - rotated.shape[1]
        value = context.value[:, first:]
    else:
        first = context.tokens - rotated.shape[1]
        value = context.part(first, context.tokens).value
    backend = attention_backend(q, None)
    search = context.search if isinstance(context, KeyValueCache) else None
    if search is not None or isinstance(context, SharedMemory):  # among keys that all queries of a segment remember
        segments = [window for segment in segments for window in single_windows(segment)]

    def nearest(own: Tensor, batch: slice, keys: slice) -> tuple[Tensor, Tensor] | None:
        if isinstance(context, SharedMemory):
            return context.attend(own, batch, keys, scale)
        if search is None or keys.stop - keys.start <= search.top_k:
            return None
        assert isinstance(context, KeyValueCache)
        return attention_over_nearest(own, context, keys, scale, batch)

    return _forward(q, q_local, rotated, value, first, remembered, segments, scale, backend, nearest)[0]


def memory_attention_naive(
    q: Tensor,
    rotated: Tensor,
    key: Tensor | None,
    value: Tensor,
    segments: Sequence[Segment],
    scale: float,
    q_local: Tensor | None = None,
) -> Tensor:
    """The same with dense scores of all S keys as local ones and as memory, and masks for what a segment leaves out."""
    B, T, H, _ = q.shape
    L, (S, G) = rotated.shape[1], value.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    local, memory = (torch.zeros(B, T, count, dtype=torch.bool, device=q.device) for count in (L, S))
    for rows, local_keys, memory_keys, batch, steps in segments:
        own = local_keys.stop - rows.stop
        begins = [local_keys.start] * (rows.stop - rows.start)
        remembered = [memory_keys] * len(begins)
        if steps:
            begins = [step.local for step in steps for _ in range(step.rows)]
            if memory_keys != NOTHING:
                remembered = [slice(step.memory, step.local) for step in steps for _ in range(step.rows)]
        for t, begin, past in zip(range(rows.start, rows.stop), begins, remembered, strict=True):
            local[batch, t, begin - (S - L) : own + t + 1 - (S - L)] = True
            memory[batch, t, past] = True
    values = torch.cat([value, value[:, S - L :]], 1)
    raw = torch.zeros_like(value) if key is None else key
    raw, rotated, values = (x.to(wide).repeat_interleave(H // G, dim=2) for x in (raw, rotated, values))
    pairs = ((q, raw), (q if q_local is None else q_local, rotated))
    scores = torch.cat([torch.einsum("bthk,bshk->bhts", a.to(wide), b) for a, b in pairs], 3) * scale
    scores = scores.masked_fill(~torch.cat([memory, local], 2)[:, None], -torch.inf)
    return torch.einsum("bhts,bshk->bthk", scores.softmax(-1), values).to(q.dtype)


class _MemoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        rotated: Tensor,
        key: Tensor | None,
        value: Tensor,
        segments: list[Segment],
        scale: float,
        backend: str,
    ) -> Tensor:
        q, rotated, value = (dense_heads(x) for x in (q, rotated, value))
        key = None if key is None else dense_heads(key)

        def remembered(batch: slice, keys: slice) -> Iterable[tuple[Tensor, Tensor]]:
            assert key is not None
            return [(key[batch, keys], value[batch, keys])]

        first = value.shape[1] - rotated.shape[1]
        out, lse = _forward(q, q, rotated, value[:, first:], first, remembered, segments, scale, backend)
        ctx.options = segments, scale, backend
        ctx.save_for_backward(q, rotated, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, rotated, key, value, out, lse = ctx.saved_tensors
        segments, scale, backend = ctx.options
        dout, first = dense_heads(dout), value.shape[1] - rotated.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        options: dict[str, Any] = {"scale": scale, "window": None, "backend": backend}
        per_slice = KEYS_PER_SLICE_CUDA if q.is_cuda else KEYS_PER_SLICE
        dq, drotated, dvalue = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, rotated, value))
        dkey = None if key is None else torch.zeros(key.shape, dtype=wide, device=key.device)
        for rows, local, memory, batch, _ in segments:
            at = batch, rows
            given = dout[at], q[at]
            merged = out[at], lse[batch, :, rows]
            at_rotated, at_local = (batch, _moved(local, -first)), (batch, local)
            parts, count = _local_parts(rows, local, backend)
            dq[at] += backward_by_parts(
                *given, rotated[at_rotated], value[at_local], *merged, drotated[at_rotated], dvalue[at_local],
                Rows(count), parts=parts, **options,
            )  # fmt: skip
            if memory == NOTHING:
                continue
            assert key is not None and dkey is not None
            at_memory, (parts, count) = (batch, memory), _memory_parts(rows, memory.stop - memory.start)
            dq[at] += backward_by_parts(
                *given, key[at_memory], value[at_memory], *merged, dkey[at_memory], dvalue[at_memory],
                Rows(count), parts=parts, keys_per_slice=per_slice, **options,
            )  # fmt: skip
        dkey = None if dkey is None else dkey.to(key.dtype)
        return dq.to(q.dtype), drotated.to(q.dtype), dkey, dvalue.to(q.dtype), None, None, None


def _forward(
    q: Tensor,
    q_local: Tensor,
    rotated: Tensor,
    local_value: Tensor,
    first: int,
    remembered: Remembered,
    segments: Sequence[Segment],
    scale: float,
    backend: str,
    nearest: Nearest | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, K) in q's dtype, lse (B, H, T) in fp32 or wider); local keys and values begin with key `first`."""
    B, T, H, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    options: dict[str, Any] = {"scale": scale, "window": None, "backend": backend}
    out, all_lse = torch.empty_like(q), torch.empty((B, H, T), dtype=wide, device=q.device)
    for segment in segments:
        rows, local, memory, batch, steps = segment
        own, at_local = q[batch, rows], (batch, _moved(local, -first))
        given = q_local[batch, rows], rotated[at_local], local_value[at_local]
        if steps:
            edge = local_edge(segment, q.device)
            y, lse = forward_by_parts(*given, edge.seen, parts=edge.parts, **options)
        else:
            parts, count = _local_parts(rows, local, backend)
            y, lse = forward_by_parts(*given, Rows(count), parts=parts, **options)
        found = None if memory == NOTHING or nearest is None else nearest(own, batch, memory)
        if found is not None:
            y = y.to(wide)
            _merge(y, lse, *found)
        elif memory != NOTHING:
            y = y.to(wide)
            for edge in memory_edges(segment, q.device) if steps else ():
                at = edge.rows
                key, value = (torch.cat(x, 1) for x in zip(*remembered(batch, edge.keys), strict=True))
                more = forward_by_parts(own[:, at], key, value, edge.seen, parts=edge.parts, **options)
                _merge(y[:, at], lse[:, :, at], *more)
            for key, value in remembered(batch, remembered_by_all(segment)):
                parts, count = _memory_parts(rows, key.shape[1])
                _merge(y, lse, *forward_by_parts(own, key, value, Rows(count), parts=parts, **options))
        out[batch, rows] = y.to(q.dtype)
        all_lse[batch, :, rows] = lse
    return out, all_lse


def _merge(y: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Makes one softmax over all of two over different keys; y and lse are changed."""
    both = torch.logaddexp(lse, part_lse)
    weight, part_weight = ((x - both).exp().transpose(1, 2)[..., None] for x in (lse, part_lse))
    y *= weight
    y += part_weight * part
    lse.copy_(both)


def _local_parts(rows: slice, local: slice, backend: str) -> tuple[list[Part], int]:
    R, S = rows.stop - rows.start, local.stop - local.start
    if R == 1:  # it sees all of them: one call in place of two
        return _memory_parts(rows, S)
    return causal_parts(R, S, None, None, backend), S


def _memory_parts(rows: slice, keys: int) -> tuple[list[Part], int]:
    return [Part(slice(0, rows.stop - rows.start), slice(0, keys), "all")], keys


def _moved(keys: slice, by: int) -> slice:
    return slice(keys.start + by, keys.stop + by)
