"""The tools around tokenizers: a report whose numbers can be counted by hand, exports, mistakes in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from megayoco.data.command import run_command
from megayoco.data.tokenizer import TiktokenTokenizer, build_tokenizer
from megayoco.data.tokenizer.report import measure
from megayoco.errors import UserError
from tests.tools.test_tools import ROOT, fails, load_tool, write_lines

export_tokenizer, tokenizer_report, train_tokenizer = map(
    load_tool, ("export_tokenizer", "tokenizer_report", "train_tokenizer")
)


@pytest.fixture
def corpus(tmp_path) -> Path:
    texts = ["the cat and the hat, 1234567\n" * 5, "été 日本語 " * 6, "x"]
    return write_lines(tmp_path / "corpus.jsonl", *({"text": text} for text in texts), {"text": ""})


@pytest.fixture
def rank_file(corpus, tmp_path) -> Path:
    path = tmp_path / "ranks.tiktoken"
    arguments = ["--input", corpus, "--vocab-size", 270, "--output", path]
    assert run_command(train_tokenizer.main, [str(a) for a in arguments]) == 0
    return path


def test_the_printed_command_lines_work_as_they_stand(corpus, rank_file, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    for line in (
        "tools/export_tokenizer.py --tokenizer-model ranks.tiktoken --output tokenizer",
        "tools/tokenizer_report.py --input corpus.jsonl --tokenizer TiktokenTokenizer:ranks.tiktoken"
        " --tokenizer HuggingFaceTokenizer:tokenizer/tokenizer.json,eod_token=<|endoftext|> --tokenizer ByteTokenizer",
    ):
        done = subprocess.run(
            [sys.executable, *line.split()], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "tokens / character" in done.stdout and "HuggingFaceTokenizer" in done.stdout


def test_the_report_counts(corpus, rank_file, tmp_path, capsys):
    arguments = ["--input", corpus, "--tokenizer", "ByteTokenizer", "--json", tmp_path / "r.json"]
    arguments += ["--tokenizer", f"TiktokenTokenizer:{rank_file}", "--examples", 3]
    assert run_command(tokenizer_report.main, [str(a) for a in arguments]) == 0
    table = capsys.readouterr().out
    assert "3 documents, 194 characters, 242 bytes" in table
    as_bytes, ranks = json.loads((tmp_path / "r.json").read_text())
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()][:3]
    assert as_bytes["characters"] == sum(map(len, texts)) == 145 + 6 * 8 + 1
    assert as_bytes["tokens"] == as_bytes["bytes"] == sum(len(text.encode()) for text in texts) == 242
    assert as_bytes["tokens_per_character"] == 242 / 194 and as_bytes["tokens_per_byte"] == 1
    assert as_bytes["tokens_per_sample"] == {"mean": 242 / 3, "median": 96.0, "p95": pytest.approx(140.1), "max": 145}
    beyond_ascii = sum(byte > 127 for text in texts for byte in text.encode())
    assert as_bytes["fallback_share"] == pytest.approx(beyond_ascii / 242)
    used = {byte for text in texts for byte in text.encode()}
    assert as_bytes["never_produced"] | {"examples": 0} == {"count": 256 - len(used), "of": 256, "examples": 0}
    assert list(as_bytes["never_produced"]["examples"]) == ["0", "1", "2"]

    tokenizer = TiktokenTokenizer(str(rank_file))
    ids = [i for text in texts for i in tokenizer.encode(text)]
    assert ranks["tokens"] == len(ids) < 242
    assert ranks["never_produced"]["count"] == len(set(range(270)) - set(ids)) and ranks["never_produced"]["of"] == 270
    assert {key: ranks["tokenizer"][key] for key in tokenizer.identity()} == tokenizer.identity()


def test_the_report_stops_where_it_is_told(corpus, tmp_path):
    arguments = ["--input", corpus, "--tokenizer", "ByteTokenizer", "--json", tmp_path / "r.json", "--max-mb", 1e-6]
    assert run_command(tokenizer_report.main, [str(a) for a in arguments]) == 0
    assert json.loads((tmp_path / "r.json").read_text())[0]["documents"] == 1


def test_measuring_goes_on_over_batches_and_names_the_text_that_fails(monkeypatch):
    monkeypatch.setattr("megayoco.data.tokenizer.report._BATCH", 10)
    tokenizer = build_tokenizer("ByteTokenizer")
    texts = [("a", "12345"), ("b", ""), ("c", "67890"), ("d", "x")]
    steps = [found[0].characters for found in measure([tokenizer], texts)]
    assert steps == [10, 11]

    def refuse(texts):
        from megayoco.data.tokenizer.base import EncodingError

        raise EncodingError("cannot be encoded", 1)

    monkeypatch.setattr(tokenizer, "encode_documents", refuse)
    with pytest.raises(UserError, match=r"^c: cannot be encoded"):
        list(measure([tokenizer], texts))


def test_an_exported_tokenizer_loads_in_transformers(rank_file, tmp_path, capsys):
    arguments = [str(a) for a in ("--tokenizer-model", rank_file, "--output", tmp_path / "out")]
    assert run_command(export_tokenizer.main, arguments) == 0
    assert "271 ids, of which 270 ends a document" in capsys.readouterr().out
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the cat 1234567 été"
    assert loaded(text, add_special_tokens=False).input_ids == TiktokenTokenizer(str(rank_file)).encode(text)
    assert "exists" in fails(export_tokenizer, arguments, capsys)
    assert run_command(export_tokenizer.main, [*arguments, "--overwrite"]) == 0
    yoco = [*arguments[:3], str(tmp_path / "yoco"), "--tokenizer-type", "YocoTiktokenTokenizer"]
    assert run_command(export_tokenizer.main, yoco) == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "yoco").eos_token == "</s>"


def test_mistakes_are_explained(corpus, rank_file, tmp_path, capsys):
    report = ["--input", corpus, "--tokenizer"]
    blank = write_lines(tmp_path / "blank.jsonl", {"text": ""})
    for arguments, message in [
        ([*report, "ByteTokenizer:x,y"], "expected TYPE:MODEL,OPTION=VALUE"),
        ([*report, "Tiktoken"], "--tokenizer Tiktoken: unknown tokenizer type"),
        ([*report, "TiktokenTokenizer"], "--tokenizer TiktokenTokenizer: TiktokenTokenizer needs a model"),
        ([*report, "ByteTokenizer", "--max-mb", 0], "--max-mb must be above 0"),
        ([*report, "ByteTokenizer", "--json-keys", "body"], "corpus.jsonl, line 1"),
        (["--input", blank, "--tokenizer", "ByteTokenizer"], "no text in the input"),
    ]:
        assert message in fails(tokenizer_report, arguments, capsys)
    for arguments, message in [
        (["--output", tmp_path / "o"], "needs a model"),
        (["--output", rank_file / "o", "--tokenizer-model", rank_file], "cannot write"),
    ]:
        assert message in fails(export_tokenizer, arguments, capsys)
    empty = ["--input", blank, "--vocab-size", 300, "--output", tmp_path / "r"]
    assert "no text under text; nothing was written" in fails(train_tokenizer, empty, capsys)
    assert not (tmp_path / "r").exists()


def test_the_tokenizer_trains_on_what_preprocessing_reads(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("abab abab abab", "utf-8")
    (tmp_path / "folder" / "b.png").write_bytes(b"\x89PNG")
    arguments = ["--input", tmp_path / "folder", "--vocab-size", 258, "--output", tmp_path / "r"]
    assert run_command(train_tokenizer.main, [str(a) for a in arguments]) == 0
    written = capsys.readouterr()
    assert "258 ranks" in written.out and "note: " in written.err


@pytest.mark.parametrize("tool", [export_tokenizer, tokenizer_report])
def test_help_and_unknown_flags(tool):
    for arguments, code in ((["--help"], 0), (["--no-such-flag"], 2)):
        with pytest.raises(SystemExit) as caught:
            tool.main(arguments)
        assert caught.value.code == code
