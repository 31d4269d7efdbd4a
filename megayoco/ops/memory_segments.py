"""Scores of memory attention cut into segments: some queries, the keys of their window, and those that they remember.

Where windows overlap, queries of several short ones share a segment. Of the keys at its edges some of these queries see
more and others less, which masks say.

Shapes: R queries of a segment. Keys are counted from 0 to S - 1, the last of which are the chunk's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megayoco.ops.attention_parts import MASKED_ROWS, Part, Rows
from megayoco.ops.windows import Span, Windows

NOTHING = slice(0, 0)


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


def single_windows(segment: Segment) -> list[Segment]:
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


class Edge(NamedTuple):
    """Keys of which the queries of several windows see more or less."""

    rows: slice
    """Queries of the segment, each of which sees a key."""
    keys: slice
    seen: Rows

    @property
    def parts(self) -> list[Part]:
        return [Part(slice(0, self.rows.stop - self.rows.start), slice(0, self.seen.keys), "masked")]


def local_edge(segment: Segment, device: torch.device) -> Edge:
    """The local keys of a segment with steps."""
    local = segment.local
    first_key = _of_rows(segment, [step.local - local.start for step in segment.steps], device)
    rows = slice(0, segment.rows.stop - segment.rows.start)
    return Edge(rows, local, Rows(local.stop - local.start, first_key=first_key))


def remembered_by_all(segment: Segment) -> slice:
    """Keys that all queries of a segment remember."""
    if not segment.steps:
        return segment.memory
    first, last = segment.steps[0], segment.steps[-1]
    return slice(last.memory, first.local) if last.memory < first.local else NOTHING


def memory_edges(segment: Segment, device: torch.device) -> list[Edge]:
    """What is left: keys that only the first queries remember, for lack of capacity, and those that only the last ones
    do, because the others see them locally."""
    steps = segment.steps
    middle = remembered_by_all(segment)
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
        edges.append(Edge(rows, slice(start, stop), Rows(stop - start, index, first_key)))
    return edges


def _of_rows(segment: Segment, values: Sequence[int], device: torch.device) -> Tensor:
    """(1, R) int64: a value of each step for each of its queries."""
    counts = torch.tensor([step.rows for step in segment.steps])
    return torch.tensor(values).repeat_interleave(counts)[None].to(device)
