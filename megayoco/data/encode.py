"""Pieces of input to tokens: parse, find the text under each key, encode a whole piece in one call of the tokenizer.

What is wrong with a record is a `Problem`: it ends the run with its place, or the record is left out and listed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from megayoco.data.chunks import Chunk, Reason, place_of, read_inputs, too_long
from megayoco.data.indexed import MAX_SEQUENCE, token_dtype
from megayoco.data.inputs import Source
from megayoco.data.tokenizer import Tokenizer, build_tokenizer
from megayoco.errors import UserError

JOINED_LINES = "raw_content_lines"
"""The one key whose value may be a list of lines, as the layout of YOCO has it."""
_JOINED_CHARACTERS = 1 << 22
_FROM_ARRAY = "If the file is one JSON array, make lines of it by `jq -c '.[]'`; else repair or remove it"


@dataclass(frozen=True)
class Task:
    """What happens to every record.

    Attributes:
        tokenizer_type, tokenizer_model, tokenizer_options: what `build_tokenizer` takes.
        fields: key of the output -> keys of a record that may hold its text; the first that is there counts.
        append_eod: end every document with the end-of-document token.
        allow_special: strings of special tokens become these tokens.
        skip: leave out records that cannot be used, and list them; else the first one ends the run.
        max_document_bytes: of one line, row or text file.
    """

    tokenizer_type: str
    tokenizer_model: str | None = None
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"text": ("text",)})
    append_eod: bool = False
    allow_special: bool = False
    skip: bool = False
    max_document_bytes: int = 1 << 27

    def build_tokenizer(self) -> Tokenizer:
        return build_tokenizer(self.tokenizer_type, self.tokenizer_model, self.tokenizer_options)


@dataclass(frozen=True)
class Problem:
    """Records that cannot be used: the first one's file and number, how many they are, and why."""

    path: str
    unit: str
    number: int
    reason: Reason
    records: int = 1

    @property
    def place(self) -> str:
        return place_of(self.path, self.unit, self.number, self.number + self.records - 1)

    def as_json(self) -> str:
        """One line for the report of skipped records."""
        entry: dict[str, Any] = {"file": self.path}
        if self.unit != "file":
            entry[self.unit] = self.number
        if self.records != 1:
            entry["records"] = self.records
        return json.dumps({**entry, "reason": self.reason.text}, ensure_ascii=False) + "\n"

    def error(self, *, skippable: bool = True) -> UserError:
        skip = ", or give --on-error skip to leave out all such records" if skippable else ""
        return UserError(f"{self.place}: {self.reason.text}. {self.reason.remedy}{skip}.")


@dataclass
class Encoded:
    """One key's documents of a chunk: tokens (n,) in the dtype of the pair, lengths (documents,) without the empty."""

    tokens: np.ndarray
    lengths: np.ndarray
    empty: int
    text_bytes: int


@dataclass
class Result:
    """What became of a chunk: records that were used, documents per key, and what could not be used."""

    records: int
    keys: dict[str, Encoded]
    problems: list[Problem]


@dataclass
class Counts:
    """What became of one key so far."""

    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0


@dataclass
class Totals:
    """What became of the whole input so far; `read` bytes of `size` on disk, `records` used and `skipped`."""

    size: int
    read: int = 0
    records: int = 0
    skipped: int = 0
    keys: dict[str, Counts] = field(default_factory=dict)

    @property
    def text_bytes(self) -> int:
        return sum(count.text_bytes for count in self.keys.values())

    @property
    def tokens(self) -> int:
        return sum(count.tokens for count in self.keys.values())


