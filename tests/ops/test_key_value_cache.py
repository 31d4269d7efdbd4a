"""A cache is a value: what is read from it never depends on how it grew, nor on who continued it."""

from pathlib import Path

import pytest
import torch

from megayoco.errors import UserError
from megayoco.ops.attention import causal_attention_naive
from megayoco.ops.key_value_cache import STORAGES, KeyValueCache, attention_over_cache
from megayoco.ops.key_value_storage import Place
from megayoco.ops.key_values import KeyValues

B, G, H, K = 2, 2, 6, 8
CPU = torch.device("cpu")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def key_values(tokens, seed=0, dtype=torch.float64):
    return KeyValues(
        random(B, tokens, G, K, seed=seed, dtype=dtype), random(B, tokens, G, K, seed=seed + 1, dtype=dtype)
    )


def filled(sizes, reserve=0, storage=None, dtype=torch.float64):
    """A cache of sum(sizes) tokens that came in pieces, and what went in."""
    whole = key_values(sum(sizes), dtype=dtype)
    cache, start = KeyValueCache.empty(B, G, K, dtype, CPU, reserve=reserve, storage=storage), 0
    for size in sizes:
        cache = cache.combine(KeyValues(whole.key[:, start : start + size], whole.value[:, start : start + size]))
        start += size
    return cache, whole


@pytest.mark.parametrize("reserve", [0, 7, 100])
@pytest.mark.parametrize("sizes", [[50], [1] * 50, [13, 1, 1, 20, 15]])
def test_what_went_in_comes_out(sizes, reserve):
    cache, whole = filled(sizes, reserve)
    assert cache.tokens == 50
    assert torch.equal(cache.key, whole.key)
    assert torch.equal(cache.value, whole.value)
    assert cache.bytes == 2 * whole.key.numel() * 8


def test_continuations_of_one_prefix_do_not_see_each_other():
    prefix, whole = filled([5, 6], reserve=64)
    first = prefix.combine(key_values(4, seed=10))
    second = prefix.combine(key_values(3, seed=20))
    third = first.combine(key_values(1, seed=30))
    for cache, parts in (
        (prefix, [whole]),
        (first, [whole, key_values(4, seed=10)]),
        (second, [whole, key_values(3, seed=20)]),
        (third, [whole, key_values(4, seed=10), key_values(1, seed=30)]),
    ):
        assert torch.equal(cache.key, torch.cat([part.key for part in parts], 1))
        assert torch.equal(cache.value, torch.cat([part.value for part in parts], 1))


def test_appending_is_in_place_until_the_room_is_full_and_then_doubles():
    cache, _ = filled([1])
    places = set()
    for token in range(500):
        cache = cache.combine(key_values(1, seed=token))
        places.add(cache.key.data_ptr())
    # 64, 128 or so, 256 or so, 512 or so: a handful of buffers, not one per token
    assert len(places) <= 5
    reserved, _ = filled([1], reserve=501)
    place = reserved.key.data_ptr()
    for token in range(500):
        reserved = reserved.combine(key_values(1, seed=token))
    assert reserved.key.data_ptr() == place


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("queries", [1, 2, 9, 33])
@pytest.mark.parametrize("storage", [None, *STORAGES])
def test_attention_equals_the_naive_one_over_what_is_stored(storage, queries, ragged, monkeypatch):
    monkeypatch.setattr("megayoco.ops.key_value_cache._BLOCK", 16)
    monkeypatch.setattr("megayoco.ops.key_value_cache._MASKED_ROWS", 5)
    cache, _ = filled([20, 13], storage=STORAGES.get(storage))
    q = random(B, queries, H, K, seed=5)
    first_key = None
    if ragged:
        # row 1 begins with 17 tokens of padding, a document of their own
        index = torch.arange(33 - queries, 33)
        first_key = torch.stack([torch.zeros(queries, dtype=torch.int64), torch.where(index < 17, 0, 17)])
    expected = causal_attention_naive(q, cache.key, cache.value, scale=0.4, first_key=first_key)
    got = attention_over_cache(q, cache, scale=0.4, first_key=first_key)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "error"), [("int8", 0.005), ("fp8", 0.04)])
