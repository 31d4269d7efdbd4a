"""The tools that users run first: the printed command lines, what they write, and one line for every mistake."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megayoco.data.command import run_command
from megayoco.data.indexed import check_prefix
from megayoco.data.installation import module_documentation
from megayoco.data.tokenizer import TiktokenTokenizer, load_ranks

ROOT = Path(__file__).parents[2]


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_corpus, train_tokenizer, preprocess_data = map(load_tool, ("make_corpus", "train_tokenizer", "preprocess_data"))


def fails(tool, arguments, capsys) -> str:
    """The one line that a tool prints when it ends with exit code 2."""
    capsys.readouterr()
    assert run_command(tool.main, [str(a) for a in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def write_lines(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def tokens_of(prefix) -> list[list[int]]:
    index = check_prefix(str(prefix), 10**6)
    tokens = np.fromfile(f"{prefix}.bin", index.dtype)
    return [part.tolist() for part in np.split(tokens, np.cumsum(index.lengths)[:-1])]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    assert run_command(make_corpus.main, ["--output", str(path), "--max-mb", "0.4"]) == 0
    return path


@pytest.fixture(scope="module")
def rank_file(corpus):
    path = corpus.parent / "ranks.tiktoken"
    arguments = ["--input", str(corpus), "--vocab-size", "600", "--output", str(path)]
    assert run_command(train_tokenizer.main, arguments) == 0
    return path


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_printed_command_lines_work_as_they_stand(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    for line in (
        "tools/make_corpus.py --output corpus.jsonl --max-mb 0.2",
        "tools/train_tokenizer.py --input corpus.jsonl --vocab-size 300 --output ranks.tiktoken",
        "tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --tokenizer-type TiktokenTokenizer"
        " --tokenizer-model ranks.tiktoken --append-eod --workers 2",
    ):
        done = subprocess.run(
            [sys.executable, *line.split()], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    check_prefix(str(tmp_path / "data/corpus_text_document"), 301, sequence_length=1024)


def test_encoding_needs_no_torch():
    code = "import sys, megayoco.data.prepare; assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_the_corpus_is_text_of_the_size_asked_for_and_always_the_same(corpus, tmp_path):
    lines = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    assert all(set(line) == {"text", "source"} and line["text"].strip() for line in lines)
    assert 0.35e6 < sum(len(line["text"].encode()) for line in lines) <= 0.4e6
    assert len({line["source"] for line in lines}) == len(lines) > 10
    assert run_command(make_corpus.main, ["--output", str(tmp_path / "again"), "--max-mb", "0.4"]) == 0
    assert (tmp_path / "again").read_bytes() == corpus.read_bytes()


def test_a_corpus_that_is_smaller_than_asked_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make_corpus, "all_documents", lambda: iter([("a", "some text\n"), ("b", "some text\n")]))
    assert run_command(make_corpus.main, ["--output", str(tmp_path / "c"), "--max-mb", "1"]) == 0
    written = capsys.readouterr()
    assert "this installation holds 0.0 MB of text, 1.0 MB were asked for" in written.err
    assert "1 documents" in written.out  # the same text is not written twice


def test_documentation_of_built_in_modules_is_a_document():
    assert "math" in sys.builtin_module_names or "builtins" in sys.builtin_module_names
    assert "Return the absolute value of the argument." in module_documentation("builtins")


def test_ranks_encode_as_the_trained_merges_and_every_text_comes_back(corpus, rank_file):
    texts = texts_of(corpus)
    trained = train_tokenizer.train(iter(texts), 600)
    tokenizer = TiktokenTokenizer(str(rank_file))
    assert tokenizer.engine.ranks == train_tokenizer.tiktoken_ranks(trained)
    assert sorted(load_ranks(rank_file).values()) == list(range(600))
    assert (tokenizer.vocab_size, tokenizer.eod) == (601, 600)
    generator = random.Random(0)
    alphabet = "ab01 '\"\n\t\r  _.,(){}ſéßЖ日本語\u200d\u0301🙂I'll DON'T"
    random_texts = ["".join(generator.choices(alphabet, k=80)) for _ in range(300)]
    for text in [*texts, *random_texts, "", " " * 50, "<|endoftext|>", "1234567"]:
        assert tokenizer.encode(text) == trained.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert sum(len(tokenizer.encode(t)) for t in texts) < 0.7 * sum(len(t.encode()) for t in texts)


def test_a_vocabulary_larger_than_the_text_gives_is_smaller_and_says_so(tmp_path, capsys):
    text = write_lines(tmp_path / "t.jsonl", {"text": "abab abab"})
    arguments = ["--input", text, "--vocab-size", "1000", "--output", tmp_path / "r"]
    assert run_command(train_tokenizer.main, [str(a) for a in arguments]) == 0
    assert "ranks of the 1000 asked for" in capsys.readouterr().err
    assert len(load_ranks(tmp_path / "r")) < 270


def test_mistakes_in_the_arguments(tmp_path, capsys, corpus, rank_file):
    path = write_lines(tmp_path / "a.jsonl", {"text": "fine"})
    blank = write_lines(tmp_path / "blank.jsonl", {"text": ""})
    size = ["--vocab-size", 300, "--output"]
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000)
    for arguments, message in [
        (["--input", path, "--vocab-size", 255, "--output", tmp_path / "r"], "below 256"),
        (["--input", corpus, *size, rank_file], "exists"),
        (["--input", blank, "--json-keys", "body", *size, tmp_path / "r"], "blank.jsonl, line 1: no key 'body'"),
        (["--input", deep, *size, tmp_path / "r"], "deep.jsonl, line 1: JSON nested too deeply"),
        (["--input", path, *size, Path(path, "r")], "cannot write"),
        (["--input", path, "--vocab-size", 2**40, "--output", tmp_path / "r"], "32 bits"),
    ]:
        assert message in fails(train_tokenizer, arguments, capsys)
    assert "exists" in fails(make_corpus, ["--output", corpus], capsys)
    assert "is a folder" in fails(make_corpus, ["--output", tmp_path, "--overwrite"], capsys)
    assert "cannot write" in fails(make_corpus, ["--output", Path(path, "c")], capsys)
    assert "--max-mb" in fails(make_corpus, ["--output", tmp_path / "c", "--max-mb", 0], capsys)


@pytest.mark.parametrize("tool", [make_corpus, train_tokenizer, preprocess_data])
def test_help_and_unknown_flags(tool, capsys):
    with pytest.raises(SystemExit) as caught:
        tool.main(["--help"])
    assert caught.value.code == 0
    with pytest.raises(SystemExit) as caught:
        tool.main(["--no-such-flag"])
    assert caught.value.code == 2
