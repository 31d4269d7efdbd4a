"""Rows of Parquet and Arrow files in pieces, by pyarrow: only the wanted columns, only as much as fits a piece."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from megayoco.data.chunks import COPY_AGAIN, Chunk, Position, Reason
from megayoco.data.inputs import Source
from megayoco.errors import UserError

_MAX_ROWS = 10_000


def read_rows(
    source: Source, start: Position, fields: Mapping[str, Sequence[str]], chunk_bytes: int
) -> Iterator[Chunk]:
    """The rows of a file from `start.record` on. See `chunks.read_inputs`.

    Raises:
        OSError: the file cannot be read.
    """
    number, _, done = start
    end = Position(number + 1)
    try:
        with closing(_Parquet(source.path) if source.format == "parquet" else _Arrow(source.path)) as table:
            if problem := _unusable(table.schema, fields):
                if count := table.count() - done:
                    yield Chunk(source.path, "row", done + 1, count, None, 0, end, 1.0, problem)
                return
            columns = [name for names in fields.values() for name in names if name in table.schema.names]
            for batch in table.batches(columns, done, chunk_bytes):
                for piece in _pieces(_decoded(batch), chunk_bytes):
                    content = {name: _values(piece.column(name)) for name in columns}
                    after = Position(number, 0, done + piece.num_rows)
                    share = table.share(after.record)
                    yield Chunk(source.path, "row", done + 1, piece.num_rows, content, piece.nbytes, after, share)
                    done = after.record
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        detail = str(error).strip().split("\n")[0]
        reason = f"the {source.format} data are damaged or no {source.format} at all ({detail})"
        yield Chunk(
            source.path, "row", done + 1, 1, None, 0, end, 1.0, Reason(f"{reason} after row {done}", COPY_AGAIN)
        )


class _Parquet:
    def __init__(self, path: str):
        # buffer_size: column chunks are read as a stream; without it a row group is in memory as a whole
        self._raw = open(path, "rb")  # noqa: SIM115 (closed by close)
        try:
            self._file = pq.ParquetFile(self._raw, buffer_size=1 << 20, pre_buffer=False)
        except BaseException:
            self._raw.close()
            raise
        self.schema = self._file.schema_arrow

    def batches(self, columns: list[str], skip: int, chunk_bytes: int) -> Iterator[pa.RecordBatch]:
        metadata = self._file.metadata
        for group in range(metadata.num_row_groups):
            description = metadata.row_group(group)
            if skip >= description.num_rows:
                skip -= description.num_rows
                continue
            size = sum(
                description.column(i).total_uncompressed_size
                for i in range(description.num_columns)
                if description.column(i).path_in_schema.split(".")[0] in columns
            )
            rows = max(1, min(_MAX_ROWS, chunk_bytes * description.num_rows // max(size, 1)))
            for batch in self._file.iter_batches(rows, [group], columns, use_threads=False):
                if skip < batch.num_rows:
                    yield batch.slice(skip)
                skip = max(skip - batch.num_rows, 0)

    def count(self) -> int:
        return self._file.metadata.num_rows

    def share(self, done: int) -> float:
        return done / max(self.count(), 1)

    def close(self) -> None:
        self._file.close(force=True)
        self._raw.close()


class _Arrow:
    """A file of record batches, or a stream of them, which is what Hugging Face datasets save."""

    def __init__(self, path: str):
        with open(path, "rb") as file:  # a system error with its number, which pyarrow's lack
            self._is_file = file.read(6) == b"ARROW1"
        # not memory-mapped: pages of a map count as memory in use
        self._raw = pa.OSFile(path)
        try:
            self._size = self._raw.size()
            self.schema = self._open([]).schema
        except BaseException:
            self._raw.close()
            raise

    def _open(self, fields: list[int]) -> Any:
        self._raw.seek(0)
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        open_it = pa.ipc.open_file if self._is_file else pa.ipc.open_stream
        return open_it(self._raw, options=options)

    def _iterate(self, reader: Any) -> Iterator[pa.RecordBatch]:
        return (reader.get_batch(i) for i in range(reader.num_record_batches)) if self._is_file else iter(reader)

    def batches(self, columns: list[str], skip: int, chunk_bytes: int) -> Iterator[pa.RecordBatch]:
        fields = [self.schema.get_field_index(name) for name in columns]
        for batch in self._iterate(self._open(fields)):
            if skip < batch.num_rows:
                yield batch.slice(skip)
            skip = max(skip - batch.num_rows, 0)

    def count(self) -> int:
        return sum(batch.num_rows for batch in self._iterate(self._open([0])))

    def share(self, done: int) -> float:
        return self._raw.tell() / max(self._size, 1)

    def close(self) -> None:
        self._raw.close()


def _unusable(schema: pa.Schema, fields: Mapping[str, Sequence[str]]) -> Reason | None:
    """What is wrong with the wanted columns as a whole."""
    for names in fields.values():
        present = [name for name in names if name in schema.names]
        if not present:
            known = ", ".join(map(repr, schema.names)) or "none"
            return Reason(f"no column {names[0]!r}, only {known}", "Name the right one by --json-keys")
        for name in present:
            kind = schema.field(name).type
            value = kind.value_type if pa.types.is_dictionary(kind) else kind
            text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
            if not any(check(value) for check in text):
                return Reason(f"the column {name!r} is {kind}, not text", "Name another by --json-keys")
    return None


def _decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same with dictionaries written out, whose size a slice would not tell."""
    columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _pieces(batch: pa.RecordBatch, chunk_bytes: int) -> Iterator[pa.RecordBatch]:
    """A batch in pieces of about chunk_bytes, in case its rows are longer than the average of the row group."""
    if batch.num_rows <= 1 or batch.nbytes <= 2 * chunk_bytes:
        if batch.num_rows:
            yield batch
        return
    half = batch.num_rows // 2
    yield from _pieces(batch.slice(0, half), chunk_bytes)
    yield from _pieces(batch.slice(half), chunk_bytes)


def _values(column: pa.Array) -> list[Any]:
    """str or None for each row; bytes where they are not UTF-8, which the worker reports with its row."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pa.large_binary()).to_pylist()


def read_whole_rows(path: str, kind: str, chunk_bytes: int) -> Iterator[list[dict[str, Any]]]:
    """All rows of a file with all of their columns, nested ones too, in pieces.

    Args:
        kind: parquet or arrow.

    Raises:
        UserError: the file is damaged or of another format.
        OSError: it cannot be read.
    """
    done = 0
    try:
        with closing(_Parquet(path) if kind == "parquet" else _Arrow(path)) as table:
            for batch in table.batches(table.schema.names, 0, chunk_bytes):
                for piece in _pieces(_decoded(batch), chunk_bytes):
                    yield piece.to_pylist()
                    done += piece.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        detail = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: the {kind} data are damaged after row {done} ({detail}). {COPY_AGAIN}.") from error
