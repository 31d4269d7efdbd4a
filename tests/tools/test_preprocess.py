"""The command line of preprocess_data.py: what it writes is what megatron-core reads; its flags; its mistakes."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megayoco.data import prepare
from megayoco.data.command import run_command
from megayoco.data.indexed import check_prefix
from megayoco.data.tokenizer import build_tokenizer
from tests.tools.datasets import ROOT, load_tool

make_corpus, train_tokenizer, preprocess_data = map(load_tool, ("make_corpus", "train_tokenizer", "preprocess_data"))
GOOD = {"text": "fine"}


def write_lines(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def run(*arguments) -> int:
    return run_command(preprocess_data.main, [str(a) for a in arguments])


def run_bytes(path, prefix, *more) -> int:
    return run("--input", path, "--output-prefix", prefix, "--tokenizer-type", "ByteTokenizer", *more)


def fails(capsys, *arguments) -> str:
    """The one line that the tool prints when it ends with exit code 2."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def tokens_of(prefix) -> list[list[int]]:
    index = check_prefix(str(prefix), 10**6)
    tokens = np.fromfile(f"{prefix}.bin", index.dtype)
    return [part.tolist() for part in np.split(tokens, np.cumsum(index.lengths)[:-1])]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    assert run_command(make_corpus.main, ["--output", str(path), "--max-mb", "0.3"]) == 0
    return path


@pytest.fixture(scope="module")
def models(corpus):
    """The same small vocabulary as a rank file and as a tokenizer.json."""
    ranks = corpus.parent / "ranks.tiktoken"
    arguments = ["--input", str(corpus), "--vocab-size", "600", "--output", str(ranks)]
    assert run_command(train_tokenizer.main, arguments) == 0
    trained = train_tokenizer.train((json.loads(line)["text"] for line in corpus.open(encoding="utf-8")), 600)
    trained.add_special_tokens(["<|endoftext|>"])
    trained.save(str(corpus.parent / "tokenizer.json"))
    return {"TiktokenTokenizer": ranks, "HuggingFaceTokenizer": corpus.parent / "tokenizer.json", "ByteTokenizer": None}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["TiktokenTokenizer", "HuggingFaceTokenizer", "ByteTokenizer"])
