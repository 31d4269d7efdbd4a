"""A folder of weights appears whole or not at all, and replaces only what we would write ourselves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from megayoco.errors import UserError

FILES = (
    "config.json",
    "params.json",
    "checkpoint.pth",
    "llama_config.json",
    "streaming_params",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "configuration_megayoco.py",
    "modeling_megayoco.py",
    "configuration_longllama.py",
    "cache_longllama.py",
    "modeling_longllama.py",
    "README.md",
    "tokenizer",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "megayoco_tokenizer.json",
)
"""Everything that a format of ours puts into its folder."""


@contextmanager
def whole_folder(target: Path, what: str) -> Iterator[Path]:
    """A new folder to fill, which becomes `target` when the block ends; an older `target` is replaced only then.

    Args:
        target: the folder to make; its parents are made.
        what: what it will hold, for messages.

    Raises:
        UserError: something cannot be written. Whatever ends the block early, nothing half-written stays.
    """
    target = target.resolve() if target.is_symlink() else target  # the link stays, what it points to is replaced
    partial, replaced = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "replaced"))
    try:
        if replaced.exists() and not target.exists():  # killed between the two renames below
            replaced.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                _flush(path)
        _flush(partial)
        # a folder cannot replace a full one in one step: the older one goes only when the new one is on disk
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        _flush(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} {target} cannot be written: {reason}. Make room, or make it writable.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises UserError unless the disk of `folder` has `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{what} needs {needed:,} bytes, but the disk has {free:,} left. Make room, or choose another disk."
        )


def check_destination(target: Path, overwrite: bool) -> None:
    """Raises UserError unless `target` is absent, empty, or (with `overwrite`) a folder that holds our files only."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file, where a folder should go. Move it away, or choose another.")
    found = sorted(path.name for path in target.iterdir())
    if found and not overwrite:
        raise UserError(f"{target} is not empty. Give --overwrite to replace what is there, or choose another folder.")
    if strange := strangers(found, FILES):
        raise UserError(f"{target} holds {strange[0]}, which replacing it would delete. Move that away.")
    if found and not {"config.json", "params.json", "llama_config.json"} & set(found):
        raise UserError(f"{target} does not look like a folder of weights. Move it away, or choose another.")


def strangers(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of `names` that match none of the patterns."""
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]


def _flush(path: Path) -> None:
    """On disk before anything refers to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
