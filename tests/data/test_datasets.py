"""The samples of a phase, from its config: complete, weighted, split, in an order that follows from seed and data."""

import base64
import dataclasses
import json
import logging
from itertools import pairwise

import numpy as np
import pytest

from megayoco.config import DataConfig, ModelConfig, PhaseConfig, PhaseDataConfig, RunConfig
from megayoco.data.datasets import build_datasets, resolve_tokenizer, with_blend_files
from megayoco.data.tokenizer import ByteTokenizer, build_tokenizer, describe_tokenizer
from megayoco.errors import UserError

LENGTHS = [7, 1, 30, 2, 64, 5, 5, 18, 3, 40]  # 175 tokens
N = 8


def build(train, *, seed=5, sequence_length=N, vocab_size=60_000, **kwargs):
    data = DataConfig(train=train, **{"split": "1,0,0", **kwargs})
    return build_datasets(data, sequence_length=sequence_length, seed=seed, vocab_size=vocab_size)


def tokens(source, numbers):
    return [source[n]["tokens"].tolist() for n in numbers]


def shares(datasets):
    return [round(source.share, 6) for source in datasets.shares]


def test_borders_are_where_documents_begin(numbered):
    train = build(numbered("a", LENGTHS)).train
    firsts = set(np.cumsum([0, *LENGTHS]).tolist())
    found = 0
    for n in range(44):
        sample = train[n]
        expected = [i for i in range(1, N + 1) if sample["tokens"][i] in firsts]
        assert sample["borders"].tolist() == expected
        found += len(expected)
        documents = np.split(sample["tokens"], sample["borders"])
        assert all(b == a + 1 for document in documents for a, b in pairwise(document.tolist()))
    assert found > 10


def test_the_order_does_not_depend_on_what_was_read_before(numbered):
    a, b, c = (numbered(name, LENGTHS[i:], first=1000 * i) for i, name in enumerate("abc"))
    for train in (a, [a, b], [0.3, a, 0.5, b, 0.2, c]):
        forward, backward, single = build(train).train, build(train).train, build(train).train
        numbers = list(range(200))
        expected = tokens(forward, numbers)
        assert tokens(backward, numbers[::-1])[::-1] == expected
        assert tokens(single, [137]) == [expected[137]]


def test_the_order_depends_on_the_seed(numbered):
    prefix = numbered("a", LENGTHS)
    orders = [tokens(build(prefix, seed=seed).train, range(21)) for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]


def test_the_order_survives_a_move_of_the_data(numbered, tmp_path):
    before = tokens(build(numbered("a", LENGTHS)).train, range(30))
    (tmp_path / "elsewhere").mkdir()
    for kind in ("bin", "idx"):
        (tmp_path / f"a.{kind}").rename(tmp_path / "elsewhere" / f"b.{kind}")
    assert tokens(build(str(tmp_path / "elsewhere" / "b")).train, range(30)) == before


def test_a_blend_keeps_its_weights_and_reads_each_source_in_its_own_order(numbered):
    a, b = numbered("a", LENGTHS), numbered("b", LENGTHS, first=10_000)
    built = build([3, a, 1, b])
    assert shares(built) == [0.75, 0.25]
    rows = tokens(built.train, range(400))
    from_b = [row[0] >= 10_000 for row in rows]
    for k in range(1, 401):  # any prefix, not only the whole
        assert abs(sum(from_b[:k]) - k / 4) <= 1
    assert [row for row, b_ in zip(rows, from_b, strict=True) if not b_] == tokens(build(a).train, range(300))


def test_an_unweighted_list_reads_every_source_by_its_size(numbered):
    a, b = numbered("a", LENGTHS), numbered("b", LENGTHS * 3, first=10_000)
    for train in ([a, b], [{"prefix": a}, {"prefix": b}]):
        assert shares(build(train)) == [0.25, 0.75]


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.1), (2.0, 1 / (1 + 9**0.5)), (1e9, 0.5)])
def test_temperature_evens_out_the_sizes(numbered, temperature, expected):
    a, b = numbered("a", [20] * 5), numbered("b", [30] * 30, first=1000)
    assert shares(build([a, b], temperature=temperature)) == [round(expected, 6), round(1 - expected, 6)]


