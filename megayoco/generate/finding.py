"""Where the weights of `--model` are. Imports no layers, which take seconds: a wrong path is told before."""

from __future__ import annotations

import os
from pathlib import Path

from megayoco.convert.export import CONFIG_FILE, is_export
from megayoco.errors import UserError


def find_export(path: str | os.PathLike[str]) -> Path:
    """The folder of the export that `path` means: itself, or `export/` of a run directory.

    Raises:
        UserError: there is none; says how to get one.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"--model {folder} {what}. Give a run directory, or the folder of an export.")
    if is_export(folder):
        return folder
    inner = folder / "export"
    if inner.is_dir():
        return inner
    if (folder / "checkpoints").is_dir():
        has = "has checkpoints but no export yet" if any(folder.glob("checkpoints/*/")) else "has no checkpoint yet"
        raise UserError(
            f"--model {folder} {has}. Launch its training again with --resume: it exports at its end, or with"
            " checkpoint.export=every at each checkpoint."
        )
    if (folder / CONFIG_FILE).exists():
        raise UserError(f"--model {folder}: its {CONFIG_FILE} does not describe an export of MegaYOCO.")
    raise UserError(
        f"--model {folder} is neither a run directory nor an export: it has neither export/ nor {CONFIG_FILE}."
    )
