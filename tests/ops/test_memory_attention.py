"""Attention over windows and a memory: against dense masks, and the segments against what a query must see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from megayoco.ops.key_value_cache import STORAGES, KeyValueCache
from megayoco.ops.key_values import KeyValues
from megayoco.ops.memory_attention import (
    Segment,
    cross_batch_segments,
    memory_attention,
    memory_attention_naive,
    memory_attention_over_context,
    window_segments,
    windows_before,
)
from megayoco.ops.windows import Eviction


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def segments_of(
    first: int,
    queries: int,
    keys: int,
    window: int,
    *,
    evicted: int | None = None,
    capacity: int | None = None,
    remembers: bool = True,
    batch: slice = slice(None),
) -> list[Segment]:
    """Of one row; `first`: index of its first query."""
    rule = Eviction(window=window, evicted=evicted or window, capacity=capacity)
    return window_segments(rule.windows([first], queries), 0, queries, keys, remembers=remembers, batch=batch)


def seen_by(segments: Iterable[Segment], row: int) -> tuple[list[int], list[int]]:
    """Local and remembered keys of a query, by number."""
    (found,) = [segment for segment in segments if segment.rows.start <= row < segment.rows.stop]
    own = found.local.stop - (found.rows.stop - row)
    local, memory = range(found.local.start, own + 1), range(found.memory.start, found.memory.stop)
    if found.steps:
        step = [step for step in found.steps for _ in range(step.rows)][row - found.rows.start]
        local = range(step.local, own + 1)
        memory = range(step.memory, step.local) if found.memory != slice(0, 0) else range(0)
    return list(local), list(memory)


@pytest.mark.parametrize("remembers", [True, False])
@pytest.mark.parametrize("window", [1, 3, 4, 50])
@pytest.mark.parametrize(("first", "queries"), [(0, 1), (0, 9), (4, 3), (5, 8), (11, 1), (12, 1)])
def test_a_query_sees_its_window_and_what_is_before_it(first, queries, window, remembers):
    segments = segments_of(first, queries, first + queries, window, remembers=remembers)
    for row in range(queries):
        index = first + row
        begin = index - index % window
        local, memory = seen_by(segments, row)
        assert local == list(range(begin, index + 1))
        assert memory == (list(range(begin)) if remembers else [])


@pytest.mark.parametrize("capacity", [None, 1, 3, 30])
@pytest.mark.parametrize("evicted", [1, 2, 3, 5])
@pytest.mark.parametrize("remembers", [True, False])
def test_a_query_sees_what_its_rule_says(remembers, evicted, capacity):
    rule = Eviction(window=5, evicted=evicted, capacity=capacity)
    for first, queries in ((0, 23), (3, 9), (17, 1)):
        segments = segments_of(
            first, queries, first + queries, 5, evicted=evicted, capacity=capacity, remembers=remembers
        )
        for row in range(queries):
            begin = rule.begin(first + row)
            local, memory = seen_by(segments, row)
            assert local == list(range(begin, first + row + 1))
            assert memory == (list(range(begin))[-(capacity or 99) :] if remembers else [])


def test_queries_of_short_windows_share_a_segment():
    assert len(segments_of(0, 300, 300, 4)) == 75
    assert [s.rows.stop - s.rows.start for s in segments_of(0, 300, 300, 4, evicted=2)] == [128, 128, 44]
    # a window with many queries has one of its own, without masks
    assert [len(s.steps) for s in segments_of(0, 900, 900, 400, evicted=200)] == [0, 0, 0, 0]


def test_padding_sees_padding_and_windows_begin_behind_it():
    """Five tokens of padding, of which three are in the chunk, and windows of two."""
    segments = segments_of(-3, 8, 10, 2)
    assert [seen_by(segments, row) for row in range(8)] == [
        ([2], []),
        ([2, 3], []),
        ([2, 3, 4], []),
        ([5], []),
        ([5, 6], []),
        ([7], [5, 6]),
        ([7, 8], [5, 6]),
        ([9], [5, 6, 7, 8]),
    ]
    assert segments_of(-9, 2, 4, 2) == [Segment(slice(0, 2), slice(2, 4), slice(0, 0))]


def test_a_context_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="context of 2 tokens before index 7 lacks 1"):
        segments_of(7, 1, 3, 4, remembers=False)
    with pytest.raises(ValueError, match="lacks 4"):
        segments_of(7, 1, 4, 4)
    segments_of(7, 1, 4, 4, remembers=False)
    segments_of(17, 1, 8, 4, capacity=6)
    with pytest.raises(ValueError, match="lacks 1 of them"):
        segments_of(17, 1, 7, 4, capacity=6)


# own windows and others that the windows of a pack see, by pack and range, as the released code gives them
TABLE = {
    (4, 3): [(0, 0), (1, 1), (2, 1), (3, 0)],
    (4, 6): [(0, 0), (1, 2), (2, 4), (3, 3)],
    (4, 7): [(0, 0), (1, 2), (2, 4), (3, 4)],
    (2, 2): [(0, 0), (1, 1)],
}


@pytest.mark.parametrize(("pack", "reach"), TABLE)
def test_cross_batch_positives_and_negatives(pack, reach):
    samples, window = 4, 3
    segments = cross_batch_segments(samples, pack * window, window, reach, True)
    found = []
    for number, segment in enumerate(segments):
        own = slice(number * window, (number + 1) * window)
        assert (segment.rows, segment.local) == (own, own)
        memory = range(segment.memory.start, segment.memory.stop)
        assert not memory or memory.stop == own.start
        sample = number // pack * pack * window
        positives = sum(key >= sample for key in memory)
        found.append((positives // window, (len(memory) - positives) // window))
    assert found[-pack:] == TABLE[pack, reach]
    assert all(negatives == 0 for _, negatives in found[:pack])  # nothing before the first sample


@pytest.mark.parametrize(
    ("pack", "stepping", "counts"), [(3, False, [0, 1, 2, 2, 2, 2]), (1, True, [0, 1, 2, 2, 2, 2])]
)
def test_without_steps_every_window_sees_the_whole_range(pack, stepping, counts):
    segments = cross_batch_segments(6 // pack, pack * 2, 2, 2, stepping)
    assert [(s.memory.stop - s.memory.start) // 2 for s in segments] == counts
    assert all(s.memory.stop in (s.rows.start, 0) for s in segments)
    with pytest.raises(ValueError, match="5 tokens are no packs of windows of 2"):
        cross_batch_segments(2, 5, 2, 2, stepping)


@pytest.mark.parametrize(("pack", "reach", "stepping"), [(4, 3, True), (4, 6, True), (4, 7, True), (4, 7, False)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parts_and_later_micro_batches_see_what_the_whole_sees(pack, reach, stepping, ranks):
    """Two micro-batches of two samples; of the second one every rank's part, with what came from the first before."""
    samples, window = 2, 3
    whole = cross_batch_segments(2 * samples, pack * window, window, reach, stepping)[samples * pack :]
    before = windows_before(pack, reach, stepping)
    missing = samples * pack - before  # windows of the first micro-batch that nobody asks for
    seen_from_first = [missing * window - s.memory.start for s in whole if s.memory.stop]
    assert before <= samples * pack and max(seen_from_first) == 0
    for rank in range(ranks):
        segments = cross_batch_segments(
            samples, pack * window, window, reach, stepping, before=before, rank=rank, ranks=ranks
        )
        share = pack // ranks
        numbers = [sample * pack + rank * share + i for sample in range(samples) for i in range(share)]
        local = (before + (samples * pack if ranks > 1 else 0)) * window
        for place, (segment, number) in enumerate(zip(segments, numbers, strict=True)):
            assert segment.rows == slice(place * window, (place + 1) * window)
            assert segment.local == slice(local + segment.rows.start, local + segment.rows.stop)
            memory = range(segment.memory.start, segment.memory.stop)
            expected = whole[number].memory
            assert [key + missing * window for key in memory] == list(range(expected.start, expected.stop))
    with pytest.raises(ValueError, match="of 3 in 3 parts"):
        cross_batch_segments(samples, pack * window, window, reach, stepping, ranks=3)