def test_narrow_storage_is_small_and_close(name, error):
    cache, whole = filled([100, 28], storage=STORAGES[name], dtype=torch.float32)
    assert cache.is_narrow
    # one byte per number, one fp32 scale per token and head
    assert cache.bytes == 2 * B * 128 * G * (K + 4)
    for got, sent in ((cache.key, whole.key), (cache.value, whole.value)):
        assert got.dtype == torch.float32
        largest = sent.abs().amax(-1, keepdim=True)
        assert float(((got - sent).abs() / largest).max()) < error
        assert not torch.equal(got, sent)
    q = random(B, 4, H, K, seed=5, dtype=torch.float32)
    exact = causal_attention_naive(q, whole.key, whole.value, scale=K**-0.5)
    got = attention_over_cache(q, cache, scale=K**-0.5)
    assert float((got - exact).norm() / exact.norm()) < 2 * error


@pytest.mark.parametrize("name", STORAGES)
def test_zeros_and_large_numbers_survive_narrow_storage(name):
    cache = KeyValueCache.empty(1, 1, 4, torch.float32, CPU, storage=STORAGES[name])
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e30, -1e30, 0.0, 5e29], [1e-30, 0.0, -1e-30, 1e-30]]).view(1, 3, 1, 4)
    cache = cache.combine(KeyValues(x, -x))
    assert torch.isfinite(cache.key).all()
    torch.testing.assert_close(cache.key[0, :2], x[0, :2], rtol=0.05, atol=0)
    torch.testing.assert_close(cache.value[0, :2], -x[0, :2], rtol=0.05, atol=0)


@pytest.mark.parametrize("storage", [None, *STORAGES])
@pytest.mark.parametrize("queries", [1, 9])
def test_loaded_tokens_are_read_where_they_lie_by_all_continuations(queries, storage, monkeypatch):
    monkeypatch.setattr("megayoco.ops.key_value_cache._BLOCK", 16)
    monkeypatch.setattr("megayoco.ops.key_value_cache._LONG_BLOCK", 8)
    whole, _ = filled([33], storage=STORAGES.get(storage))
    more = [KeyValues(whole.key[:, 21:] * sign, whole.value[:, 21:]) for sign in (1, -1)]
    loaded, _ = filled([33], storage=STORAGES.get(storage))
    base = loaded.spans(0, 21)[0][0].copy(21, 21, Place(CPU))
    empty = KeyValueCache.empty(B, G, K, torch.float64, CPU, storage=STORAGES.get(storage))
    first = empty.over(base)
    assert first.tokens == 21
    assert first.is_one_view == (storage is None)
    place = base.key.data_ptr()
    for right in more:
        cache = first.combine(KeyValues(right.key[:, :5], right.value[:, :5]))
        cache = cache.combine(KeyValues(right.key[:, 5:], right.value[:, 5:]))
        assert cache.tokens == 33
        assert cache.spans(0, 33)[0][0].key.data_ptr() == place
        assert [piece.key.shape[1] for piece in cache.pieces(0, 33)] == ([21, 12] if storage is None else [16, 5, 12])
        torch.testing.assert_close(cache.key[:, :21], whole.key[:, :21], rtol=0, atol=0)
        torch.testing.assert_close(cache.key[:, 21:], right.key, rtol=1e-1, atol=1e-1)
        assert torch.equal(cache.part(18, 24).value, cache.value[:, 18:24])
        assert cache.bytes == whole.bytes
        numbers = torch.tensor([[[0, 20, 21], [32, 5, 20]], [[1, 2, 3], [30, 31, 32]]])
        for got, kept in zip(cache.gather(numbers), (cache.key, cache.value), strict=True):
            assert torch.equal(got, kept.transpose(1, 2).gather(2, numbers[..., None].expand(-1, -1, -1, K)))
        assert torch.equal(cache.gather(numbers[1:], slice(1, 2)).key, cache.gather(numbers).key[1:])
        q = random(B, queries, H, K, seed=5)
        # row 1 begins with 24 tokens of padding, a document of their own
        index = torch.arange(33 - queries, 33)
        ragged = torch.stack([torch.zeros(queries, dtype=torch.int64), torch.where(index < 24, 0, 24)])
        for first_key in (None, ragged):
            expected = causal_attention_naive(q, cache.key, cache.value, scale=0.4, first_key=first_key)
            got = attention_over_cache(q, cache, scale=0.4, first_key=first_key)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="do not fit"):
        cache.over(base)
    with pytest.raises(ValueError, match="do not fit"):
        KeyValueCache.empty(B, G, K + 1, torch.float64, CPU).over(base)


