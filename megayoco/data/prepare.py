"""Text files to indexed datasets, in several processes, without torch.

The parent cuts the input into chunks of whole lines and writes what comes back, in order; the workers parse, encode
and cast. A chunk is about 1 MiB of text, so that little is spent between processes and memory stays bounded whatever
the input's size: never more than two chunks per worker are under way.
"""

import glob
import gzip
import json
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from typing import Any, BinaryIO

import numpy as np

from megayoco.data.indexed import MAX_SEQUENCE, IndexedWriter, token_dtype
from megayoco.data.tokenizer import Tokenizer, build_tokenizer
from megayoco.errors import UserError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Task:
    """What happens to every line: which keys are encoded by which tokenizer."""

    tokenizer_type: str
    tokenizer_model: str | None
    keys: tuple[str, ...]
    append_eod: bool


@dataclass(frozen=True)
class Chunk:
    """Whole lines of one file: the number of the first, and how many bytes of the file (packed) are read by now."""

    path: str
    first_line: int
    lines: bytes
    read: int


@dataclass
class Encoded:
    """One key's documents of a chunk: tokens (n,), lengths (documents,) without the empty ones."""

    tokens: np.ndarray
    lengths: np.ndarray
    empty: int
    text_bytes: int


@dataclass
class Counts:
    """What became of one key so far."""

    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0


@dataclass
class Totals:
    """What became of the whole input so far; `read` bytes of `size` on disk."""

    size: int
    read: int = 0
    lines: int = 0
    keys: dict[str, Counts] = field(default_factory=dict)


def find_inputs(patterns: Sequence[str]) -> list[str]:
    """Files behind paths and globs, in the order given, those of one glob sorted.

    Raises:
        UserError: nothing matches, a folder, or a file named twice.
    """
    paths: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"--input {pattern}: no such file, and no file matches it as a pattern")
        paths.extend(found)
    for number, path in enumerate(paths):
        if not os.path.isfile(path):
            raise UserError(
                f"--input {path} is not a file. For the files of a folder, give a pattern: '{path}/*.jsonl'."
            )
        if path in paths[:number]:
            raise UserError(f"--input names {path} twice")
    return paths


def read_chunks(path: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The lines of a file, plain or gzip (by its first bytes), in chunks of about chunk_bytes."""
    line = 1
    try:
        with ExitStack() as stack:
            raw: BinaryIO = stack.enter_context(open(path, "rb"))
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file: Any = stack.enter_context(gzip.open(raw)) if packed else raw
            while lines := file.read(chunk_bytes):
                lines += file.readline()
                yield Chunk(path, line, lines, raw.tell())
                line += lines.count(b"\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: the gzip data is damaged after line {line} ({error}). Copy the file again; nothing was written."
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def encode_chunk(chunk: Chunk, task: Task, tokenizer: Tokenizer) -> tuple[int, dict[str, Encoded]]:
    """The lines of a chunk that are not blank, and their documents per key.

    Raises:
        UserError: with file and line: no JSON object, a key missing or not text, a document too long.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    parts: dict[str, list[np.ndarray]] = {key: [] for key in task.keys}
    counts = {key: Counts() for key in task.keys}
    end = np.array([tokenizer.eod] if task.append_eod else [], np.int64)
    documents = 0
    for number, line in enumerate(chunk.lines.split(b"\n"), chunk.first_line):
        if not line.strip():
            continue
        place = f"{chunk.path}, line {number}"
        document = _parse(line, place)
        documents += 1
        for key in task.keys:
            text = document.get(key)
            if not isinstance(text, str):
                raise UserError(_wrong_key(place, key, document))
            if not text:
                counts[key].empty_documents += 1
                continue
            ids = tokenizer.encode_array(text)
            if int(ids.max()) >= tokenizer.vocab_size or len(ids) >= MAX_SEQUENCE:
                raise UserError(f"{place}: {len(ids)} tokens up to id {int(ids.max())} do not fit the format")
            parts[key].append(np.concatenate((ids, end), dtype=dtype, casting="unsafe"))
            counts[key].text_bytes += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
    encoded = {}
    for key in task.keys:
        tokens = np.concatenate(parts[key]) if parts[key] else np.zeros(0, dtype)
        lengths = np.array([len(part) for part in parts[key]], np.int64)
        encoded[key] = Encoded(tokens, lengths, counts[key].empty_documents, counts[key].text_bytes)
    return documents, encoded


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    task: Task,
    *,
    workers: int = 1,
    overwrite: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    report: Callable[[Totals], None] = lambda totals: None,
) -> Totals:
    """Write OUTPUT_PREFIX_KEY_document.{bin,idx,meta.json} for every key, all of them or none.

    Args:
        inputs: files of JSON lines.
        workers: processes; with 1 everything happens in this one.
        report: called after every chunk.

    Raises:
        UserError: the first mistake in the input, with file and line; an output that exists; a worker that died.
    """
    tokenizer = build_tokenizer(task.tokenizer_type, task.tokenizer_model)
    totals = Totals(size=sum(os.path.getsize(path) for path in inputs), keys={key: Counts() for key in task.keys})
    before = 0  # bytes of the files that are finished
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(
                IndexedWriter(f"{output_prefix}_{key}_document", tokenizer.vocab_size, overwrite=overwrite)
            )
            for key in task.keys
        }
        encode = stack.enter_context(_Encoder(task, tokenizer, workers))
        for path in inputs:
            for chunk, (lines, encoded) in encode(read_chunks(path, chunk_bytes)):
                totals.lines += lines
                totals.read = before + chunk.read
                for key, part in encoded.items():
                    writers[key].add(part.tokens, part.lengths)
                    count = totals.keys[key]
                    count.documents += len(part.lengths)
                    count.empty_documents += part.empty
                    count.text_bytes += part.text_bytes
                    count.tokens += len(part.tokens)
                report(totals)
            before += os.path.getsize(path)
        for key, count in totals.keys.items():
            if not count.documents:
                raise UserError(f"{inputs[0]}: no document with text under the key {key!r}; nothing was written")
        for key, writer in writers.items():
            writer.finish(_meta(writer.prefix, inputs, key, task, tokenizer, totals.keys[key]))
    return totals


