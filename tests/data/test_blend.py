"""Data paths: Megatron's grammar for sane input, an error that shows the reading for the rest."""

import json
import logging
from types import SimpleNamespace

import pytest
import yaml

from megayoco.config import DataConfig, PhaseDataConfig
from megayoco.data.blend import Source, expand_blend_files, is_blend_file, parse_blend
from megayoco.errors import UserError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a b", [("a b", None)]),
        (["a"], [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        (["a", "b", "c"], [("a", None), ("b", None), ("c", None)]),
        (["0.3", "a", "7", "b"], [("a", 0.3), ("b", 7.0)]),
        ([0.3, "a", 7, "b"], [("a", 0.3), ("b", 7.0)]),
        ([1, "2024"], [("2024", 1.0)]),
        ([0, "a", 1, "b"], [("b", 1.0)]),
        ([{"prefix": "a", "weight": 2}, {"prefix": "b", "weight": 1}], [("a", 2.0), ("b", 1.0)]),
        ([{"prefix": "a"}, {"prefix": "b", "weight": None}], [("a", None), ("b", None)]),
        ([SimpleNamespace(prefix="a", weight=0.5)], [("a", 0.5)]),
    ],
)
def test_data_paths(value, expected):
    assert parse_blend(value, "data.train") == [Source(*pair) for pair in expected]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must be a prefix or a list"),
        (None, "must be a prefix or a list"),
        (["0.3", "a", "0.7"], "'0.3' stands where a prefix is expected. The 3 words were read as prefixes"),
        (["a", "0.5"], "'0.5' stands where a prefix is expected"),
        ([0.5, "a", "b", "c"], "0.5 stands where a prefix is expected"),
        ([-1, "a"], "weight of a is -1"),
        (["nan", "a"], "weight of a is nan"),
        (["inf", "a"], "weight of a is inf"),
        ([0, "a", 0, "b"], "all weights are 0"),
        (["a", "./a"], "given twice"),
        ([{"prefix": "a", "wieght": 1}], "expected {prefix: PATH, weight: NUMBER}"),
        ([{"prefix": "a", "weight": 2}, {"prefix": "b"}], "b has no weight, but others have"),
        ([{"weight": 1}], "expected {prefix: PATH, weight: NUMBER}"),
    ],
)
def test_mistakes_show_the_word(value, message):
    with pytest.raises(UserError, match=r"data\.train") as caught:
        parse_blend(value, "data.train")
    assert message in str(caught.value)


def test_a_final_bin_or_idx_is_removed_with_a_note(caplog):
    caplog.set_level(logging.INFO, "megayoco")
    assert parse_blend(["x/a.bin", "x/b.idx"], "data.train") == [Source("x/a", None), Source("x/b", None)]
    assert "reading x/a.bin as the prefix x/a" in caplog.text


def read(tmp_path, name, content, **kwargs):
    """What a section reads whose train is a blend file of this content."""
    (tmp_path / name).write_text(content)
    return expand_blend_files(DataConfig(train=str(tmp_path / name), **kwargs), "data")


def words(blend):
    return None if blend is None else [(source.prefix, source.weight) for source in blend]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.yaml", "- {prefix: a, weight: 0.3}\n- {prefix: b c, weight: 7}\n"),
        ("b.yml", "[0.3, a, 7, b c]"),
        ("b.json", '["0.3", "a", 7, "b c"]'),
        ("b.json", '[{"prefix": "a", "weight": 0.3}, {"prefix": "b c", "weight": 7}]'),
        ("b.yaml", "train: [0.3, a, 7, b c]\ntest: [t]\n"),
    ],
)
def test_blend_files_say_what_a_list_says(tmp_path, name, content):
    data = read(tmp_path, name, content)
    assert words(data.train) == [("a", 0.3), ("b c", 7.0)]
    assert (data.valid, data.split) == (None, "99,1,0")
    assert expand_blend_files(data, "data") is not None
    assert parse_blend(data.train, "data.train") == [Source("a", 0.3), Source("b c", 7.0)]


