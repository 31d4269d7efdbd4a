"""One indexed pair read in blocks, so that memory stays small whatever its size, and every damage in it found.

Shapes: S sequences, D = documents + 1, as in `indexed.py`, whose `read_index` holds the whole index in memory and
stops at the first contradiction. The tools that look at a pair as a whole, or copy it, work from here.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megayoco.data.blend import strip_suffix
from megayoco.data.indexed import DTYPES, HEADER, MAGIC, read_index
from megayoco.errors import UserError

BLOCK = 1 << 20
"""Numbers of an index, or tokens, that are in memory at one time."""


@dataclass(frozen=True)
class Pair:
    """The sizes of a pair and access to its parts; holds no file open.

    Attributes:
        prefix: path without .bin and .idx.
        dtype: of the tokens, an integer type.
        num_sequences: S.
        num_documents: D - 1.
        has_modes: the index ends with one byte per sequence, as multimodal datasets do.
        bin_bytes: size of PREFIX.bin on disk, whatever the index describes.
    """

    prefix: str
    dtype: np.dtype
    num_sequences: int
    num_documents: int
    has_modes: bool
    bin_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens that PREFIX.bin has room for: those that the index describes, if the pair is whole."""
        return self.bin_bytes // self.dtype.itemsize

    @cached_property
    def _places(self) -> dict[str, tuple[int, np.dtype, int]]:
        """First byte, type and count of each array of the index."""
        S, D = self.num_sequences, self.num_documents + 1
        return {
            "lengths": (HEADER.size, np.dtype("<i4"), S),
            "offsets": (HEADER.size + 4 * S, np.dtype("<i8"), S),
            "documents": (HEADER.size + 12 * S, np.dtype("<i8"), D),
            "modes": (HEADER.size + 12 * S + 8 * D, np.dtype("i1"), S if self.has_modes else 0),
        }

    def blocks(self, name: str, block: int = BLOCK) -> Iterator[np.ndarray]:
        """One array of the index, in order, in parts of at most `block` numbers.

        Args:
            name: lengths (S,) int32 tokens; offsets (S,) int64 bytes; documents (D,) int64, the first sequence of
                each document and S; modes (S,) int8, or nothing.
        """
        start, dtype, count = self._places[name]
        for done in range(0, count, block):
            yield _read(f"{self.prefix}.idx", start + done * dtype.itemsize, dtype, min(block, count - done))

    def number(self, name: str, position: int) -> int:
        """One entry of an array of the index; names as in `blocks`."""
        start, dtype, count = self._places[name]
        if not 0 <= position < count:
            raise IndexError(f"{name} of {self.prefix} has {count} entries, not {position}")
        return int(_read(f"{self.prefix}.idx", start + position * dtype.itemsize, dtype, 1)[0])

    def tokens(self, first: int, count: int) -> np.ndarray:
        """Tokens `first` to `first + count` (count,) of PREFIX.bin, in `dtype`.

        Raises:
            UserError: the file ends before.
        """
        return _read(f"{self.prefix}.bin", first * self.dtype.itemsize, self.dtype, count)


def _read(path: str, offset: int, dtype: np.dtype, count: int) -> np.ndarray:
    """`count` numbers from byte `offset` on; never a view of the file."""
    try:
        numbers = np.fromfile(path, dtype, count, offset=offset)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(numbers) != count:
        raise UserError(f"{path} ends before byte {offset + count * dtype.itemsize:,}. Is it still being copied?")
    return numbers


def open_pair(prefix: str) -> Pair:
    """The sizes of a pair, from the index's header and the sizes of both files; `find_damage` looks at the rest.

    Raises:
        UserError: a file is missing, or the index is of another format, holds no token ids or is of a wrong size.
    """
    try:
        bin_bytes = os.path.getsize(f"{prefix}.bin")
        idx_bytes = os.path.getsize(f"{prefix}.idx")
        with open(f"{prefix}.idx", "rb") as file:
            header = file.read(HEADER.size)
        magic, version, code, S, D = HEADER.unpack(header)
        dtype = np.dtype(DTYPES[code])
        described = HEADER.size + 12 * S + 8 * D
        usable = magic == MAGIC and version == 1 and dtype.kind != "f" and idx_bytes in (described, described + S)
    except (OSError, struct.error, KeyError):
        usable = False
    if not usable or D == 0:
        read_index(prefix)  # says what is wrong, and how to repair it
        raise UserError(f"cannot read {prefix}.idx. Copy both files again, or rebuild them.")
    return Pair(prefix, dtype, S, D - 1, S > 0 and idx_bytes == described + S, bin_bytes)


