"""Samples of one dataset: nothing dropped, every token a target equally often, borders where documents begin.

The datasets hold the tokens 0, 1, 2, ..., so a token says where in the file it lies.
"""

import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megayoco.data.cache import OrderSettings, open_places, sequence_order
from megayoco.data.indexed import Index, read_index
from megayoco.data.samples import TokenStream, TrainingSource, ValidationSource
from megayoco.errors import UserError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def stream(numbered):
    """stream(lengths, **settings) -> TokenStream over a new dataset with such documents."""

    def make(lengths, *, seed=3, part=(0.0, 1.0), **kwargs):
        places = open_places(numbered("numbers", lengths), OrderSettings(part, seed, **kwargs), None)
        return TokenStream(places, 60_000)

    return make


def laid_out(stream):
    """The whole epoch as a list of documents, straight from the places."""
    places = stream._places
    lengths = np.diff(places.ends, prepend=0)
    return [list(range(s, s + n)) for s, n in zip(places.starts.tolist(), lengths.tolist(), strict=True)]


@QUICK
@given(lengths=LENGTHS, data=st.data())
def test_any_stretch_of_the_stream_is_the_documents_around_and_around(stream, lengths, data):
    tokens = stream(lengths)
    documents = laid_out(tokens)
    assert sorted(documents) == [
        list(range(end - n, end)) for end, n in zip(np.cumsum(lengths).tolist(), lengths, strict=True)
    ]
    L = tokens.num_tokens
    start, count = data.draw(st.integers(0, L - 1)), data.draw(st.integers(1, 3 * L))
    rounds = 2 + count // L
    flat = [t for document in documents for t in document] * rounds
    begins = np.cumsum([0] + [len(document) for document in documents] * rounds)
    found, borders = tokens.read(start, count)
    assert found.tolist() == flat[start : start + count]
    assert found.dtype == np.int64
    assert borders.tolist() == [b - start for b in begins.tolist() if start < b < start + count]


@QUICK
@given(lengths=LENGTHS, N=st.integers(1, 50), seed=st.integers(0, 9))
def test_training_takes_every_target_equally_often_and_drops_nothing(stream, lengths, N, seed):
    tokens = stream(lengths)
    L = tokens.num_tokens
    N = min(N, L - 1) or 1
    source = TrainingSource(tokens, N, seed)
    samples = -(-3 * L // N)  # three rounds, up to the one sample that crosses into the fourth
    numbers = [source._permuted(n) for n in range(samples)]
    assert sorted(numbers) == list(range(samples))
    targets = Counter(t for n in range(samples) for t in source[n]["tokens"][1:].tolist())
    assert sum(targets.values()) == samples * N
    assert set(targets) == set(range(L))
    assert max(targets.values()) - min(targets.values()) <= 1
    assert {source[n]["num_targets"] for n in range(samples)} == {N}


@QUICK
@given(lengths=LENGTHS, N=st.integers(1, 50))
def test_validation_takes_every_target_once(stream, lengths, N):
    tokens = stream([*lengths, 2], seed=None)
    source = ValidationSource(tokens, N, seed=1)
    targets = []
    for n in range(source.num_samples):
        sample = source[n]
        assert sample["tokens"].shape == (N + 1,)
        assert 1 <= sample["num_targets"] <= N
        assert (sample["borders"] <= sample["num_targets"]).all()
        targets += sample["tokens"][1 : sample["num_targets"] + 1].tolist()
    assert sorted(targets) == list(range(1, tokens.num_tokens))
    assert source[source.num_samples + 1]["tokens"].tolist() == source[1 % source.num_samples]["tokens"].tolist()


def test_each_round_has_an_order_of_its_own(stream):
    source = TrainingSource(stream([100, 60]), 8, seed=1)  # 20 samples a round, no rest
    rounds = [[source._permuted(n) - 20 * e for n in range(20 * e, 20 * e + 20)] for e in range(3)]
    assert all(sorted(order) == list(range(20)) for order in rounds)
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]
    first = [source[n]["tokens"].tolist() for n in (0, 25, 3)]
    assert [TrainingSource(stream([100, 60]), 8, seed=1)[n]["tokens"].tolist() for n in (0, 25, 3)] == first
    other = TrainingSource(stream([100, 60]), 8, seed=2)
    assert [other._permuted(n) for n in range(20)] != [source._permuted(n) for n in range(20)]


def test_rounds_are_cut_at_other_places(stream):
    source = TrainingSource(stream([50, 53]), 10, seed=1)
    first, second = ({source._permuted(n) * 10 % 103 for n in numbers} for numbers in (range(11), range(11, 21)))
    assert not first & second


