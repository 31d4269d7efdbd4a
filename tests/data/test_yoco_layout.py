"""The layout of the official YOCO code: every source a pair, every weight in the blend file, no text lost."""

import json
from pathlib import Path

import pytest
import yaml

from megayoco.data import partial
from megayoco.data.encode import Task
from megayoco.data.prepare import Interrupted
from megayoco.data.yoco_layout import prepare_layout, read_layout
from megayoco.errors import UserError
from tests.data.test_prepare import outputs, tokens_of

TASK = Task("ByteTokenizer")


@pytest.fixture
def layout(tmp_path):
    """A layout of three sources: listed in a file, inline, absolute; texts under each of the three keys."""
    data = tmp_path / "data"
    elsewhere = tmp_path / "elsewhere.jsonl"
    files = {
        data / "shard/CC/0.jsonl": [
            {"text": "one\n\ntwo\n", "content": "not this"},
            {"text": None, "content": "three"},
        ],
        data / "shard/CC/1.jsonl": [{"raw_content_lines": ["a", "", "b"]}, {"text": "x" * 300_000}],
        data / "code.jsonl": [{"content": "def f():\n    pass\n"}],
        elsewhere: [{"text": "elsewhere"}],
    }
    for path, records in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (data / "json").mkdir()
    (data / "json/CC.json").write_text(json.dumps(["shard/CC/1.jsonl", "shard/CC/0.jsonl"]))
    change(
        data,
        [
            {"name": "CC", "weight": 0.5},
            {"name": "StarCoder", "weight": 2, "source": ["code.jsonl"]},
            {"name": "tiny", "weight": 1e-5, "source": [str(elsewhere)]},
        ],
    )
    return data


def change(data: Path, entries, split: str = "train") -> None:
    (data / f"json/{split}.json").write_text(json.dumps(entries))


def test_sources_become_pairs_and_weights_a_blend_file(layout, tmp_path):
    reports = []
    done = prepare_layout(
        read_layout(str(layout)),
        str(tmp_path / "o/mix"),
        TASK,
        report=lambda t: reports.append((t.read, t.size, t.records)),
    )
    assert list(done) == [f"{tmp_path}/o/mix_{name}_text_document" for name in ("CC", "StarCoder", "tiny")]
    cc = tokens_of(tmp_path / "o/mix_CC_text_document")
    assert cc == [list(text.encode()) for text in ("a\n\nb", "x" * 300_000, "one\n\ntwo\n", "three")]
    assert tokens_of(tmp_path / "o/mix_tiny_text_document") == [list(b"elsewhere")]
    blend = yaml.safe_load((tmp_path / "o/mix_blend.yaml").read_text())
    assert blend == [
        {"prefix": "mix_CC_text_document", "weight": 0.5},
        {"prefix": "mix_StarCoder_text_document", "weight": 2.0},
        {"prefix": "mix_tiny_text_document", "weight": 1e-5},
    ]
    assert reports == sorted(reports) and reports[-1][0] == reports[-1][1] and reports[-1][2] == 6


def test_counts_serve_as_weights_and_other_splits_have_names(layout):
    change(layout, [{"name": "CC", "count": 30}, {"name": "code", "count": 10, "source": ["code.jsonl"]}], "valid")
    assert [source.weight for source in read_layout(str(layout), "valid")] == [30, 10]


def test_resume_leaves_finished_sources_and_ends_the_others(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "RECORD_BYTES", 0)
    sources = read_layout(str(layout))
    prepare_layout(sources, str(tmp_path / "one/mix"), TASK)
    prefix = str(tmp_path / "two/mix")
    for stop in range(1, 30):
        calls = 0

        def report(totals, stop=stop):
            nonlocal calls
            calls += 1
            if calls > stop:
                raise KeyboardInterrupt

        try:
            prepare_layout(sources, prefix, TASK, resume=True, report=report)
            break
        except Interrupted:
            assert not Path(f"{prefix}_blend.yaml").exists()
    assert stop > 2
    assert outputs(tmp_path / "two") == outputs(tmp_path / "one")
    with pytest.raises(UserError, match=r"blend\.yaml exists"):
        prepare_layout(sources, prefix, TASK)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"name": "CC"}, r"train\.json must hold a JSON list"),
        ([], "not empty"),
        ([["CC", 1]], 'entry 1: expected an object with a "name"'),
        ([{"name": "a/b", "weight": 1}], "cannot be part of a file name"),
        ([{"name": "CC", "weight": 1}, {"name": "CC", "weight": 1}], "entry 2: the name 'CC' occurs twice"),
        ([{"name": "CC"}], "weight or count must be a number of at least 0, got None"),
        ([{"name": "CC", "weight": -1}], "got -1"),
        ([{"name": "CC", "weight": "1"}], "got '1'"),
        ([{"name": "CC", "weight": 0}], "no entry has a weight"),
        ([{"name": "other", "weight": 1}], r"cannot read .*other\.json"),
        ([{"name": "CC", "weight": 1, "source": []}], "expected a list of files"),
        (
            [{"name": "CC", "weight": 1, "source": ["no.jsonl", "code.jsonl", "n"]}],
            r"no\.jsonl does not exist \(2 of 3",
        ),
        ([{"name": "CC", "weight": 1, "source": ["code.jsonl", "./code.jsonl"]}], "twice"),
        ([{"name": "CC", "weight": 1}, {"name": "x", "count": 1, "source": ["code.jsonl"]}], "others only a count"),
    ],
)
def test_a_layout_that_is_broken_is_refused_before_anything_is_written(layout, entries, message):
    change(layout, entries)
    with pytest.raises(UserError, match=message):
        read_layout(str(layout))


def test_a_missing_split_names_those_there_are(layout):
    with pytest.raises(UserError, match=r"valid\.json: No such file.*: CC, train\. Choose one by --yoco-split"):
        read_layout(str(layout), "valid")


def test_a_record_without_text_has_a_place(layout, tmp_path):
    (layout / "code.jsonl").write_text('{"content": "x"}\n{"body": "x"}\n')
    with pytest.raises(
        UserError, match=r"code\.jsonl, line 2: no key 'text' or 'content' or 'raw_content_lines', only 'body'"
    ):
        prepare_layout(read_layout(str(layout)), str(tmp_path / "o"), TASK)
    assert (tmp_path / "o_CC_text_document.idx").exists()  # finished, and --resume leaves it
    assert not (tmp_path / "o_blend.yaml").exists()