def test_the_files_of_megatron(tmp_path):
    assert words(read(tmp_path, "args.txt", "0.3 a\n0.7 b\n").train) == [("a", 0.3), ("b", 0.7)]
    assert words(read(tmp_path, "args.txt", "a b c").train) == [("a", None), ("b", None), ("c", None)]
    split = {"train": "0.3 a 0.7 b", "valid": ["v"], "test": "t"}
    data = read(tmp_path, "split.json", json.dumps(split))
    assert (words(data.train), words(data.valid)) == ([("a", 0.3), ("b", 0.7)], [("v", None)])
    assert read(tmp_path, "split.json", json.dumps(split), valid=["mine"]).valid == ["mine"]


def test_a_part_that_is_empty_means_none(tmp_path):
    data = read(tmp_path, "split.json", '{"train": ["a"], "valid": [], "test": null}')
    assert (data.valid, data.split) == (None, "1,0,0")
    assert read(tmp_path, "only.json", '{"train": ["a"]}').split == "99,1,0"


def test_a_file_for_validation_gives_its_part_or_its_list(tmp_path):
    (tmp_path / "split.yaml").write_text("train: [a]\nvalid: [v, w]\n")
    (tmp_path / "list.yaml").write_text("[v, w]")
    for name in ("split.yaml", "list.yaml"):
        data = expand_blend_files(DataConfig(train="a", valid=str(tmp_path / name)), "data")
        assert (data.train, words(data.valid)) == ("a", [("v", None), ("w", None)])
    (tmp_path / "train.yaml").write_text("train: [a]\n")
    with pytest.raises(UserError, match="names no datasets to validate on"):
        expand_blend_files(DataConfig(train="a", valid=str(tmp_path / "train.yaml")), "data")
    phase = expand_blend_files(PhaseDataConfig(train=str(tmp_path / "split.yaml")), "phases.0.data")
    assert (words(phase.train), words(phase.valid)) == ([("a", None)], [("v", None), ("w", None)])


def test_prefixes_are_looked_for_beside_the_file_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "near_document.idx").touch()
    (tmp_path / "data" / "blend.yaml").write_text(
        yaml.safe_dump([{"prefix": "near_document", "weight": 1}, {"prefix": "data/far", "weight": 2}])
    )
    data = expand_blend_files(DataConfig(train="data/blend.yaml"), "data")
    assert words(data.train) == [("data/near_document", 1.0), ("data/far", 2.0)]


def test_a_prefix_may_end_like_a_file(tmp_path):
    prefix = str(tmp_path / "corpus.json")
    assert is_blend_file(prefix)
    (tmp_path / "corpus.json.idx").touch()
    assert not is_blend_file(prefix)
    assert expand_blend_files(DataConfig(train=prefix), "data").train == prefix


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.yaml", "- [a\n", r"b\.yaml, line 2: not valid YAML"),
        ("b.yaml", "train: [a]\ntrain: [b]\n", r"b\.yaml, line 2: train is given twice"),
        ("b.json", "[1,", r"data\.train: .*b\.json is not JSON: .*line 1"),
        ("b.json", '{"training": ["a"]}', "unknown part 'training'. The parts of a blend file are train, valid, test"),
        ("b.json", '{"valid": ["a"]}', "names no datasets to train on"),
        ("b.yaml", "", "names no datasets to train on"),
        ("b.txt", " \n", "names no datasets to train on"),
        ("b.yaml", "7", "must be a prefix or a list"),
        ("b.yaml", "[a, 0.5]", r"data\.train, .*b\.yaml: 0\.5 stands where a prefix is expected"),
        ("b.yaml", "[{prefix: a, weight: x}]", r"b\.yaml: expected \{prefix: PATH, weight: NUMBER\}"),
        ("b.yaml", "[{name: a}]", r"b\.yaml: expected \{prefix: PATH, weight: NUMBER\}"),
        ("b.yaml", "[[a]]", r"b\.yaml: expected \{prefix: PATH, weight: NUMBER\}"),
        ("b.json", "[" * 100_000, "nested too deeply"),
        ("b.txt", "a \xff".encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_damaged_blend_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        expand_blend_files(DataConfig(train=str(path)), "data")


def test_a_missing_blend_file_is_named():
    with pytest.raises(UserError, match=r"data\.train: nowhere/b\.yaml is taken for a blend file .* No such file"):
        expand_blend_files(DataConfig(train="nowhere/b.yaml"), "data")
    with pytest.raises(UserError, match=r"phases\.1\.data\.valid: nowhere/b\.yaml"):
        expand_blend_files(PhaseDataConfig(valid="nowhere/b.yaml"), "phases.1.data")
