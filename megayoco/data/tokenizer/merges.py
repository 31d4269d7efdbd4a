"""How byte-level BPE makes each of its tokens: the one merge that makes it last, found for whole vocabularies at once.

A vocabulary of ranks (tiktoken) merges any two neighbours whose bytes together are a token, the lowest rank first, the
leftmost of these. A list of merges (tokenizers) names the pairs. The two meet in one fact. Whatever stands around the
bytes of a token t, as long as nothing is merged across their borders, they go as they go alone; so when t appears, it
is made of the pair that makes it when its bytes stand alone, its *last merge*: there is only one state with two parts.
Merges of t from other pairs never happen.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

_BASE = np.uint64(0x9E3779B97F4A7C15)


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The parts of a token's bytes before it would be made: two, or more if no merge makes it.

    Args:
        token: two bytes or more.
        ranks: token bytes -> rank; all single bytes are tokens.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b) for a, b in pairwise(parts)]
        rank = min((rank for rank in pairs if rank is not None), default=None)
        if rank is None:
            break
        at = pairs.index(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def last_merges(tokens: Sequence[bytes], pairs: np.ndarray, products: np.ndarray) -> np.ndarray:
    """For every token the number of the pair that is its last merge, of those given; `last_merge` for all at once.

    A pair (a, b) is the last merge of t unless something is merged across the border between a and b before. What
    stands left of the border is in turn every tail of a that is a part of it (a, its second part, that one's second
    part, ...), each from its own rank on until its parent's; likewise on the right. Two neighbours of them that live
    at the same time are merged if their bytes are a token whose rank comes before both parents.

    Args:
        tokens: n tokens by rank, the 256 single bytes first.
        pairs: (m, 2) integers, places in `tokens`.
        products: (m,), place of the token that the two make.

    Returns:
        (n,) int64: a row of `pairs`, or -1 where none of the rows is the last merge. Single bytes have -1.
    """
    n = len(tokens)
    length = np.array([len(token) for token in tokens], np.int64)
    power = np.full(length.max() + 1, _BASE, np.uint64)
    power[0] = 1
    power = power.cumprod()
    digest = _digests(tokens, length, power)
    by_digest = digest.argsort()
    digests = digest[by_digest]

    def rank_of_both(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Rank of the token that x and y make, n if they make none."""
        wanted = digest[x] * power[length[y]] + digest[y]
        at = np.minimum(digests.searchsorted(wanted), n - 1)
        return np.where(digests[at] == wanted, by_digest[at], n)

    born = np.where(length == 1, -1, np.arange(n))
    first, second = np.full((2, n), -1)
    known = length == 1
    found = np.full(n, -1)
    # parts are shorter than their token, so that they are known before it
    by_length = length[products].argsort(kind="stable")
    groups = np.split(by_length, np.flatnonzero(np.diff(length[products][by_length])) + 1)
    for rows in groups if len(by_length) else ():
        (a, b), t = pairs[rows].T, products[rows]
        usable = known[a] & known[b] & (born[a] < t) & (born[b] < t)
        rows, a, b, t = rows[usable], a[usable], b[usable], t[usable]
        crossed = np.zeros(len(rows), bool)
        at, x, y, x_ends, y_ends = np.arange(len(rows)), a, b, t, t
        while True:
            both_bytes = (born[x] < 0) & (born[y] < 0)
            more = ~(crossed[at] | both_bytes)
            at, x, y, x_ends, y_ends = at[more], x[more], y[more], x_ends[more], y_ends[more]
            if not len(at):
                break
            # back in time: the younger of the two gives way to its part; of equals the left one was first
            down = born[x] > born[y]
            x_ends, y_ends = np.where(down, born[x], x_ends), np.where(down, y_ends, born[y])
            x, y = np.where(down, second[x], x), np.where(down, y, first[y])
            both = rank_of_both(x, y)
            time = np.maximum(both, np.maximum(born[x], born[y]))
            # at equal rank the left pair goes first: a parent of x before the two, a parent of y after them
            crossed[at] |= (both < n) & (time < x_ends) & (time <= y_ends)
        rows, a, b, t = rows[~crossed], a[~crossed], b[~crossed], t[~crossed]
        found[t], first[t], second[t], known[t] = rows, a, b, True
    return found


def _digests(tokens: Sequence[bytes], length: np.ndarray, power: np.ndarray) -> np.ndarray:
    """(n,) uint64: a polynomial of the bytes, modulo 2**64. Two tokens with one value would only cost a last merge."""
    data = np.frombuffer(b"".join(tokens), np.uint8).astype(np.uint64) + np.uint64(1)
    ends = length.cumsum()
    exponent = np.repeat(ends, length) - 1 - np.arange(len(data))
    return np.add.reduceat(data * power[exponent], ends - length)
