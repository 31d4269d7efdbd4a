"""Samples: complete, in an order that depends on seed and data only, from indices that are never stale."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megayoco.data.datasets import _config, build_datasets, resolve_tokenizer
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.errors import UserError

LENGTHS = [7, 1, 30, 2, 64, 5, 5, 18, 3, 40]  # 175 tokens
N = 8


def settings(train, **kwargs):
    defaults = {
        "valid": None,
        "split": "1,0,0",
        "tokenizer_type": None,
        "tokenizer_model": None,
        "cache_dir": None,
    }
    return SimpleNamespace(train=train, **(defaults | kwargs))


def build(train, *, num_samples=100, seed=5, sequence_length=N, vocab_size=60_000, **kwargs):
    return build_datasets(
        settings(train, **kwargs),
        sequence_length=sequence_length,
        num_samples=num_samples,
        seed=seed,
        vocab_size=vocab_size,
    )


def tokens(source, numbers):
    return [source[n]["tokens"].tolist() for n in numbers]


def test_an_epoch_is_that_of_megatron(numbered, tmp_path):
    prefix = numbered("a", LENGTHS)
    train = build(prefix).train
    theirs = GPTDataset(
        IndexedDataset(prefix),
        prefix,
        np.arange(len(LENGTHS), dtype=np.int32),
        None,
        Split.train,
        _config(prefix, N, 5, str(tmp_path / "other")),
    )
    assert train.samples_per_epoch == len(theirs) == (sum(LENGTHS) - 1) // N
    for n in range(len(theirs)):
        expected = theirs[n]
        assert train[n]["tokens"][:-1].tolist() == expected["tokens"].tolist()
        assert train[n]["tokens"][1:].tolist() == expected["labels"].tolist()


def test_borders_are_where_documents_begin(numbered):
    train = build(numbered("a", LENGTHS)).train
    firsts = set(np.cumsum([0, *LENGTHS]).tolist())
    found = 0
    for n in range(train.samples_per_epoch):
        sample = train[n]
        expected = [i for i in range(1, N + 1) if sample["tokens"][i] in firsts]
        assert sample["borders"].tolist() == expected
        found += len(expected)
    assert found > 5


def test_every_epoch_has_the_same_samples_in_another_order(numbered):
    train = build(numbered("a", LENGTHS)).train
    E = train.samples_per_epoch
    epochs = [tokens(train, range(e * E, (e + 1) * E)) for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_does_not_depend_on_the_number_of_samples_or_on_what_was_read_before(numbered):
    a, b, c = (numbered(name, LENGTHS[i:], first=1000 * i) for i, name in enumerate("abc"))
    for train in (a, [a, b], [0.3, a, 0.5, b, 0.2, c]):
        short = tokens(build(train, num_samples=40).train, range(40))
        extended = build(train, num_samples=500).train
        assert tokens(extended, range(499, -1, -1))[::-1][:40] == short
        assert tokens(extended, range(40, 60)) == tokens(build(train, num_samples=60).train, range(40, 60))


def test_the_order_depends_on_the_seed(numbered):
    prefix = numbered("a", LENGTHS)
    orders = [tokens(build(prefix, seed=seed).train, range(21)) for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]


def test_a_blend_is_built_without_warnings(numbered, caplog):
    build([numbered("a", LENGTHS), numbered("b", LENGTHS)])
    assert not caplog.records


def test_a_blend_keeps_its_weights(numbered):
    a, b = numbered("a", LENGTHS), numbered("b", LENGTHS, first=10_000)
    weighted = build([3, a, 1, b], num_samples=400).train
    from_b = [weighted[n]["tokens"][0] >= 10_000 for n in range(400)]
    for k in (4, 40, 100, 400):  # any prefix, not only the whole
        assert abs(sum(from_b[:k]) - k / 4) <= 1


def test_an_unweighted_list_reads_every_source_by_its_size(numbered):
    a, b = numbered("a", LENGTHS), numbered("b", LENGTHS * 3, first=10_000)
    train = build([a, b]).train
    E = train.samples_per_epoch
    assert E == 21 + (3 * 175 - 1) // N
    once = tokens(build([a, b], num_samples=E).train, range(E))
    assert sum(row[0] < 10_000 for row in once) == 21
    assert len({row[0] for row in once}) == E


def test_a_split_cuts_the_sequences_and_valid_is_separate(numbered):
    a, b = numbered("a", LENGTHS), numbered("b", LENGTHS, first=10_000)
    both = build(a, split="80,20,0")
    border = sum(LENGTHS[:8])
    assert {t for row in tokens(both.train, range(both.train.samples_per_epoch)) for t in row} <= set(range(border))
    assert min(min(row) for row in tokens(both.valid, range(both.valid.samples_per_epoch))) >= border
    assert build(a, split="100,0,0").valid is None
    separate = build(a, valid=b, split="80,20,0")
    assert separate.valid[0]["tokens"].min() >= 10_000
    assert separate.train.samples_per_epoch == 21
    assert build([1, a, 1, b], split="80,20,0").valid.samples_per_epoch == 2 * both.valid.samples_per_epoch


def test_a_regenerated_pair_never_uses_the_old_index(numbered):
    prefix = numbered("a", LENGTHS)
    stat = os.stat(f"{prefix}.idx")
    build(prefix)
    numbered("a", LENGTHS[::-1])  # the same size, other documents
    assert os.stat(f"{prefix}.idx").st_size == stat.st_size
    train = build(prefix).train
    firsts = set(np.cumsum([0, *LENGTHS[::-1]]).tolist())
    for n in range(train.samples_per_epoch):
        sample = train[n]
        assert sample["borders"].tolist() == [i for i in range(1, N + 1) if sample["tokens"][i] in firsts]


def test_the_cache_is_used_again_and_goes_where_it_is_told(numbered, tmp_path, monkeypatch):
    prefix, cache = numbered("a", LENGTHS), tmp_path / "cache"
    first = tokens(build(prefix, cache_dir=str(cache)).train, range(30))
    folders = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert folders and not Path(f"{prefix}/cache").exists() and not (tmp_path / ".megayoco-cache").exists()
    monkeypatch.chdir(tmp_path)
    assert tokens(build("./a", cache_dir="cache").train, range(30)) == first
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == folders
    build(prefix, cache_dir=str(cache), sequence_length=9)
    assert len(list(cache.iterdir())) == 2


def test_a_half_built_index_of_a_killed_run_is_ignored(numbered, tmp_path):
    prefix, cache = numbered("a", LENGTHS), tmp_path / "cache"
    first = tokens(build(prefix, cache_dir=str(cache)).train, range(21))
    (folder,) = cache.iterdir()
    left = folder.rename(f"{folder}.tmp-1")
    for path in left.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:40])
    assert tokens(build(prefix, cache_dir=str(cache)).train, range(21)) == first


def test_a_damaged_index_is_refused_with_its_folder(numbered, tmp_path):
    prefix, cache = numbered("a", LENGTHS), tmp_path / "cache"
    build(prefix, cache_dir=str(cache))
    (folder,) = cache.iterdir()
    for path in folder.glob("*.npy"):
        path.write_bytes(b"xx")
    with pytest.raises(UserError, match=f"{folder} are damaged. Remove that folder"):
        build(prefix, cache_dir=str(cache))


def test_an_id_outside_the_vocabulary_that_no_check_before_saw_is_refused(numbered, monkeypatch):
    monkeypatch.setattr("megayoco.data.indexed._sampled_range", lambda *_: (0, 9))
    train = build(numbered("a", LENGTHS), vocab_size=174).train
    with pytest.raises(UserError, match=r"a\.bin holds token id 174, outside the model's vocabulary 0\.\.173"):
        tokens(train, range(train.samples_per_epoch))


def test_a_blend_that_memory_cannot_hold_is_refused(numbered):
    prefixes = [numbered("a", LENGTHS), numbered("b", LENGTHS)]
    with pytest.raises(UserError, match="samples of 2 datasets does not fit in memory"):
        build(prefixes, num_samples=10**15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 175}, r"holds 175 tokens, fewer than one sample of 175 \+ 1"),
        ({"split": "99,1,0"}, r"part 0\.99 to 1 of its 10 sequences holds 0 tokens.*data\.split"),
        ({"split": "a,b"}, "data.split must be three parts"),
        ({"valid": "missing"}, "missing.bin does not exist|missing.idx does not exist"),
        ({"vocab_size": 100}, "token id 174, outside"),
        ({"cache_dir": "/proc/nowhere"}, "cannot write sample indices.*data.cache_dir"),
    ],
)
def test_unusable_data_is_refused_before_the_first_step(numbered, arguments, message):
    prefix = numbered("a", LENGTHS)
    with pytest.raises(UserError, match=message):
        build(prefix, **arguments)


def test_the_tokenizer_comes_from_the_meta_file(write_pair):
    identity = ByteTokenizer().identity() | {"model": None}
    a = write_pair("a", [[1, 2]], meta={"tokenizer": identity})
    b = write_pair("b", [[1, 2]])
    c = write_pair("c", [[1, 2]], meta={"tokenizer": identity | {"sha256": "0"}})
    assert resolve_tokenizer(settings(a)).identity() == ByteTokenizer().identity()
    assert resolve_tokenizer(settings([a, b])).type == "ByteTokenizer"
    assert resolve_tokenizer(settings(b, tokenizer_type="ByteTokenizer")).type == "ByteTokenizer"
    with pytest.raises(UserError, match=r"b has no \.meta\.json"):
        resolve_tokenizer(settings(b))
    with pytest.raises(UserError, match="c was made with another tokenizer"):
        resolve_tokenizer(settings(a, valid=c))


def test_a_tokenizer_that_has_moved_is_explained(write_pair):
    saved = {"type": "TiktokenTokenizer", "model": "gone.tiktoken", "sha256": "0", "vocab_size": 9}
    a = write_pair("a", [[1, 2]], meta={"tokenizer": saved})
    with pytest.raises(UserError, match=r"a\.meta\.json: .*gone\.tiktoken.*has moved"):
        resolve_tokenizer(settings(a))