CASES: dict[str, tuple[int, int, int, int, list[Segment]]] = {
    # batch, queries, keys, local keys, segments
    "whole": (2, 11, 11, 11, segments_of(0, 11, 11, 4)),
    "a chunk that begins in a window": (2, 7, 12, 8, segments_of(5, 7, 12, 4)),
    "one token": (2, 1, 12, 4, segments_of(11, 1, 12, 4)),
    "no memory": (2, 7, 8, 8, segments_of(5, 7, 8, 4, remembers=False)),
    "long enough for parts": (1, 300, 700, 300, segments_of(400, 300, 700, 200)),
    "across the batch": (1, 24, 24, 24, cross_batch_segments(3, 8, 4, 3, True)),
    "a part of the samples": (1, 12, 48, 12, cross_batch_segments(3, 8, 4, 3, False, before=3, rank=1, ranks=2)),
    "padded rows": (
        2, 6, 6, 6, [
            *segments_of(-2, 6, 6, 2, batch=slice(0, 1)),
            *segments_of(0, 6, 6, 2, batch=slice(1, 2)),
        ],
    ),
}  # fmt: skip


OVERLAPPING: dict[str, tuple[int, int, int, int, list[Segment]]] = {
    "half windows": (2, 11, 11, 11, segments_of(0, 11, 11, 4, evicted=2)),
    "sliding": (2, 11, 17, 14, segments_of(6, 11, 17, 4, evicted=1)),
    "sliding without memory": (2, 11, 14, 14, segments_of(6, 11, 14, 4, evicted=1, remembers=False)),
    "several segments": (1, 300, 420, 310, segments_of(120, 300, 420, 11, evicted=3)),
    "capacity": (2, 20, 40, 23, segments_of(20, 20, 40, 4, evicted=2, capacity=9)),
    "capacity below a segment": (2, 150, 190, 153, segments_of(40, 150, 190, 4, evicted=1, capacity=5)),
    "one token": (2, 1, 12, 4, segments_of(11, 1, 12, 4, evicted=1)),
    "padded rows": (
        2, 9, 9, 9, [
            *segments_of(-2, 9, 9, 4, evicted=1, batch=slice(0, 1)),
            *segments_of(0, 9, 9, 4, evicted=1, batch=slice(1, 2)),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("name", CASES)
def test_segments_equal_dense_masks_with_every_gradient(name, heads):
    (B, T, S, L, segments), (H, G), K = CASES[name], heads, 6
    given = [random(1, B, T, H, K), random(2, B, L, G, K), random(3, B, S, G, K), random(4, B, S, G, K)]
    if name == "no memory":
        given[2] = None  # type: ignore[call-overload]
    results: list[list[Any]] = []
    for form in (memory_attention_naive, memory_attention):
        leaves = [None if x is None else x.clone().requires_grad_() for x in given]
        y = form(*leaves, segments, 0.3)  # type: ignore[arg-type]
        wanted = [x for x in leaves if x is not None]
        results.append([y, *torch.autograd.grad((y * random(5, *y.shape)).sum(), wanted)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_merged_in_fp32():
    B, T, S, L, segments = CASES["whole"]
    given = [random(i, B, n, 2, 8, dtype=torch.bfloat16) for i, n in enumerate((T, L, S, S))]
    expected = memory_attention_naive(*(x.float() for x in given), segments, 0.5)
    got = memory_attention(*given, segments, 0.5)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)


def cache_of(key: Tensor, value: Tensor, storage: torch.dtype | None = None) -> KeyValueCache:
    B, _, G, K = key.shape
    return KeyValueCache.empty(B, G, K, key.dtype, key.device, storage=storage).combine(KeyValues(key, value))


@pytest.mark.parametrize("name", [name for name in CASES if name != "no memory"])
def test_a_cache_gives_the_same(name):
    B, T, S, L, segments = CASES[name]
    q, rotated, key, value = random(1, B, T, 4, 6), random(2, B, L, 2, 6), random(3, B, S, 2, 6), random(4, B, S, 2, 6)
    expected = memory_attention_naive(q, rotated, key, value, segments, 0.3)
    got = memory_attention_over_context(q, q, rotated, cache_of(key, value), segments, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping_windows_equal_dense_masks(name):
    B, T, S, L, segments = OVERLAPPING[name]
    q, local, rotated, key, value = (
        random(i, B, n, heads, 6) for i, (n, heads) in enumerate(((T, 4), (T, 4), (L, 2), (S, 2), (S, 2)), start=1)
    )
    expected = memory_attention_naive(q, rotated, key, value, segments, 0.3, local)
    context = KeyValues(key, value) if "without" in name else cache_of(key, value)
    got = memory_attention_over_context(q, local, rotated, context, segments, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if any(segment.steps for segment in segments):
        with pytest.raises(ValueError, match="there is no gradient"):
            memory_attention(q, rotated, key, value, segments, 0.3)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_narrow_cache_is_read_in_blocks_of_what_it_holds(storage, monkeypatch):
    monkeypatch.setattr("megayoco.ops.key_value_cache._BLOCK", 5)
    B, T, S, L, segments = CASES["a chunk that begins in a window"]
    q, rotated, key, value = (random(i, B, n, 2, 6, dtype=torch.float32) for i, n in enumerate((T, L, S, S), start=1))
    cache = cache_of(key, value, STORAGES[storage])
    assert [piece.key.shape[1] for piece in cache.pieces(0, S)] == [5, 5, 2]
    expected = memory_attention_naive(q, rotated, cache.key, cache.value, segments, 0.3)
    got = memory_attention_over_context(q, q, rotated, cache, segments, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_decoded_token_copies_no_memory():
    """What a token allocates does not grow with the memory."""
    peaks = []
    for tokens in (2048, 16384):
        key, value = random(1, 1, tokens, 1, 8, dtype=torch.float32), random(2, 1, tokens, 1, 8, dtype=torch.float32)
        cache = cache_of(key, value)
        segments = segments_of(tokens - 1, 1, tokens, 4)
        q, rotated = random(3, 1, 1, 2, 8, dtype=torch.float32), random(4, 1, 4, 1, 8, dtype=torch.float32)
        with torch.profiler.profile(profile_memory=True) as profile:
            memory_attention_over_context(q, q, rotated, cache, segments, 0.3)
        peaks.append(max(event.self_cpu_memory_usage for event in profile.events()))
    assert 0 < peaks[1] <= 1.1 * peaks[0], peaks


def test_memory_without_keys_is_refused():
    B, T, S, L, segments = CASES["whole"]
    with pytest.raises(ValueError, match="no keys were given"):
        memory_attention(random(1, B, T, 2, 4), random(2, B, L, 2, 4), None, random(3, B, S, 2, 4), segments, 1.0)
