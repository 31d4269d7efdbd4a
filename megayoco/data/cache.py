"""The order of a dataset's sequences on disk: built once per node, never stale, never half-written.

    CACHE_DIR/KEY/places.npy    (2, P) int64, see Places
    CACHE_DIR/KEY/places.json   what it belongs to and a sample of its content

KEY names all that the order follows from: the settings, and of the dataset its path, the sizes and modification times
of both files, and a hash of blocks of both, among them the index's header and the ends of its arrays. So a dataset that
was made anew in place, whatever its size and time say, gets another folder.

Every process asks for the order. The first one builds it, under a temporary name that is renamed at the end; the others
of the same node wait at a file lock, not in a collective that would time out. Where nodes share the folder, they share
the work; where they do not, or where the file system knows no locks, each builds its own.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megayoco.data.files import read_json_object, write_text_atomically
from megayoco.data.indexed import HEADER, Index, read_index
from megayoco.data.order import Permutation
from megayoco.errors import UserError

log = logging.getLogger(__name__)

Opened = TypeVar("Opened")

FORMAT = 2
"""Part of every key and of a run's identity: a release that orders samples in another way raises it."""


@dataclass(frozen=True)
class OrderSettings:
    """What the order of a dataset's sequences follows from, besides the dataset."""

    part: tuple[float, float]
    """The sequences that take part, from and to, as fractions of their number."""

    seed: int | None
    """Of the order, and of which long documents come once more than others; None leaves the order of the file."""

    long_document: int | None = None
    """Sequences of more tokens than this take part `long_document_weight` times; None where that is 1."""

    long_document_weight: float = 1.0

    min_length: int = 0
    """Sequences of fewer tokens do not take part."""

    shuffled: bool = True
    """Whether the order is the seed's; else it is the file's, copies of a long document side by side."""


