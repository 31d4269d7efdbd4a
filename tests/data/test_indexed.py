"""Indexed pairs: byte for byte what megatron-core writes, and every broken one refused with a remedy."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from megayoco.data.indexed import check_prefix, read_index, read_meta, token_dtype
from megayoco.data.indexed_writer import IndexedWriter
from megayoco.errors import UserError

DOCUMENTS = [[1, 2, 3], [4], [5, 6], [499] * 40]


@pytest.mark.parametrize("vocab_size", [500, 65499, 65500, 200_000])
def test_a_pair_equals_the_one_that_megatron_writes(write_pair, tmp_path, vocab_size):
    torch = pytest.importorskip("torch")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    documents = [*DOCUMENTS, [vocab_size - 1]]
    prefix = write_pair("ours", documents, vocab_size)
    theirs = str(tmp_path / "theirs")
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(f"{theirs}.idx")
    for kind in ("bin", "idx"):
        assert Path(f"{prefix}.{kind}").read_bytes() == Path(f"{theirs}.{kind}").read_bytes(), kind
    dataset = IndexedDataset(prefix)
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents


def test_what_is_read_is_what_was_written(write_pair):
    index = check_prefix(write_pair("a", DOCUMENTS), 500, sequence_length=45)
    assert index.lengths.tolist() == [3, 1, 2, 40]
    assert index.offsets.tolist() == [0, 6, 8, 12]
    assert index.documents.tolist() == [0, 1, 2, 3, 4]
    assert (index.num_tokens, index.num_documents, index.dtype) == (46, 4, np.uint16)


def test_documents_of_several_or_no_sequences_are_read_with_a_warning(write_pair, caplog):
    prefix = write_pair("a", DOCUMENTS)
    content = Path(f"{prefix}.idx").read_bytes()
    documents = np.array([0, 2, 2, 4], np.int64)
    content = content[:26] + struct.pack("<Q", 4) + content[34 : 34 + 48] + documents.tobytes()
    Path(f"{prefix}.idx").write_bytes(content)
    assert check_prefix(prefix, 500).num_documents == 3
    assert "4 sequences in 3 documents" in caplog.text


def corrupt(prefix: str, kind: str, at: int, new: bytes) -> None:
    path = Path(f"{prefix}.{kind}")
    content = path.read_bytes()
    path.write_bytes(content[:at] + new + content[at + len(new) :])


def shorten(prefix: str, kind: str, by: int) -> None:
    path = Path(f"{prefix}.{kind}")
    path.write_bytes(path.read_bytes()[:-by])


BROKEN = {
    "no index": (lambda p: os.remove(f"{p}.idx"), r"a\.idx does not exist.*incomplete"),
    "no data": (lambda p: os.remove(f"{p}.bin"), r"a\.bin does not exist.*incomplete"),
    "short data": (lambda p: shorten(p, "bin", 2), r"a\.bin holds 90 bytes, its index describes 92.*cut short"),
    "long data": (lambda p: Path(f"{p}.bin").write_bytes(bytes(94)), "not of one pair"),
    "short index": (lambda p: shorten(p, "idx", 3), "header describes 122.*cut short"),
    "half a header": (lambda p: shorten(p, "idx", 100), "less than an index header"),
    "another format": (lambda p: corrupt(p, "idx", 0, b"PK\x03\x04"), "no Megatron index"),
    "the older format": (lambda p: corrupt(p, "idx", 0, b"TNTIDX\x00\x00"), "TNTIDX.*Rebuild"),
    "another version": (lambda p: corrupt(p, "idx", 9, b"\x02"), "version 2"),
    "floats": (lambda p: corrupt(p, "idx", 17, b"\x07"), "float32 numbers"),
    "unknown dtype": (lambda p: corrupt(p, "idx", 17, b"\x63"), "dtype code 99"),
    "wrong offset": (lambda p: corrupt(p, "idx", 34 + 16 + 8, b"\x05"), "contradicts itself"),
    "wrong first offset": (lambda p: corrupt(p, "idx", 34 + 16, b"\x02"), "contradicts itself"),
    "wrong documents": (lambda p: corrupt(p, "idx", 34 + 48 + 32, b"\x03"), "contradicts itself"),
    "ids too large": (lambda p: corrupt(p, "bin", 50, b"\xff\xff"), "token id 65535, outside.*0..499"),
    "meta of another": (lambda p: Path(f"{p}.meta.json").write_text('{"bin_bytes": 5}'), "belongs to another dataset"),
    "meta without a tokenizer": (
        lambda p: Path(f"{p}.meta.json").write_text('{"bin_bytes": 92, "tokenizer": null}'),
        "was not written by tools/preprocess_data.py",
    ),
    "meta without numbers": (
        lambda p: Path(f"{p}.meta.json").write_text('{"bin_bytes": 92, "max_id": "x"}'),
        "tokenizer or max_id are of another kind",
    ),
    "deep meta": (lambda p: Path(f"{p}.meta.json").write_text("[" * 100_000), "nested too deeply"),
    "broken meta": (lambda p: Path(f"{p}.meta.json").write_text("{"), "is not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_pair_is_refused_with_the_file_and_a_remedy(write_pair, case):
    change, message = BROKEN[case]
    prefix = write_pair("a", DOCUMENTS)
    change(prefix)
    with pytest.raises(UserError, match=message) as caught:
        check_prefix(prefix, 500)
    assert str(Path(prefix).parent) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_larger_than_the_models_is_refused(write_pair):
    prefix = write_pair("a", DOCUMENTS, meta={"tokenizer": {"vocab_size": 1000}})
    assert read_meta(prefix)["max_id"] == 499
    check_prefix(prefix, 1000)
    with pytest.raises(UserError, match="tokenizer of 1000 ids, the model's vocabulary has 999"):
        check_prefix(prefix, 999)


def test_too_few_tokens_for_one_sample_are_refused(write_pair):
    prefix = write_pair("a", DOCUMENTS)
    check_prefix(prefix, 500, sequence_length=45)
    with pytest.raises(UserError, match=r"holds 46 tokens, fewer than one sample of 46 \+ 1"):
        check_prefix(prefix, 500, sequence_length=46)


def test_the_missing_part_of_a_prefix_is_suggested(write_pair, tmp_path):
    write_pair("corpus_text_document", DOCUMENTS)
    with pytest.raises(UserError, match=r"Did you mean the prefix .*corpus_text_document"):
        read_index(str(tmp_path / "corpus"))


def test_ids_outside_the_vocabulary_are_never_written(tmp_path):
    with pytest.raises(ValueError, match="70 is outside"), IndexedWriter(str(tmp_path / "a"), 70) as writer:
        writer.add(np.array([69, 70], np.uint16), np.array([2]))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_pair_is_kept_unless_told_otherwise(write_pair, tmp_path):
    prefix = write_pair("a", DOCUMENTS)
    before = Path(f"{prefix}.bin").read_bytes()
    with pytest.raises(UserError, match=r"exists.*--overwrite"):
        IndexedWriter(prefix, 500)
    with IndexedWriter(prefix, 500, overwrite=True) as writer:  # and never finished
        writer.add(np.array([1], np.uint16), np.array([1]))
    assert Path(f"{prefix}.bin").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_meta_holds_the_counts(write_pair):
    prefix = write_pair("a", DOCUMENTS, meta={"key": "text"})
    meta = json.loads(Path(f"{prefix}.meta.json").read_text())
    assert meta == {"key": "text", "dtype": "uint16", "tokens": 46, "max_id": 499, "bin_bytes": 92}
