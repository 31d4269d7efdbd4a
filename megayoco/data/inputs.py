"""Which files hold the text: paths, patterns, folders and stdin turned into a list of files and their formats.

    jsonl    JSON lines: one object per line, plain, gzip or zstd
    text     one document per file, plain, gzip or zstd
    parquet  rows of a Parquet file
    arrow    rows of an Arrow file, as `save_to_disk` of Hugging Face datasets writes them

The format is told by content where content tells, else by the name's ending. A folder stands for the data files in and
below it, in the order of their paths. What is left out of a folder is listed in a note; where it is not clear what
should be read, nothing is guessed. How the files are read stands in `chunks.py` and `tables.py`.
"""

import glob
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from megayoco.data.packed import SUFFIXES, Damaged, unpacked
from megayoco.errors import UserError

FORMATS = ("jsonl", "text", "parquet", "arrow")
STDIN = "-"
_JSON = (".jsonl", ".json", ".ndjson")
_TEXT = (".txt", ".text", ".md", ".rst")
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
# descriptions that lie beside the data in folders of Hugging Face datasets, and in this project's output
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLITS = re.compile(r"(?:.*[-_.])?(train|test|validation|valid|val|dev)(?:[-.]\d{5}-of-\d{5}.*)?", re.IGNORECASE)
_ENDINGS = re.compile(r"(\.(jsonl|json|ndjson|parquet|arrow|txt|text|md|rst))?(\.(gz|zst|zstd))?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Source:
    """A file to read: its path ("-" is stdin), one of FORMATS, its size in bytes and modification time in ns."""

    path: str
    format: str
    size: int
    modified: int


@dataclass
class Inputs:
    """What `find_inputs` found: files to read in this order, and lines to tell the user."""

    sources: list[Source] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all files on disk."""
        return sum(source.size for source in self.sources)

    def described(self) -> str:
        """The number of files of each format, for a message."""
        counts = {kind: sum(s.format == kind for s in self.sources) for kind in FORMATS}
        return ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)


def find_inputs(patterns: Sequence[str], input_format: str = "auto") -> Inputs:
    """The files behind paths, patterns and folders, in the order given, those of a pattern or folder sorted.

    Args:
        patterns: files, folders, glob patterns (** spans folders), or "-" for stdin.
        input_format: auto, or one of FORMATS for every file.

    Raises:
        UserError: nothing matches, a file that cannot be opened or is named twice, a folder whose meaning is unclear.
    """
    inputs = Inputs()
    for pattern in patterns:
        if pattern == STDIN:
            if input_format in _TABLES.values():
                raise UserError(f"--input -: {input_format} cannot be read from a pipe. Name the file.")
            inputs.sources.append(Source(STDIN, "jsonl" if input_format == "auto" else input_format, 0, 0))
            continue
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"--input {pattern}: no such file, and no file matches it as a pattern")
        for path in found:
            if os.path.isdir(path):
                _add_folder(inputs, path, input_format)
            else:
                inputs.sources.append(open_source(path, input_format))
    seen: dict[str, str] = {}
    for source in inputs.sources:
        real = source.path if source.path == STDIN else os.path.realpath(source.path)
        if real in seen:
            same = "" if seen[real] == source.path else f", also as {seen[real]}"
            raise UserError(f"--input names {source.path} twice{same}")
        seen[real] = source.path
    return inputs


def open_source(path: str, input_format: str = "auto") -> Source:
    """One file and its format. Raises UserError if it cannot be read or is no regular file."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"--input {path} is no regular file. For the output of a program, give - and a pipe.")
        with open(path, "rb") as file:
            kind = _format(path, file) if input_format == "auto" else input_format
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return Source(path, kind, status.st_size, status.st_mtime_ns)


def _format(path: str, file: BinaryIO) -> str:
    head, suffix = file.read(6), _suffix(path)
    if head[:4] == b"PAR1":
        return "parquet"
    if head == b"ARROW1" or (suffix == ".arrow" and head[:4] == b"\xff\xff\xff\xff"):
        return "arrow"
    if suffix in _TABLES:  # damaged, which its reader says better
        return _TABLES[suffix]
    if suffix not in _TEXT:
        return "jsonl"
    file.seek(0)
    try:
        first = next(unpacked(file), b"").removeprefix(b"\xef\xbb\xbf").lstrip()
    except Damaged:
        first = b""
    return "jsonl" if first.startswith(b'{"') else "text"


def _suffix(path: str) -> str:
    """The ending that tells the format, in lower case, without that of the packer."""
    name, suffix = os.path.splitext(path.lower())
    return os.path.splitext(name)[1] if suffix in SUFFIXES else suffix


def _add_folder(inputs: Inputs, folder: str, input_format: str) -> None:
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        splits = sorted(p.name for p in Path(folder).iterdir() if (p / "state.json").exists())
        raise UserError(
            f"--input {folder} holds the splits {', '.join(splits)} of a Hugging Face dataset. Name the folder of one:"
            f" {os.path.join(folder, splits[0] if splits else 'SPLIT')}."
        )
    if os.path.exists(os.path.join(folder, "state.json")) and input_format in ("auto", "arrow"):
        inputs.sources += [open_source(path, "arrow") for path in _saved_dataset(folder)]
        return
    files = sorted(_walk(folder, set()))
    names = {path: os.path.basename(path) for path in files}
    if input_format == "auto":
        kinds = {path: _by_name(path) for path in files if not names[path].startswith((".", "_"))}
        data = {kind for kind in kinds.values() if kind not in (None, "text")}
        if len(data) > 1:
            raise UserError(
                f"--input {folder} holds {' and '.join(sorted(map(str, data)))} files. Say by --input-format which of"
                " them are the data, or name the files by a pattern."
            )
        wanted = data.pop() if data else "text"
        chosen = [path for path, kind in kinds.items() if kind == wanted]
    elif input_format == "text":
        chosen = [path for path in files if not names[path].startswith(".")]
    else:
        chosen = [path for path in files if _by_name(path) == input_format]
    if not chosen:
        seen = f"{len(files):,} other files, such as {files[0]}" if files else "nothing at all"
        raise UserError(
            f"--input {folder}: the folder holds no {'data' if input_format == 'auto' else input_format} files"
            f" ({', '.join((*_JSON, *_TABLES, *_TEXT))}, packed or not), only {seen}. Name the files by a pattern,"
            " or give --input-format text to make every file a document."
        )
    sources = [open_source(path, input_format) for path in chosen]
    if input_format != "text":
        _refuse_several_splits(folder, chosen)
    others = sorted(set(files) - set(chosen))
    if others:
        shown = ", ".join(os.path.relpath(path, folder) for path in others[:5])
        more = f" and {len(others) - 5:,} more" if len(others) > 5 else ""
        inputs.notes.append(f"{folder}: not read, because they are no {_by_name(chosen[0]) or 'data'}: {shown}{more}")
    inputs.sources += sources


def _walk(folder: str, above: set[str]) -> Iterator[str]:
    """All files in and below a folder; links to folders are followed, once in each branch."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.is_dir():
                    yield entry.path  # a hidden folder is listed like a file that is not read
                else:
                    yield from _walk(entry.path, above | {real})
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error


def _by_name(path: str) -> str | None:
    suffix = _suffix(path)
    if os.path.basename(path) in _DESCRIPTIONS or path.endswith(".meta.json"):
        return None
    if suffix in _TABLES:
        return _TABLES[suffix]
    return "jsonl" if suffix in _JSON else "text" if suffix in _TEXT else None


def _saved_dataset(folder: str) -> list[str]:
    """The Arrow files of a folder that `save_to_disk` of Hugging Face datasets wrote, in their order."""
    path = os.path.join(folder, "state.json")
    try:
        state = json.loads(Path(path).read_bytes())
        files = [os.path.join(folder, entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not list the files of a Hugging Face dataset. Name the files instead.") from error
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"{folder} holds a selection of rows. Save it again after dataset.flatten_indices().")
    missing = [name for name in files if not os.path.exists(name)]
    if missing:
        raise UserError(f"{path} lists {missing[0]}, which does not exist. Copy the whole folder again.")
    return files


def _refuse_several_splits(folder: str, files: Sequence[str]) -> None:
    """A folder as on the Hugging Face hub, data/train-00000-of-00002.parquet: training must not read the test split."""
    splits: dict[str, str] = {}
    for path in files:
        for part in Path(os.path.relpath(path, folder)).parts:
            if match := _SPLITS.fullmatch(_ENDINGS.sub("", part)):
                splits.setdefault(match[1].lower(), os.path.join(folder, part))
    if len(splits) > 1:
        raise UserError(
            f"--input {folder} holds the splits {', '.join(sorted(splits))}. Name the files of those you want by"
            f" patterns, such as '{os.path.join(folder, '**', '*train*')}'."
        )
