"""Records of the files that a model is tuned on, in pieces that a worker can take, each with its place for messages.

A record is a JSON object, or a row of a table with all of its columns, nested ones too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from megayoco.data.chunks import COPY_AGAIN, place_of, read_inputs
from megayoco.data.encode import parse_line
from megayoco.data.inputs import STDIN, Source, find_inputs
from megayoco.data.packed import Damaged, unpacked
from megayoco.errors import UserError

PIECE_BYTES = 1 << 20
_PIECE_RECORDS = 1000


@dataclass(frozen=True)
class Piece:
    """Records of one file that follow one another: bytes of whole lines, or what they were parsed to.

    Attributes:
        path, unit: the file, and what its records are called.
        first: number of the first one in the file, from 1.
    """

    path: str
    unit: str
    first: int
    content: bytes | list[Any]

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Place and content of every record; blank lines are left out.

        Raises:
            UserError: a record is no JSON object.
        """
        for number, item in enumerate(self._items(), self.first):
            place = place_of(self.path, self.unit, number)
            if isinstance(item, bytes):
                if not item or item.isspace():
                    continue
                item = parse_line(item, place)
            if not isinstance(item, dict):
                raise UserError(f"{place}: expected an object with fields, got {type(item).__name__}. Repair it.")
            yield place, item

    def _items(self) -> list[Any]:
        if not isinstance(self.content, bytes):
            return self.content
        content = self.content.removeprefix(b"\xef\xbb\xbf") if self.first == 1 else self.content
        return content.split(b"\n")  # nothing, which counts as a blank line, behind the last line's end


def find_files(patterns: Sequence[str]) -> list[Source]:
    """The files behind paths, folders and patterns of the config. Raises UserError that begins with what was given."""
    if STDIN in patterns:
        raise UserError("data.tuning cannot read from standard input: name a file.")
    try:
        sources = find_inputs(patterns).sources
    except UserError as error:
        text = str(error).removeprefix("--input ")
        raise UserError(f"data.tuning: {text}{'' if text.endswith('.') else '. Correct files'}.") from error
    for source in sources:
        if source.format == "text":
            raise UserError(f"data.tuning: {source.path} is plain text, not records. Give JSON lines, or a table.")
    return sources


def read_pieces(sources: Sequence[Source]) -> Iterator[Piece]:
    """All records of the files, in order.

    Raises:
        UserError: a file that cannot be read, or is damaged.
    """
    for source in sources:
        try:
            if source.format != "jsonl":
                from megayoco.data.tables import read_whole_rows  # pyarrow takes long to import

                first = 1
                for rows in read_whole_rows(source.path, source.format, PIECE_BYTES):
                    yield Piece(source.path, "row", first, rows)
                    first += len(rows)
            elif _is_list(source):
                entries = _read_list(source)
                for at in range(0, len(entries), _PIECE_RECORDS):
                    yield Piece(source.path, "entry", at + 1, entries[at : at + _PIECE_RECORDS])
            else:
                yield from _lines(source)
        except OSError as error:
            raise UserError(f"cannot read {source.path}: {error.strerror}") from error


def _lines(source: Source) -> Iterator[Piece]:
    for chunk in read_inputs([source], {}, chunk_bytes=PIECE_BYTES):
        content = chunk.take()
        if not isinstance(content, bytes):
            assert chunk.problem is not None
            raise UserError(f"{chunk.place}: {chunk.problem.text}. {chunk.problem.remedy}.")
        yield Piece(source.path, "line", chunk.first, content)


def _is_list(source: Source) -> bool:
    with open(source.path, "rb") as file:
        try:
            begin = next(unpacked(file, block_bytes=4096, name=source.path), b"")
        except Damaged:
            return False  # the reader of lines says it
    return begin.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _read_list(source: Source) -> list[Any]:
    with open(source.path, "rb") as file:
        try:
            content = b"".join(unpacked(file, name=source.path))
        except Damaged as damage:
            raise UserError(f"{source.path}: {damage}. {COPY_AGAIN}.") from damage
    try:
        entries = orjson.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        raise UserError(f"{source.path}, line {error.lineno}: not JSON ({error.msg}). Repair it.") from error
    assert isinstance(entries, list)
    return entries
