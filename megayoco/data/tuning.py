"""Samples of instruction and chat tuning: one example each, filled up to the sequence length.

Shapes: N sequence length, n <= N tokens of an example, P = N - n tokens that fill it up.

The sample holds p of the P in front of the example and the rest behind it, with 0 <= p <= P drawn from the seed and the
sample's number. What stands in front is a document of its own (`Sample.padding`), so nothing sees it; nothing looks at
what stands behind. The windows of memory layers begin at the first token of the sample, padding or not, so that a
random part of the text lies in the memory. Targets are shifted across the borders of windows.

Which source a sample is of is drawn by seed and number; it is example i mod E of the source's E, i the sample's number,
in an order that is another one in each round of E.
Source: instruction and chat tuning of LongLLaMA (arXiv 2307.03170, released code).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from megayoco.data.order import Permutation, drawn
from megayoco.data.samples import Sample
from megayoco.data.tuning_cache import Examples

PAD = 0
"""Id of what fills samples up: any would do, since nothing sees it and it is no target."""


class TuningSamples:
    """Training samples of several sources, without end.

    Args:
        sources: the examples of each, of at most N tokens.
        weights: of the sources.
        sequence_length: N.
        seed: of sources, order and padding.
        random_padding: else all of it stands behind the example.
    """

    def __init__(
        self,
        sources: Sequence[Examples],
        weights: Sequence[float],
        *,
        sequence_length: int,
        seed: int,
        random_padding: bool,
    ):
        self._sources, self._length, self._seed, self._random = list(sources), sequence_length, seed, random_padding
        self._shares = [total / sum(weights) for total in accumulate(weights)]
        self._orders: dict[int, tuple[int, Permutation]] = {}

    def __getitem__(self, number: int) -> Sample:
        """Sample `number` >= 0."""
        ids, labelled = self._sources[self.source_of(number)][self.example_of(number)]
        room = self._length - len(ids)
        return filled_up(
            ids, labelled, self._length, drawn(room + 1, "padding", self._seed, number) if self._random else 0
        )

    def source_of(self, number: int) -> int:
        """The source that sample `number` is of."""
        if len(self._sources) == 1:
            return 0
        share = drawn(1 << 52, "source", self._seed, number) / (1 << 52)
        return min(bisect_right(self._shares, share), len(self._shares) - 1)

    def example_of(self, number: int) -> int:
        """The example of that source that it is."""
        source = self.source_of(number)
        size = len(self._sources[source])
        round_, place = divmod(number, size)
        known = self._orders.get(source)
        if known is None or known[0] != round_:
            known = self._orders[source] = round_, Permutation(size, "examples", self._seed, source, round_)
        return known[1][place]


class TuningValidation:
    """The examples of all sources, each once, in a fixed random order; repeated without end. Arguments as above."""

    def __init__(self, sources: Sequence[Examples], *, sequence_length: int, seed: int, random_padding: bool):
        self._sources, self._length, self._seed, self._random = list(sources), sequence_length, seed, random_padding
        self._ends = list(accumulate(map(len, sources)))
        self.num_samples = self._ends[-1]
        self._order = Permutation(self.num_samples, "validation examples", seed)

    def __getitem__(self, number: int) -> Sample:
        """Sample `number` >= 0, the same again after num_samples."""
        number = self._order[number % self.num_samples]
        source = bisect_right(self._ends, number)
        ids, labelled = self._sources[source][number - (self._ends[source - 1] if source else 0)]
        room = self._length - len(ids)
        padding = drawn(room + 1, "validation padding", self._seed, number) if self._random else 0
        return filled_up(ids, labelled, self._length, padding)


def filled_up(ids: np.ndarray, labelled: np.ndarray, length: int, padding: int) -> Sample:
    """An example of n tokens as a sample of `length`: `padding` in front, what is left behind it.

    Args:
        ids: (n,) int64.
        labelled: (n,) bool, what is learned; the first token never is, since nothing foretells it.
    """
    n = len(ids)
    tokens = np.full(length + 1, PAD, np.int64)
    tokens[padding : padding + n] = ids
    targets = np.zeros(length, bool)
    targets[padding : padding + n - 1] = labelled[1:]
    return Sample(
        tokens=tokens, borders=np.zeros(0, np.int64), num_targets=padding + n - 1, padding=padding, labelled=targets
    )
