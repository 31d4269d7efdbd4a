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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megayoco.ops.attention import causal_parts
from megayoco.ops.attention_parts import MASKED_ROWS, Part, Rows, backward_by_parts, dense_heads, forward_by_parts
from megayoco.ops.attention_store import KEYS_PER_SLICE, KEYS_PER_SLICE_CUDA
from megayoco.ops.backends import attention_backend
from megayoco.ops.key_value_cache import KeyValueCache
from megayoco.ops.key_values import KeyValues
from megayoco.ops.memory_search import attention_over_nearest
from megayoco.ops.windows import Span, Windows

NOTHING = slice(0, 0)

Remembered = Callable[[slice, slice], Iterable[tuple[Tensor, Tensor]]]
"""(batch entries, key numbers) -> keys and values (B', S', G, K) of these, piece by piece."""
Nearest = Callable[[Tensor, slice, slice], tuple[Tensor, Tensor] | None]
"""(queries (B', R, H, K), batch entries, key numbers) -> attention over some of these keys and its log-sum-exp, both in
fp32 or wider. None: all of them are to be read."""


class Step(NamedTuple):
    """Queries of one window among those of a segment with several."""

    rows: int
    """How many."""
    local: int
    """Number of the first key that they see locally."""
    memory: int
    """Number of the first key that they remember; the last one is in front of `local`."""


class Segment(NamedTuple):
    """Queries and the keys that they see, all of one window unless there are steps."""

    rows: slice
    """Queries of the chunk."""
    local: slice
    """Keys of the window; its last ones are the queries' own, so the mask is causal and aligned bottom-right."""
    memory: slice
    """Keys that all of the queries remember, or with steps some of them."""
    batch: slice = slice(None)
    steps: tuple[Step, ...] = ()
    """The windows of the queries where there are several, ascending; only in inference."""


def window_segments(
    windows: Windows, row: int, queries: int, keys: int, *, remembers: bool, batch: slice = slice(None)
) -> list[Segment]:
    """The segments of a chunk that sees the sequence before it.

    Args:
        windows: of the chunk.
        row: which of their rows.
        queries, keys: T and S.
        remembers: whether a query sees what is before its window.
        batch: the entries of the batch that this holds for.

    Raises:
        ValueError: keys that a query sees are not there.
    """
    spans = windows.rows[row]
    first = spans[0].start
    origin = keys - queries - first  # the number of the key at index 0
    segments = []
    for group in _groups(spans) if windows.overlap else [[span] for span in spans]:
        begin, stop = group[0].begin, group[-1].stop
        earliest = windows.remembered_from(begin) if remembers and begin > 0 else begin
        if origin + earliest < 0:
            missing = -(origin + earliest)
            raise ValueError(f"the context of {keys - queries} tokens before index {first} lacks {missing} of them")
        memory = NOTHING
        if remembers and group[-1].begin > 0:
            memory = slice(origin + earliest, origin + group[-1].begin)
        steps: tuple[Step, ...] = ()
        if len(group) > 1:
            steps = tuple(
                Step(span.stop - span.start, origin + span.begin, origin + windows.remembered_from(span.begin))
                for span in group
            )
        rows, local = slice(group[0].start - first, stop - first), slice(origin + begin, origin + stop)
        segments.append(Segment(rows, local, memory, batch, steps))
    return segments


