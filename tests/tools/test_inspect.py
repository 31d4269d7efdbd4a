"""What the inspection says of whole, odd and damaged datasets, and its statistics against plain numpy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megayoco.data import inspect
from megayoco.data.command import run_command
from megayoco.data.indexed import HEADER
from megayoco.data.indexed_writer import IndexedWriter
from megayoco.data.lengths import QUANTILES, length_statistics
from megayoco.data.pair import Pair, find_damage, open_pair
from megayoco.data.tokenizer import build_tokenizer
from tests.tools.datasets import ROOT, documents_of, load_tool, megatron_pair

inspect_dataset = load_tool("inspect_dataset")
TEXTS = ["One.", "Two, with a control \x1b[31m character.", "3", "A longer one. " * 20]


def run(*arguments) -> int:
    return run_command(inspect_dataset.main, [str(a) for a in arguments])


def report(capsys, *arguments, code=0) -> list[dict]:
    capsys.readouterr()
    assert run(*arguments, "--json") == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def prefix(tmp_path):
    """Four documents of bytes with an end, and a meta file."""
    path, tokenizer = str(tmp_path / "a"), build_tokenizer("ByteTokenizer")
    with IndexedWriter(path, tokenizer.vocab_size) as writer:
        for text in TEXTS:
            ids = np.array([*tokenizer.encode(text), tokenizer.eod], writer.dtype)
            writer.add(ids, np.array([len(ids)]))
        described = {**tokenizer.identity(), "model": None, "options": {}}
        meta = {"tokenizer": described, "append_eod": True, "documents": 4, "text_bytes": 320, "empty_documents": 2}
        writer.finish({**meta, "key": "text", "sources": [{"path": "x"}]})
    return path


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(
        st.one_of(st.integers(0, 9), st.integers(0, 2**18), st.integers(2**16 - 2, 2**31 - 1)), max_size=60
    )
)
@example(lengths=[0])
@example(lengths=[0, 0, 7])
@example(lengths=[2**31 - 1] * 3)
def test_statistics_equal_those_of_all_lengths_at_once(lengths):
    numbers = np.array(lengths, np.int32)
    found = length_statistics(lambda: np.array_split(numbers, len(numbers) // 7 + 1))
    if not lengths:
        assert (found.mean, found.quantiles, found.bins) == (0.0, {}, [])
        return
    ordered = np.sort(numbers.astype(np.int64))
    for name, share in QUANTILES.items():
        assert found.quantiles[name] == np.quantile(ordered, share, method="inverted_cdf"), name
    assert found.mean == pytest.approx(ordered.mean())
    longest = next(n for n in ordered if 2 * ordered[ordered <= n].sum() >= ordered.sum())
    assert found.half_of_tokens == longest
    assert sum(b.sequences for b in found.bins) == len(ordered)
    for b in found.bins:
        inside = ordered[(ordered >= b.low) & (ordered <= b.high)]
        assert (b.sequences, b.tokens) == (len(inside), inside.sum())


DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=3), max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS, block=st.integers(1, 7))
def test_a_scan_finds_what_there_is_whatever_the_blocks(documents, block, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(Pair.blocks, "__defaults__", (block,))
    pair = open_pair(megatron_pair(tmp_path_factory.mktemp("pair") / "a", documents))
    assert find_damage(pair) == []
    assert inspect.count_empty(pair) == sum(not any(document) for document in documents)
    flat = [i for document in documents for sequence in document for i in sequence]
    lasts = [document[-1][-1] for document in documents if document and document[-1]]
    found = inspect.scan(pair, eod=2, vocab_size=4, block=block)
    assert (found.tokens, found.outside) == (len(flat), sum(i >= 4 for i in flat))
    assert (found.low, found.high) == ((min(flat), max(flat)) if flat else (0, -1))
    assert (found.ends, found.ends_with_eod) == (len(lasts), lasts.count(2))
    if found.outside:
        place = next(n for n, i in enumerate(flat) if i >= 4)
        sequences = [sequence for document in documents for sequence in document]
        owner = next(n for n in range(len(sequences)) if sum(map(len, sequences[: n + 1])) > place)
        assert found.first_outside == f"token {place:,}, in sequence {owner:,}"
    sampled = inspect.sample(pair, eod=2, vocab_size=4)  # of so few, all
    for name in ("tokens", "low", "high", "outside", "ends", "ends_with_eod"):
        assert getattr(sampled, name) == getattr(found, name), name


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_a_whole_dataset(prefix, capsys, check):
    assert run(prefix, *check, "--samples", 2, "--sample_tokens", 8) == 0
    out = capsys.readouterr().out
    tokens = sum(map(len, TEXTS)) + 4
    for text in (
        "documents   4\n",
        f"tokens      {tokens} uint16, {2 * tokens} bytes",
        "tokenizer   ByteTokenizer of 257 ids",
        "end of document 256",
        "2 empty documents left out",
        "inputs      1, key text",
        "ids         27 to 256",
        "endings     4 of 4 with the end of document",
        "min 2, p5 2, p25 2, median 5, p75 37, p95 281, p99 281, max 281",
        "half of the tokens are in documents of 281 tokens or more",
        "256-511",
    ):
        assert text in out
    assert "\x1b" not in out
    assert "tokens sampled" in out or check


def test_samples_are_drawn_by_the_seed_and_decoded(prefix, capsys):
    drawn = {seed: report(capsys, prefix, "--samples", 2, "--seed", seed)[0]["excerpts"] for seed in (0, 0, 1, 2)}
    assert len({json.dumps(excerpts) for excerpts in drawn.values()}) > 1
    everything = report(capsys, prefix, "--samples", 99, "--sample-tokens", 16)[0]["excerpts"]
    assert [one["sequence"] for one in everything] == [0, 1, 2, 3]
    assert [one["head_text"] for one in everything] == [text[:16] for text in TEXTS]
    assert everything[3]["tail_text"] == TEXTS[3][-3:]
    assert everything[3]["tail"][-1] == 256


def test_a_foreign_dataset_without_meta_file_is_shown_by_its_ids(tmp_path, capsys):
    prefix = megatron_pair(tmp_path / "a", [[[72, 105], [33]], [], [[72]]], np.int32)
    one = report(capsys, prefix, "--check", "--samples", 9)[0]
    assert (one["documents"], one["sequences"], one["empty_documents"], one["tokens"]) == (3, 3, 1, 4)
    assert [e["head_text"] for e in one["excerpts"]] == [None] * 3
    assert one["damage"] == []
    assert "no meta file names its tokenizer" in one["notes"][0]
    one = report(capsys, prefix, "--check", "--samples", 9, "--tokenizer-type", "ByteTokenizer")[0]
    assert [e["head_text"] for e in one["excerpts"]] == ["Hi", "!", "H"]
    assert any("2 of 2 documents do not end with the id 256" in note for note in one["notes"])
    assert run(megatron_pair(tmp_path / "b", [[[1], [2]]]), "--samples", 1) == 0
    out = capsys.readouterr().out
    assert "2 sequences in 1 documents" in out
    assert "of 1 tokens: [" in out
    for documents in ([], [[]]):
        assert run(megatron_pair(tmp_path / "none", documents), "--check", "--samples", 1) == 0


def patch(path: str, at: int, new: bytes) -> None:
    content = bytearray(Path(path).read_bytes())
    content[at : at + len(new)] = new
    Path(path).write_bytes(content)


def edit_meta(prefix: str, **values) -> None:
    path = Path(f"{prefix}.meta.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


LENGTHS, OFFSETS, ENTRIES = HEADER.size, HEADER.size + 16, HEADER.size + 48
DAMAGE = {
    "truncated tail": (
        lambda p: os.truncate(f"{p}.bin", 600),
        "a.bin holds 600 bytes, its index describes 650: it was cut",
    ),
    "too long": (lambda p: Path(f"{p}.bin").write_bytes(bytes(700)), "it is not the data of this index"),
    "offset": (
        lambda p: patch(f"{p}.idx", OFFSETS + 8, b"\x0b"),
        "sequence 1 begins at byte 11, where the lengths before it add up to 10",
    ),
    "first offset": (lambda p: patch(f"{p}.idx", OFFSETS, b"\x02"), "sequence 0 begins at byte 2"),
    "negative length": (lambda p: patch(f"{p}.idx", LENGTHS + 4, b"\xff" * 4), "sequence 1 has the length -1"),
    "documents fall": (
        lambda p: patch(f"{p}.idx", ENTRIES + 16, b"\x00"),
        "document 2 begins at sequence 0, the one before it at 1",
    ),
    "documents begin": (
        lambda p: patch(f"{p}.idx", ENTRIES, b"\x01"),
        "the first document begins at sequence 1, not at 0",
    ),
    "documents end": (lambda p: patch(f"{p}.idx", ENTRIES + 32, b"\x03"), "the documents end at sequence 3 of 4"),
    "short index": (lambda p: os.truncate(f"{p}.idx", 100), "The copy was cut short"),
    "no index": (lambda p: os.remove(f"{p}.idx"), "does not exist"),
    "not an index": (lambda p: Path(f"{p}.idx").write_bytes(b"PK" * 40), "is no Megatron index"),
    "id too large": (
        lambda p: patch(f"{p}.bin", 6, b"\x00\x02"),
        "1 ids of 325 are outside the vocabulary 0..256 (they reach from 27 to 512); the first is token 3",
    ),
    "no end": (
        lambda p: patch(f"{p}.bin", 8, b"\x07\x00"),
        "1 of 4 documents do not end with the id 256, but the meta file says that all do",
    ),
    "other counts": (lambda p: edit_meta(p, documents=5), "says documents 5, the pair holds 4"),
    "other largest id": (lambda p: edit_meta(p, max_id=40), "says max_id 40, the pair holds 256"),
    "meta of another": (lambda p: edit_meta(p, bin_bytes=4), "it belongs to another dataset"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_ends_in_exit_code_2(prefix, capsys, case):
    change, message = DAMAGE[case]
    change(prefix)
    found = report(capsys, prefix, "--check", code=2)[0]
    assert any(message in line for line in found["damage"]), found["damage"]
    assert all(prefix in line for line in found["damage"])
    assert run(prefix, "--check") == 2
    captured = capsys.readouterr()
    assert f"DAMAGE: {found['damage'][0]}" in captured.out
    assert captured.err.startswith("error: 1 of 1 datasets damaged. ")
    assert captured.err.count("\n") == 1


def test_ids_are_compared_with_the_vocabulary_given(tmp_path, capsys):
    prefix = megatron_pair(tmp_path / "a", [[[5]], [[9, 9]], [[-3]]], np.int32)
    found = report(capsys, prefix, "--vocab-size", 9, "--check", code=2)[0]["damage"]
    assert "3 ids of 4 are outside the vocabulary 0..8 (they reach from -3 to 9); the first is token 1" in found[0]
    assert "1 ids of 4 are negative" in report(capsys, prefix, code=2)[0]["damage"][0]


def test_every_dataset_is_looked_at_although_one_is_damaged(prefix, tmp_path, capsys):
    cut = megatron_pair(tmp_path / "cut", [[[1]], [[2]]])
    os.truncate(f"{cut}.bin", 2)
    (tmp_path / "c.bin").touch()
    (tmp_path / "run.partial").touch()
    assert run(tmp_path) == 2
    captured = capsys.readouterr()
    assert "3 datasets: 6 documents" in captured.out
    assert "c.idx does not exist" in captured.out
    assert "note: " in captured.err and "run.partial is of a run that has not finished" in captured.err
    assert "error: 2 of 3 datasets damaged. " in captured.err and "(and 1 more)" in captured.err


def test_a_tokenizer_that_cannot_be_had_costs_only_the_text(prefix, capsys):
    described = json.loads(Path(f"{prefix}.meta.json").read_text())["tokenizer"]
    edit_meta(prefix, tokenizer={**described, "type": "TiktokenTokenizer", "model": "gone.tiktoken"})
    one = report(capsys, prefix, "--samples", 1, "--check")[0]
    assert one["excerpts"][0]["head_text"] is None
    assert "no text is shown: " in one["notes"][0]
    assert one["content"]["ends_with_eod"] == 4
    edit_meta(prefix, tokenizer={**described, "sha256": "0" * 64})
    assert "has changed since" in report(capsys, prefix)[0]["notes"][0]


def test_a_picture_of_the_lengths(prefix, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    other = megatron_pair(tmp_path / "b", [[[1] * 9, []]])
    assert run(prefix, other, "--png", tmp_path / "lengths.png") == 0
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert run(prefix, "--png", "/proc/x.png") == 2
    assert "cannot write /proc/x.png" in capsys.readouterr().err
    assert run(megatron_pair(tmp_path / "none", []), "--png", tmp_path / "n.png") == 2
    assert "no dataset has lengths" in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_in_one_line(prefix, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(prefix, "--png", "x.png") == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_neither_torch_nor_matplotlib_is_imported_for_text(prefix):
    code = (
        "import sys, runpy; sys.argv[1:] = [sys.argv[1], '--check', '--samples', '1']\n"
        "try: runpy.run_path('tools/inspect_dataset.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'matplotlib', 'tiktoken', 'tokenizers', 'pyarrow'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, prefix], cwd=ROOT, check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert documents_of(prefix)[0][0][-1] == 256


@pytest.mark.parametrize("tool", ["inspect_dataset", "merge_datasets"])
def test_help_and_unknown_flags(tool, capsys):
    for arguments, code in ((["--help"], 0), (["--no-such-flag"], 2), ([], 2)):
        with pytest.raises(SystemExit) as caught:
            load_tool(tool).main(arguments)
        assert caught.value.code == code


def test_a_reader_that_goes_away_costs_no_traceback(prefix):
    command = [sys.executable, "tools/inspect_dataset.py", prefix, "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
