"""Input files read in pieces of about 1 MiB that workers can take: whole lines, whole rows, or whole files.

Every piece says where it is from and where reading goes on behind it, so that a run can be continued there. Data that
are damaged (a cut gzip file, a line beyond the limit) become a piece of their own that says what is wrong, in its place
among the others: everything before it is delivered first.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from megayoco.data.inputs import STDIN, Source
from megayoco.data.packed import BLOCK_BYTES, Damaged, unpacked
from megayoco.errors import UserError

CHUNK_BYTES = 1 << 20
COPY_AGAIN = "Copy the file again"


class Position(NamedTuple):
    """Where reading goes on: file number, byte offset in it (unpacked) and records (lines, rows) before that."""

    source: int = 0
    offset: int = 0
    record: int = 0


class Reason(NamedTuple):
    """Why a record cannot be used, and what the user can do, both without a full stop."""

    text: str
    remedy: str = "Repair or remove it"


@dataclass
class Chunk:
    """Records of one file, or several whole text files.

    Attributes:
        path: the file; of the first one, if there are several.
        unit: line, row or file.
        first: number of the first record in its file, from 1.
        records: how many there are.
        content: lines as bytes, rows as a list of values per column, files as pairs of path and bytes; None if
            `problem` says what is wrong with these records.
        size: bytes of the content.
        after: where reading goes on.
        read: share of the bytes of `path` on disk that were read by then, 0 to 1.
    """

    path: str
    unit: str
    first: int
    records: int
    content: bytes | dict[str, list[Any]] | list[tuple[str, bytes]] | None
    size: int
    after: Position
    read: float
    problem: Reason | None = None

    def take(self) -> bytes | dict[str, list[Any]] | list[tuple[str, bytes]] | None:
        """The content, which the chunk then holds no longer: one record may be most of the memory there is."""
        content, self.content = self.content, None
        return content

    @property
    def place(self) -> str:
        """Where these records stand, for a message."""
        if self.unit == "file" and self.records > 1:
            return f"{self.path} and the {self.records - 1} files behind it"
        return place_of(self.path, self.unit, self.first, self.first + self.records - 1)


def place_of(path: str, unit: str, first: int, last: int | None = None) -> str:
    """A file and a record or a range of records in it, as messages name it."""
    name = "stdin" if path == STDIN else path
    if unit == "file":
        return name
    return f"{name}, {unit} {first}" if last in (None, first) else f"{name}, {unit}s {first} to {last}"


def read_inputs(
    sources: Sequence[Source],
    fields: Mapping[str, Sequence[str]],
    start: Position = Position(),  # noqa: B008 (immutable)
    *,
    chunk_bytes: int = CHUNK_BYTES,
    limit: int = 1 << 27,
) -> Iterator[Chunk]:
    """All records of the files in order, from `start` on.

    Args:
        fields: key -> the columns of a table that may hold its text, the first that is there counts; files of other
            formats are delivered whole.
        chunk_bytes: about as much per piece, more if one record is longer.
        limit: bytes of the longest record that is kept in memory; a longer one is delivered as a problem.

    Raises:
        UserError: a file that cannot be read.
    """
    texts: list[tuple[str, bytes]] = []
    size = 0
    for number, source in enumerate(sources[start.source :], start.source):
        begin = start if number == start.source else Position(number)
        try:
            if source.format == "text":
                content = _read_text(source, limit)
                if isinstance(content, bytes):
                    texts.append((source.path, content))
                    size += len(content)
                following = sources[number + 1].format if number + 1 < len(sources) else ""
                full = size >= chunk_bytes or len(texts) >= 4096
                if texts and (full or following != "text" or not isinstance(content, bytes)):
                    last = number + isinstance(content, bytes)
                    yield Chunk(texts[0][0], "file", 1, len(texts), texts, size, Position(last), 1.0)
                    texts, size = [], 0
                if not isinstance(content, bytes):
                    yield Chunk(source.path, "file", 1, 1, None, 0, Position(number + 1), 1.0, content)
            elif source.format == "jsonl":
                yield from _read_lines(source, begin, chunk_bytes, limit)
            else:
                from megayoco.data.tables import read_rows  # pyarrow takes long to import

                yield from read_rows(source, begin, fields, chunk_bytes)
        except OSError as error:
            raise UserError(f"cannot read {source.path}: {error.strerror}") from error


def _read_text(source: Source, limit: int) -> bytes | Reason:
    """A whole file, or what is wrong with it."""
    parts, size = [], 0
    with ExitStack() as stack:
        try:
            for block in unpacked(_open(source, stack), name=source.path):
                parts.append(block)
                size += len(block)
                if size > limit:
                    return too_long("file", limit)
        except Damaged as damage:
            return Reason(str(damage), COPY_AGAIN)
    return b"".join(parts)


def _read_lines(source: Source, start: Position, chunk_bytes: int, limit: int) -> Iterator[Chunk]:
    number, offset, record = start
    with ExitStack() as stack:
        raw = _open(source, stack)

        def chunk(lines: int, size: int, content: bytes | None, problem: Reason | None = None) -> Chunk:
            nonlocal offset, record
            first, offset, record = record + 1, offset + size, record + lines
            share = raw.tell() / source.size if source.size else 1.0
            after = Position(number, offset, record)
            return Chunk(source.path, "line", first, lines, content, len(content or b""), after, share, problem)

        blocks = unpacked(raw, offset, min(BLOCK_BYTES, chunk_bytes), source.path)
        try:
            for size, content in cut_lines(blocks, chunk_bytes, limit):
                if content is None:
                    piece = chunk(1, size, None, too_long("line", limit))
                else:
                    piece = chunk(content.count(b"\n") + (content[-1:] != b"\n"), size, content)
                del content  # only the chunk holds it, until its taker frees it
                yield piece
        except Damaged as damage:
            place = Position(number + 1)
            reason = Reason(f"{damage} after line {record}", COPY_AGAIN)
            yield Chunk(source.path, "line", record + 1, 1, None, 0, place, 1.0, reason)


def cut_lines(blocks: Iterator[bytes], chunk_bytes: int, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Blocks of any size joined to pieces of whole lines: (bytes, content), content None for a line above the limit.

    If `blocks` raises Damaged, the whole lines before are delivered first.
    """
    # one array that grows: a list of blocks would leave the heap in holes that no other use fits
    waiting = bytearray()
    whole = dropped = 0  # bytes of `waiting` that are whole lines; bytes of a too long line that are gone
    damage: Damaged | None = None
    while damage is None:
        try:
            block = next(blocks, None)
        except Damaged as error:
            damage = error
            break
        if block is None:
            break
        if dropped:
            end = block.find(b"\n") + 1
            if not end:
                dropped += len(block)
                continue
            yield dropped + end, None
            dropped, block = 0, block[end:]
        end = block.rfind(b"\n") + 1
        if end:
            whole = len(waiting) + end
        waiting += block
        line = len(waiting) - whole  # the beginning of the line behind them
        if whole and (max(whole, line) >= chunk_bytes or line > limit):
            yield whole, _taken(waiting, whole)
            whole = 0
        if line > limit:
            waiting.clear()
            dropped = line
    if whole:
        yield whole, _taken(waiting, whole)
    if damage is not None:
        raise damage
    if dropped:
        yield dropped, None
    elif waiting:
        yield len(waiting), _taken(waiting, len(waiting))


def _taken(array: bytearray, size: int) -> bytes:
    """The first bytes of an array, which is then shorter by them."""
    with memoryview(array) as view:
        taken = bytes(view[:size])
    del array[:size]
    return taken


def too_long(unit: str, limit: int) -> Reason:
    return Reason(f"the {unit} is longer than {limit / 1e6:,.0f} MB", "Shorten it, or raise --max-document-mb")


def _open(source: Source, stack: ExitStack) -> BinaryIO:
    if source.path == STDIN:
        return sys.stdin.buffer
    return stack.enter_context(open(source.path, "rb", buffering=0))
