"""Memory attention over the k best keys of the memory, for each query and head, in place of all of them.

A remembered key has no rotation and a query the same one for all of them, so that the score is a plain inner product:
the k keys with the largest are found, their scores computed anew in the precision of attention, and the softmax runs
over them alone. The tail that is left out is dropped, as in the paper. With as many keys as there are, it is exact.

The backends of the search:

    exact       matrix products and top-k in torch, block after block of keys
    faiss-flat  the same by Faiss, over a copy of the keys in fp32 in the memory of the CPU
    faiss-hnsw  Faiss's graph (HNSW, arXiv 1603.09320) over such a copy: approximate, without comparing all keys

All query heads of a group search the keys of their key-value head. Faiss has one index per row of the batch and
key-value head; it belongs to the buffer that holds the keys, grows with it, and is shared by all its continuations.

Shapes: B' rows of the batch, R queries, H query heads, g key-value heads, K head dim, k keys per query,
        n = R H / g queries that search the same keys.
Source: Focused Transformer (LongLLaMA), arXiv 2307.03170, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megayoco.errors import UserError
from megayoco.ops.key_value_cache import KeyValueCache
from megayoco.ops.key_value_storage import Buffer

SEARCHES = ("exact", "faiss-flat", "faiss-hnsw")

_NUMBERS = 1 << 24
"""Scores, or numbers of gathered keys, that exist at a time."""
_LONGEST_BLOCK = 1 << 16
"""Keys that are compared, or handed to an index, at a time."""
HNSW_LINKS = 32
"""Neighbours of a key in the graph."""
HNSW_BUILD = 80
"""Candidates for them when a key is added."""
HNSW_WIDTH = 2
"""Candidates of a search: so many times the keys that are wanted."""


@dataclass(frozen=True)
class Search:
    """How the remembered keys of a query are chosen.

    Raises:
        ValueError: fewer than one key, or no such backend.
        UserError: the backend needs Faiss, which is not installed.
    """

    top_k: int
    """Keys per query and head, at least 1. A memory that is not larger is read whole."""

    backend: str = "exact"
    """One of `SEARCHES`."""

    def __post_init__(self) -> None:
        if self.top_k < 1 or self.backend not in SEARCHES:
            raise ValueError(f"top_k {self.top_k} must be at least 1, and {self.backend} one of {SEARCHES}")
        if self.backend != "exact":
            _faiss(self.backend)


def attention_over_nearest(
    q: Tensor, cache: KeyValueCache, keys: slice, scale: float, batch: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that the cache's search finds. Without gradient.

    Args:
        q: (B', R, H, K) in the cache's compute dtype; query head h reads key-value head h // (H // g).
        cache: with a search.
        keys: numbers of the cached tokens to search among; none of them is padding of these rows.
        scale: factor of the scores, positive.
        batch: the rows of the cache that the queries belong to.

    Returns:
        out (B', R, H, K) and the log-sum-exp of the scores (B', H, R), both fp32 or wider; 0 and -inf for a query for
        which an approximate search finds nothing.
    """
    B, R, H, K = q.shape
    assert cache.search is not None
    k = min(cache.search.top_k, keys.stop - keys.start)
    rows = max(_NUMBERS // (B * H * k * K), 1)
    parts = [_nearest_of(q[:, r : r + rows], cache, keys, k, scale, batch) for r in range(0, R, rows)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)


def _nearest_of(
    q: Tensor, cache: KeyValueCache, keys: slice, k: int, scale: float, batch: slice
) -> tuple[Tensor, Tensor]:
    B, R, H, K = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    g = cache.heads
    # the heads of a group are queries of one key-value head
    q_BgnK = q.to(wide).transpose(1, 2).reshape(B, g, -1, K)
    numbers_Bgnk = nearest(q_BgnK, cache, keys, k, batch)
    found = cache.gather(numbers_Bgnk.clamp(min=0).flatten(2), batch)
    key, value = (x.to(wide).unflatten(2, (-1, k)) for x in found)
    scores = torch.einsum("bgnd,bgnkd->bgnk", q_BgnK, key) * scale
    scores.masked_fill_(numbers_Bgnk < 0, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    out = torch.einsum("bgnk,bgnkd->bgnd", (scores - lse).exp().nan_to_num_(0), value)
    return out.reshape(B, H, R, K).transpose(1, 2), lse.reshape(B, H, R)


def nearest(q: Tensor, cache: KeyValueCache, keys: slice, k: int, batch: slice = slice(None)) -> Tensor:
    """(B', g, n, k) int64: the numbers of the cached tokens whose keys have the largest inner products with the
    queries (B', g, n, K), best first; -1 where an approximate search finds fewer.

    Args:
        q: fp32 or float64, on the device of the cache's queries.
        cache: with a search.
        keys: numbers of the cached tokens to search among, at least k of them.
        k: keys per query.
        batch: the rows of the cache that the queries belong to.
    """
    assert cache.search is not None
    if cache.search.backend == "exact":
        return _nearest_exact(q, cache, keys, k, batch)
    parts = [
        _nearest_by_index(q, cache, buffer, slice(first, last), offset, k, batch)
        for buffer, first, last, offset in cache.spans(keys.start, keys.stop)
    ]
    scores, numbers = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    if len(parts) > 1:
        best = scores.topk(k).indices
        numbers = numbers.gather(-1, best)
    return numbers.to(q.device)


def _nearest_exact(q: Tensor, cache: KeyValueCache, keys: slice, k: int, batch: slice) -> Tensor:
    step = min(max(_NUMBERS // q.shape[:3].numel(), k), _LONGEST_BLOCK)
    scores, numbers = q.new_empty(*q.shape[:3], 0), torch.empty(*q.shape[:3], 0, dtype=torch.int64, device=q.device)
    for first, key in cache.key_blocks(keys.start, keys.stop, step, batch):
        products = q @ key.to(q.dtype).transpose(-1, -2)
        best, at = products.topk(min(k, products.shape[-1]))
        scores, numbers = torch.cat([scores, best], -1), torch.cat([numbers, at + first], -1)
        if scores.shape[-1] > k:
            scores, at = scores.topk(k)
            numbers = numbers.gather(-1, at)
    return numbers


def _nearest_by_index(
    q: Tensor, cache: KeyValueCache, buffer: Buffer, keys: slice, offset: int, k: int, batch: slice
) -> tuple[Tensor, Tensor]:
    """Scores and numbers (B', g, n, k) of the best tokens of one buffer, on the CPU; -inf and -1 where there are
    fewer."""
    assert cache.search is not None
    queries = q.float().cpu().contiguous().numpy()
    scores = torch.full((*q.shape[:3], k), -torch.inf)
    numbers = torch.full((*q.shape[:3], k), -1)
    for row, entry in enumerate(range(buffer.key.shape[0])[batch]):
        for head in range(q.shape[1]):
            index = buffer.indexes.setdefault((cache.search, entry, head), _Index(cache.search))
            index.cover(buffer, entry, head, keys, cache.dtype)
            found, at = index.search(queries[row, head], keys, k)
            none = torch.from_numpy(at) < 0
            scores[row, head] = torch.from_numpy(found).masked_fill(none, -torch.inf)
            numbers[row, head] = (torch.from_numpy(at) + offset).masked_fill(none, -1)
    return scores, numbers


class _Index:
    """Faiss's index of some keys of one row and head of a buffer."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._first = 0
        self._index: Any = None

    def cover(self, buffer: Buffer, row: int, head: int, keys: slice, dtype: torch.dtype) -> None:
        """Adds what is missing of these keys; only the end of them, but for the first time."""
        if self._index is None or keys.start < self._first:
            self._first, self._index = keys.start, self._empty(buffer.key.shape[3])
        for start in range(self._first + self._index.ntotal, keys.stop, _LONGEST_BLOCK):
            end = min(start + _LONGEST_BLOCK, keys.stop)
            added = buffer.keys(start, end, dtype, slice(row, row + 1))[0, head]
            self._index.add(added.float().cpu().contiguous().numpy())

    def search(self, queries: Any, keys: slice, k: int) -> tuple[Any, Any]:
        """Scores and numbers (n, k) among `keys`, for queries (n, K) fp32; number -1 where there are fewer."""
        faiss = _faiss(self._search.backend)
        begin, end = keys.start - self._first, keys.stop - self._first
        # a branch may have added more than this one has, and a limited memory may have lost its beginning
        chosen = faiss.IDSelectorRange(begin, end) if begin or end < self._index.ntotal else None
        if self._search.backend == "faiss-hnsw":
            options = faiss.SearchParametersHNSW(sel=chosen, efSearch=HNSW_WIDTH * k)
        else:
            options = faiss.SearchParameters(sel=chosen)
        scores, numbers = self._index.search(queries, k, params=options)
        numbers[numbers >= 0] += self._first
        return scores, numbers

    def _empty(self, dim: int) -> Any:
        faiss = _faiss(self._search.backend)
        faiss.omp_set_num_threads(torch.get_num_threads())
        if self._search.backend == "faiss-flat":
            return faiss.IndexFlatIP(dim)
        index = faiss.IndexHNSWFlat(dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = HNSW_BUILD
        return index


def _faiss(backend: str) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"the search {backend} needs Faiss, which is not installed: pip install faiss-cpu, or search exact."
        ) from error
    return faiss
