"""The directory of a run: what may be written where, and when something older may go."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megayoco.config import RunConfig, save_config
from megayoco.convert.checkpoints import LATEST, Checkpoint, find_latest, open_checkpoint, saved_steps
from megayoco.convert.export import check_replaceable
from megayoco.data.datasets import Datasets
from megayoco.data.files import read_json_object, write_text_atomically
from megayoco.errors import UserError
from megayoco.train.report import METRICS_FILE, truncate_metrics

CONFIG_FILE = "config.yaml"
DATA_FILE = "data.json"
_FILES = (CONFIG_FILE, METRICS_FILE, DATA_FILE)
ENTRIES = (*_FILES, "tensorboard", "checkpoints", "tokenizer", "export", "evaluation")
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


def plan_output(run: RunConfig, *, resume: str | None, overwrite: bool) -> OutputPlan:
    """Look at the output directory, and make it if it is absent; nothing that exists is changed.

    Args:
        run: the config.
        resume: go on from the checkpoint that `latest` names ("latest"), or from a tag such as "global_step40". "auto":
            the caller looks for the newest whole one, the plan has none. None: a new run.
        overwrite: give up the run that is there.

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
    checkpoints = directory / "checkpoints"
    if resume in (None, "auto"):
        return OutputPlan(directory, None)
    if resume == "latest":
        return OutputPlan(directory, find_latest(checkpoints))
    if resume not in {f"global_step{step}" for step in saved_steps(checkpoints)}:
        there = ", ".join(f"global_step{step}" for step in saved_steps(checkpoints)) or "none"
        raise UserError(f"--resume {resume}: {checkpoints} has no such checkpoint, but {there}.")
    return OutputPlan(directory, open_checkpoint(checkpoints / str(resume)))


def prepare_output(plan: OutputPlan, run: RunConfig) -> None:
    """Carry out the plan, on rank 0 alone: remove what is given up, save the config, cut the metrics back. `latest`
    names the checkpoint that the run goes on from, whichever it named before."""
    try:
        for path in plan.remove:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        plan.checkpoints.mkdir(parents=True, exist_ok=True)
        for stale in plan.checkpoints.glob(".*"):  # a save that was interrupted
            shutil.rmtree(stale, ignore_errors=True)
        if plan.checkpoint is not None:
            write_text_atomically(plan.checkpoints / LATEST, plan.checkpoint.folder.name)
        save_config(run, plan.directory / CONFIG_FILE)
        truncate_metrics(plan.directory, plan.checkpoint.step if plan.checkpoint else 0)
    except OSError as error:
        raise UserError(
            f"{error.filename or plan.directory} cannot be changed: {error.strerror}. Choose another output_dir, or"
            " make it writable."
        ) from error


def check_data(plan: OutputPlan, phase: int, datasets: Datasets) -> None:
    """On resume within a phase, compare the sizes of its datasets with what they were: other data, other samples.

    Raises:
        UserError: a dataset has been made anew since.
    """
    path = plan.directory / DATA_FILE
    if not path.exists():
        return
    remedy = "Restore it, or start anew with --overwrite or another output_dir."
    before = read_json_object(path, remedy).get(str(phase))
    for source, entry in zip(datasets.shares, before if isinstance(before, list) else [], strict=False):
        entry = entry if isinstance(entry, dict) else {}
        tokens = entry.get("tokens_per_epoch")
        if source.content != entry.get("content") and tokens == source.tokens_per_epoch:
            raise UserError(
                f"{source.prefix} gives other examples to phase {phase} than when the run began ({path}): a file, a"
                f" field or a filter has changed since. {remedy}"
            )
        if tokens != source.tokens_per_epoch:
            raise UserError(
                f"{source.prefix} gives {source.tokens_per_epoch:,} tokens to an epoch of phase {phase}, but {tokens}"
                f" when the run began ({path}): it was made anew, and the samples are others. {remedy}"
            )


def record_data(plan: OutputPlan, datasets: Mapping[int, Datasets]) -> None:
    """Write what the phases read, on rank 0 alone, for `check_data` and for people."""
    known = recorded_data(plan)
    known.update({str(number): [vars(source) for source in phase.shares] for number, phase in datasets.items()})
    write_text_atomically(plan.directory / DATA_FILE, json.dumps(known, indent=1) + "\n")


def recorded_data(plan: OutputPlan) -> dict[str, Any]:
    """What `record_data` wrote: the datasets of every phase so far by its number."""
    path = plan.directory / DATA_FILE
    return read_json_object(path, "Remove it.") if path.exists() else {}
