"""Merged datasets: byte for byte what megatron-core makes of them, and nothing half-finished or mixed up."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megayoco.data import merge
from megayoco.data.command import run_command
from megayoco.data.indexed import read_meta
from megayoco.data.indexed_writer import IndexedWriter
from megayoco.data.pair import Pair
from megayoco.data.tokenizer import build_tokenizer, describe_tokenizer
from tests.tools.datasets import ROOT, documents_of, files_of, load_tool, megatron_pair

merge_datasets = load_tool("merge_datasets")
FIRST = [[[1, 2, 3], [4]], [[5, 6]]]
SECOND = [[[7]], [], [[8, 9], [], [10]]]


def run(*arguments) -> int:
    return run_command(merge_datasets.main, [str(a) for a in arguments])


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def our_pair(prefix, documents, tokenizer=None, **meta) -> str:
    tokenizer = tokenizer or build_tokenizer("ByteTokenizer")
    with IndexedWriter(str(prefix), tokenizer.vocab_size) as writer:
        for ids in documents:
            writer.add(np.array(ids, writer.dtype), np.array([len(ids)]))
        described = describe_tokenizer(tokenizer, os.path.dirname(prefix))
        writer.finish({"format": 1, "tokenizer": described, "documents": len(documents), **meta})
    return str(prefix)


@pytest.mark.parametrize("modes", [False, True])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_result_equals_megatrons(tmp_path, dtype, modes):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    prefixes = [
        megatron_pair(tmp_path / name, documents, dtype, modes)
        for name, documents in (("a", FIRST), ("none", []), ("b", SECOND), ("blank", [[], []]))
    ]
    assert run("--input", *prefixes, "--output_prefix", tmp_path / "new/all") == 0
    builder = IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=dtype, multimodal=modes)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(f"{tmp_path}/theirs.idx")
    for kind in ("bin", "idx"):
        assert (tmp_path / f"new/all.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes(), kind
    assert documents_of(tmp_path / "new/all") == [*FIRST, *SECOND, [], []]
    assert files_of(tmp_path / "new") == ["all.bin", "all.idx"]
    dataset = IndexedDataset(str(tmp_path / "new/all"), multimodal=modes)
    read = [dataset[i][0] if modes else dataset[i] for i in range(len(dataset))]
    assert [ids.tolist() for ids in read] == [s for document in FIRST + SECOND for s in document]


DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 250), max_size=4), max_size=3), max_size=5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.tuples(DOCUMENTS, st.sampled_from([np.uint16, np.int32, np.uint8])), min_size=1, max_size=4))
def test_a_merge_is_the_concatenation_whatever_the_types_and_blocks(parts, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(Pair.blocks, "__defaults__", (3,))
    monkeypatch.setattr(merge._copy_tokens, "__defaults__", (5,))
    folder = tmp_path_factory.mktemp("parts")
    prefixes = [megatron_pair(folder / str(number), *part) for number, part in enumerate(parts)]
    merged = merge.merge_pairs(prefixes, str(folder / "all"))
    assert documents_of(folder / "all") == [document for documents, _ in parts for document in documents]
    assert merged.dtype == np.result_type(*[dtype for _, dtype in parts])


def test_meta_is_merged(tmp_path):
    numbers = dict(key="text", append_eod=True, empty_documents=1)
    our_pair(tmp_path / "in/a", [[1, 2], [3]], text_bytes=9, sources=[{"path": "x.jsonl", "bytes": 5}], **numbers)
    our_pair(tmp_path / "in/b", [[250]], text_bytes=2, sources=[{"path": "y.jsonl", "bytes": 7}], **numbers)
    assert run("--input", tmp_path / "in", "--output-prefix", tmp_path / "all") == 0
    meta = read_meta(str(tmp_path / "all"))
    assert {name: meta[name] for name in ("format", "key", "append_eod", "empty_documents", "text_bytes")} == {
        "format": 1,
        "key": "text",
        "append_eod": True,
        "empty_documents": 2,
        "text_bytes": 11,
    }
    assert (meta["documents"], meta["tokens"], meta["max_id"], meta["bin_bytes"]) == (3, 4, 250, 8)
    assert [source["path"] for source in meta["sources"]] == ["x.jsonl", "y.jsonl"]
    assert meta["merged"] == [
        {"prefix": str(tmp_path / "in/a"), "documents": 2, "tokens": 3},
        {"prefix": str(tmp_path / "in/b"), "documents": 1, "tokens": 1},
    ]
    assert documents_of(tmp_path / "all") == [[[1, 2]], [[3]], [[250]]]


def test_counts_and_settings_that_not_all_share_are_left_out(tmp_path, caplog):
    our_pair(tmp_path / "a", [[1]], append_eod=True, text_bytes=4, key="text")
    our_pair(tmp_path / "b", [[1]], append_eod=False, key="text")
    merge.merge_pairs([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "all"))
    assert not {"append_eod", "text_bytes"} & read_meta(str(tmp_path / "all")).keys()
    assert read_meta(str(tmp_path / "all"))["key"] == "text"
    assert "the datasets differ in append_eod: False, True" in caplog.text


def test_the_tokenizers_file_is_found_from_another_folder(tmp_path):
    ranks = tmp_path / "in/ranks.tiktoken"
    ranks.parent.mkdir()
    from megayoco.data.tokenizer import CL100K_PATTERN, write_rank_file

    write_rank_file(ranks, {bytes([i]): i for i in range(256)}, CL100K_PATTERN, {"<|endoftext|>": 256})
    tokenizer = build_tokenizer("TiktokenTokenizer", str(ranks))
    our_pair(tmp_path / "in/a", [[1]], tokenizer)
    assert read_meta(str(tmp_path / "in/a"))["tokenizer"]["model"] == "ranks.tiktoken"
    assert run("--input", tmp_path / "in/a", "--output-prefix", tmp_path / "out/deep/all") == 0
    meta = read_meta(str(tmp_path / "out/deep/all"))
    assert meta["tokenizer"]["model"] == "../../in/ranks.tiktoken"


def test_different_or_unknown_tokenizers_are_refused_unless_told_otherwise(tmp_path, capsys):
    a = our_pair(tmp_path / "a", [[1]])
    b = our_pair(tmp_path / "b", [[2]])
    path = Path(f"{b}.meta.json")
    meta = json.loads(path.read_text())
    meta["tokenizer"]["sha256"] = "f" * 64
    path.write_text(json.dumps(meta))
    c = megatron_pair(tmp_path / "c", FIRST)
    output = ["--output-prefix", tmp_path / "all"]
    error = fails(capsys, "--input", a, b, *output)
    assert f"{b} was made with another tokenizer (ByteTokenizer of 257 ids, ffffffffffff)" in error
    error = fails(capsys, "--input", a, c, *output)
    assert f"{c} has no meta file that names its tokenizer" in error
    assert "--assume-same-tokenizer" in error
    assert not list(tmp_path.glob("all*"))
    assert run("--input", a, b, c, *output, "--assume-same-tokenizer") == 0
    merged = read_meta(str(tmp_path / "all"))
    assert merged["tokenizer"] == read_meta(a)["tokenizer"]
    assert "sources" not in merged
    assert documents_of(tmp_path / "all") == [[[1]], [[2]], *FIRST]


def test_a_folder_is_merged_in_the_order_of_its_file_names(tmp_path, capsys):
    for number in (2, 1, 10):
        megatron_pair(tmp_path / f"part_{number}", [[[number]]])
    (tmp_path / "part_1" / "cache").mkdir(parents=True)  # a prefix may also be a folder
    assert run("--input", tmp_path, "--output-prefix", tmp_path / "o/all") == 0
    assert documents_of(tmp_path / "o/all") == [[[1]], [[10]], [[2]]]
    assert run("--input", tmp_path / "part_1.idx", tmp_path / "part_2.bin", "--output-prefix", tmp_path / "o/b") == 0
    assert documents_of(tmp_path / "o/b") == [[[1]], [[2]]]


def test_mistakes_are_one_line_and_write_nothing(tmp_path, capsys):
    a, b = megatron_pair(tmp_path / "a", FIRST), megatron_pair(tmp_path / "b", SECOND)
    modal = megatron_pair(tmp_path / "modal", FIRST, modes=True)
    cut = megatron_pair(tmp_path / "cut", FIRST)
    os.truncate(f"{cut}.bin", 10)
    negative = megatron_pair(tmp_path / "negative", [[[5], [-7]]], np.int32)
    os.symlink(f"{a}.bin", tmp_path / "link.bin")
    os.symlink(f"{a}.idx", tmp_path / "link.idx")
    (tmp_path / "empty").mkdir()
    megatron_pair(tmp_path / "empty/../lone", FIRST)
    os.remove(tmp_path / "lone.idx")
    before = files_of(tmp_path)
    new = ["--output-prefix", tmp_path / "all"]
    for arguments, message in [
        (["--input", a, b, "--output-prefix", b], f"{b}.bin exists"),
        (["--input", a, b, "--output-prefix", b, "--overwrite"], f"{b} is also the output"),
        (["--input", a, a, *new], f"{a} and {a} are the same dataset"),
        (["--input", a, tmp_path / "link", *new], "are the same dataset"),
        (["--input", tmp_path / "none", *new], "none.idx does not exist"),
        (["--input", tmp_path / "empty", *new], "is a folder without any .bin and .idx"),
        (["--input", tmp_path / "lone", *new], "the pair is incomplete"),
        (["--input", a, cut, *new], "cut.bin holds 10 bytes, its index describes 12: it was cut short"),
        (["--input", a, modal, *new], f"{a} is no multimodal dataset"),
        (["--input", a, negative, *new], "negative.bin holds the negative token id -7"),
        (["--input", a, "--output-prefix", "/proc/x/all"], "cannot write"),
    ]:
        assert message in fails(capsys, *arguments)
        assert files_of(tmp_path) == before


def test_what_an_unfinished_run_left_in_the_folder_is_named(tmp_path, capsys):
    megatron_pair(tmp_path / "a", FIRST)
    for leftover in ("corpus.partial", "b.bin.tmp-17"):
        (tmp_path / leftover).touch()
        error = fails(capsys, "--input", tmp_path, "--output-prefix", tmp_path / "all")
        assert f"{leftover} is of a run that has not finished" in error
        assert run("--input", tmp_path / "a", "--output-prefix", tmp_path / leftover[0] / "all") == 0
        (tmp_path / leftover).unlink()
    # what an earlier try of this very merge has left is replaced
    (tmp_path / "all.bin.partial").write_bytes(b"half")
    assert run("--input", tmp_path, "--output-prefix", tmp_path / "all") == 0
    assert documents_of(tmp_path / "all") == FIRST


def test_output_is_replaced_with_its_meta_file_only_when_told_to(tmp_path, capsys):
    a, b = our_pair(tmp_path / "a", [[1]]), megatron_pair(tmp_path / "b", SECOND)
    output = ["--output-prefix", tmp_path / "all"]
    assert run("--input", a, *output) == 0
    assert "all.bin exists" in fails(capsys, "--input", b, *output)
    assert documents_of(tmp_path / "all") == [[[1]]]
    assert run("--input", b, *output, "--overwrite") == 0
    assert documents_of(tmp_path / "all") == SECOND
    assert [name for name in files_of(tmp_path) if name.startswith("all")] == ["all.bin", "all.idx"]


def test_two_runs_cannot_write_one_prefix(tmp_path, capsys):
    a = megatron_pair(tmp_path / "a", FIRST)
    with open(tmp_path / "all.bin.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        error = fails(capsys, "--input", a, "--output-prefix", tmp_path / "all")
    assert "another run is writing" in error
    assert files_of(tmp_path) == ["a.bin", "a.idx", "all.bin.partial"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    a = megatron_pair(tmp_path / "a", FIRST)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    error = fails(capsys, "--input", a, "--output-prefix", tmp_path / "all")
    assert "cannot write" in error
    assert "No space left on device" in error
    assert files_of(tmp_path) == ["a.bin", "a.idx"]


def test_the_command_line_needs_no_torch(tmp_path):
    a = megatron_pair(tmp_path / "a", FIRST)
    code = (
        "import sys, runpy; sys.argv[1:] = ['--input', sys.argv[1], '--output-prefix', sys.argv[2]]\n"
        "try: runpy.run_path('tools/merge_datasets.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'tiktoken', 'tokenizers', 'pyarrow'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, a, tmp_path / "all"], cwd=ROOT, check=True, timeout=60)
    assert documents_of(tmp_path / "all") == FIRST