@pytest.mark.parametrize("storage", [None, *STORAGES])
def test_files_hold_what_memory_holds_and_vanish(storage, tmp_path):
    place = Place(CPU, tmp_path)
    results = []
    for where in (None, place):
        cache = KeyValueCache.empty(B, G, K, torch.float64, CPU, storage=STORAGES.get(storage), place=where)
        for token in range(70):  # a buffer is left for a larger one
            cache = cache.combine(key_values(1, seed=token))
        results.append(cache)
    assert torch.equal(results[1].key, results[0].key)
    assert torch.equal(results[1].value, results[0].value)
    # the keys lie in a file that has no name any more
    address = results[1].spans(0, 70)[0][0].key.data_ptr()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert any(int(line.split("-")[0], 16) == address and line.endswith("(deleted)") for line in mapped)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_is_the_users_to_change(tmp_path):
    cache = KeyValueCache.empty(B, G, K, torch.float64, CPU, place=Place(CPU, tmp_path / "absent"))
    with pytest.raises(UserError, match=r"cannot be kept in .*absent: No such file or directory"):
        cache.combine(key_values(1))


@pytest.mark.parametrize("storage", [None, *STORAGES.values()])
def test_what_is_dropped_is_gone_and_gives_its_room_back(storage):
    """`last` after every piece, against the tokens of a cache that keeps all; branches and gathered tokens too."""
    dtype = torch.float32 if storage else torch.float64
    cache, endless = (KeyValueCache.empty(B, G, K, dtype, CPU, storage=storage) for _ in range(2))
    capacities = []
    for number, size in enumerate([5, 1, 1, 9, 30, *[2] * 60, 1, 17]):
        new = key_values(size, seed=number, dtype=dtype)
        longer, before = cache.combine(new), endless.tokens
        branch = cache.combine(key_values(3, seed=99, dtype=dtype))
        endless = endless.combine(new)
        assert torch.equal(longer.key, endless.part(before - cache.tokens, endless.tokens).key)
        assert torch.equal(branch.part(0, cache.tokens).value, longer.part(0, cache.tokens).value)
        cache = longer.last(12)
        assert cache.tokens == min(12, endless.tokens)
        assert longer.last(100).tokens == longer.tokens
        assert torch.equal(cache.value, endless.part(endless.tokens - cache.tokens, endless.tokens).value)
        numbers = torch.tensor([[[0, cache.tokens - 1]] * G] * B)
        for got, expected in zip(cache.gather(numbers), (cache.key, cache.value), strict=True):
            assert torch.equal(got, expected[:, [0, -1]].transpose(1, 2))
        capacities.append(cache._buffer.capacity)
    assert max(capacities[5:]) <= 2 * (12 + 30 + 3) + 64
    assert endless._buffer.capacity >= 180
    assert cache.bytes < endless.bytes / 10


def test_loaded_tokens_can_be_dropped():
    loaded, whole = filled([10])
    cache = KeyValueCache.empty(B, G, K, torch.float64, CPU).over(loaded._buffer)
    new = [key_values(size, seed=40 + size) for size in (4, 5, 80)]
    everything = [whole]
    for part in new:
        cache = cache.combine(part)
        everything.append(part)
        cache = cache.last(11)
        keys = torch.cat([part.key for part in everything], 1)[:, -11:]
        assert torch.equal(cache.key, keys)
        numbers = torch.arange(11).expand(B, G, 11)
        assert torch.equal(cache.gather(numbers).key, keys.transpose(1, 2))
        # what was loaded is let go once all of it has been dropped
        assert cache.is_one_view == (cache._base is None) == (part is new[-1])
