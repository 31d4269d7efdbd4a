"""Text to indexed pairs: PREFIX_KEY_document.bin, .idx and .meta.json, without torch.

    inputs.py   which files, and of which format          packed.py  gzip and zstd
    chunks.py   files in pieces of whole records           tables.py  Parquet and Arrow
    encode.py   a piece to tokens                          workers.py the processes that do so
    partial.py  the folder in which the output grows       prepare.py all of it together

PREFIX.meta.json is one JSON object: format 1; tokenizer (type, sha256, vocab_size, eod; model and options, paths
relative to the meta file); key; append_eod; allow_special; documents, without empty_documents; skipped records;
text_bytes (UTF-8) of the documents; sources, the files with their bytes, or folders with their number of files where
there are very many; and dtype, tokens, max_id, bin_bytes. Training checks the model against it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megayoco.data.chunks import CHUNK_BYTES, read_inputs
from megayoco.data.encode import Counts, Task, Totals
from megayoco.data.files import read_json_object
from megayoco.data.indexed_writer import pair_paths
from megayoco.data.inputs import STDIN, Source
from megayoco.data.partial import PartialRun, remove_leftovers
from megayoco.data.tokenizer import Tokenizer, describe_tokenizer
from megayoco.data.workers import Encoder
from megayoco.errors import UserError

_MAX_LISTED = 1000


class Interrupted(KeyboardInterrupt):
    """A run was ended by Ctrl-C or a signal; the text says what remains of it."""


def preprocess(
    sources: Sequence[Source],
    output_prefix: str,
    task: Task,
    *,
    workers: int = 1,
    overwrite: bool = False,
    resume: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    report: Callable[[Totals], None] = lambda totals: None,
) -> Totals:
    """Write OUTPUT_PREFIX_KEY_document.{bin,idx,meta.json} for every key of the task, all of them or none.

    The result depends on the input, the task and nothing else: not on workers, nor on where a run was interrupted.

    Args:
        sources: files of `find_inputs`.
        workers: processes that encode; with 1 everything happens in this one.
        overwrite: replace existing pairs, and an unfinished run of this prefix.
        resume: go on with an unfinished run of this prefix, if there is one; a finished one is left as it is.
        report: called at the start and after every chunk.

    Returns:
        The counts, those of the interrupted runs included.

    Raises:
        UserError: a record that cannot be used (unless `task.skip`), with file and line; no document at all; output
            that exists; a worker that died; a full disk.
        Interrupted: Ctrl-C, or another KeyboardInterrupt.
    """
    for key in task.fields:
        if not key or "/" in key or key.startswith("."):
            raise UserError(f"--json-keys: {key!r} cannot be part of a file name")
    piped = any(source.path == STDIN for source in sources)
    if piped and resume:
        raise UserError("--resume needs input that can be read again, not stdin (-). Write it to a file first.")
    tokenizer = task.build_tokenizer()
    keys = list(task.fields)
    if resume and not os.path.exists(f"{output_prefix}.partial/state.json"):
        finished = _finished(output_prefix, sources, task, tokenizer)
        if finished is not None:
            remove_leftovers(output_prefix)
            report(finished)
            return finished
    size = sum(source.size for source in sources)
    settings = _settings(sources, task, tokenizer)
    options: dict[str, Any] = dict(overwrite=overwrite, resume=resume, size=size, resumable=not piped)
    with (
        Encoder(task, tokenizer, workers) as encode,
        PartialRun(output_prefix, keys, tokenizer.vocab_size, settings, **options) as run,
    ):
        try:
            report(run.totals)
            if not run.complete:
                _encode_all(run, sources, task, encode, chunk_bytes, report)
                _check_unchanged(sources)
                for key, count in run.totals.keys.items():
                    if not count.documents:
                        left_out = f" ({run.totals.skipped:,} records were skipped)" if run.totals.skipped else ""
                        raise UserError(
                            f"{sources[0].path}: no document with text under the key {key!r}{left_out}; nothing was"
                            " written"
                        )
            folder = Path(output_prefix).parent
            run.publish({key: _meta(folder, sources, key, task, tokenizer, run.totals) for key in keys})
        except _ChangedError:
            raise
        except UserError as error:
            kept = f" {run.kept_records:,} documents are kept: --resume goes on." if run.kept else ""
            raise UserError(f"{error}{kept}") from error
        except KeyboardInterrupt as error:
            kept = f"{run.kept_records:,} documents are kept: run it again with --resume to go on"
            raise Interrupted(kept if run.kept else "nothing was written") from error
    return run.totals


def _encode_all(
    run: PartialRun,
    sources: Sequence[Source],
    task: Task,
    encode: Encoder,
    chunk_bytes: int,
    report: Callable[[Totals], None],
) -> None:
    limit, totals = task.max_document_bytes, run.totals
    before = [0]  # bytes of the files in front of each
    for source in sources:
        before.append(before[-1] + source.size)
    chunks = read_inputs(sources, task.fields, run.position, chunk_bytes=chunk_bytes, limit=limit)
    try:
        for chunk, result in encode(chunks):
            run.advance(result, chunk.after)
            at = chunk.after.source
            begun = at < len(sources) and chunk.after.record
            totals.read = before[at] + int(begun and chunk.read * sources[at].size)
            run.record()
            report(totals)
    except (UserError, KeyboardInterrupt):
        if run.kept:
            with suppress(UserError):  # the disk is full: what was recorded before is still good
                run.record(now=True)
        raise


class _ChangedError(UserError):
    """The input changed under the run: what was encoded cannot be gone on with."""


def _check_unchanged(sources: Sequence[Source]) -> None:
    """Raise unless the files are what they were at the start: one that still grew would be cut anywhere."""
    for source in sources:
        if source.path == STDIN:
            continue
        try:
            status = os.stat(source.path)
        except OSError as error:
            raise _ChangedError(f"{source.path} was removed while it was read ({error.strerror})") from error
        if (status.st_size, status.st_mtime_ns) != (source.size, source.modified):
            raise _ChangedError(
                f"{source.path} changed while it was read. Wait until it is complete, and begin again with --overwrite."
            )


def _settings(sources: Sequence[Source], task: Task, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the result, flag by flag, to be compared when a run is resumed."""
    return {
        "--input": [[os.path.abspath(s.path), s.format, s.size, s.modified] for s in sources],
        "--json-keys": {key: list(names) for key, names in task.fields.items()},
        "--tokenizer-type and --tokenizer-model": tokenizer.identity(),
        "--append-eod": task.append_eod,
        "--allow-special": task.allow_special,
        "--on-error": "skip" if task.skip else "stop",
        "--max-document-mb": task.max_document_bytes / 1e6,
    }


