"""The k best keys: as many as there are is dense, fewer is dense with the rest masked."""

import sys

import pytest
import torch

from megayoco.errors import UserError
from megayoco.ops import memory_search
from megayoco.ops.key_value_cache import STORAGES, KeyValueCache
from megayoco.ops.key_value_storage import Buffer, Place
from megayoco.ops.key_values import KeyValues
from megayoco.ops.memory_attention import Segment, memory_attention_over_context, window_segments
from megayoco.ops.memory_search import SEARCHES, Search, attention_over_nearest, nearest
from megayoco.ops.windows import Eviction

B, H, G, K, W = 2, 4, 2, 6, 4
CPU = torch.device("cpu")


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def search_of(top_k, backend="exact"):
    if backend != "exact":
        pytest.importorskip("faiss")
    return Search(top_k, backend)


def cache_of(tokens, search, *, dtype=torch.float64, storage=None, place=None, base=0):
    """A cache of random tokens, the first `base` of them loaded."""
    key, value = random(3, B, tokens, G, K, dtype=dtype), random(4, B, tokens, G, K, dtype=dtype)
    cache = KeyValueCache.empty(B, G, K, dtype, CPU, storage=storage, place=place, search=search)
    if base:
        loaded = Buffer.allocate((B, G, base, K), storage or dtype, Place(CPU))
        loaded.write(0, key[:, :base], value[:, :base])
        cache = cache.over(loaded)
    return cache.combine(KeyValues(key[:, base:], value[:, base:]))


def padded_segments(queries, keys, padding, evicted=W, capacity=None):
    """Of row 0 without padding, and row 1 that begins with some."""
    rule = Eviction(window=W, evicted=evicted, capacity=capacity)
    windows = rule.windows([keys - queries - pad for pad in (0, padding)], queries)
    rows = [window_segments(windows, row, queries, keys, remembers=True) for row in range(2)]
    return [segment._replace(batch=slice(row, row + 1)) for row, part in enumerate(rows) for segment in part]


def naive(q, rotated, cache, segments, scale, top_k):
    """Dense scores of every query, those of the memory masked but for the k largest of its head."""
    y, first = torch.empty_like(q), cache.tokens - rotated.shape[1]
    for rows, local, memory, batch, _ in segments:
        for b in range(B)[batch]:
            for t in range(rows.start, rows.stop):
                end = local.stop - (rows.stop - 1 - t)
                for h in range(H):
                    g = h // (H // G)
                    own = rotated[b, local.start - first : end - first, g] @ q[b, t, h] * scale
                    far = cache.key[b, memory, g] @ q[b, t, h] * scale
                    if len(far) > top_k:
                        far = far.masked_fill(far < far.sort(descending=True).values[top_k - 1], -torch.inf)
                    values = torch.cat([cache.value[b, local.start : end, g], cache.value[b, memory, g]])
                    y[b, t, h] = torch.cat([own, far]).softmax(0) @ values
    return y


def attend(cache, segments, queries, dtype=torch.float64):
    q = random(1, B, queries, H, K, dtype=dtype)
    local = cache.tokens - min(segment.local.start for segment in segments)
    rotated = random(2, B, local, G, K, dtype=dtype)
    return q, rotated, memory_attention_over_context(q, q, rotated, cache, segments, 0.3)


@pytest.mark.parametrize(
    ("queries", "base"), [(1, 0), (7, 0), (32, 0), (1, 11), (7, 11), (1, 31), (7, 25)], ids=lambda x: str(x)
)
def test_fewer_keys_are_dense_attention_with_the_rest_masked(queries, base, monkeypatch):
    # several blocks of keys and of queries
    monkeypatch.setattr("megayoco.ops.memory_search._NUMBERS", 400)
    monkeypatch.setattr("megayoco.ops.memory_search._LONGEST_BLOCK", 9)
    segments = padded_segments(queries, 32, 5)
    cache = cache_of(32, search_of(3), base=base)
    q, rotated, got = attend(cache, segments, queries)
    torch.testing.assert_close(got, naive(q, rotated, cache, segments, 0.3, 3), rtol=1e-12, atol=1e-12)
    dense = attend(cache_of(32, None, base=base), segments, queries)[2]
    assert float((got - dense).abs().max()) > 1e-3


