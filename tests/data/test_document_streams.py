"""Samples cut from streams of documents, against the pipelines of the Focused Transformer's code written out naively.

The datasets hold the tokens 0, 1, 2, ..., so a token says of which document it is.
"""

import itertools
from itertools import pairwise

import numpy as np
import pytest

from megayoco.config import DataConfig
from megayoco.data.batches import Batches
from megayoco.data.cache import OrderSettings, open_places
from megayoco.data.datasets import build_datasets
from megayoco.data.document_streams import DocumentSource, DocumentStreams
from megayoco.errors import UserError

LENGTHS = [7, 1, 30, 2, 64, 5, 5, 18, 3, 40, 11, 8]  # 194 tokens
N = 8


def build(train, *, batch_size=3, seed=5, length=N, **kwargs):
    data = DataConfig(train=train, **{"split": "1,0,0", "pipeline": "doc_aware", **kwargs})
    return build_datasets(data, sequence_length=length, seed=seed, vocab_size=60_000, batch_size=batch_size)


def documents_of(source, lengths, count, first=0):
    """The first `count` documents of a linear stream, told by where they begin in the file."""
    begins = first + np.cumsum([0, *lengths])
    documents = {int(a): list(range(a, b)) for a, b in pairwise(begins.tolist())}
    stream = (token for n in itertools.count() for token in source[n]["tokens"][:-1].tolist())
    found = []
    while len(found) < count:
        document = documents[next(stream)]
        assert [next(stream) for _ in document[1:]] == document[1:]
        found.append(document)
    return found


def doc_aware(documents, rows, length, steps):
    """Batches (rows of length + 1 tokens) as the released code makes them, from any iterable of documents."""
    documents, held = iter(documents), [[] for _ in range(rows)]
    batches = []
    for _ in range(steps):
        for tokens in held:
            while len(tokens) < length + 1:
                tokens += next(documents)
        batches.append([tokens[: length + 1] for tokens in held])
        held = [tokens[length:] for tokens in held]
    return batches