def _groups(spans: Sequence[Span]) -> list[list[Span]]:
    """Neighbouring windows of few queries together, up to MASKED_ROWS of them; padding by itself."""
    groups: list[list[Span]] = []
    for span in spans:
        joins = groups and groups[-1][0].start >= 0 and span.stop - groups[-1][0].start <= MASKED_ROWS
        if joins:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def cross_batch_segments(samples: int, length: int, window: int, reach: int, stepping: bool) -> list[Segment]:
    """The segments of cross-batch training, for `samples` sequences of `length` tokens laid end to end.

    Window number i of all sees the windows i - 1, ..., i - (n_i - 1) before it, of its own sequence and of others, with
    n_i as in the released code (FoT, "cross-batch"): n = reach + 1; with stepping and k > 1 windows per sequence at
    most (i mod k) ceil(n / (k - 1)) + 1; never more than there are.

    Raises:
        ValueError: length is no multiple of window.
    """
    if length % window:
        raise ValueError(f"sequences of {length} tokens are no packs of windows of {window}")
    pack = length // window
    segments = []
    for i in range(samples * pack):
        seen = reach
        if stepping and pack > 1:
            seen = min(i % pack * -(-(reach + 1) // (pack - 1)), reach)
        seen = min(seen, i)
        own = slice(i * window, (i + 1) * window)
        segments.append(Segment(own, own, slice((i - seen) * window, i * window) if seen else NOTHING))
    return segments


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
    context: KeyValueCache | KeyValues,
    segments: Sequence[Segment],
    scale: float,
) -> Tensor:
    """The same over the tokens of a context, its keys without rotation, and without gradient. The memory is read where
    it lies, never copied; a narrow cache is widened in blocks. Of a memory with a search, the best keys of each query
    are read (memory_search.py).

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
        return [(context.key[batch, keys], context.value[batch, keys])] if keys != NOTHING else []

    if isinstance(context, KeyValueCache):
        first = context.tokens - rotated.shape[1]
        value = context.part(first, context.tokens).value
    else:
        first = context.key.shape[1] - rotated.shape[1]
        value = context.value[:, first:]
    backend = attention_backend(q, None)
    search = context.search if isinstance(context, KeyValueCache) else None
    if search is not None:  # among keys that all queries of a segment remember
        segments = [window for segment in segments for window in _single_windows(segment)]

    def nearest(own: Tensor, batch: slice, keys: slice) -> tuple[Tensor, Tensor] | None:
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
            edge = _local_edge(segment, q.device)
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
            for edge in _memory_edges(segment, q.device) if steps else ():
                at = edge.rows
                key, value = (torch.cat(x, 1) for x in zip(*remembered(batch, edge.keys), strict=True))
                more = forward_by_parts(own[:, at], key, value, edge.seen, parts=edge.parts, **options)
                _merge(y[:, at], lse[:, :, at], *more)
            for key, value in remembered(batch, _remembered_by_all(segment)):
                parts, count = _memory_parts(rows, key.shape[1])
                _merge(y, lse, *forward_by_parts(own, key, value, Rows(count), parts=parts, **options))
        out[batch, rows] = y.to(q.dtype)
        all_lse[batch, :, rows] = lse
    return out, all_lse


def _single_windows(segment: Segment) -> list[Segment]:
    """A segment for each of its windows."""
    if not segment.steps:
        return [segment]
    found, row, own = [], segment.rows.start, segment.local.stop - segment.rows.stop
    for step in segment.steps:
        rows = slice(row, row + step.rows)
        memory = NOTHING
        if segment.memory != NOTHING and step.memory < step.local:
            memory = slice(step.memory, step.local)
        found.append(Segment(rows, slice(step.local, own + rows.stop), memory, segment.batch))
        row = rows.stop
    return found


class _Edge(NamedTuple):
    """Keys of which the queries of several windows see more or less."""

    rows: slice
    """Queries of the segment, each of which sees a key."""
    keys: slice
    seen: Rows

    @property
    def parts(self) -> list[Part]:
        return [Part(slice(0, self.rows.stop - self.rows.start), slice(0, self.seen.keys), "masked")]


def _local_edge(segment: Segment, device: torch.device) -> _Edge:
    """The local keys of a segment with steps."""
    local = segment.local
    first_key = _of_rows(segment, [step.local - local.start for step in segment.steps], device)
    rows = slice(0, segment.rows.stop - segment.rows.start)
    return _Edge(rows, local, Rows(local.stop - local.start, first_key=first_key))


def _remembered_by_all(segment: Segment) -> slice:
    """Keys that all queries of a segment remember."""
    if not segment.steps:
        return segment.memory
    first, last = segment.steps[0], segment.steps[-1]
    return slice(last.memory, first.local) if last.memory < first.local else NOTHING


def _memory_edges(segment: Segment, device: torch.device) -> list[_Edge]:
    """What is left: keys that only the first queries remember, for lack of capacity, and those that only the last ones
    do, because the others see them locally."""
    steps = segment.steps
    middle = _remembered_by_all(segment)
    ends = [(segment.memory.start, middle.start), (middle.stop, segment.memory.stop)]
    if middle == NOTHING:
        ends = [(segment.memory.start, segment.memory.stop)]
    edges = []
    for start, stop in ends:
        seeing = [number for number, step in enumerate(steps) if max(step.memory, start) < min(step.local, stop)]
        if not seeing:
            continue
        counts = [sum(step.rows for step in steps[:number]) for number in (seeing[0], seeing[-1] + 1)]
        rows = slice(*counts)
        first_key = _of_rows(segment, [max(step.memory - start, 0) for step in steps], device)[:, rows]
        index = _of_rows(segment, [min(step.local, stop) - 1 - start for step in steps], device)[:, rows]
        edges.append(_Edge(rows, slice(start, stop), Rows(stop - start, index, first_key)))
    return edges


def _of_rows(segment: Segment, values: Sequence[int], device: torch.device) -> Tensor:
    """(1, R) int64: a value of each step for each of its queries."""
    counts = torch.tensor([step.rows for step in segment.steps])
    return torch.tensor(values).repeat_interleave(counts)[None].to(device)


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
