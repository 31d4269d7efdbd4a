"""The directory of a run: what may be written where, and when something older may go."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megayoco.config import RunConfig, save_config
from megayoco.convert.export import check_replaceable
from megayoco.errors import UserError
from megayoco.train.checkpoint import Checkpoint, find_latest
from megayoco.train.report import METRICS_FILE, truncate_metrics

CONFIG_FILE = "config.yaml"
_FILES = (CONFIG_FILE, METRICS_FILE)
ENTRIES = (*_FILES, "tensorboard", "checkpoints", "tokenizer", "export")
"""All that a run writes, and all that --overwrite removes."""


@dataclass(frozen=True)
class OutputPlan:
    """What to do with the run's directory once every check of the run has passed."""

    directory: Path
    checkpoint: Checkpoint | None
    """Where to resume from."""
    remove: tuple[Path, ...] = ()
    """What an earlier run left and --overwrite gives up."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.directory / "checkpoints"


def plan_output(run: RunConfig, *, resume: bool, overwrite: bool) -> OutputPlan:
    """Look at the output directory, and make it if it is absent; nothing that exists is changed.

    Raises:
        UserError: it holds another run and neither flag is given; it cannot be written; its checkpoint is damaged;
            the export would replace something else.
    """
    directory = Path(run.output_dir)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other: go on with a run, or give it up. Choose one.")
    found = tuple(directory / name for name in ENTRIES if (directory / name).exists())
    if found and not (resume or overwrite):
        raise UserError(
            f"{directory} holds another run ({', '.join(path.name for path in found)}). "
            "Go on with it by --resume, give it up by --overwrite, or choose another output_dir."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"output_dir {directory} cannot be written: {error.strerror}. Choose another, or make it writable."
        ) from error
    if overwrite:
        return OutputPlan(directory, None, found)
    for path in found:
        if path.is_file() != (path.name in _FILES):
            raise UserError(
                f"{path} is no {'file' if path.name in _FILES else 'folder'}, as a run has it. Move it away, or start"
                " anew with --overwrite."
            )
    if run.checkpoint.export != "never":
        check_replaceable(directory / "export")
    return OutputPlan(directory, find_latest(directory / "checkpoints") if resume else None)


def prepare_output(plan: OutputPlan, run: RunConfig) -> None:
    """Carry out the plan, on rank 0 alone: remove what is given up, save the config, cut the metrics back."""
    try:
        for path in plan.remove:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        plan.checkpoints.mkdir(parents=True, exist_ok=True)
        for stale in plan.checkpoints.glob(".*"):  # a save that was interrupted
            shutil.rmtree(stale, ignore_errors=True)
        save_config(run, plan.directory / CONFIG_FILE)
        truncate_metrics(plan.directory, plan.checkpoint.step if plan.checkpoint else 0)
    except OSError as error:
        raise UserError(
            f"{error.filename or plan.directory} cannot be changed: {error.strerror}. Choose another output_dir, or"
            " make it writable."
        ) from error
