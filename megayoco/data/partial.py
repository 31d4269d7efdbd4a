"""PREFIX.partial: the folder in which the pairs of a run grow until they are complete.

    lock           held (flock) by the run that writes; a second run on one prefix is refused
    settings.json  what decides the result: input files, keys, flags, tokenizer. A resumed run must agree
    KEY.bin        tokens so far; KEY.lengths the length of each document, int32
    skipped.jsonl  records left out so far
    state.json     position in the input, counts, and how much of each file belongs to that position

state.json is replaced, and the others are brought to the disk before it, each time some work is done. So after a kill
or a power failure the files are cut to what it says and the run goes on there; the result is the same to the byte. At
the end the indexes are written here too, and everything is renamed to its place, the index of each key last.
"""

import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from megayoco.data.chunks import Position
from megayoco.data.encode import Counts, Result, Totals
from megayoco.data.files import read_json_object
from megayoco.data.indexed_writer import (
    TokenFiles,
    format_meta,
    make_folder_of,
    pair_paths,
    publish_pair,
    refuse_existing,
)
from megayoco.errors import UserError

RECORD_BYTES = 64 << 20
RECORD_SECONDS = 5.0
_KINDS = ("bin", "meta.json", "idx")


class PartialRun:
    """The folder of a run, locked. A context manager: leaving it closes the files and frees the lock.

    Left without `publish`, the folder stays if something was recorded that `--resume` can use, else it is removed.

    Args:
        prefix, keys: of the output; the pairs are PREFIX_KEY_document.
        vocab_size: of the tokenizer.
        settings: JSON-able, flag -> value: what decides the result.
        overwrite: existing pairs and unfinished runs may be replaced.
        resume: go on with an unfinished run if there is one.
        size: bytes of the input.
        resumable: whether the input can be read again; else nothing is kept.

    Attributes:
        position, totals: where the run stands.
        complete: everything is encoded, and only the files must be given their names.
        resumed: an unfinished run was found.
        kept_records: records that a resumed run would not read again.

    Raises:
        UserError: another run holds the lock; outputs or an unfinished run exist and nothing says what to do with
            them; an unfinished run of other settings.
    """

    def __init__(
        self,
        prefix: str,
        keys: Sequence[str],
        vocab_size: int,
        settings: Mapping[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
        size: int = 0,
        resumable: bool = True,
    ):
        self.prefix, self.folder = prefix, Path(f"{prefix}.partial")
        self.report_path = Path(f"{prefix}_skipped.jsonl")
        self._settings, self._resumable, self._overwrite = dict(settings), resumable, overwrite
        self._vocab_size = vocab_size
        self.position, self.totals = Position(), Totals(size, keys={key: Counts() for key in keys})
        self.complete = self.resumed = self._removed = False
        self._between = True  # chunks, not in the middle of one
        self._files: dict[str, TokenFiles] = {}
        self._skipped: IO[str] | None = None
        self._recorded_bytes, self._recorded_at, self.kept_records = 0, time.monotonic(), 0
        make_folder_of(prefix)
        self._lock = _lock(self.folder)
        try:
            self._begin(resume)
        except BaseException:
            self._close()
            if not self._state_path.exists():
                self._remove()
            self._lock.close()
            raise

    def pair(self, key: str) -> str:
        """The prefix of a key's pair."""
        return f"{self.prefix}_{key}_document"

    @property
    def kept(self) -> bool:
        """Whether something is recorded that `--resume` can go on from."""
        return self._resumable and self._state_path.exists()

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.json"

    def __enter__(self) -> "PartialRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if not self.kept:
            self._remove()
        self._lock.close()

    def advance(self, result: Result, position: Position) -> None:
        """Append what became of a chunk, and stand behind it. Raises UserError if it cannot be written."""
        self._between = False
        for problem in result.problems:
            self.totals.skipped += problem.records
            self._write_skipped(problem.as_json())
        for key, encoded in result.keys.items():
            self._files[key].add(encoded.tokens, encoded.lengths)
            count = self.totals.keys[key]
            count.documents += len(encoded.lengths)
            count.empty_documents += encoded.empty
            count.text_bytes += encoded.text_bytes
            count.tokens += len(encoded.tokens)
        self.totals.records += result.records
        self.position = position
        self._between = True

    def _write_skipped(self, line: str) -> None:
        assert self._skipped is not None
        try:
            self._skipped.write(line)
        except OSError as error:
            raise UserError(f"cannot write {self._skipped.name}: {error.strerror}") from error

    def record(self, *, now: bool = False) -> None:
        """Make what was done so far what a resumed run goes on from; does nothing if little was, unless `now`.

        Nothing either if `advance` was interrupted: the files then hold a part of a chunk.
        """
        if not self._between:
            return
        done = self.totals.text_bytes - self._recorded_bytes
        if not now and done < RECORD_BYTES and time.monotonic() < self._recorded_at + RECORD_SECONDS:
            return
        for files in self._files.values():
            files.sync()
        assert self._skipped is not None
        state = {
            "position": list(self.position),
            "totals": asdict(self.totals),
            "outputs": {key: [f.num_tokens, f.num_sequences, f.max_id] for key, f in self._files.items()},
            "complete": self.complete,
        }
        try:
            self._skipped.flush()
            os.fsync(self._skipped.fileno())
            state["skipped_bytes"] = os.fstat(self._skipped.fileno()).st_size
            _write_synced(self._state_path, json.dumps(state))
        except OSError as error:
            raise UserError(f"cannot write {self._state_path}: {error.strerror}") from error
        self._recorded_bytes, self._recorded_at = self.totals.text_bytes, time.monotonic()
        self.kept_records = self.totals.records

    def publish(self, metas: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the indexes and give everything its name. A run that is killed in here is finished by --resume.

        Args:
            metas: key -> content of its PREFIX.meta.json without the counts of tokens. Not used if `complete`.
        """
        if not self.complete:
            for files in self._files.values():
                files.sync()
            for key, files in self._files.items():
                files.write_index(self.folder / f"{key}.idx")
                _write_synced(self.folder / f"{key}.meta.json", format_meta(metas[key], files))
            self.complete = True
            self.record(now=True)
            self._close()
        for key in self.totals.keys:
            publish_pair(self.pair(key), {kind: self.folder / f"{key}.{kind}" for kind in _KINDS})
        try:
            report = self.folder / "skipped.jsonl"
            if self.totals.skipped and report.exists():
                os.replace(report, self.report_path)
            elif not self.totals.skipped:
                self.report_path.unlink(missing_ok=True)  # of a run that was replaced
            _sync_folder(self.folder.parent)
        except OSError as error:
            raise UserError(f"cannot write {self.report_path}: {error.strerror}") from error
        self._remove()

    def _begin(self, resume: bool) -> None:
        unfinished = self._state_path.exists()
        if unfinished and resume:
            self._load()
            if not self.complete:
                self._refuse_existing()
                self._open()
            return
        if unfinished and not self._overwrite:
            raise UserError(
                f"{self.folder} holds an unfinished run. Give --resume to go on with it, or --overwrite to begin again."
            )
        self._refuse_existing()
        _clean(self.folder)
        try:
            settings = {**self._settings, "--overwrite": self._overwrite}
            _write_synced(self.folder / "settings.json", json.dumps(settings, indent=1))
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}") from error
        self._open()

    def _refuse_existing(self) -> None:
        paths = [path for key in self.totals.keys for path in pair_paths(self.pair(key)).values()]
        refuse_existing([*paths, self.report_path], self._overwrite)

    def _load(self) -> None:
        remedy = "Give --overwrite to begin again."
        settings = read_json_object(self.folder / "settings.json", remedy)
        state = read_json_object(self._state_path, remedy)
        self._overwrite = bool(settings.pop("--overwrite", False)) or self._overwrite
        try:
            self.position = Position(*state["position"])
            totals = state["totals"]
            keys = {key: Counts(**count) for key, count in totals.pop("keys").items()}
            self.totals = Totals(**totals, keys=keys)
            self.complete = bool(state["complete"])
            self._outputs = {key: tuple(output) for key, output in state["outputs"].items()}
            self._skipped_bytes = int(state["skipped_bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self._state_path} is not the state of a run. {remedy}") from error
        _compare(settings, json.loads(json.dumps(self._settings)), self.folder, self.totals.skipped)
        self._recorded_bytes, self.kept_records, self.resumed = self.totals.text_bytes, self.totals.records, True

    def _open(self) -> None:
        for key in self.totals.keys:
            keep = self._outputs[key] if self.resumed else (0, 0, -1)
            paths = self.folder / f"{key}.bin", self.folder / f"{key}.lengths"
            self._files[key] = TokenFiles(*paths, self._vocab_size, keep=keep)
        try:
            self._skipped = open(self.folder / "skipped.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (see _close)
            self._skipped.truncate(self._skipped_bytes if self.resumed else 0)
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}") from error

    def _close(self) -> None:
        for files in self._files.values():
            files.close()
        if self._skipped is not None:
            with suppress(OSError):  # a full disk, which was reported already
                self._skipped.close()

    def _remove(self) -> None:
        if not self._removed:  # else the folder may be that of another run by now
            self._removed = True
            _remove(self.folder)


def remove_leftovers(prefix: str) -> None:
    """Remove the folder of a run that was killed when it was all but finished. Raises UserError if one is writing."""
    folder = Path(f"{prefix}.partial")
    if folder.exists():
        with _lock(folder):
            _remove(folder)


def _clean(folder: Path) -> None:
    """Remove what a run writes, state first: a run that is killed in between must not find half of the files."""
    (folder / "state.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != "lock" and path.name.endswith((*_KINDS, ".lengths", ".json", ".jsonl", ".tmp")):
            path.unlink()


def _remove(folder: Path) -> None:
    with suppress(OSError):  # something of the user's lies in it
        _clean(folder)
        (folder / "lock").unlink(missing_ok=True)
        folder.rmdir()


def _lock(folder: Path) -> IO[str]:
    """The locked lock file of a folder, which is made if needed."""
    while True:
        try:
            folder.mkdir(exist_ok=True)
            file = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (closed by the caller)
        except FileNotFoundError:  # the run that had it removed the folder just now
            continue
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{folder} is being written by {owner}. Wait for it, or choose another output prefix."
            ) from None
        except OSError:
            pass  # a file system without locks, where the user must take care
        try:
            same = os.path.samestat(os.stat(folder / "lock"), os.fstat(file.fileno()))
        except FileNotFoundError:
            same = False
        if same:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
            return file
        file.close()  # removed between open and flock


def _write_synced(path: Path, text: str) -> None:
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _compare(recorded: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path, skipped: int) -> None:
    """Raise UserError, naming the first difference, unless a run of these settings can go on with that one."""
    for flag in dict.fromkeys((*recorded, *wanted)):
        before, now = recorded.get(flag), wanted.get(flag)
        if before == now:
            continue
        if flag == "--on-error" and not skipped:
            continue  # nothing was left out so far: both ways led here
        if flag == "--input" and isinstance(before, list) and isinstance(now, list):
            files = dict(map(tuple, ((entry[0], entry[1:]) for entry in before)))
            for path, *state in now:
                if path in files and files[path] != state:
                    raise UserError(
                        f"{path} has changed since the run in {folder} read it (size or modification time). Give"
                        " --overwrite to begin again."
                    )
            before, now = f"{len(before)} files", f"{len(now)} files, or others"
        raise UserError(
            f"{folder} was begun with other settings: {flag} was {_short(before)} and is {_short(now)}. Give the same"
            " to go on by --resume, or --overwrite to begin again."
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
