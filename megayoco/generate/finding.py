"""Where the weights of `--model` are. Imports no layers, which take seconds: a wrong path is told before."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from megayoco.convert.canonical import EXPORT_FOLDER
from megayoco.convert.checkpoints import find_latest
from megayoco.convert.export import CONFIG_FILE, is_export
from megayoco.convert.formats import FORMATS, read_weights, recognise
from megayoco.convert.weights import Weights
from megayoco.data.files import read_json_object
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError


def find_model(path: str | os.PathLike[str]) -> Path:
    """The folder that `path` means: `export/` of a run directory unless a later checkpoint is there, else itself.

    Raises:
        UserError: it holds no model of any format; says how to get one.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"--model {folder} {what}. Give a run directory, or the folder of a model.")
    inner = folder / EXPORT_FOLDER
    if inner.is_dir() and not is_export(folder):
        return folder if _is_older(inner, folder / "checkpoints") else inner
    if recognise(folder):
        return folder
    if (folder / "checkpoints").is_dir():
        has = "has no complete checkpoint" if any(folder.glob("checkpoints/*/")) else "has no checkpoint yet"
        raise UserError(
            f"--model {folder} {has}, and no export. Launch its training again with --resume: it exports at its end, or"
            " with checkpoint.export=every at each checkpoint."
        )
    known = ", ".join(FORMATS)
    if (folder / CONFIG_FILE).exists():
        raise UserError(f"--model {folder}: its {CONFIG_FILE} describes no model that we know. There are {known}.")
    raise UserError(
        f"--model {folder} is neither a run directory nor a model: it has no {EXPORT_FOLDER}/, no checkpoint, and holds"
        f" none of the formats {known}."
    )


def _is_older(export: Path, checkpoints: Path) -> bool:
    """Whether a run has trained on, and saved, since it exported."""
    try:
        exported = read_json_object(export / CONFIG_FILE, "").get("facts", {}).get("step")
        latest = find_latest(checkpoints)
    except UserError:
        return False
    return latest is not None and isinstance(exported, int) and latest.step > exported


def read_model(path: str | os.PathLike[str]) -> tuple[Weights, Tokenizer]:
    """The weights that `--model` names, of any format, with the tokenizer that text needs.

    Raises:
        UserError: there are none, they cannot be read, or they come without tokenizer.
    """
    folder = find_model(path)
    weights = read_weights(folder)
    if weights.tokenizer is None:
        raise UserError(
            f"--model {folder} has no tokenizer. tools/convert_checkpoint.py --tokenizer writes a copy that has one."
        )
    return weights, weights.tokenizer


def saved_files(path: Path) -> list[Path]:
    """The file of a saved memory, or its ranks' files, in order; none if there is no memory of that name."""
    if path.is_file():
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.rank-*-of-*"))
