"""Checkpoints of a run: DeepSpeed's files in a folder that appears complete or not at all, with a note beside them.

    OUTPUT/checkpoints/latest                     text: the tag of the newest complete checkpoint, written last
    OUTPUT/checkpoints/global_stepN/              DeepSpeed's files
    OUTPUT/checkpoints/global_stepN/megayoco.json step, run identity, size of every file: written after all others
    OUTPUT/checkpoints/global_stepN/rng_RRRRR.pt  random state of rank R

Loading DeepSpeed's files runs pickle: resume only from checkpoints of your own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megayoco.config import RunConfig, model_config_to_dict
from megayoco.data.cache import FORMAT as ORDER_FORMAT
from megayoco.dsconfig import precision
from megayoco.errors import UserError
from megayoco.parallel.topology import Topology
from megayoco.train.agreement import barrier
from megayoco.train.engine import Engine
from megayoco.train.phases import Timeline

NOTE = "megayoco.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    directory: Path
    tag: str
    step: int
    identity: dict[str, Any]
    """See `run_identity`."""

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.directory / self.tag


def run_identity(run: RunConfig, topology: Topology, ds_config: dict[str, Any], step: int) -> dict[str, Any]:
    """What a checkpoint fixes, flat and JSON-able: a resumed run that differs in any of it is refused.

    The model, the layout, precision and ZeRO stage, the seed, and what decides which samples were read until `step`.
    Everything else may change on resume: learning rates, the length of the current phase, later phases, logging.
    """
    values: dict[str, Any] = {f"model.{key}": value for key, value in model_config_to_dict(run.model).items()}
    for axis in ("tensor", "pipeline", "sequence", "data"):
        values[f"layout {axis}"] = getattr(topology, axis)
    values["precision"] = precision(ds_config)
    values["zero_optimization.stage"] = ds_config["zero_optimization"]["stage"]
    values["seed"] = run.seed
    values["order of samples"] = ORDER_FORMAT
    values["phases.0.sequence_length"] = run.phases[0].sequence_length  # pipeline stages are cut by it
    position = Timeline.of(run).position(step)
    for number in range(position.phase + 1):
        phase, data = run.phases[number], run.phase_data(number)
        values[f"phases.{number}.sequence_length"] = phase.sequence_length
        values[f"phases.{number}.batch_size"] = phase.batch_size
        values[f"phases.{number}.rope_theta"] = run.phase_rope_theta(number)
        for key, value in {**data.order_settings(), "document_mask": data.document_mask}.items():
            values[f"data.{key} of phase {number}"] = value
        if number < position.phase:
            values[f"phases.{number}, steps"] = phase.num_steps
    return json.loads(json.dumps(values, default=vars))  # type: ignore[no-any-return]


def digest(identity: dict[str, Any]) -> str:
    """A short name of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def save(engine: Engine, run: RunConfig, directory: Path, step: int) -> Path:
    """Write the checkpoint of a step; returns its folder. Collective. Older ones stay until it is complete.

    Raises:
        UserError: on a rank that cannot write its part, for example to a full disk.
    """
    tag, rank = f"global_step{step}", dist.get_rank()
    partial = directory / f".{tag}.partial"
    identity = run_identity(run, engine.topology, engine.config, step)
    note: dict[str, Any] = {"format": FORMAT, "step": step, "digest": digest(identity), "identity": identity}
    position = Timeline.of(run).position(step)
    note["position"] = {"phase": position.phase, "phase_step": position.phase_step, "tokens": position.tokens}
    note["position"]["consumed_samples"] = position.consumed_samples
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    state = {"megayoco": note}
    with _told_if_unwritable(partial):
        engine.deepspeed.save_checkpoint(str(directory), tag=partial.name, client_state=state, save_latest=False)
        torch.save(_random_state(engine.device), partial / f"rng_{rank:05d}.pt")
    barrier()
    folder = directory / tag
    if rank == 0:
        note["files"] = {path.name: path.stat().st_size for path in sorted(partial.iterdir()) if path.is_file()}
        _write(partial / NOTE, json.dumps(note, indent=1))
        if folder.exists():
            replaced = directory / f".{tag}.replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
            partial.rename(folder)
            shutil.rmtree(replaced)
        else:
            partial.rename(folder)
        _write(directory / "latest", tag)
    barrier()
    return folder


