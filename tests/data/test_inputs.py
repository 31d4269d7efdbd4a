"""Input files: found, told apart, cut into pieces of whole records, and continued anywhere."""

import gzip
import io
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megayoco.data.chunks import Position, cut_lines, read_inputs
from megayoco.data.encode import Problem, read_documents, read_records
from megayoco.data.inputs import find_inputs
from megayoco.data.packed import Damaged, unpacked
from megayoco.errors import UserError

zstandard = pytest.importorskip("zstandard")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FIELDS = {"text": ("text",)}
TEXTS = [f"document {i}\n{'é🙂x' * (i % 7)}" for i in range(40)]


def json_lines(texts) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write_all_formats(folder: Path) -> list[Path]:
    """The same texts in every format."""
    folder.mkdir(exist_ok=True)
    lines = json_lines(TEXTS)
    half = lines.index(b"\n", len(lines) // 2) + 1
    (folder / "plain.jsonl").write_bytes(lines)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]) + bytes(100))
    pack = zstandard.ZstdCompressor().compress
    (folder / "packed.json.zst").write_bytes(pack(lines[:half]) + pack(lines[half:]))
    table = pa.table({"number": list(range(len(TEXTS))), "text": TEXTS})
    pq.write_table(table, folder / "rows.parquet", row_group_size=7)
    pq.write_table(
        table.set_column(1, "text", table["text"].dictionary_encode()), folder / "dictionary.parquet", row_group_size=30
    )
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=6)
    with pa.OSFile(str(folder / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=11)
    (folder / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "texts" / f"{number:02}.txt").write_bytes(b"\xef\xbb\xbf" * (number % 2) + text.encode())
    return sorted(folder.iterdir())


def texts_from(sources, start=Position(), limit=1 << 20, **options) -> list:  # noqa: B008
    found = []
    for chunk in read_inputs(sources, FIELDS, start, limit=limit, **options):
        for path, number, values in read_records(chunk, FIELDS, limit):
            bad = isinstance(values, Problem)
            found.append((Path(path).name, number, values.reason.text) if bad else values[0])
    return found


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return write_all_formats(tmp_path_factory.mktemp("formats"))


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 20])
def test_every_format_gives_the_same_documents(formats, chunk_bytes):
    assert len(formats) == 8
    for path in formats:
        assert texts_from(find_inputs([str(path)]).sources, chunk_bytes=chunk_bytes) == TEXTS, path


def test_reading_goes_on_behind_any_chunk(formats):
    for path in formats:
        sources = find_inputs([str(path)]).sources
        chunks = list(read_inputs(sources, FIELDS, chunk_bytes=150))
        assert len(chunks) > (1 if path.suffix == ".zst" else 4), path
        shares = [chunk.read for chunk in chunks]
        assert all(0 <= share <= 1 for share in shares) and (path.name == "texts" or shares == sorted(shares))
        done = 0
        for chunk in chunks:
            done += sum(1 for _ in read_records(chunk, FIELDS, 1 << 20))
            assert texts_from(sources, chunk.after, chunk_bytes=170) == TEXTS[done:], (path, chunk.after)


def test_files_of_all_kinds_go_one_after_the_other(formats):
    sources = find_inputs([str(path) for path in formats]).sources
    assert texts_from(sources, chunk_bytes=1000) == TEXTS * len(formats)
    assert [text for _, text in read_documents(sources)] == TEXTS * len(formats)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"x", b"\n")), max_size=30), st.integers(1, 20))