def _meta(
    folder: Path, sources: Sequence[Source], key: str, task: Task, tokenizer: Tokenizer, totals: Totals
) -> dict[str, Any]:
    count = totals.keys[key]
    return {
        "format": 1,
        "tokenizer": describe_tokenizer(tokenizer, folder),
        "key": key,
        "append_eod": task.append_eod,
        "allow_special": task.allow_special,
        "documents": count.documents,
        "empty_documents": count.empty_documents,
        "skipped": totals.skipped,
        "text_bytes": count.text_bytes,
        "sources": _describe_sources(sources),
    }


def _describe_sources(sources: Sequence[Source]) -> list[dict[str, Any]]:
    if len(sources) <= _MAX_LISTED:
        return [{"path": source.path, "bytes": source.size} for source in sources]
    folders: dict[str, list[int]] = {}
    for source in sources:
        folders.setdefault(os.path.dirname(source.path), []).append(source.size)
    return [{"path": path, "files": len(sizes), "bytes": sum(sizes)} for path, sizes in folders.items()]


def _finished(prefix: str, sources: Sequence[Source], task: Task, tokenizer: Tokenizer) -> Totals | None:
    """The counts of pairs that this very run wrote earlier, None if there are none."""
    totals = Totals(size := sum(source.size for source in sources), read=size)
    newest = max(source.modified for source in sources)
    for key in task.fields:
        paths = pair_paths(f"{prefix}_{key}_document")
        if not all(path.exists() for path in paths.values()):
            return None
        meta = read_json_object(paths["meta.json"], "Give --overwrite to write the pair again.")
        totals.keys[key] = Counts()
        expected = _meta(Path(prefix).parent, sources, key, task, tokenizer, totals)
        compared = ("format", "key", "append_eod", "allow_special", "sources")
        if any(meta.get(name) != expected[name] for name in compared):
            return None
        identity: Mapping[str, Any] = tokenizer.identity()
        if any(meta.get("tokenizer", {}).get(name) != value for name, value in identity.items()):
            return None
        if paths["meta.json"].stat().st_mtime_ns < newest:  # the input was changed after it was read
            return None
        counts = {name: int(meta[name]) for name in asdict(Counts())}
        totals.keys[key] = Counts(**counts)
        totals.skipped = int(meta.get("skipped", 0))
    first = next(iter(totals.keys.values()))
    totals.records = first.documents + first.empty_documents
    return totals