def test_long_documents_are_read_more_often_where_asked(numbered):
    prefix = numbered("a", LENGTHS)  # 30, 64, 18 and 40 tokens are longer than N
    weighted = build(prefix, long_document_weight=3.0)
    assert weighted.shares[0].tokens_per_epoch == 175 + 2 * (30 + 64 + 18 + 40)
    epoch = [t for row in tokens(weighted.train, range(-(-479 // N))) for t in row[1:]]
    counts = np.bincount(epoch[:479], minlength=175)
    bounds = np.cumsum([0, *LENGTHS])
    for (begin, end), length in zip(pairwise(bounds.tolist()), LENGTHS, strict=True):
        assert counts[begin:end].mean() == pytest.approx(3 if length > N else 1, abs=0.5)
    # which documents are long follows from the phase's own sequence length
    assert build(prefix, long_document_weight=3.0, sequence_length=50).shares[0].tokens_per_epoch == 175 + 2 * 64
    assert build(prefix, long_document_weight=0.0, split="50,50,0").shares[0].tokens_per_epoch == 7 + 1 + 2
    # validation measures the data as it is
    assert build(prefix, long_document_weight=3.0, valid=prefix).valid.num_samples == -(-174 // N)


def test_a_split_cuts_the_sequences_and_valid_is_separate(numbered):
    a, b = numbered("a", LENGTHS), numbered("b", LENGTHS, first=10_000)
    both = build(a, split="80,20,0")
    border = sum(LENGTHS[:8])
    assert {t for row in tokens(both.train, range(40)) for t in row} == set(range(border))
    valid = tokens(both.valid, range(both.valid.num_samples))
    assert {t for row in valid for t in row} - {0} == set(range(border, 175))  # 0 pads the last one
    assert build(a, split="100,0,0").valid is None
    separate = build(a, valid=b, split="80,20,0")
    assert separate.valid[0]["tokens"].min() >= 10_000
    assert separate.shares[0].tokens_per_epoch == 175


def test_validation_on_several_datasets_is_one_pass_unless_weighted(numbered):
    a, b = numbered("a", LENGTHS), numbered("b", LENGTHS * 3, first=10_000)
    once = build(a, valid=[a, b]).valid
    rows = tokens(once, range(once.num_samples))
    assert once.num_samples == -(-174 // N) + -(-524 // N)
    assert len({tuple(row) for row in rows}) == once.num_samples
    targets = sorted(t for n in range(once.num_samples) for t in once[n]["tokens"][1 : once[n]["num_targets"] + 1])
    assert targets == [*range(1, 175), *range(10_001, 10_525)]
    weighted = build(a, valid=[1, a, 1, b]).valid
    rows = tokens(weighted, range(weighted.num_samples))
    assert abs(sum(row[0] < 10_000 for row in rows) - len(rows) / 2) <= 1


def test_one_validation_sample_may_be_shorter_than_the_sequence(numbered):
    prefix = numbered("a", LENGTHS)
    valid = build(prefix, valid=numbered("v", [3, 2], first=500)).valid
    assert valid.num_samples == 1
    assert valid[0]["tokens"].tolist() == [500, 501, 502, 503, 504, 0, 0, 0, 0]
    assert (valid[0]["num_targets"], valid[0]["borders"].tolist()) == (4, [3])


def test_a_blend_is_built_without_warnings(numbered, caplog):
    with caplog.at_level(logging.INFO):
        build([numbered("a", LENGTHS), numbered("b", LENGTHS)])
    assert not caplog.records


def test_an_id_outside_the_vocabulary_that_no_check_before_saw_is_refused(numbered, monkeypatch):
    monkeypatch.setattr("megayoco.data.indexed._sampled_range", lambda *_: (0, 9))
    train = build(numbered("a", LENGTHS), vocab_size=174).train
    with pytest.raises(UserError, match=r"a\.bin holds token id 174, outside the model's vocabulary 0\.\.173"):
        tokens(train, range(22))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 175}, r"holds 175 tokens, fewer than the 176 of one sample"),
        ({"split": "99,1,0"}, r"part 0\.99 to 1 of its sequences holds 0 tokens.*data\.split"),
        ({"valid": "missing"}, "missing.idx does not exist"),
        ({"valid": "missing.yaml"}, r"data\.valid: missing\.yaml is taken for a blend file by its ending, but cannot"),
        ({"vocab_size": 100}, "token id 174, outside"),
        ({"cache_dir": "/proc/nowhere"}, "cannot write sample indices.*data.cache_dir"),
        ({"long_document_weight": 0.0, "sequence_length": 3}, "holds 3 tokens, fewer than the 4"),
    ],
)
def test_unusable_data_is_refused_before_the_first_step(numbered, arguments, message):
    prefix = numbered("a", [2, 1, 172] if "long_document_weight" in arguments else LENGTHS)
    with pytest.raises(UserError, match=message):
        build(prefix, **arguments)


def test_weights_that_read_nothing_or_contradict_are_refused(numbered):
    a, b = numbered("a", LENGTHS), numbered("b", [2, 8], first=1000)
    with pytest.raises(UserError, match=r"data\.temperature 2 makes weights.*but data\.train gives weights"):
        build([1, a, 2, b], temperature=2.0)
    with pytest.raises(UserError, match="b has next to no weight"):
        build([a, b], temperature=0.01)
    with pytest.raises(UserError, match="a has next to no weight"):
        build([1e-20, a, 1e20, b])


def run_config(tmp_path, **data):
    phase = PhaseConfig(sequence_length=8, steps=4, batch_size=4, learning_rate=1.0)
    return RunConfig(
        model=ModelConfig(pattern="llama", dim=16, layers=2, hidden_dim=32, heads=2, vocab_size=64),
        data=DataConfig(**data),
        phases=[phase, dataclasses.replace(phase, data=PhaseDataConfig(train=str(tmp_path / "second.yaml")))],
        output_dir="out",
    )


def test_a_run_is_saved_with_the_content_of_its_blend_files(tmp_path):
    (tmp_path / "first.json").write_text('{"train": "0.3 a 0.7 b", "valid": ["v"], "test": null}')
    (tmp_path / "second.yaml").write_text("- {prefix: c, weight: 2}\n- {prefix: d, weight: 1e-1}\n")
    run = with_blend_files(run_config(tmp_path, train=str(tmp_path / "first.json")))
    assert [(source.prefix, source.weight) for source in run.data.train] == [("a", 0.3), ("b", 0.7)]
    assert [(source.prefix, source.weight) for source in run.data.valid] == [("v", None)]
    assert [(source.prefix, source.weight) for source in run.phase_data(1).train] == [("c", 2.0), ("d", 0.1)]
    assert run.phase_data(1).valid == run.data.valid
    assert with_blend_files(run) == run


def test_the_tokenizer_comes_from_the_meta_file(write_pair):
    identity = ByteTokenizer().identity() | {"model": None}
    a = write_pair("a", [[1, 2]], meta={"tokenizer": identity})
    b = write_pair("b", [[1, 2]])
    c = write_pair("c", [[1, 2]], meta={"tokenizer": identity | {"sha256": "0"}})
    assert resolve_tokenizer(DataConfig(train=a)).identity() == ByteTokenizer().identity()
    assert resolve_tokenizer(DataConfig(train=[a, b])).type == "ByteTokenizer"
    assert resolve_tokenizer(DataConfig(train=b, tokenizer_type="ByteTokenizer")).type == "ByteTokenizer"
    with pytest.raises(UserError, match=r"b has no \.meta\.json"):
        resolve_tokenizer(DataConfig(train=b))
    with pytest.raises(UserError, match="c was made with another tokenizer"):
        resolve_tokenizer(DataConfig(train=a, valid=c))
    with pytest.raises(UserError, match="c was made with another tokenizer"):
        resolve_tokenizer(DataConfig(train=a), DataConfig(train=c))


def test_options_of_the_tokenizer_come_from_the_meta_file_or_the_config(write_pair, tmp_path):
    ranks = tmp_path / "bytes.tiktoken"
    ranks.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    tokenizer = build_tokenizer("TiktokenTokenizer", str(ranks), {"special_tokens": ["<|a|>", "<|b|>"]})
    described = json.loads(json.dumps(describe_tokenizer(tokenizer, tmp_path)))
    a = write_pair("a", [[1, 2]], meta={"tokenizer": described})
    assert resolve_tokenizer(DataConfig(train=a)).identity() == tokenizer.identity()
    options = {"special_tokens": ["<|a|>", "<|b|>"]}
    named = DataConfig(
        train=a, tokenizer_type="TiktokenTokenizer", tokenizer_model=str(ranks), tokenizer_options=options
    )
    assert resolve_tokenizer(named).identity() == tokenizer.identity()
    with pytest.raises(UserError, match="made with another tokenizer"):
        resolve_tokenizer(dataclasses.replace(named, tokenizer_options=None))


def test_a_tokenizer_that_has_moved_is_explained(write_pair):
    saved = {"type": "TiktokenTokenizer", "model": "gone.tiktoken", "sha256": "0", "vocab_size": 9}
    a = write_pair("a", [[1, 2]], meta={"tokenizer": saved})
    with pytest.raises(UserError, match=r"a\.meta\.json: .*gone\.tiktoken.*has moved"):
        resolve_tokenizer(DataConfig(train=a))
