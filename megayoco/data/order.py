"""Orders with random access and without arrays: a keyed permutation, keyed numbers, and the interleaving of weighted
sources.

All are functions of their arguments alone, in integers or in a fixed sequence of float64 operations: the same on every
machine and with every version of numpy, so a run that is resumed years later reads on in the same order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_MASK = 2**64 - 1
_ROUNDS = 10
"""With 6, numbers of a small permutation would keep their neighbours 10 % too often; with 10, nothing is measurable."""
_GOLDEN = (math.sqrt(5) - 1) / 2


class Permutation:
    """A permutation of 0..size - 1 that is fixed by its key.

    A Feistel network over pairs of numbers below ceil(sqrt(size)); what lands beyond the size goes round again ("cycle
    walking", rare: fewer than 2 sqrt(size) of the pairs lie beyond it).

    Args:
        size: > 0.
        key: anything with a stable repr; other keys give other permutations.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
    """

    def __init__(self, size: int, *key: Any):
        if size <= 0:
            raise ValueError(f"a permutation of {size} numbers")
        self.size = size
        self._half = math.isqrt(size - 1) + 1
        digest = hashlib.shake_256(repr(key).encode()).digest(8 * _ROUNDS)
        self._keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]

    def __getitem__(self, number: int) -> int:
        """Where `number` goes."""
        if not 0 <= number < self.size:
            raise IndexError(f"{number} is not among {self.size}")
        number = self._network(number)
        while number >= self.size:
            number = self._network(number)
        return number

    def array(self, block: int = 1 << 14) -> np.ndarray:
        """The whole permutation, (size,) int64."""
        result = np.empty(self.size, np.int64)
        for first in range(0, self.size, block):  # blocks that fit into the processor's cache
            result[first : first + block] = self.part(first, min(first + block, self.size))
        return result

    def part(self, first: int, end: int) -> np.ndarray:
        """Where the numbers first .. end - 1 go, (end - first,) int64."""
        if not 0 <= first <= end <= self.size:
            raise IndexError(f"{first} to {end} are not among {self.size}")
        x = self._network(np.arange(first, end, dtype=np.uint64))
        while (outside := x >= self.size).any():
            x[outside] = self._network(x[outside])
        return x.astype(np.int64)

    def _network(self, x: Any) -> Any:
        """One pass, for a Python integer or an array of uint64, in which products wrap as the mask makes them wrap."""
        half = self._half
        left, right = x // half, x % half
        for key in self._keys:
            mixed = right ^ key  # the finalizer of splitmix64
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
            # the upper half of the bits, scaled to 0..half - 1
            left, right = right, (left + (((mixed >> 32) * half) >> 32)) % half
        return left * half + right


def drawn(size: int, *key: Any) -> int:
    """A number of 0..size - 1, each as likely as the others, that is fixed by `key` (anything with a stable repr)."""
    digest = hashlib.shake_256(repr(key).encode()).digest(16)
    return int.from_bytes(digest, "little") * size >> 128


class BlendOrder:
    """The endless interleaving of sources by weight; any item can be asked for, at constant memory.

    Time runs at one item per unit. A source of share w (all shares sum to 1) gives its item j at time (j + u) / w, with
    an offset 0 <= u < 1 of its own: it is never more than one item from its share of the time. The offsets are spread
    evenly, so that many small sources do not come all at once. Items are sorted by time, equal times by source number.

    So the order is a function of the weights alone, and every prefix of it is the order of a shorter run.

    Args:
        weights: of the sources, each > 0; need not sum to 1.
    """

    def __init__(self, weights: Sequence[float]):
        shares = np.asarray(weights, np.float64)
        if not len(shares) or not (np.isfinite(shares).all() and (shares > 0).all()):
            raise ValueError(f"weights {weights} must be positive numbers")
        self.shares = shares / shares.sum()
        self._offsets = (0.5 + _GOLDEN * np.arange(len(shares))) % 1
        self._span = max(4096, 4 * len(shares))
        self._block: tuple[int, int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, number: int) -> tuple[int, int]:
        """(source, item of that source) at place `number` >= 0."""
        if number < 0:
            raise IndexError(f"item {number} of a blend")
        block = self._block
        if block is None or not block[0] <= number < block[1]:
            block = self._block = self._sorted_block(number)
        place = number - block[0]
        return int(block[2][place]), int(block[3][place])

    def counts(self, time: float) -> np.ndarray:
        """(sources,) int64: items of each source before a time.

        The one definition of what lies in which block: it rises with the time whatever the rounding, so no item is lost
        or given twice at the border of two blocks.
        """
        return np.maximum(np.ceil(self.shares * time - self._offsets), 0).astype(np.int64)

    def _sorted_block(self, number: int) -> tuple[int, int, np.ndarray, np.ndarray]:
        """First place, end, sources and items of the block of `number`: what falls into one span of time."""
        span = self._span
        n = number // span  # the items before a time are its number, give or take the number of sources
        while self.counts(n * span).sum() > number:
            n -= 1
        while self.counts((n + 1) * span).sum() <= number:
            n += 1
        first, last = self.counts(n * span), self.counts((n + 1) * span)
        lengths = last - first
        sources = np.repeat(np.arange(len(lengths)), lengths)
        items = np.arange(len(sources)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + first[sources]
        order = np.lexsort((sources, (items + self._offsets[sources]) / self.shares[sources]))
        start = int(first.sum())
        return start, start + len(order), sources[order], items[order]