def find_damage(pair: Pair) -> list[str]:
    """What is wrong with the index of a pair and the size of its data, one line each; nothing for a whole pair.

    Of damage of one kind only the first place is named. Nothing after a negative length is looked at.
    """
    index = f"{pair.prefix}.idx"
    damage: list[str] = []
    end = done = 0  # in bytes and in sequences
    for lengths, offsets in zip(pair.blocks("lengths"), pair.blocks("offsets"), strict=True):
        if lengths.min() < 0:
            at = int(np.argmax(lengths < 0))
            return [*damage, f"{index}: sequence {done + at:,} has the length {lengths[at]:,}"]
        ends = end + np.cumsum(lengths, dtype=np.int64) * pair.dtype.itemsize
        expected = np.concatenate(([end], ends[:-1]))
        wrong = np.flatnonzero(offsets != expected)
        if len(wrong) and not damage:
            at = int(wrong[0])
            damage.append(
                f"{index}: sequence {done + at:,} begins at byte {offsets[at]:,}, where the lengths before it add up to"
                f" {expected[at]:,}"
            )
        end, done = int(ends[-1]), done + len(lengths)
    damage += _document_damage(pair)
    if pair.bin_bytes != end:
        state = "it was cut short" if pair.bin_bytes < end else "it is not the data of this index"
        damage.append(f"{pair.prefix}.bin holds {pair.bin_bytes:,} bytes, its index describes {end:,}: {state}")
    return damage


def _document_damage(pair: Pair) -> list[str]:
    previous, done = 0, 0
    for entries in pair.blocks("documents"):
        if done == 0 and entries[0] != 0:
            return [f"{pair.prefix}.idx: the first document begins at sequence {entries[0]:,}, not at 0"]
        falls = np.flatnonzero(np.diff(entries, prepend=previous) < 0)
        if len(falls):
            at = int(falls[0])
            before = entries[at - 1] if at else previous
            place = f"{pair.prefix}.idx: document {done + at:,}"
            return [f"{place} begins at sequence {entries[at]:,}, the one before it at {before:,}"]
        previous, done = int(entries[-1]), done + len(entries)
    if previous != pair.num_sequences:
        return [f"{pair.prefix}.idx: the documents end at sequence {previous:,} of {pair.num_sequences:,}"]
    return []


def find_pairs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The prefixes behind prefixes and folders, in the order given; those of a folder in the order of their file names.

    Args:
        words: prefixes, with or without .bin or .idx, and folders, of which every pair is taken.

    Returns:
        The prefixes, and the files and folders that an unfinished run has left in the folders named. A file whose
        partner is missing counts as a pair: opening it says so.

    Raises:
        UserError: a folder without a pair, or a pair named twice.
    """
    prefixes: list[str] = []
    leftovers: list[str] = []
    for word in words:
        if not os.path.isdir(word) or os.path.isfile(f"{word}.idx"):  # a prefix may also be a folder, of caches
            prefixes.append(strip_suffix(word))
            continue
        names = sorted(os.listdir(word))
        found = dict.fromkeys(name[:-4] for name in names if name.endswith((".bin", ".idx")))
        if not found:
            raise UserError(f"{word} is a folder without any .bin and .idx. Give prefixes, or the folder of the pairs.")
        prefixes += [os.path.join(word, name) for name in found]
        leftovers += [os.path.join(word, name) for name in names if name.endswith(".partial") or ".tmp-" in name]
    seen: dict[Path, str] = {}
    for prefix in prefixes:
        place = Path(f"{prefix}.bin").resolve()
        if place in seen:
            raise UserError(f"{seen[place]} and {prefix} are the same dataset. Give it once.")
        seen[place] = prefix
    return prefixes, leftovers