def index_of(lengths):
    lengths = np.array(lengths, np.int32)
    offsets = np.cumsum(lengths, dtype=np.int64) - lengths
    return Index(np.dtype(np.uint16), lengths, 2 * offsets, np.arange(len(lengths) + 1))


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=200),
    weight=st.floats(0, 5) | st.integers(0, 3).map(float),
    seed=st.integers(0, 5) | st.none(),
)
def test_long_documents_stand_in_an_epoch_as_often_as_asked(lengths, weight, seed):
    order = sequence_order(index_of(lengths), OrderSettings((0.0, 1.0), seed, 10, weight))
    counts = np.bincount(order, minlength=len(lengths))
    long = np.array(lengths) > 10
    short = (np.array(lengths) > 0) & ~long
    assert (counts[short] == 1).all()
    assert (counts[np.array(lengths) == 0] == 0).all()
    if long.any():
        assert set(counts[long].tolist()) <= {int(weight), int(weight) + 1}
        assert abs(counts[long].sum() - weight * long.sum()) <= 0.5
        if weight == int(weight):
            assert (counts[long] == weight).all()
    if seed is None:
        assert (np.diff(order) >= 0).all()


def test_the_documents_that_a_fraction_chooses_depend_on_the_seed():
    index = index_of([30] * 100)
    chosen = [
        frozenset(np.flatnonzero(np.bincount(sequence_order(index, OrderSettings((0.0, 1.0), seed, 10, 1.3))) == 2))
        for seed in (1, 2, 1)
    ]
    assert [len(c) for c in chosen] == [30, 30, 30]
    assert chosen[0] == chosen[2] != chosen[1]


def test_parts_share_no_sequence_and_leave_none_out():
    index = index_of(range(1, 102))
    parts = [(0.0, 0.969), (0.969, 0.999), (0.999, 1.0)]
    found = [sequence_order(index, OrderSettings(part, 7)).tolist() for part in parts]
    assert sorted(found[0] + found[1]) == list(range(101))
    assert [len(part) for part in found] == [98, 3, 0]
    assert max(found[0]) < min(found[1])


def test_ids_of_any_width_are_read(tmp_path):
    """The code byte of the index decides, not the vocabulary."""
    import struct

    for code, dtype in ((1, np.uint8), (4, np.int32), (5, np.int64), (8, np.uint16)):
        prefix = str(tmp_path / f"wide{code}")
        np.arange(100, 120, dtype=dtype).tofile(f"{prefix}.bin")
        lengths, offsets = np.array([12, 8], np.int32), np.array([0, 12], np.int64) * np.dtype(dtype).itemsize
        header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, 2, 3)
        arrays = [lengths, offsets, np.arange(3, dtype=np.int64)]
        (tmp_path / f"wide{code}.idx").write_bytes(header + b"".join(a.tobytes() for a in arrays))
        tokens, borders = TokenStream(open_places(prefix, OrderSettings((0.0, 1.0), None), None), 120).read(0, 20)
        assert tokens.tolist() == list(range(100, 120))
        assert borders.tolist() == [12]


def test_a_pair_of_megatron_is_read_as_megatron_reads_it(tmp_path):
    """Documents of several sequences, an empty document and an empty sequence among them; written by its builder."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    prefix = str(tmp_path / "theirs")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    generator = np.random.default_rng(0)
    for lengths in ([5], [3, 4], [], [12, 0, 1], [30]):
        for length in lengths:
            builder.add_item(torch.from_numpy(generator.integers(0, 100_000, length)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    theirs = IndexedDataset(prefix)
    sequences = [theirs[i].tolist() for i in range(len(theirs))]
    places = open_places(prefix, OrderSettings((0.0, 1.0), 4), None)
    tokens, borders = TokenStream(places, 100_000).read(0, places.num_tokens)
    found = [part.tolist() for part in np.split(tokens, borders)]
    assert sorted(found) == sorted(sequence for sequence in sequences if sequence)
    assert found != [sequence for sequence in sequences if sequence]


def test_an_id_outside_the_vocabulary_is_refused_where_it_is_read(stream):
    narrow = stream([30, 40, 20])
    narrow._file._vocab_size = 89
    with pytest.raises(UserError, match=r"numbers\.bin holds token id 89, outside the model's vocabulary 0\.\.88"):
        narrow.read(0, 90)


def test_a_file_that_becomes_shorter_under_a_run_is_an_error(stream):
    tokens = stream([30, 40], seed=None)
    os.truncate(tokens._file._path, 100)
    assert tokens.read(0, 50)[0].tolist() == list(range(50))
    with pytest.raises(UserError, match=r"numbers\.bin ends before byte 130: it has become shorter"):
        tokens.read(40, 25)


def test_sequences_and_documents_that_differ_are_named(tmp_path, numbered, caplog):
    prefix = numbered("split", [5, 6, 7])
    content = bytearray((tmp_path / "split.idx").read_bytes())
    content[26:34] = (3).to_bytes(8, "little")  # two documents: one of two sequences, one of one
    at = 34 + 12 * 3
    documents = np.array([0, 2, 3], np.int64).tobytes()
    (tmp_path / "split.idx").write_bytes(bytes(content[:at]) + documents)
    assert read_index(prefix).num_documents == 2
    for _ in range(2):  # when it is built, and when it comes from the cache
        caplog.clear()
        open_places(prefix, OrderSettings((0.0, 1.0), 1), None)
        assert "holds 3 sequences in 2 documents" in caplog.text