class _Encoder:
    """Encodes chunks in processes, a few in advance, and gives them back in order. A context manager."""

    def __init__(self, task: Task, tokenizer: Tokenizer, workers: int):
        self._task, self._tokenizer, self._workers = task, tokenizer, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Callable[[Iterator[Chunk]], Iterator[tuple[Chunk, tuple[int, dict[str, Encoded]]]]]:
        if self._workers > 1:
            # spawned, not forked: a fork would copy the progress bar's thread and locks in any state
            context = get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _start_worker, (self._task,))
        return self._encode

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _encode(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, tuple[int, dict[str, Encoded]]]]:
        if self._pool is None:
            for chunk in chunks:
                yield chunk, encode_chunk(chunk, self._task, self._tokenizer)
            return
        waiting: deque[tuple[Chunk, Future]] = deque()
        for chunk in chunks:
            waiting.append(self._submit(chunk))
            if len(waiting) >= 2 * self._workers:
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())

    def _submit(self, chunk: Chunk) -> tuple[Chunk, Future]:
        assert self._pool is not None
        try:
            return chunk, self._pool.submit(_work, chunk)
        except BrokenProcessPool as error:
            raise UserError(_died(chunk)) from error

    def _result(self, chunk: Chunk, future: Future) -> tuple[Chunk, tuple[int, dict[str, Encoded]]]:
        try:
            return chunk, future.result()
        except BrokenProcessPool as error:
            raise UserError(_died(chunk)) from error


_worker: tuple[Task, Tokenizer] | None = None


def _start_worker(task: Task) -> None:
    global _worker
    _worker = task, build_tokenizer(task.tokenizer_type, task.tokenizer_model)
    # the pool's queues do not tell a worker that its parent was killed: without this it would wait for ever
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(chunk: Chunk) -> tuple[int, dict[str, Encoded]]:
    assert _worker is not None
    return encode_chunk(chunk, *_worker)


def _died(chunk: Chunk) -> str:
    last = chunk.first_line + chunk.lines.count(b"\n")
    return (
        f"{chunk.path}, about lines {chunk.first_line} to {last}: a worker process died, most often because memory ran"
        " out. Nothing was written. Give fewer --workers, or look for a huge line there."
    )


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: byte {error.start} is not UTF-8. Repair or remove the line.") from None
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}). Repair or remove the line.") from None
    except RecursionError:
        raise UserError(f"{place}: JSON nested too deeply. Repair or remove the line.") from None
    if not isinstance(document, dict):
        raise UserError(f"{place}: expected a JSON object, got {type(document).__name__}: {line[:40]!r}")
    return document


def _wrong_key(place: str, key: str, document: dict[str, Any]) -> str:
    if key in document:
        return f"{place}: the value of {key!r} is {type(document[key]).__name__}, not text"
    return (
        f"{place}: no key {key!r}, only {', '.join(map(repr, document)) or 'none'}. Name the right one by --json-keys."
    )


def _meta(
    prefix: str, inputs: Sequence[str], key: str, task: Task, tokenizer: Tokenizer, count: Counts
) -> dict[str, Any]:
    model = tokenizer.model
    if model is not None and os.path.exists(model):
        # relative to the meta file, so that a folder with both can be moved
        model = os.path.relpath(os.path.realpath(model), os.path.dirname(os.path.realpath(prefix)))
    return {
        "format": 1,
        "tokenizer": {**tokenizer.identity(), "model": model},
        "key": key,
        "append_eod": task.append_eod,
        "documents": count.documents,
        "empty_documents": count.empty_documents,
        "text_bytes": count.text_bytes,
        "sources": [{"path": str(path), "bytes": os.path.getsize(path)} for path in inputs],
    }