def test_pieces_are_whole_lines_and_nothing_is_lost(blocks, chunk_bytes):
    content = b"".join(blocks)
    pieces = [piece for _, piece in cut_lines(iter(blocks), chunk_bytes, limit=1000)]
    assert b"".join(pieces) == content
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])
    assert all(pieces)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12),
    st.integers(1, 15),
    st.integers(1, 30),
    st.booleans(),
)
def test_a_line_above_the_limit_is_left_out_and_the_places_stay(lengths, block, chunk_bytes, ended):
    limit = 20
    lines = [bytes([65 + i]) * length + b"\n" for i, length in enumerate(lengths)]
    content = b"".join(lines) if ended else b"".join(lines)[:-1]
    blocks = [content[i : i + block] for i in range(0, len(content), block)]
    kept, offset = b"", 0
    for size, piece in cut_lines(iter(blocks), chunk_bytes, limit):
        assert piece is None or content[offset : offset + size] == piece
        if piece is None:  # exactly one line, which is too long
            left_out = content[offset : offset + size]
            assert len(left_out.rstrip(b"\n")) > limit and left_out.count(b"\n") <= 1
        else:
            kept += piece
        offset += size
    assert offset == len(content)
    for line in lines:  # a line that fits is kept, whatever stands around it
        if len(line.rstrip(b"\n")) <= limit and line != b"\n":
            assert line.rstrip(b"\n") in kept


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
@pytest.mark.parametrize("cut", [5, 200, 3000])
def test_what_a_cut_file_still_holds_is_delivered_before_the_damage(tmp_path, kind, cut):
    random.seed(0)
    lines = json_lines("".join(random.choices("abcdefgh", k=100)) for _ in range(200))
    packed = gzip.compress(lines) if kind == "gzip" else zstandard.ZstdCompressor().compress(lines)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed[:-cut])
    found = texts_from(find_inputs([str(path)]).sources, chunk_bytes=2000)
    assert found[:-1] == [json.loads(line)["text"] for line in lines.splitlines()[: len(found) - 1]]
    assert found[-1] == ("a.jsonl.gz", len(found), f"the {kind} data are cut short after line {len(found) - 1}")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.ZST"])
def test_an_empty_file_that_should_be_packed_is_damaged(tmp_path, name):
    (tmp_path / name).touch()
    found = texts_from(find_inputs([str(tmp_path / name)]).sources)
    assert len(found) == 1
    assert found[0][2].startswith("the file holds no packed data")


def test_a_flipped_bit_in_packed_data_is_damage():
    packed = bytearray(gzip.compress(json_lines(TEXTS)))
    packed[len(packed) // 2] ^= 16
    with pytest.raises(Damaged, match="gzip"):
        list(unpacked(io.BytesIO(bytes(packed))))
    with pytest.raises(Damaged, match="gzip"):
        list(unpacked(io.BytesIO(gzip.compress(b"x") + b"garbage")))
    frame = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(json_lines(TEXTS)))
    frame[-1] ^= 1
    with pytest.raises(Damaged, match="zstd"):
        list(unpacked(io.BytesIO(bytes(frame))))


def test_highly_packed_data_come_in_small_blocks():
    packed = gzip.compress(bytes(50_000_000))
    assert max(map(len, unpacked(io.BytesIO(packed)))) <= 1 << 18


def test_damaged_tables_are_reported_with_their_row(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), path := tmp_path / "a.parquet", compression="snappy")
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    ((name, row, reason),) = texts_from(find_inputs([str(path)]).sources)
    assert (name, row) == ("a.parquet", 1) and "parquet data are damaged" in reason
    path.write_bytes(b"PAR1 is all there is")
    ((_, _, reason),) = texts_from(find_inputs([str(path)]).sources)
    assert "damaged or no parquet" in reason
    for sources, message in [
        (pa.table({"body": TEXTS}), "no column 'text', only 'body'"),
        (pa.table({"text": list(range(40))}), "the column 'text' is int64, not text"),
    ]:
        pq.write_table(sources, path)
        ((chunk),) = read_inputs(find_inputs([str(path)]).sources, FIELDS)
        assert (chunk.records, chunk.content) == (40, None) and chunk.problem.text == message