def test_linear_is_the_documents_one_after_the_other_in_a_new_order_each_epoch(numbered):
    prefix = numbered("a", LENGTHS)
    source = build(prefix, pipeline="linear").train
    P = len(LENGTHS)
    found = documents_of(source, LENGTHS, 4 * P)
    epochs = [found[i : i + P] for i in range(0, 4 * P, P)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len({id(x) for x in epoch}) == P for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 4
    flat = [token for document in found for token in document]
    firsts = set(np.cumsum([0, *map(len, found)]).tolist())
    for n in range(60):
        sample = source[n]
        assert sample["tokens"].tolist() == flat[n * N : (n + 1) * N + 1]
        assert sample["borders"].tolist() == [i for i in range(1, N + 1) if n * N + i in firsts]
        assert sample["num_targets"] == N


@pytest.mark.parametrize(("rows", "length"), [(3, 8), (5, 1), (1, 16), (4, 50), (12, 4)])
def test_doc_aware_equals_the_released_pipeline(numbered, rows, length):
    prefix = numbered("a", LENGTHS)
    order = documents_of(build(prefix, pipeline="linear").train, LENGTHS, 700)
    expected = doc_aware(order, rows, length, 40)
    source = build(prefix, batch_size=rows, length=length).train
    got = [[source[step * rows + row]["tokens"].tolist() for row in range(rows)] for step in range(40)]
    assert got == expected


def test_k_windows_of_a_document_are_consecutive_rows_of_the_released_code(numbered):
    """doc_aware_k: B rows of T tokens, in packs of k. A sample of ours is a pack."""
    k, T, B = 4, 4, 8
    prefix = numbered("a", LENGTHS)
    order = documents_of(build(prefix, pipeline="linear").train, LENGTHS, 500)
    source = build(prefix, batch_size=B // k, length=k * T).train
    for step, batch in enumerate(doc_aware(order, B // k, k * T, 20)):
        inputs = np.array([row[:-1] for row in batch]).reshape(B, T)
        targets = np.array([row[1:] for row in batch]).reshape(B, T)
        batches = Batches(
            source, batch_size=B // k, micro_batch_size=B // k, data_rank=0, data_size=1, prefetch=0,
            consumed_samples=step * B // k,
        )  # fmt: skip
        (micro,) = batches.next_step()
        assert np.array_equal(micro.tokens.reshape(B, T).numpy(), inputs)
        assert np.array_equal(micro.targets.reshape(B, T).numpy(), targets)
        assert (inputs[:-1, -1] != inputs[1:, 0]).any() and micro.document_starts is None


def test_streams_do_not_depend_on_ranks_and_go_on_where_they_stopped(numbered):
    prefix, B = numbered("a", LENGTHS), 4
    source = build(prefix, batch_size=B).train
    whole = [[source[step * B + row]["tokens"][:-1].tolist() for row in range(B)] for step in range(12)]
    for before, after in pairwise(whole):
        assert any(x[-1] + 1 == y[0] for x, y in zip(before, after, strict=True))
    for ranks, micro, first in [(1, 2, 0), (2, 1, 5), (4, 1, 7), (2, 2, 11)]:
        parts = []
        for rank in range(ranks):
            fresh = build(prefix, batch_size=B).train  # nothing is left of an earlier run but its number of samples
            layout = dict(batch_size=B, micro_batch_size=micro, data_rank=rank, data_size=ranks, prefetch=0)
            parts.append(Batches(fresh, consumed_samples=first * B, **layout))
        for step in range(first, 12):
            dealt = [part.next_step() for part in parts]
            rows = [row for m in range(len(dealt[0])) for part in dealt for row in part[m].tokens.tolist()]
            assert rows == whole[step]


def sources(numbered, weights, seed=1):
    settings = OrderSettings((0.0, 1.0), seed, shuffled=False)
    lengths = [LENGTHS, [6] * 20, [25, 4, 9] * 3]
    prefixes = [numbered(name, lengths[i], first=10_000 * i) for i, name in enumerate("abc"[: len(weights)])]
    return [
        DocumentSource(open_places(prefix, settings, None), weight, settings)
        for prefix, weight in zip(prefixes, weights, strict=True)
    ]


def test_units_are_a_matter_of_the_cache_alone(numbered, tmp_path):
    mixed = sources(numbered, [0.5, 0.3, 0.2])
    options = dict(streams=3, sequence_length=N, seed=9, vocab_size=60_000)
    whole = DocumentStreams(mixed, cache_dir=tmp_path / "whole", **options)
    expected = [whole[n]["tokens"].tolist() for n in range(200)]
    small = DocumentStreams(mixed, cache_dir=tmp_path / "small", unit=7, **options)
    assert [small[n]["tokens"].tolist() for n in reversed(range(200))] == expected[::-1]
    borders = [small[n]["borders"].tolist() for n in range(200)]
    assert borders == [whole[n]["borders"].tolist() for n in range(200)]
    made = sorted((tmp_path / "small").glob("documents-*"))
    assert len(made) > 20
    (made[3] / "documents.npy").write_bytes(b"damaged")
    again = DocumentStreams(mixed, cache_dir=tmp_path / "small", unit=7, **options)
    assert [again[n]["tokens"].tolist() for n in range(200)] == expected
    assert sorted((tmp_path / "small").glob("documents-*")) == made


def test_sources_share_the_tokens_by_weight_to_a_document(numbered, tmp_path):
    mixed = sources(numbered, [0.5, 0.3, 0.2])
    stream = DocumentStreams(mixed, streams=1, sequence_length=1, seed=2, vocab_size=60_000, cache_dir=tmp_path)
    tokens = np.concatenate([stream[n]["tokens"][:1] for n in range(3000)])
    given = np.stack([np.cumsum(tokens // 10_000 == i) for i in range(3)])
    shares = np.array([0.5, 0.3, 0.2])[:, None]
    assert np.abs(given - shares * np.arange(1, 3001)).max() <= 64  # the longest document


def test_short_documents_are_left_out(numbered):
    prefix = numbered("a", LENGTHS)
    begins = np.cumsum([0, *LENGTHS])
    long = {int(b) for b, n in zip(begins, LENGTHS, strict=False) if n >= 7}
    for pipeline in ("shuffled", "linear", "doc_aware"):
        built = build(prefix, pipeline=pipeline, min_document_length=7)
        seen = {int(t) for n in range(100) for t in built.train[n]["tokens"]}
        assert {int(b) for b in begins[:-1]} & seen == long
        assert built.shares[0].tokens_per_epoch == sum(n for n in LENGTHS if n >= 7)
    b = numbered("b", LENGTHS, first=1000)
    built = build([{"prefix": prefix, "min_document_length": 30}, {"prefix": b}], min_document_length=2)
    assert [share.tokens_per_epoch for share in built.shares] == [134, 193]
    with pytest.raises(UserError, match="Documents of fewer than 100 tokens are left out"):
        build(prefix, min_document_length=100)


def test_validation_reads_every_token_whatever_the_pipeline(numbered):
    prefix = numbered("a", LENGTHS)
    built = build(prefix, valid=numbered("v", [9, 2, 30], first=500), min_document_length=7)
    samples = [built.valid[n] for n in range(built.valid.num_samples)]
    targets = [t for s in samples for t in s["tokens"][1 : 1 + s["num_targets"]].tolist()]
    assert sorted(targets) == list(range(501, 541))


def test_fewer_documents_than_streams_are_refused(numbered):
    with pytest.raises(UserError, match="to 13 streams, one for each sample of batch_size, and there are only 12"):
        build(numbered("a", LENGTHS), batch_size=13)


def test_long_documents_are_dealt_more_often_where_asked(numbered):
    prefix = numbered("a", LENGTHS)
    built = build(prefix, pipeline="linear", long_document_weight=2.0)
    assert built.shares[0].tokens_per_epoch == 194 + sum(n for n in LENGTHS if n > N)
