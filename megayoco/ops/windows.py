"""Which tokens a query of memory attention sees locally: its window. What lies before it is memory.

Training counts windows off a fixed grid. Inference may choose: a rule says for every token where its window begins, so
the tokens of a chunk can be computed at once, however a text is cut into chunks.

Indices count the tokens of a row from 0; below 0 stands padding, which sees the padding of its chunk only. Columns
count padding, too.
Source: Focused Transformer (LongLLaMA), arXiv 2307.03170, and the inference of its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol


class Span(NamedTuple):
    """Neighbouring tokens that share a window."""

    start: int
    """Index of the first."""
    stop: int
    begin: int
    """Index of the first token of their window, at most `start`."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows of a chunk."""

    rows: tuple[tuple[Span, ...], ...]
    """Spans that cover the chunk, of each row, or once for all of them."""
    next_begin: tuple[int, ...]
    """Per entry of `rows`: the earliest index that a later token may see locally."""
    overlap: bool = False
    """Whether a token can be in two windows."""
    capacity: int | None = None
    """Tokens in front of a window that are remembered; None: all."""

    def remembered_from(self, begin: int) -> int:
        """Index of the first token that queries of the window from `begin` on remember."""
        return 0 if self.capacity is None else max(begin - self.capacity, 0)

    def needed(self, remembers: bool) -> int:
        """Tokens, the last ones so far, that later queries may see; the most of all rows."""
        first = self.remembered_from if remembers else int
        counts = (row[-1].stop - first(begin) for row, begin in zip(self.rows, self.next_begin, strict=True))
        return max(0, *counts)


class WindowRule(Protocol):
    """Gives the windows of a chunk."""

    def windows(self, firsts: Sequence[int], length: int) -> Windows:
        """The windows of a chunk of `length` tokens, the first of which have the indices `firsts`, one per row or one
        for all."""


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """Whenever a window of `window` tokens is full, its `evicted` oldest tokens leave it.

    evicted = window is the grid of training, 1 a sliding window. A token's window depends on its index alone.
    """

    window: int
    evicted: int
    capacity: int | None = None

    def begin(self, index: int) -> int:
        """Index of the first token of a token's window."""
        return max(-((self.window - 1 - index) // self.evicted), 0) * self.evicted

    def windows(self, firsts: Sequence[int], length: int) -> Windows:
        return Windows(
            rows=tuple(self._spans(first, first + length) for first in firsts),
            next_begin=tuple(self.begin(first + length) for first in firsts),
            overlap=self.evicted < self.window,
            capacity=self.capacity,
        )

    def _spans(self, first: int, stop: int) -> tuple[Span, ...]:
        spans = [Span(first, min(stop, 0), first)] if first < 0 else []
        index = max(first, 0)
        while index < stop:
            begin = self.begin(index)
            spans.append(Span(index, min(begin + self.window, stop), begin))
            index = spans[-1].stop
        return tuple(spans)


class PromptWindows(NamedTuple):
    """Windows that depend on how long a prompt is, as in the inference of the released code: between two prompts.

    All tokens of a prompt but the last `last_context` are cut into windows; these last ones are a window of their own.
    A piece joins the tokens of the open window if both fit into `window`, else all of these become memory. Before the
    first prompt nothing is open, and every piece begins anew. Windows are cut at the same columns in all rows.
    """

    window: int
    last_context: int
    begin: int = 0
    """Column of the first token of the open window."""
    planned: tuple[Span, ...] = ()
    """Columns of announced tokens that are yet to come."""
    capacity: int | None = None

    @property
    def waiting(self) -> int:
        """Announced tokens that are yet to come."""
        return self.planned[-1].stop - self.planned[0].start if self.planned else 0

    def announce(self, length: int, count: int) -> PromptWindows:
        """The next `count` tokens, behind `length` columns, are one prompt. Raises ValueError while another waits."""
        if self.planned:
            raise ValueError(f"a prompt was announced, and {self.waiting} of its tokens are yet to come")
        before = max(count - self.last_context, 0)
        cuts = [*range(0, before, self.window), before, count]
        begin, spans = self.begin, []
        for start, stop in pairwise(cuts):
            if length == 0 or length + stop - begin > self.window:
                begin = length + start
            spans.append(Span(length + start, length + stop, begin))
        return self._replace(planned=tuple(spans))

    def take(self, length: int, count: int) -> tuple[ColumnWindows, PromptWindows]:
        """The windows of the next `count` columns behind `length`, and what follows; unless announced, they are a
        prompt. Raises ValueError for more than were announced."""
        state = self if self.planned else self.announce(length, count)
        if count > state.waiting:
            raise ValueError(f"{count} tokens come, but only {state.waiting} of the announced prompt are missing")
        end = length + count
        taken = [Span(span.start, min(span.stop, end), span.begin) for span in state.planned if span.start < end]
        left = [Span(max(span.start, end), span.stop, span.begin) for span in state.planned if span.stop > end]
        right = state._replace(begin=taken[-1].begin, planned=tuple(left))
        # tokens that will open a window of their own see nothing of this one
        return ColumnWindows(length, tuple(taken), left[0].begin if left else right.begin, self.capacity), right


class ColumnWindows(NamedTuple):
    """Windows that begin at the same columns in all rows."""

    first: int
    """The chunk's first column."""
    spans: tuple[Span, ...]
    next_begin: int
    capacity: int | None = None

    def windows(self, firsts: Sequence[int], length: int) -> Windows:
        return Windows(
            rows=tuple(self._shifted(self.first - first) for first in firsts),
            next_begin=tuple(max(self.next_begin - (self.first - first), 0) for first in firsts),
            capacity=self.capacity,
        )

    def _shifted(self, padding: int) -> tuple[Span, ...]:
        """By index, for a row that begins with so much padding."""
        end, first = self.spans[-1].stop, self.first
        spans = [Span(first - padding, min(end - padding, 0), first - padding)] if first < padding else []
        for span in self.spans:
            if span.stop > padding:
                start, stop, begin = (max(column - padding, 0) for column in span)
                spans.append(Span(start, stop, begin))
        return tuple(spans)