def encode_chunk(chunk: Chunk, task: Task, tokenizer: Tokenizer) -> Result:
    """Encode the records of a chunk, whose content is taken out; blank lines count for nothing.

    Raises:
        UserError: the first record that cannot be used, with its place, unless `task.skip`.
    """
    places: list[tuple[str, int]] = []
    texts: dict[str, list[str]] = {key: [] for key in task.fields}
    problems: list[Problem] = []
    for path, number, values in read_records(chunk, task.fields, task.max_document_bytes):
        if isinstance(values, Problem):
            if not task.skip:
                raise values.error()
            problems.append(values)
            continue
        places.append((path, number))
        for key, text in zip(texts, values, strict=True):
            texts[key].append(text)
    keys: dict[str, Encoded] = {}
    while len(keys) < len(texts):
        keys.clear()
        for key, documents in texts.items():
            try:
                keys[key] = _encode(documents, task, tokenizer)
            except UserError:  # which of them?
                refused = _refused(documents, task, tokenizer)
                found = [Problem(places[i][0], chunk.unit, places[i][1], refused[i]) for i in sorted(refused)]
                if not found:
                    raise
                if not task.skip:
                    raise found[0].error() from None
                problems += found
                for name in texts:
                    texts[name] = [text for i, text in enumerate(texts[name]) if i not in refused]
                places = [place for i, place in enumerate(places) if i not in refused]
                break
    return Result(len(places), keys, sorted(problems, key=lambda problem: problem.number))


def read_records(
    chunk: Chunk, fields: Mapping[str, Sequence[str]], limit: int
) -> Iterator[tuple[str, int, list[str] | Problem]]:
    """File, number and, in the order of `fields`, texts of every record of a chunk; blank lines are left out.

    Takes the content out of the chunk.
    """
    path, unit, content = chunk.path, chunk.unit, chunk.take()
    if content is None:
        reason = chunk.problem or Reason("nothing could be read")
        yield path, chunk.first, Problem(path, unit, chunk.first, reason, chunk.records)
    elif isinstance(content, bytes):
        if chunk.first == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")
        whole = content.endswith(b"\n")
        lines = content.split(b"\n")
        del content
        for i in range(len(lines)):
            line, lines[i] = lines[i], b""  # freed as soon as it is parsed
            if not line or line.isspace():
                continue
            number = chunk.first + i
            record: Any = too_long("line", limit) if len(line) > limit else _parse(line)
            if isinstance(record, Reason) and not whole and i == len(lines) - 1:
                record = Reason(f"{record.text}; the line has no end, so the file may be cut short", record.remedy)
            del line
            values = record if isinstance(record, Reason) else _texts(record, fields, limit)
            yield path, number, Problem(path, unit, number, values) if isinstance(values, Reason) else values
    elif isinstance(content, dict):
        names = list(content)
        for number, row in enumerate(zip(*content.values(), strict=True), chunk.first):
            values = _texts(dict(zip(names, row, strict=True)), fields, limit)
            yield path, number, Problem(path, unit, number, values) if isinstance(values, Reason) else values
    else:
        for file, data in content:
            text = _utf8(data.removeprefix(b"\xef\xbb\xbf"))
            if text is None:
                yield file, 1, Problem(file, unit, 1, _not_utf8(data))
            else:
                yield file, 1, [text] * len(fields)


def read_documents(
    sources: Sequence[Source], keys: Sequence[str] = ("text",), max_document_bytes: int = 1 << 27
) -> Iterator[tuple[str, str]]:
    """Place and text of every record and key, for tools that look at text without writing a dataset.

    Raises:
        UserError: the first record without text under one of `keys`, or that cannot be read, with its place.
    """
    fields = {key: (key,) for key in keys}
    for chunk in read_inputs(sources, fields, limit=max_document_bytes):
        for path, number, values in read_records(chunk, fields, max_document_bytes):
            if isinstance(values, Problem):
                raise values.error(skippable=False)
            place = place_of(path, chunk.unit, number)
            for text in values[:1] if chunk.unit == "file" else values:
                yield place, text