@contextmanager
def _told_if_unwritable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's zip writer hides the system's error behind one of its own
        if not isinstance(error, OSError) and not re.search("inline_container|PytorchStreamWriter", str(error)):
            raise
        reason = getattr(error, "strerror", None) or "the file system takes no more"
        raise UserError(
            f"the checkpoint {folder} cannot be written: {reason}. Make room or make it writable, then go on with"
            " --resume: earlier checkpoints are whole."
        ) from error


def find_latest(directory: Path) -> Checkpoint | None:
    """The checkpoint that `latest` names, without that file the last complete one; None if there is none yet.

    Raises:
        UserError: `latest` names a folder that is missing, incomplete or of another version.
    """
    try:
        tag = (directory / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        complete = [note.parent.name for note in directory.glob(f"global_step*/{NOTE}")]
        if not complete:
            return None
        tag = max(complete, key=lambda name: (len(name), name))
    except OSError as error:
        raise UserError(f"{directory / 'latest'} cannot be read: {error.strerror}.") from error
    remedy = f"Write the tag of a complete checkpoint into {directory / 'latest'}, or start anew with --overwrite."
    folder = directory / tag
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        files, step, identity, version = note["files"], note["step"], note["identity"], note["format"]
        if not (isinstance(files, dict) and isinstance(identity, dict) and type(step) is int and step >= 0):
            raise ValueError("values of other kinds than `save` writes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a complete checkpoint: {NOTE} is missing or damaged. {remedy}") from error
    if version != FORMAT:
        raise UserError(f"{folder} has checkpoint format {version}, this version reads {FORMAT}. {remedy}")
    for name, size in files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            found = f"has {path.stat().st_size:,} bytes, not {size:,}" if path.exists() else "is missing"
            raise UserError(f"{path} {found}: the checkpoint is damaged. {remedy}")
    return Checkpoint(directory, tag, step, identity)


def check_resumable(checkpoint: Checkpoint, run: RunConfig, topology: Topology, ds_config: dict[str, Any]) -> None:
    """Raises UserError unless this run can go on exactly where the checkpoint ends."""
    total = Timeline.of(run).total_steps
    if checkpoint.step > total:
        raise UserError(
            f"{checkpoint.folder} is of step {checkpoint.step}, the run ends at step {total}. Make the phases longer."
        )
    now = run_identity(run, topology, ds_config, checkpoint.step)
    for key in [*checkpoint.identity, *(key for key in now if key not in checkpoint.identity)]:
        before, after = checkpoint.identity.get(key), now.get(key)
        if before == after:
            continue
        remedy = "Resume with the same value, or start anew with --overwrite or another output_dir."
        if key.startswith("layout") or key == "zero_optimization.stage":
            remedy = "A checkpoint resumes on the layout that wrote it: give that one, or start anew with --overwrite."
        raise UserError(f"{checkpoint.folder} was made with {key} = {before!r}, this run has {after!r}. {remedy}")


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put weights, optimizer and random state of a checkpoint into the engine. Collective.

    Raises:
        RuntimeError: DeepSpeed found nothing to load.
    """
    path, state = engine.deepspeed.load_checkpoint(str(checkpoint.directory), tag=checkpoint.tag)
    if path is None or state["megayoco"]["step"] != checkpoint.step:
        raise RuntimeError(f"DeepSpeed did not load {checkpoint.folder}")
    file = checkpoint.folder / f"rng_{dist.get_rank():05d}.pt"
    _restore_random_state(torch.load(file, map_location="cpu", weights_only=True), engine.device)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    # tensors only, so that the file loads without pickle's powers; samples are ordered by their number, not by chance
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _write(path: Path, text: str) -> None:
    """Write through a temporary name, on disk before it is visible."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
