"""Samples from a dataset: any number of them, each found from its number alone.

Shapes: N sequence length; a sample is N + 1 consecutive tokens; L tokens of an epoch.

The sequences of a dataset, permuted, are one circular stream of L tokens. Sample k of the stream is its tokens k N to
(k + 1) N, so neighbours share a token, every token is a target once per round, and no rest of an epoch is dropped: the
sample at the end goes on at the beginning, where the next round cuts at other places. The samples of each round are
permuted among themselves. So training sample n is a function of seed, N and data, never of how many a run asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypedDict

import numpy as np

from megayoco.data.cache import Places
from megayoco.data.order import BlendOrder, Permutation
from megayoco.data.token_file import TokenFile


class _Tokens(TypedDict):
    tokens: np.ndarray
    borders: np.ndarray
    num_targets: int


class Sample(_Tokens, total=False):
    """What a sequence of a batch is made of.

    tokens (N + 1,) int64; borders (n,) int64, ascending in 1..N: where a new document begins within the sample;
    num_targets: how many of the N targets, from the first on, belong to it; what follows is padding.

    Of examples for tuning only: padding, how many tokens in front fill the sample up, which the others must not see;
    labelled (N,) bool, which of the targets take a loss.
    """

    padding: int
    labelled: np.ndarray


class SampleSource(Protocol):
    """Samples by number, without end."""

    def __getitem__(self, number: int) -> Sample: ...


class FiniteSource(SampleSource, Protocol):
    """A set of `num_samples` samples, repeated without end."""

    num_samples: int


class TokenStream:
    """The tokens of a dataset in the order of `places`, around and around.

    Args:
        places: the order; at least one token.
        vocab_size: every id must be below it: files are too large to look at each before training.
    """

    def __init__(self, places: Places, vocab_size: int):
        self.num_tokens = places.num_tokens
        self._places = places
        self._file = TokenFile(places.prefix, places.dtype, vocab_size)

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens from token `start` of the stream, 0 <= start < num_tokens.

        Returns:
            tokens (count,) int64, and borders (n,) int64, ascending in 1..count - 1: where a sequence begins.

        Raises:
            UserError: an id lies outside the vocabulary, or the file has become shorter.
        """
        pieces: list[tuple[int, int]] = []
        borders, filled = [], 0
        while filled < count:
            take = min(count - filled, self.num_tokens - start)
            begins, found = self._pieces(start, take)
            pieces += found
            borders.append(filled + begins)
            filled, start = filled + take, 0
        return self._file.read(pieces), np.concatenate(borders)[1:]

    def _pieces(self, start: int, count: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Where sequences begin among tokens start .. start + count <= num_tokens, the first of which counts as a
        beginning; and (place in the file, tokens) of each."""
        ends = self._places.ends
        first, last = np.searchsorted(ends, [start, start + count - 1], "right").tolist()
        borders = np.concatenate([[start], ends[first:last], [start + count]])
        lengths = borders[1:] - borders[:-1]
        places = self._places.starts[first : last + 1].copy()
        places[0] += start - (int(ends[first - 1]) if first else 0)
        return borders[:-1] - start, list(zip(places.tolist(), lengths.tolist(), strict=True))


class TrainingSource:
    """The samples of one dataset for training, epoch after epoch.

    Args:
        stream: at least one sample long.
        sequence_length: N.
        seed: of the order of the samples.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, seed: int):
        self.tokens_per_epoch = stream.num_tokens
        self._stream, self._length, self._seed = stream, sequence_length, seed
        self._epoch: tuple[int, int, Permutation] | None = None

    def __getitem__(self, number: int) -> Sample:
        """Sample `number` >= 0. Raises UserError as TokenStream.read does."""
        N, L = self._length, self.tokens_per_epoch
        start = self._permuted(number) * N % L
        tokens, borders = self._stream.read(start, N + 1)
        return Sample(tokens=tokens, borders=borders, num_targets=N)

    def _permuted(self, number: int) -> int:
        """The number in the stream of the sample that comes at place `number`."""
        N, L = self._length, self.tokens_per_epoch
        epoch = number * N // L
        if self._epoch is None or self._epoch[0] != epoch:
            # the samples that begin within round `epoch` of the stream: L / N of them, rounded up or down
            first, end = -(-epoch * L // N), -(-(epoch + 1) * L // N)
            self._epoch = epoch, first, Permutation(end - first, "samples", self._seed, L, epoch)
        _, first, permutation = self._epoch
        return first + permutation[number - first]


class ValidationSource:
    """The samples of one dataset for validation: every token but the first is a target exactly once.

    The last sample is padded with targets that do not count. The order is fixed and permuted, so that any number of
    samples from its beginning stands for the whole.

    Args:
        stream: at least two tokens.
        sequence_length: N.
        seed: of the order.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, seed: int):
        self.num_samples = -(-(stream.num_tokens - 1) // sequence_length)
        self._stream, self._length = stream, sequence_length
        self._order = Permutation(self.num_samples, "validation", seed, stream.num_tokens)

    def __getitem__(self, number: int) -> Sample:
        """Sample `number` >= 0, the same again after num_samples. Raises UserError as TokenStream.read does."""
        N = self._length
        start = self._order[number % self.num_samples] * N
        count = min(N + 1, self._stream.num_tokens - start)
        tokens, borders = self._stream.read(start, count)
        return Sample(tokens=np.pad(tokens, (0, N + 1 - count)), borders=borders, num_targets=count - 1)


class Blend:
    """Several sources interleaved by weight, see BlendOrder: each is read in its own order, without gaps."""

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float]):
        self.sources = list(sources)
        self.order = BlendOrder(weights)

    def __getitem__(self, number: int) -> Sample:
        """Sample `number` >= 0."""
        source, item = self.order[number]
        return self.sources[source][item]


class ValidationBlend(Blend):
    """As many samples as the sources have together. Weighted by their sizes, that is each sample once."""

    def __init__(self, sources: Sequence[FiniteSource], weights: Sequence[float]):
        super().__init__(sources, weights)
        self.num_samples = sum(source.num_samples for source in sources)
