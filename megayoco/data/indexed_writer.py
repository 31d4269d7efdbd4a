"""Writing indexed pairs, PREFIX.bin and PREFIX.idx: in blocks, so that a pair of any size needs no memory.

`IndexedWriter` writes a pair at once. `TokenFiles` is a pair while it grows, for a run that can be interrupted and goes
on; `write_index` and `publish_pair` complete it. The format stands in `indexed.py`.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megayoco.data.files import write_text_atomically
from megayoco.data.indexed import DTYPES, HEADER, MAGIC, MAX_SEQUENCE, token_dtype
from megayoco.errors import UserError


class TokenFiles:
    """A pair while it grows: the tokens of .bin, and beside them the length of every sequence (int32, no header).

    Nothing is kept in memory. `write_index` makes the index out of the lengths; a writer that was killed goes on by
    `keep`, the size of both files that is known to be on disk.

    Args:
        data, lengths: the two files; replaced unless `keep` is given.
        vocab_size: every id must be below it; it decides the dtype unless `dtype` does.
        keep: (tokens, sequences, largest id) so far: the files are cut there and grow on.

    Raises:
        UserError: a file cannot be written, or is shorter than `keep` says.
    """

    def __init__(
        self,
        data: str | os.PathLike[str],
        lengths: str | os.PathLike[str],
        vocab_size: int,
        *,
        dtype: np.dtype | None = None,
        keep: tuple[int, int, int] = (0, 0, -1),
    ):
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size) if dtype is None else np.dtype(dtype)
        self.num_tokens, self.num_sequences, self.max_id = keep
        self.paths = Path(data), Path(lengths)
        sizes = self.num_tokens * self.dtype.itemsize, self.num_sequences * 4
        self._files: list[BinaryIO] = []
        try:
            for path, size in zip(self.paths, sizes, strict=True):
                file: BinaryIO = open(path, "r+b" if size else "wb")  # noqa: SIM115 (closed by close)
                self._files.append(file)
                if file.seek(0, os.SEEK_END) < size:
                    raise UserError(f"{path} is shorter than the {size:,} bytes that were recorded of it")
                file.truncate(size)
                file.seek(size)
        except OSError as error:
            self.close()
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        except UserError:
            self.close()
            raise

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append sequences.

        Args:
            tokens: (n,) ids of all of them, one after the other, in `self.dtype`.
            lengths: (sequences,) tokens of each, summing to n; 0 is legal in the format.
        """
        fits = tokens.dtype == self.dtype and int(lengths.sum(dtype=np.int64)) == len(tokens)
        if not fits or (len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= MAX_SEQUENCE):
            raise ValueError(f"{tokens.dtype} {tokens.shape} and lengths {lengths} are no sequences of {self.dtype}")
        high = int(tokens.max()) if len(tokens) else -1
        if high >= self.vocab_size or (len(tokens) and int(tokens.min()) < 0):  # a narrower dtype would have wrapped
            raise ValueError(f"token id {high} is outside the vocabulary of {self.vocab_size}")
        for path, file, numbers in zip(self.paths, self._files, (tokens, lengths.astype(np.int32)), strict=True):
            try:
                file.write(np.ascontiguousarray(numbers).data)
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}") from error
        self.max_id = max(self.max_id, high)
        self.num_tokens += len(tokens)
        self.num_sequences += len(lengths)

    def sync(self) -> None:
        """Bring everything so far to the disk."""
        for path, file in zip(self.paths, self._files, strict=True):
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the files, whatever state they are in; call `sync` before if their content counts."""
        for file in self._files:
            with suppress(OSError):  # a full disk, which `add` or `sync` reported already
                file.close()

    def write_index(self, path: str | os.PathLike[str]) -> None:
        """The index of what was added, one document per sequence; call `sync` before."""

        def blocks() -> Iterator[np.ndarray]:
            with open(self.paths[1], "rb") as file:
                while block := file.read(1 << 22):
                    yield np.frombuffer(block, np.int32)

        write_index(path, self.dtype, self.num_sequences, blocks)

    def counts(self) -> dict[str, Any]:
        """What a meta file says of the tokens: dtype, tokens, max_id, bin_bytes."""
        size = self.num_tokens * self.dtype.itemsize
        return {"dtype": self.dtype.name, "tokens": self.num_tokens, "max_id": self.max_id, "bin_bytes": size}


def write_index(
    path: str | os.PathLike[str],
    dtype: np.dtype,
    num_sequences: int,
    lengths: Callable[[], Iterable[np.ndarray]],
    documents: Iterable[np.ndarray] | None = None,
    num_documents: int | None = None,
) -> None:
    """Write PREFIX.idx block by block, so that an index of any size needs no memory, and bring it to the disk.

    Args:
        lengths: gives, each time it is called, blocks that add up to (S,) tokens of each sequence.
        documents: blocks that add up to (D,) first sequence of each document and then S; without it every sequence
            is a document.
        num_documents: D - 1, needed with `documents`.

    Raises:
        UserError: the file cannot be written.
    """
    S = num_sequences
    if documents is None:
        num_documents = S
        documents = (np.arange(at, min(at + (1 << 19), S + 1)) for at in range(0, S + 1, 1 << 19))
    if num_documents is None:
        raise ValueError("num_documents must be given with documents")
    code = {np.dtype(kind): code for code, kind in DTYPES.items()}[np.dtype(dtype)]
    try:
        with open(path, "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, S, num_documents + 1))
            for block in lengths():
                file.write(np.ascontiguousarray(block, "<i4").data)
            offset = 0
            for block in lengths():
                ends = offset + np.cumsum(block.astype(np.int64) * np.dtype(dtype).itemsize)
                file.write(np.concatenate(([offset], ends[:-1])).astype("<i8").data if len(ends) else b"")
                offset = int(ends[-1]) if len(ends) else offset
            for block in documents:
                file.write(np.ascontiguousarray(block, "<i8").data)
            expected = HEADER.size + 12 * S + 8 * (num_documents + 1)
            if file.tell() != expected:
                raise ValueError(f"{path}: {file.tell()} bytes of lengths and documents, {expected} were announced")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


class IndexedWriter:
    """Writes one pair: `with IndexedWriter(prefix, vocab_size) as writer: writer.add(...); writer.finish(...)`.

    Everything grows under temporary names; `finish` renames the index last, so a visible index means a complete pair.
    Leaving the block without `finish` removes the temporary files.

    Raises:
        UserError: the pair exists and `overwrite` is not set, or the files cannot be written.
    """

    def __init__(self, prefix: str, vocab_size: int, *, overwrite: bool = False, dtype: np.dtype | None = None):
        self.prefix = prefix
        refuse_existing(pair_paths(prefix).values(), overwrite)
        self._temporary = {
            kind: f"{prefix}.{kind}.tmp-{os.getpid()}" for kind in ("bin", "lengths", "idx", "meta.json")
        }
        make_folder_of(prefix)
        self._files = TokenFiles(self._temporary["bin"], self._temporary["lengths"], vocab_size, dtype=dtype)
        self.dtype = self._files.dtype

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()
        for path in self._temporary.values():
            Path(path).unlink(missing_ok=True)

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents of one sequence each.

        Args:
            tokens: (n,) ids of all of them, one after the other, in `self.dtype`.
            lengths: tokens of each, summing to n, none of them 0.
        """
        if len(lengths) and int(lengths.min()) <= 0:
            raise ValueError(f"lengths {lengths}: a document needs a token")
        self._files.add(tokens, lengths)

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Complete the pair: counts, dtype and largest id are added to `meta`."""
        self._files.sync()
        self._files.close()
        self._files.write_index(self._temporary["idx"])
        write_text_atomically(self._temporary["meta.json"], format_meta(meta, self._files))
        publish_pair(self.prefix, self._temporary)


def pair_paths(prefix: str) -> dict[str, Path]:
    """The three files of a pair, in the order in which they become visible."""
    return {kind: Path(f"{prefix}.{kind}") for kind in ("bin", "meta.json", "idx")}


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise UserError if one of `paths` exists and may not be replaced."""
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists. Choose another output prefix, or give --overwrite to replace it.")


def make_folder_of(prefix: str) -> None:
    """The folder that a prefix names. Raises UserError if it cannot be made, or if the prefix is a folder's name."""
    if not os.path.basename(prefix):
        raise UserError(f"the output prefix {prefix!r} names a folder. Add the beginning of a file name to it.")
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {prefix}.bin: {error.strerror}") from error


def format_meta(meta: Mapping[str, Any], files: TokenFiles) -> str:
    """The content of PREFIX.meta.json: `meta` and the counts of `files`."""
    return json.dumps({**meta, **files.counts()}, indent=2) + "\n"


def publish_pair(prefix: str, finished: Mapping[str, str | os.PathLike[str]]) -> None:
    """Give the finished files (bin, meta.json, idx) their names, the index last. Can be repeated after a kill."""
    paths = pair_paths(prefix)
    try:
        if os.path.exists(finished["idx"]):
            paths["idx"].unlink(missing_ok=True)  # a replaced pair is incomplete until its index is back
        for kind, path in paths.items():
            if os.path.exists(finished[kind]):
                os.replace(finished[kind], path)
    except OSError as error:
        raise UserError(f"cannot write {prefix}.bin and .idx: {error.strerror}") from error
