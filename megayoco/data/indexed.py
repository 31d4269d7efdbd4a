"""Megatron's indexed dataset, PREFIX.bin and PREFIX.idx: read and check, without torch.

Shapes: S sequences, D = documents + 1. The index is little-endian: magic, version, dtype code, S, D, lengths in tokens
int32 (S,), offsets in bytes int64 (S,), first sequence of each document int64 (D,). The arrays start at byte 34, hence
are never aligned. PREFIX.bin holds the ids of all sequences, one after the other. PREFIX.meta.json beside them (ours,
optional) says which tokenizer made them, their counts and largest id.
Source: megatron-core, megatron/core/datasets/indexed_dataset.py.
"""

import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megayoco.data.files import read_json_object
from megayoco.errors import UserError

log = logging.getLogger(__name__)

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.number]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
MAX_SEQUENCE = 2**31 - 1
_REBUILD = "Copy both files again, or rebuild them with tools/preprocess_data.py."


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 ids, else int32: the choice of every Megatron writer."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class Index:
    """What an index file says; the arrays are copies and outlive the file.

    lengths (S,) int32 tokens, offsets (S,) int64 bytes, documents (D,) int64 first sequence of each document.
    """

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1


def read_index(prefix: str) -> Index:
    """The index of a pair, after checking that index and data belong together.

    Raises:
        UserError: a file is missing, of another format or version, holds floats, or is cut short.
    """
    idx, data = f"{prefix}.idx", f"{prefix}.bin"
    for path in (idx, data):
        if not os.path.isfile(path):
            raise UserError(f"{path} does not exist. {_missing_remedy(prefix, path)}")
    index_size = os.path.getsize(idx)
    with open(idx, "rb") as file:
        header = file.read(HEADER.size)
    if header[:8] == b"TNTIDX\x00\x00":
        raise UserError(
            f"{idx} is of the older TNTIDX format (gpt-neox data_impl: cached), which shares only the file names."
            " Rebuild the pair with tools/preprocess_data.py, or with data_impl: mmap."
        )
    if header[: len(MAGIC)] != MAGIC:
        raise UserError(f"{idx} is no Megatron index: it begins with {header[:9]!r}, not {MAGIC!r}. {_REBUILD}")
    if len(header) < HEADER.size:
        raise UserError(f"{idx} holds {index_size} bytes, less than an index header. {_REBUILD}")
    _, version, code, S, D = HEADER.unpack(header)
    if version != 1:
        raise UserError(f"{idx} has version {version}, only 1 is known. {_REBUILD}")
    if code not in DTYPES:
        raise UserError(f"{idx} has the unknown dtype code {code}. {_REBUILD}")
    dtype = np.dtype(DTYPES[code])
    if dtype.kind == "f":
        raise UserError(f"{idx} describes {dtype} numbers, but token ids are integers. {_REBUILD}")
    expected = HEADER.size + 12 * S + 8 * D
    if index_size not in (expected, expected + S):  # multimodal files end with one mode per sequence
        raise UserError(
            f"{idx} holds {index_size:,} bytes, its header describes {expected:,}. The copy was cut short. {_REBUILD}"
        )
    with open(idx, "rb") as file:
        file.seek(HEADER.size)
        lengths, offsets, documents = (
            np.fromfile(file, kind, count) for kind, count in (("<i4", S), ("<i8", S), ("<i8", D))
        )
    ends = offsets + lengths.astype(np.int64) * dtype.itemsize
    consistent = D > 0 and documents[0] == 0 and documents[-1] == S and bool((np.diff(documents) >= 0).all())
    consistent = consistent and bool((lengths >= 0).all() and (offsets >= 0).all())
    consistent = consistent and bool((offsets[:1] == 0).all() and (ends[:-1] == offsets[1:]).all())
    if not consistent:
        raise UserError(f"{idx} contradicts itself: lengths, offsets and documents do not fit together. {_REBUILD}")
    described, size = int(ends[-1]) if S else 0, os.path.getsize(data)
    if size != described:
        state = "The copy was cut short" if size < described else "They are not of one pair"
        raise UserError(f"{data} holds {size:,} bytes, its index describes {described:,}. {state}. {_REBUILD}")
    return Index(dtype, lengths, offsets, documents)


