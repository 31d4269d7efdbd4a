"""Exact statistics of the lengths of a dataset's sequences, read in blocks: memory stays the same for any number."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class LengthBin:
    """Sequences of `low` to `high` tokens, both included, and the tokens they hold together."""

    low: int
    high: int
    sequences: int
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """Lengths of the sequences in tokens.

    Attributes:
        mean: tokens per sequence.
        quantiles: name in QUANTILES -> the smallest length that this share of the sequences does not exceed.
        half_of_tokens: half of all tokens are in sequences of at least this length.
        bins: 0, 1, 2-3, 4-7, ... from the first to the last that is not empty.
    """

    mean: float
    quantiles: dict[str, int]
    half_of_tokens: int
    bins: list[LengthBin]


def length_statistics(blocks: Callable[[], Iterable[np.ndarray]]) -> Lengths:
    """Exact quantiles and a histogram of lengths that need not fit into memory.

    Args:
        blocks: gives the lengths (n,) int32 >= 0 in parts; called twice.
    """
    by_bits = _Counts(33)  # 0, 1, 2-3, 4-7, ...
    by_upper = _Counts(1 << 16)  # the upper 16 bits: the first of two digits of a quantile
    for lengths in blocks():
        by_bits.add(np.frexp(lengths.astype(np.float64))[1], lengths)
        by_upper.add(lengths >> 16, lengths)
    S, total = int(by_bits.sequences.sum()), int(by_bits.tokens.sum())
    if S == 0:
        return Lengths(0.0, {}, 0, [])
    ranks = {name: max(math.ceil(share * S), 1) for name, share in QUANTILES.items()}
    half = max(total - total // 2, 1)
    uppers = {name: _first_reaching(by_upper.sequences, rank)[0] for name, rank in ranks.items()}
    half_upper = _first_reaching(by_upper.tokens, half)[0] if total else 0
    by_lower = {upper: _Counts(1 << 16) for upper in {*uppers.values(), half_upper}}
    for lengths in blocks():
        for upper, counts in by_lower.items():
            chosen = lengths[lengths >> 16 == upper]
            counts.add(chosen & 0xFFFF, chosen)
    quantiles = {}
    for name, rank in ranks.items():
        upper, before = _first_reaching(by_upper.sequences, rank)
        quantiles[name] = (upper << 16) + _first_reaching(by_lower[upper].sequences, rank - before)[0]
    middle = 0
    if total:
        _, before = _first_reaching(by_upper.tokens, half)
        middle = (half_upper << 16) + _first_reaching(by_lower[half_upper].tokens, half - before)[0]
    used = np.flatnonzero(by_bits.sequences)
    bins = [
        LengthBin(1 << bits >> 1, (1 << bits) - 1, int(by_bits.sequences[bits]), int(by_bits.tokens[bits]))
        for bits in range(int(used[0]), int(used[-1]) + 1)
    ]
    return Lengths(total / S, quantiles, middle, bins)


class _Counts:
    """Sequences (n,) and their tokens (n,), both int64, by one of n classes."""

    def __init__(self, classes: int):
        self.sequences = np.zeros(classes, np.int64)
        self.tokens = np.zeros(classes, np.int64)

    def add(self, of: np.ndarray, lengths: np.ndarray) -> None:
        self.sequences += np.bincount(of, minlength=len(self.sequences))
        # the sum of a block is exact in float64: less than 2**53
        self.tokens += np.bincount(of, lengths.astype(np.float64), len(self.tokens)).astype(np.int64)


def _first_reaching(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The first class at which the counts so far reach `rank`, and what was counted before it."""
    reached = np.cumsum(counts)
    at = int(np.searchsorted(reached, rank))
    return at, int(reached[at] - counts[at])