@pytest.mark.parametrize(("evicted", "capacity"), [(2, None), (1, None), (1, 9)])
def test_windows_that_overlap_are_searched_one_by_one(evicted, capacity):
    segments = padded_segments(12, 32, 5, evicted, capacity)
    alone = []
    for segment in segments:
        row, own = segment.rows.start, segment.local.stop - segment.rows.stop
        for step in segment.steps:
            rows = slice(row, row + step.rows)
            memory = slice(step.memory, step.local)
            alone.append(Segment(rows, slice(step.local, own + rows.stop), memory, segment.batch))
            row = rows.stop
    assert len(alone) > 6 and sum(s.rows.stop - s.rows.start for s in alone) == 24
    cache = cache_of(32, search_of(3))
    q, rotated, got = attend(cache, segments, 12)
    torch.testing.assert_close(got, naive(q, rotated, cache, alone, 0.3, 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", SEARCHES)
@pytest.mark.parametrize("top_k", [28, 100])
def test_as_many_keys_as_there_are_is_dense(backend, top_k):
    segments = padded_segments(7, 32, 5)
    expected = attend(cache_of(32, None), segments, 7)[2]
    got = attend(cache_of(32, search_of(top_k, backend)), segments, 7)[2]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    # also where the keys are really searched, not read whole because there are few
    cache, q = cache_of(32, search_of(28, backend)), random(1, B, 7, H, K)
    out, lse = attention_over_nearest(q, cache, slice(0, 28), 0.3)
    scores = torch.einsum("bthk,bshk->bhts", q, cache.key[:, :28].repeat_interleave(H // G, 2)) * 0.3
    values = cache.value[:, :28].repeat_interleave(H // G, 2)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, torch.einsum("bhts,bshk->bthk", scores.softmax(-1), values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["faiss-flat", "faiss-hnsw"])
def test_faiss_finds_what_the_exact_search_finds(backend):
    """fp32 searches of few keys: the graph is small enough to be exact."""
    segments, results = padded_segments(9, 64, 6), []
    for kind in ("exact", backend):
        cache = cache_of(64, search_of(5, kind), dtype=torch.float32, base=20)
        results.append(attend(cache, segments, 9, torch.float32)[2])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", SEARCHES)
def test_the_search_sees_its_keys_only_whatever_the_index_has_seen(backend):
    """An index grows with the newest continuation; older and limited ones search a part of it."""
    cache = cache_of(40, search_of(4, backend), dtype=torch.float32)
    q = random(5, B, G, 3, K, dtype=torch.float32)
    for keys in (slice(5, 20), slice(5, 40), slice(5, 20), slice(12, 30), slice(0, 9)):
        scores = q @ cache.key[:, keys].transpose(1, 2).transpose(-1, -2)
        expected = scores.topk(4).indices + keys.start
        assert torch.equal(nearest(q, cache, keys, 4), expected), keys
    later = cache.combine(KeyValues(10 * cache.key[:, :3], cache.value[:, :3]))
    expected = (q @ later.key.transpose(1, 2).transpose(-1, -2)).topk(4).indices
    assert torch.equal(nearest(q, later, slice(0, 43), 4), expected)
    # a continuation that went another way has an index of its own
    other = cache.combine(KeyValues(-10 * cache.key[:, :3], cache.value[:, :3]))
    expected = (q @ other.key.transpose(1, 2).transpose(-1, -2)).topk(4).indices
    assert torch.equal(nearest(q, other, slice(0, 43), 4), expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_narrow_memory_is_searched_by_what_it_holds(storage):
    segments = padded_segments(3, 32, 5)
    cache = cache_of(32, search_of(3), dtype=torch.float32, storage=STORAGES[storage], base=10)
    q, rotated, got = attend(cache, segments, 3, torch.float32)
    torch.testing.assert_close(got, naive(q, rotated, cache, segments, 0.3, 3), rtol=1e-5, atol=1e-5)


def test_bfloat16_scores_are_fp32():
    segments = padded_segments(3, 32, 5)
    cache = cache_of(32, search_of(3), dtype=torch.bfloat16)
    q, rotated, got = attend(cache, segments, 3, torch.bfloat16)
    wide = KeyValueCache.empty(B, G, K, torch.float32, CPU, search=cache.search)
    wide = wide.combine(KeyValues(cache.key.float(), cache.value.float()))
    expected = naive(q.float(), rotated.float(), wide, segments, 0.3, 3)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_memory_in_files_gives_the_same_and_leaves_nothing_behind(tmp_path):
    segments = padded_segments(7, 32, 5)
    expected = attend(cache_of(32, search_of(3)), segments, 7)[2]
    got = attend(cache_of(32, search_of(3), place=Place(CPU, tmp_path)), segments, 7)[2]
    assert torch.equal(got, expected)
    assert list(tmp_path.iterdir()) == []


def test_what_a_search_allocates_does_not_grow_with_the_memory():
    peaks = []
    for tokens in (1 << 14, 1 << 17):
        cache = KeyValueCache.empty(1, 1, 8, torch.float32, CPU, search=search_of(4))
        cache = cache.combine(KeyValues(*(random(i, 1, tokens, 1, 8, dtype=torch.float32) for i in (1, 2))))
        q = random(3, 1, 16, 2, 8, dtype=torch.float32)
        with pytest.MonkeyPatch.context() as patch, torch.profiler.profile(profile_memory=True) as profile:
            patch.setattr("megayoco.ops.memory_search._LONGEST_BLOCK", 1 << 11)
            attention_over_nearest(q, cache, slice(0, tokens), 0.3)
        peaks.append(max(event.self_cpu_memory_usage for event in profile.events()))
    assert 0 < peaks[1] <= 1.1 * peaks[0], peaks


def test_searches_that_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match="must be at least 1"):
        Search(0)
    with pytest.raises(ValueError, match="one of"):
        Search(3, "annoy")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="needs Faiss, which is not installed: pip install"):
        Search(3, "faiss-flat")
    assert memory_search.SEARCHES[0] == Search(3).backend