def test_megatron_reads_a_pair_and_its_tokens_equal_direct_encoding(
    corpus, models, tmp_path, kind, workers, monkeypatch
):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    monkeypatch.setattr(
        prepare.preprocess, "__kwdefaults__", prepare.preprocess.__kwdefaults__ | {"chunk_bytes": 30_000}
    )
    model = models[kind] and str(models[kind])
    options = {"eod_token": "<|endoftext|>"} if kind == "HuggingFaceTokenizer" else {}
    arguments = ["--input", corpus, "--output_prefix", tmp_path / "d/c", "--tokenizer_type", kind, "--append-eod"]
    arguments += ["--tokenizer-model", model] if model else []
    arguments += ["--eod_token", options["eod_token"]] if options else []
    assert run(*arguments, f"--workers={workers}", "--log_interval", 5) == 0
    tokenizer = build_tokenizer(kind, model, options)
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    prefix = tmp_path / "d/c_text_document"
    theirs = indexed_dataset.IndexedDataset(str(prefix))
    assert [theirs[i].tolist() for i in range(len(theirs))] == expected == tokens_of(prefix)
    assert theirs.document_indices.tolist() == list(range(len(texts) + 1))
    meta = json.loads(Path(f"{prefix}.meta.json").read_text())
    assert {key: meta["tokenizer"][key] for key in tokenizer.identity()} == tokenizer.identity()
    assert meta["documents"] == len(texts)
    assert meta["tokens"] == sum(map(len, expected))
    assert meta["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert sorted(p.suffix for p in (tmp_path / "d").iterdir()) == [".bin", ".idx", ".json"]


def test_empty_documents_are_counted_and_special_tokens_are_text(tmp_path, capsys):
    path = write_lines(
        tmp_path / "a.jsonl", {"text": "x"}, {"text": ""}, b"", {"text": "<|endoftext|>"}, {"text": "\ud800"}
    )
    path.write_bytes(path.read_bytes()[:-1])  # the last line has no newline
    assert run_bytes(path, tmp_path / "o") == 0
    assert tokens_of(tmp_path / "o_text_document") == [list(b"x"), list(b"<|endoftext|>"), list("\ufffd".encode())]
    assert "1 empty documents left out" in capsys.readouterr().out


def test_several_keys_files_patterns_and_gzip(tmp_path):
    write_lines(tmp_path / "a-1.jsonl", {"text": "x", "title": "A"})
    packed = gzip.compress(write_lines(tmp_path / "b", {"text": "y", "title": "B"}).read_bytes())
    (tmp_path / "a-2.jsonl.gz").write_bytes(packed)
    write_lines(tmp_path / "c", {"text": "z", "title": ""})
    arguments = ["--input", tmp_path / "a-*", tmp_path / "c", "--output-prefix", tmp_path / "p", "--jsonl-keys", "text"]
    assert run(*arguments, "title", "--tokenizer-type", "ByteTokenizer") == 0
    assert tokens_of(tmp_path / "p_text_document") == [list(b"x"), list(b"y"), list(b"z")]
    assert tokens_of(tmp_path / "p_title_document") == [list(b"A"), list(b"B")]


def test_stdin_plain_and_packed(tmp_path):
    pytest.importorskip("zstandard")
    import zstandard

    lines = b'{"text": "x"}\n{"text": "y"}'
    for number, data in enumerate((lines, gzip.compress(lines), zstandard.ZstdCompressor().compress(lines))):
        arguments = ["--input", "-", "--output-prefix", tmp_path / f"{number}", "--tokenizer-type", "ByteTokenizer"]
        done = subprocess.run(
            [sys.executable, ROOT / "tools/preprocess_data.py", *map(str, arguments)],
            input=data,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert tokens_of(tmp_path / f"{number}_text_document") == [[120], [121]]
        meta = json.loads((tmp_path / f"{number}_text_document.meta.json").read_text())
        assert meta["sources"] == [{"path": "-", "bytes": 0}]
    assert not list(tmp_path.glob("*.partial"))


def test_skipping_ends_well_and_tells(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", GOOD, ["text"], GOOD, {"body": "x"})
    assert run_bytes(path, tmp_path / "o", "--on-error", "skip") == 0
    assert f"warning: 2 records were skipped; {tmp_path}/o_skipped.jsonl lists them" in capsys.readouterr().err
    listed = [json.loads(line) for line in (tmp_path / "o_skipped.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in listed] == [(str(path), 2), (str(path), 4)]
    assert "o_text_document.bin exists" in fails(
        capsys, "--input", path, "--output-prefix", tmp_path / "o", "--tokenizer-type", "ByteTokenizer"
    )
    write_lines(path, GOOD)
    assert run_bytes(path, tmp_path / "o", "--overwrite") == 0
    assert not (tmp_path / "o_skipped.jsonl").exists()


MISTAKES = {
    "not JSON": (b'{"text": "cut', "line 3: not JSON"),
    "an array": (["text"], "line 3: expected a JSON object, got list"),
    "no key": ({"content": "x", "id": 1}, "line 3: no key 'text', only 'content', 'id'"),
    "not text": ({"text": 5}, "line 3: the value of 'text' is int, not text"),
    "not UTF-8": (b'{"text": "\xff"}', "line 3: byte 10 is not UTF-8"),
}


@pytest.mark.parametrize(("case", "workers"), [*((case, 1) for case in MISTAKES), ("no key", 2)])
def test_a_mistake_ends_the_run_with_file_and_line(tmp_path, capsys, case, workers):
    line, message = MISTAKES[case]
    path = write_lines(tmp_path / "a.jsonl", GOOD, GOOD, line, GOOD)
    arguments = ["--input", path, "--output-prefix", tmp_path / "d/o", "--tokenizer-type", "ByteTokenizer"]
    error = fails(capsys, *arguments, "--workers", workers)
    assert f"{path}, {message}" in error and "--on-error skip" in error
    assert list((tmp_path / "d").iterdir()) == []


def test_a_file_of_one_json_array_is_explained(tmp_path, capsys):
    path = tmp_path / "a.json"
    for text in ('[{"text": "x"}]', '[\n {"text": "x"}\n]'):
        path.write_text(text)
        error = fails(capsys, "--input", path, "--output-prefix", tmp_path / "o", "--tokenizer-type", "ByteTokenizer")
        assert "a.json, line 1" in error and "jq -c '.[]'" in error


def test_output_is_replaced_only_when_told_to(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", GOOD)
    assert run_bytes(path, tmp_path / "o") == 0
    write_lines(path, {"text": "other"})
    arguments = ["--input", path, "--output-prefix", tmp_path / "o", "--tokenizer-type", "ByteTokenizer"]
    assert "o_text_document.bin exists" in fails(capsys, *arguments)
    assert "o_text_document.bin exists" in fails(capsys, *arguments, "--resume")  # the input was changed
    assert tokens_of(tmp_path / "o_text_document") == [list(b"fine")]
    assert run_bytes(path, tmp_path / "o", "--overwrite") == 0
    assert tokens_of(tmp_path / "o_text_document") == [list(b"other")]


def test_the_yoco_layout_from_the_command_line(tmp_path, capsys):
    (tmp_path / "d/json").mkdir(parents=True)
    write_lines(tmp_path / "d/a.jsonl", {"content": "x"})
    entries = [{"name": "A", "weight": 1, "source": ["a.jsonl"]}]
    (tmp_path / "d/json/train.json").write_text(json.dumps(entries))
    arguments = ["--yoco-data", tmp_path / "d", "--output-prefix", tmp_path / "m", "--tokenizer-type", "ByteTokenizer"]
    assert run(*arguments) == 0
    assert tokens_of(tmp_path / "m_A_text_document") == [[120]]
    assert "m_blend.yaml: 1 sources" in capsys.readouterr().out
    assert "--json-keys does not go with --yoco-data" in fails(capsys, *arguments, "--json-keys", "text")
    assert "Choose one by --yoco-split" in fails(capsys, *arguments, "--yoco-split", "valid")


def test_flags_of_the_megatron_family(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", GOOD)
    assert run_bytes(path, tmp_path / "o", "--keep-newlines", "--partitions", 4, "--dataset-impl", "mmap") == 0
    for flag, message in [
        ("--split-sentences", "--split-sentences is not supported: a document is one sequence here"),
        ("--lang=english", "--lang=english is not supported"),
        ("--no-such-flag", "See --help"),
    ]:
        with pytest.raises(SystemExit) as caught:
            run_bytes(path, tmp_path / "p", flag)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_mistakes_in_the_arguments(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", GOOD)
    packed = tmp_path / "cut.gz"
    packed.write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-500])
    blank = write_lines(tmp_path / "blank.jsonl", {"text": ""})
    output = ["--output-prefix", tmp_path / "o", "--tokenizer-type"]
    for arguments, message in [
        (["--input", tmp_path / "none*", *output, "ByteTokenizer"], "no such file"),
        (["--input", path, path, *output, "ByteTokenizer"], "twice"),
        (["--input", packed, *output, "ByteTokenizer"], "cut.gz, line 1: the gzip data are cut short after line 0"),
        (["--input", blank, *output, "ByteTokenizer"], "no document with text under the key 'text'"),
        (["--input", "-", "--resume", *output, "ByteTokenizer"], "--resume needs input that can be read again"),
        (["--input", path, "--yoco-split", "train", *output, "ByteTokenizer"], "--yoco-split belongs to --yoco-data"),
        (["--input", path, *output, "TiktokenTokenizer"], "TiktokenTokenizer needs a model"),
        (["--input", path, *output, "TiktokenTokenizer", "--tokenizer-model", path], "expected a token in base64"),
        (["--input", path, "--output-prefix", "/proc/x/o", "--tokenizer-type", "ByteTokenizer"], "cannot write"),
    ]:
        assert message in fails(capsys, *arguments)
        assert not list(tmp_path.glob("o*"))


def test_it_starts_without_heavy_libraries():
    code = """
import runpy, sys
sys.argv = ["preprocess_data.py", "--help"]
try:
    runpy.run_path("tools/preprocess_data.py", run_name="__main__")
except SystemExit:
    pass
heavy = {"torch", "megatron", "rich", "pyarrow", "tokenizers", "tiktoken", "yaml", "zstandard"} & set(sys.modules)
assert not heavy, heavy
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