def read_meta(prefix: str) -> dict[str, Any] | None:
    """PREFIX.meta.json, None if there is none. Raises UserError if it describes another pair, or is not ours."""
    path = f"{prefix}.meta.json"
    if not os.path.exists(path):
        return None
    meta = read_json_object(path, remedy="Remove it, or rebuild the dataset with tools/preprocess_data.py.")
    size = os.path.getsize(f"{prefix}.bin")
    if meta.get("bin_bytes") != size:
        raise UserError(
            f"{path} describes {meta.get('bin_bytes')} bytes of tokens, but {prefix}.bin holds {size}: it belongs to"
            " another dataset. Copy the right one, or remove it and give data.tokenizer_type and data.tokenizer_model."
        )
    tokenizer = meta.get("tokenizer", {})
    usable = isinstance(tokenizer, dict) and isinstance(meta.get("max_id", -1), int)
    usable = usable and isinstance(tokenizer.get("vocab_size", 0), int)
    if not (usable and isinstance(tokenizer.get("type", ""), str) and isinstance(tokenizer.get("model") or "", str)):
        raise UserError(
            f"{path} was not written by tools/preprocess_data.py: tokenizer or max_id are of another kind. Rebuild the"
            " dataset, or remove the file and give data.tokenizer_type and data.tokenizer_model."
        )
    return meta


def check_prefix(prefix: str, vocab_size: int, *, sequence_length: int | None = None) -> Index:
    """All that can be checked of a dataset before training starts; reads the index and a sample of the ids.

    Args:
        prefix: path without .bin and .idx.
        vocab_size: of the model: every id, and the tokenizer's whole vocabulary, must be below it.
        sequence_length: tokens per sample, if at least one sample must fit.

    Returns:
        The index.

    Raises:
        UserError: one line with the file and the remedy.
    """
    index = read_index(prefix)
    check_vocabulary(prefix, index.dtype, vocab_size)
    if sequence_length is not None and index.num_tokens < sequence_length + 1:
        raise UserError(
            f"{prefix} holds {index.num_tokens} tokens, fewer than one sample of {sequence_length} + 1. Prepare more"
            " text, or shorten sequence_length."
        )
    if len(index.lengths) != index.num_documents:
        log.warning(
            "%s holds %d sequences in %d documents (split sentences, or empty documents); the sequence is what is"
            " shuffled and treated as a document",
            prefix,
            len(index.lengths),
            index.num_documents,
        )
    return index


def outside_vocabulary(prefix: str, low: int, high: int, vocab_size: int) -> str:
    """What to say of ids from `low` to `high` that a model has no rows for."""
    return (
        f"{prefix}.bin holds token id {high if high >= vocab_size else low}, outside the model's vocabulary"
        f" 0..{vocab_size - 1}. Set model.vocab_size to that of the tokenizer, or rebuild the dataset with it."
    )


def _missing_remedy(prefix: str, path: str) -> str:
    wanted = Path(prefix)
    found = sorted(wanted.parent.glob(f"{wanted.name}_*_document.idx")) if wanted.parent.is_dir() else []
    if found:
        return f"Did you mean the prefix {str(found[0])[:-4]}?"
    if wanted.parent.is_dir():
        for folder in sorted(wanted.parent.glob("*.partial")):
            if wanted.name.startswith(f"{folder.stem}_"):
                return f"{folder} holds an unfinished run of tools/preprocess_data.py: --resume there goes on with it."
    other = f"{prefix}.idx" if path.endswith(".bin") else f"{prefix}.bin"
    if os.path.exists(other):
        return f"Its partner {other} is there: the pair is incomplete. {_REBUILD}"
    return "Check the prefix (the path without .bin or .idx), or write the dataset with tools/preprocess_data.py."


def _sampled_range(path: str, dtype: np.dtype, blocks: int = 64, block: int = 4096) -> tuple[int, int]:
    """Smallest and largest id in blocks spread evenly over the file, both ends included; (0, -1) if it is empty."""
    count = os.path.getsize(path) // dtype.itemsize
    if not count:
        return 0, -1
    tokens = np.memmap(path, dtype, "r")
    starts = np.linspace(0, max(count - block, 0), blocks).astype(np.int64)
    parts = [tokens[s : s + block] for s in np.unique(starts).tolist()]
    return min(int(p.min()) for p in parts), max(int(p.max()) for p in parts)


def check_vocabulary(prefix: str, dtype: np.dtype, vocab_size: int) -> None:
    """Compare a dataset with the vocabulary of a model, without reading its index.

    Args:
        prefix: path without .bin and .idx.
        dtype: of its ids.
        vocab_size: of the model: the tokenizer's whole vocabulary, and every id of a sample, must be below it.

    Raises:
        UserError: one line with the file and the remedy.
    """
    meta = read_meta(prefix)
    made_with = 0 if meta is None else meta.get("tokenizer", {}).get("vocab_size", 0)
    if made_with > vocab_size:
        raise UserError(
            f"{prefix} was made with a tokenizer of {made_with} ids, the model's vocabulary has {vocab_size}."
            f" Set model.vocab_size to at least {made_with}, or rebuild the dataset with a smaller tokenizer."
        )
    low, high = _sampled_range(f"{prefix}.bin", dtype)
    high = max(high, -1 if meta is None else int(meta.get("max_id", -1)))
    if low < 0 or high >= vocab_size:
        raise UserError(outside_vocabulary(prefix, low, high, vocab_size))