def _encode(documents: Sequence[str], task: Task, tokenizer: Tokenizer) -> Encoded:
    dtype = token_dtype(tokenizer.vocab_size)
    text_bytes = sum(map(_utf8_length, documents))
    parts = [
        tokenizer.encode_documents(group, append_eod=task.append_eod, allow_special=task.allow_special)
        for group in _groups(documents)
    ]
    tokens, lengths = parts[0] if len(parts) == 1 else (np.concatenate(part) for part in zip(*parts, strict=True))
    del parts
    if len(tokens) and int(tokens.max()) >= tokenizer.vocab_size:
        raise RuntimeError(f"{tokenizer.type} gave id {int(tokens.max())}, its vocabulary is {tokenizer.vocab_size}")
    if len(lengths) and int(lengths.max()) > MAX_SEQUENCE:
        raise UserError(f"{int(lengths.max())} tokens are more than the format can count")
    written = lengths[lengths > 0]
    return Encoded(tokens.astype(dtype, copy=False), written.astype(np.int32), len(lengths) - len(written), text_bytes)


def _groups(documents: Sequence[str]) -> Iterator[Sequence[str]]:
    """The documents, those together that the tokenizer should join: a very long one is not to be copied."""
    start = size = 0
    for number, document in enumerate(documents):
        size += len(document)
        if size > _JOINED_CHARACTERS and number > start:
            yield documents[start:number]
            start, size = number, len(document)
    yield documents[start:] if start else documents


def _refused(documents: Sequence[str], task: Task, tokenizer: Tokenizer) -> dict[int, Reason]:
    """The documents that cannot be encoded, and why."""
    refused = {}
    for i, document in enumerate(documents):
        try:
            _encode([document], task, tokenizer)
        except UserError as error:
            refused[i] = Reason(str(error).rstrip("."))
    return refused


def parse_line(line: bytes, place: str) -> Any:
    """The JSON object of a line. Raises UserError that begins with `place`."""
    record = _parse(line)
    if isinstance(record, Reason):
        raise UserError(f"{place}: {record.text}. {record.remedy}.")
    return record


def _parse(line: bytes) -> Any:
    """A JSON object, or what is wrong."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:  # stricter than JSON as Python writes it: NaN, lone surrogates
        text = _utf8(line)
        if text is None:
            return _not_utf8(line)
        try:
            record = json.loads(text)
        except ValueError as error:
            array = text.lstrip()[:1] == "["
            return Reason(f"not JSON ({error})", _FROM_ARRAY) if array else Reason(f"not JSON ({error})")
        except RecursionError:
            return Reason("JSON nested too deeply")
    if not isinstance(record, dict):
        reason = f"expected a JSON object, got {type(record).__name__}: {line[:40]!r}"
        return Reason(reason, _FROM_ARRAY) if isinstance(record, list) else Reason(reason)
    return record


def _texts(record: Mapping[str, Any], fields: Mapping[str, Sequence[str]], limit: int) -> list[str] | Reason:
    """The text of each field, or what is wrong."""
    values = []
    for names in fields.values():
        value = None
        for name in names:
            value = record.get(name)
            if value is not None:
                break
        if isinstance(value, list) and name == JOINED_LINES and all(isinstance(part, str) for part in value):
            value = "\n".join(value)
        if isinstance(value, bytes):
            if (text := _utf8(value)) is None:
                return _not_utf8(value)
            value = text
        if not isinstance(value, str):
            return _wrong_value(record, names, name, value)
        if len(value) > limit:
            return too_long("text", limit)
        values.append(value)
    return values


def _wrong_value(record: Mapping[str, Any], names: Sequence[str], name: str, value: Any) -> Reason:
    if value is None:
        null = [name for name in names if name in record]
        if null:
            return Reason(f"the value of {null[0]!r} is null, not text")
        known = ", ".join(map(repr, record)) or "none"
        return Reason(f"no key {' or '.join(map(repr, names))}, only {known}", "Name the right one by --json-keys")
    return Reason(f"the value of {name!r} is {type(value).__name__}, not text")


def _utf8(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _not_utf8(data: bytes) -> Reason:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        remedy = "It looks like UTF-16: convert it by iconv" if utf16 else "Repair or remove it"
        return Reason(f"byte {error.start} is not UTF-8", remedy)
    return Reason("not UTF-8")


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