def test_rows_that_are_null_or_not_utf8_are_named(tmp_path):
    texts = pa.array([b"a", b"\xff\xfe", None, "é".encode()], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 4, texts.buffers())
    pq.write_table(pa.table({"text": column}), path := tmp_path / "a.parquet")
    assert texts_from(find_inputs([str(path)]).sources) == [
        "a",
        ("a.parquet", 2, "byte 0 is not UTF-8"),
        ("a.parquet", 3, "the value of 'text' is null, not text"),
        "é",
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"one\r\n\ntwo", ["one\r\n\ntwo"]),
        ("a.txt", b'{"text": "x"}\n{"text": "y"}\n', ["x", "y"]),
        ("a.txt.gz", gzip.compress(b'{"text": "x"}\n'), ["x"]),
        ("a.md.gz", gzip.compress(b"# x\n"), ["# x\n"]),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "x"}\r\n\r\n \t\n{"text": "y"}', ["x", "y"]),
        ("a.data", b'{"text": "x"}\n', ["x"]),
        ("a.jsonl", gzip.compress(b'{"text": "x"}\n'), ["x"]),
        ("a.txt", b"", [""]),
    ],
)
def test_the_format_is_told_by_content(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert texts_from(find_inputs([str(tmp_path / name)]).sources) == expected


def test_folders_are_read_with_what_is_below_them(tmp_path):
    for name in (
        "b/2.jsonl",
        "a/1.json.gz",
        "a/0.ndjson.zst",
        "c.jsonl",
        "README.md",
        "a/.hidden.jsonl",
        "dataset_info.json",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = json_lines([name])
        pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
        path.write_bytes(pack(text))
    (tmp_path / "link").symlink_to(tmp_path)  # a loop
    (tmp_path / ".git").mkdir()
    inputs = find_inputs([str(tmp_path)])
    assert texts_from(inputs.sources) == ["a/0.ndjson.zst", "a/1.json.gz", "b/2.jsonl", "c.jsonl"]
    (note,) = inputs.notes
    assert all(name in note for name in (".git", "README.md", ".hidden.jsonl", "dataset_info.json"))
    only = find_inputs([str(tmp_path)], "text")
    assert "README.md" in [os.path.relpath(source.path, tmp_path) for source in only.sources]


def test_a_saved_hugging_face_dataset_is_read_in_its_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS)))})
    saved.save_to_disk(tmp_path / "saved", num_shards=3)
    assert texts_from(find_inputs([str(tmp_path / "saved")]).sources) == TEXTS
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match="the splits test, train of a Hugging Face dataset"):
        find_inputs([str(tmp_path / "both")])
    assert texts_from(find_inputs([str(tmp_path / "both" / "train")]).sources) == TEXTS
    saved.select([3, 1, 2]).save_to_disk(tmp_path / "selected")
    assert texts_from(find_inputs([str(tmp_path / "selected")]).sources) == [TEXTS[i] for i in (3, 1, 2)]
    os.remove(next((tmp_path / "saved").glob("*-00001-*")))
    with pytest.raises(UserError, match=r"does not exist\. Copy the whole folder"):
        find_inputs([str(tmp_path / "saved")])


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json_lines(["x"]))
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl"], "holds the splits test, train"),
        (
            ["en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"],
            "holds the splits train, validation",
        ),
        (["train/a.jsonl", "valid/a.jsonl"], "holds the splits train, valid"),
        (["train.jsonl.gz", "test.jsonl.gz"], "holds the splits test, train"),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], None),
        (["a.jsonl", "b.parquet"], "holds jsonl and parquet files. Say by --input-format"),
        (["a.bin", "state.json.tmp"], "no data files.*only 2 other files, such as"),
        (["train.txt", "test.txt"], "splits"),
        (["train.md", "test.md"], "splits"),
    ],
)
def test_a_folder_whose_meaning_is_unclear_is_refused(tmp_path, names, message):
    make(tmp_path / "d", *names)
    if message is None:
        assert len(find_inputs([str(tmp_path / "d")]).sources) == 2
    else:
        with pytest.raises(UserError, match=message):
            find_inputs([str(tmp_path / "d")])


def test_inputs_that_cannot_be_meant(tmp_path):
    path = make(tmp_path, "a.jsonl") / "a.jsonl"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.jsonl").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for patterns, message in [
        ([tmp_path / "none*"], "no such file"),
        ([path, path], "twice"),
        ([path, tmp_path / "link.jsonl"], "link.jsonl twice, also as"),
        ([path, tmp_path / "*.jsonl"], "twice"),
        (["-", "-"], "twice"),
        ([tmp_path / "empty"], "no data files.*nothing at all"),
        ([tmp_path / "pipe"], "no regular file"),
    ]:
        with pytest.raises(UserError, match=message):
            find_inputs([str(pattern) for pattern in patterns])
    with pytest.raises(UserError, match="cannot be read from a pipe"):
        find_inputs(["-"], "parquet")
