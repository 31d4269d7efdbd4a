"""Examples on disk: made once per node from the records, mapped by every process of a run.

    CACHE_DIR/KEY/examples.bin    int32, the examples one after the other (tuning_examples.py)
    CACHE_DIR/KEY/ends.npy        (E,) int64, where each ends
    CACHE_DIR/KEY/examples.json   counts, and hashes of the content

KEY names the files by path, size, time and a sample of their content, the recipe, and the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megayoco.config.tuning import TuningSource
from megayoco.data.cache import cache_root, key_of, open_cached, sample_of
from megayoco.data.files import read_json_object, write_text_atomically
from megayoco.data.tokenizer import Tokenizer
from megayoco.data.tuning_examples import Counts, Recipe
from megayoco.data.tuning_records import Piece, find_files, read_pieces
from megayoco.errors import UserError

log = logging.getLogger(__name__)

_FORMAT = 1


@dataclass(frozen=True)
class Examples:
    """The examples of a source: tokens (n,) int32, ends (E,) int64; what became of the records; a hash of all
    tokens."""

    tokens: np.ndarray
    ends: np.ndarray
    counts: Counts
    content: str

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (n,) int64 of an example, and whether each is learned (n,) bool."""
        begin = int(self.ends[number - 1]) if number else 0
        signed = np.array(self.tokens[begin : int(self.ends[number])])
        labelled = signed >= 0
        return np.where(labelled, signed, ~signed).astype(np.int64), labelled


def open_examples(
    source: TuningSource,
    tokenizer: Tokenizer,
    length: int,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int = 1,
) -> Examples:
    """The examples of a source from the cache, after making them if need be.

    Args:
        source: files, fields, filters.
        tokenizer: of the run.
        length: tokens of the longest example; what is more is cut off.
        cache_dir: where they are kept; None: a folder beside the first file.
        workers: processes that make them.

    Raises:
        UserError: a file is missing or damaged, a record cannot be used, or nothing of all records would be learned.
    """
    files = find_files(source.patterns)
    identity = [tokenizer.identity()["sha256"], tokenizer.bos]
    described = {
        "format": _FORMAT,
        "files": [(os.path.realpath(f.path), f.size, f.modified, sample_of(f.path).hexdigest()) for f in files],
        "recipe": source.example_settings(),
        "length": length,
        "tokenizer": identity,
    }
    folder = cache_root(files[0].path, cache_dir) / f"examples-{key_of(described)}"
    recipe, name = Recipe(source, length), source_name(source)

    def build(to: Path) -> None:
        log.info("making examples of %s", name)
        with _maker(recipe, tokenizer, workers) as make:
            _write(to, make(read_pieces(files)), name, _who_answers(source))

    return open_cached(folder, lambda: _open(folder), build, "4 bytes per token")


def source_name(source: TuningSource) -> str:
    """What a source is called in messages: its files."""
    return ", ".join(source.patterns)


def _who_answers(source: TuningSource) -> str:
    """A sentence on whose turns are learned, where there are turns."""
    if source.chat is None:
        return ""
    chat = source.chat
    return f" Turns of the model are those whose {chat.role_field!r} is {chat.model_role!r} (chat.model_role)."


class _maker:
    """`with _maker(recipe, tokenizer, workers) as make: for examples, counts in make(pieces): ...`, in the order of the
    pieces. With one worker everything happens in this process."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, workers: int):
        self._recipe, self._tokenizer, self._workers = recipe, tokenizer, workers

    def __enter__(self) -> _maker:
        self._folder = tempfile.TemporaryDirectory()
        self._pool: ProcessPoolExecutor | None = None
        if self._workers > 1:
            self._tokenizer.save(self._folder.name)
            # a fork would copy the locks of this process's threads, in whatever state they are
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _begin, (self._recipe, self._folder.name))
        return self

    def __exit__(self, *rest: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._folder.cleanup()

    def __call__(self, pieces: Iterable[Piece]) -> Iterator[tuple[list[np.ndarray], Counts]]:
        if self._pool is None:
            for piece in pieces:
                yield self._recipe.examples(piece, self._tokenizer)
            return
        waiting: deque[Future[tuple[list[np.ndarray], Counts]]] = deque()
        for piece in pieces:
            waiting.append(self._pool.submit(_make, piece))
            if len(waiting) > 2 * self._workers:  # what is under way is bounded
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_of_worker: list[Any] = []
"""Recipe and tokenizer of this process, where it is a worker."""


def _begin(recipe: Recipe, folder: str) -> None:
    _of_worker[:] = [recipe, Tokenizer.from_dir(folder)]


def _make(piece: Piece) -> tuple[list[np.ndarray], Counts]:
    recipe, tokenizer = _of_worker
    return recipe.examples(piece, tokenizer)  # type: ignore[no-any-return]


def _write(folder: Path, made: Iterable[tuple[list[np.ndarray], Counts]], name: str, remark: str) -> None:
    """remark: what else to say where nothing is learned."""
    total, lengths = Counts(), []
    hashed = hashlib.sha256()
    with open(folder / "examples.bin", "wb") as file:
        for examples, counts in made:
            total.add(counts)
            lengths.append(np.array([len(example) for example in examples], np.int64))
            if examples:
                content = np.concatenate(examples).astype("<i4").tobytes()
                hashed.update(content)
                file.write(content)
    ends = np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))
    if not len(ends):
        raise UserError(
            f"data.tuning: none of the {total.records:,} records of {name} gives an example of which anything would be"
            f" learned: filters leave out {total.left_out:,}, and {total.unlabelled:,} have no answer within the limits"
            f" of length. Change files, filters or limits, or make sequence_length longer.{remark}"
        )
    hashed.update(ends.astype("<i8").tobytes())
    np.save(folder / "ends.npy", ends)
    described = {
        "counts": vars(total),
        "content": hashed.hexdigest(),
        "samples": [sample_of(folder / file).hexdigest() for file in ("examples.bin", "ends.npy")],
    }
    write_text_atomically(folder / "examples.json", json.dumps(described, indent=2) + "\n")


def _open(folder: Path) -> Examples | None:
    """What was written into a folder; None if it is absent or damaged."""
    files = [folder / name for name in ("examples.bin", "ends.npy")]
    if not all(file.is_file() for file in files):
        return None
    try:
        described = read_json_object(folder / "examples.json", remedy="")
        if [sample_of(file).hexdigest() for file in files] != described["samples"]:
            return None
        tokens = np.memmap(files[0], "<i4", "r").view(np.ndarray)
        ends = np.load(files[1], mmap_mode="r").view(np.ndarray)
        whole = len(tokens) == int(ends[-1])
        return Examples(tokens, ends, Counts(**described["counts"]), described["content"]) if whole else None
    except (UserError, OSError, ValueError, EOFError, KeyError, TypeError, IndexError):
        return None