@dataclass(frozen=True)
class Places:
    """Where the tokens of an epoch lie: P sequences one after the other, repeated and permuted as the settings say.

    starts (P,) int64: first token of each in PREFIX.bin, counted in tokens; ends (P,) int64: tokens of the epoch up to
    its end, rising. Both are mapped from the cache. dtype: of the tokens in the file. num_sequences, num_documents: of
    the dataset as a whole.
    """

    prefix: str
    dtype: np.dtype
    num_sequences: int
    num_documents: int
    starts: np.ndarray
    ends: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch, 0 if no sequence takes part."""
        return int(self.ends[-1]) if len(self.ends) else 0


def open_places(prefix: str, settings: OrderSettings, cache_dir: str | os.PathLike[str] | None) -> Places:
    """The order of a dataset's sequences from the cache, after building it there if need be.

    Args:
        prefix: of the dataset.
        settings: of the order.
        cache_dir: where orders are kept; None: the folder .megayoco-cache beside the dataset.

    Raises:
        UserError: the dataset is missing, broken or cut short, or the cache cannot be written.
    """
    prefix = os.path.realpath(prefix)
    folder = cache_root(prefix, cache_dir) / places_key(prefix, settings)
    places = open_cached(
        folder,
        lambda: _open(folder, prefix),
        lambda temporary: _build(temporary, prefix, settings),
        "16 bytes per document",
    )
    if places.num_sequences != places.num_documents:
        log.warning(
            "%s holds %d sequences in %d documents (split sentences, or empty documents); the sequence is what is"
            " shuffled and treated as a document",
            prefix,
            places.num_sequences,
            places.num_documents,
        )
    return places


def cache_root(beside: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None) -> Path:
    """The folder of caches: `cache_dir`, or where that is None the folder .megayoco-cache beside a file."""
    return Path(beside).parent / ".megayoco-cache" if cache_dir is None else Path(cache_dir)


def open_cached(folder: Path, open_it: Callable[[], Opened | None], build: Callable[[Path], None], room: str) -> Opened:
    """What lies in a folder of the cache, after building it if need be: once per node, whole or not at all.

    Args:
        folder: named by all that its content follows from.
        open_it: reads the folder; None if it is absent or damaged.
        build: fills the folder it is given.
        room: how much room that takes, for messages.

    Raises:
        UserError: the cache cannot be written, or not read back; what `build` raises.
    """
    found = open_it()
    try:
        if found is None:
            with _lock(folder) as alone:
                found = open_it()  # another process may have been faster
                if found is None:
                    _remove_remains(folder, alone)
                    _build_apart(folder, build)
                    found = open_it()
    except OSError as error:
        raise UserError(
            f"cannot write sample indices to {folder}: {error.strerror or error}. Set data.cache_dir to a writable"
            f" folder with room for {room}."
        ) from error
    if found is None:
        raise UserError(
            f"the sample indices in {folder} cannot be read back. Set data.cache_dir to a folder on another disk."
        )
    return found


def sequence_order(index: Index, settings: OrderSettings) -> np.ndarray:
    """(P,) int64: numbers of the sequences of an epoch in order, without empty and too short ones.

    Every sequence stands in it once. A long one stands in it `long_document_weight` times; of a fraction, as many of
    them as it says, chosen by the seed, stand in it once more than the others.
    """
    S = len(index.lengths)
    first, last = round(settings.part[0] * S), round(settings.part[1] * S)
    lengths = index.lengths[first:last]
    numbers = np.flatnonzero(lengths >= max(settings.min_length, 1))
    key = (settings.seed, S, index.num_tokens)  # of the data: two sources of a blend should not run in parallel
    if settings.long_document is not None:
        long = np.flatnonzero(lengths[numbers] > settings.long_document)
        if len(long):
            copies = np.ones(len(numbers), np.int64)
            whole, more = divmod(round(settings.long_document_weight * len(long)), len(long))
            copies[long] = whole + (Permutation(len(long), "long", *key).array() < more)
            numbers = np.repeat(numbers, copies)
    numbers += first
    if settings.seed is not None and settings.shuffled and len(numbers):
        return numbers[Permutation(len(numbers), "sequences", *key).array()]
    return numbers


def _build_apart(folder: Path, build: Callable[[Path], None]) -> None:
    """Build under a temporary name, which is changed at the end."""
    temporary = folder.with_name(f"{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the same number
        temporary.mkdir(parents=True)
        build(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another node was faster, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build(folder: Path, prefix: str, settings: OrderSettings) -> None:
    index = read_index(prefix)
    order = sequence_order(index, settings)
    tokens = _write_places(folder / "places.npy", index, order)
    described = {
        "prefix": prefix,
        "settings": dataclasses.asdict(settings),
        "dtype": index.dtype.name,
        "sequences": len(index.lengths),
        "documents": index.num_documents,
        "places": len(order),
        "tokens": tokens,
        "sample": sample_of(folder / "places.npy").hexdigest(),
    }
    write_text_atomically(folder / "places.json", json.dumps(described, indent=2) + "\n")


def _write_places(path: Path, index: Index, order: np.ndarray, block: int = 1 << 20) -> int:
    """Write the file of Places in blocks; returns the tokens of the epoch."""
    P, tokens = len(order), 0
    with open(path, "wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (2, P)}
        np.lib.format.write_array_header_1_0(file, header)
        for at in range(0, P, block):
            file.write((index.offsets[order[at : at + block]] // index.dtype.itemsize).tobytes())
        for at in range(0, P, block):
            ends = tokens + np.cumsum(index.lengths[order[at : at + block]], dtype=np.int64)
            file.write(ends.tobytes())
            tokens = int(ends[-1])
    return tokens


def _open(folder: Path, prefix: str) -> Places | None:
    """What lies in a folder of the cache; None if it is absent or damaged."""
    file = folder / "places.npy"
    if not file.is_file():
        return None
    try:
        described = read_json_object(folder / "places.json", remedy="")
        if sample_of(file).hexdigest() != described["sample"]:
            return None
        places = np.load(file, mmap_mode="r").view(np.ndarray)
        if places.dtype != np.int64 or places.shape != (2, described["places"]):
            return None
        dtype, counts = np.dtype(described["dtype"]), (described["sequences"], described["documents"])
        found = Places(prefix, dtype, *counts, places[0], places[1])
        return found if found.num_tokens == described["tokens"] else None
    except (UserError, OSError, ValueError, EOFError, KeyError, TypeError):
        return None


def places_key(prefix: str, settings: OrderSettings) -> str:
    """Name of the folder for one dataset, as it now is, and one way of ordering it."""
    found: dict[str, Any] = {}
    for kind in ("idx", "bin"):
        path = f"{prefix}.{kind}"
        try:
            stat = os.stat(path)
            found[kind] = stat.st_size, stat.st_mtime_ns, sample_of(path, _ends_of_arrays(path, kind)).hexdigest()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                raise UserError(f"{path} cannot be read: {error.strerror}.") from error
            read_index(prefix)  # says what to do about a missing file
            raise  # unless it has just appeared
    return key_of({"format": FORMAT, "prefix": prefix, "settings": dataclasses.asdict(settings), "files": found})


def key_of(described: Any) -> str:
    """The name of a folder of the cache, from all that its content follows from, JSON-able."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _ends_of_arrays(path: str, kind: str) -> list[int]:
    """Bytes of an index around which its arrays end; the outermost ones belong to every sample."""
    if kind != "idx":
        return []
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return []
    S = HEADER.unpack(header)[3]
    return [min(HEADER.size + bytes_each * S, 2**62) for bytes_each in (4, 12)]


def sample_of(path: str | os.PathLike[str], extra: Sequence[int] = (), *, blocks: int = 32, block: int = 4096) -> Any:
    """A hash of a file's size and of blocks of it: both ends, places spread evenly between, and around `extra`."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        firsts = {round(i * max(size - block, 0) / (blocks - 1)) for i in range(blocks)}
        firsts |= {max(at - block // 2, 0) for at in extra}
        hashed = hashlib.sha256(str(size).encode())
        for first in sorted(firsts):
            hashed.update(os.pread(file.fileno(), block, first))
    return hashed


def _remove_remains(folder: Path, alone: bool) -> None:
    """Remove what is damaged and, where no other process of this node builds, what its killed runs have left."""
    if folder.exists():
        log.warning("what is cached in %s is damaged; building it anew", folder)
        shutil.rmtree(folder)
    if alone:
        for left in folder.parent.glob(f"{folder.name}.tmp-{socket.gethostname()}-*"):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Wait until no other process of this node builds `folder`; False where the file system cannot tell."""
    path = folder.with_name(f"{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that builds %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            alone = False
        try:
            yield alone
        finally:
            path.unlink(missing_ok=True)  # who waits holds the file open, who comes later finds the folder
