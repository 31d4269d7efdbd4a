"""Training checkpoints on disk: finding them, and telling whole ones from damaged ones. See train/checkpoint.py.

CHECKPOINTS/latest                       text: the tag of the newest complete checkpoint, written last
CHECKPOINTS/global_stepN/                DeepSpeed's files of step N
CHECKPOINTS/global_stepN/layout.json     where in them every parameter lies (convert/training.py)
CHECKPOINTS/global_stepN/megayoco.json   what was saved; size and SHA-256 of every file: written after all others
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megayoco.errors import UserError

NOTE = "megayoco.json"
LAYOUT = "layout.json"
LATEST = "latest"
FORMAT = 2
_TAG = re.compile(r"global_step(\d+)", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, complete by its note."""

    folder: Path
    note: dict[str, Any]
    """Content of megayoco.json."""

    @property
    def step(self) -> int:
        """Optimizer steps that were finished when it was written."""
        return int(self.note["step"])

    @property
    def identity(self) -> dict[str, Any]:
        """What it fixes for a run that goes on from it, see train/checkpoint.py."""
        return self.note["identity"]  # type: ignore[no-any-return]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """`bytes` and `sha256` of every file by name."""
        return self.note["files"]  # type: ignore[no-any-return]


def saved_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a folder of checkpoints that have their note, ascending."""
    found = (_TAG.fullmatch(note.parent.name) for note in directory.glob(f"global_step*/{NOTE}"))
    return sorted(int(tag[1]) for tag in found if tag)


def recover(directory: Path) -> None:
    """Undo the replacement of a checkpoint that was cut short between its two renames. One process alone."""
    for replaced in directory.glob(".global_step*.replaced"):
        folder = directory / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not folder.exists() and (replaced / NOTE).is_file():
            replaced.rename(folder)


def find_latest(directory: Path) -> Checkpoint | None:
    """The checkpoint that `latest` names, without that file the last complete one; None if there is none yet.

    Raises:
        UserError: `latest` names a folder that is missing, incomplete or of another version.
    """
    try:
        tag = (directory / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        steps = saved_steps(directory)
        if not steps:
            return None
        tag = f"global_step{steps[-1]}"
    except OSError as error:
        raise UserError(f"{directory / LATEST} cannot be read: {error.strerror}.") from error
    if not _TAG.fullmatch(tag):
        raise UserError(f"{directory / LATEST} names {tag!r}, no checkpoint. {_remedy(directory / 'global_step0')}")
    return open_checkpoint(directory / tag)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, its files compared with the note by name and size.

    Raises:
        UserError: it is missing, incomplete, of another version, or a file is absent or too short.
    """
    remedy = _remedy(folder)
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        files, step, identity, version = note["files"], note["step"], note["identity"], note["format"]
        if not (isinstance(files, dict) and isinstance(identity, dict) and type(step) is int and step >= 0):
            raise ValueError("values of other kinds than `save` writes")
        sizes = {name: entry if version == 1 else entry["bytes"] for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a complete checkpoint: {NOTE} is missing or damaged. {remedy}") from error
    if folder.name != f"global_step{step}":
        raise UserError(f"{folder} holds the checkpoint of step {step}: give the folder its name back. {remedy}")
    if version != FORMAT:
        raise UserError(f"{folder} has checkpoint format {version}, this version reads {FORMAT}. {remedy}")
    for name, size in sizes.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            found = f"has {path.stat().st_size:,} bytes, not {size:,}" if path.exists() else "is missing"
            raise UserError(f"{path} {found}: the checkpoint is damaged. {remedy}")
    return Checkpoint(folder, note)


def verify(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Reads these files of a checkpoint and compares them with their checksums.

    Raises:
        UserError: a file is not what was written, or cannot be read.
    """
    for name in names:
        path = checkpoint.folder / name
        if name not in checkpoint.files:
            raise UserError(f"{path} is not among the files of {NOTE}. {_remedy(checkpoint.folder)}")
        try:
            found = checksum(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}. {_remedy(checkpoint.folder)}") from error
        if found != checkpoint.files[name]["sha256"]:
            raise UserError(
                f"{path} is not what was written (its SHA-256 differs): the checkpoint is damaged."
                f" {_remedy(checkpoint.folder)}"
            )


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _remedy(folder: Path) -> str:
    return (
        f"Go on from the one before it with --resume auto, from another by --resume TAG, or start anew with --overwrite"
        f" (checkpoints: {folder.parent})."
    )
