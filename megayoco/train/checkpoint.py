"""Checkpoints of a run: DeepSpeed's files in a folder that appears complete or not at all, with notes beside them.

    OUTPUT/checkpoints/latest                     text: the tag of the newest complete checkpoint, written last
    OUTPUT/checkpoints/global_stepN/              DeepSpeed's files: weights, optimizer
    OUTPUT/checkpoints/global_stepN/layout.json   where in them every parameter lies (convert/training.py)
    OUTPUT/checkpoints/global_stepN/config.yaml   the resolved config
    OUTPUT/checkpoints/global_stepN/rng_RRRRR.pt  random state of rank R
    OUTPUT/checkpoints/global_stepN/megayoco.json step, place in the data, identity of run, data and tokenizer; size and
                                                  SHA-256 of every file: written after all others

DeepSpeed writes, but does not read: one code path loads a checkpoint at the layout that wrote it and at any other, and
nothing is unpickled that could run code. Only optimizer states on NVMe are left to DeepSpeed, at the same layout.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megayoco.config import CheckpointConfig, RunConfig, model_config_to_dict, save_config
from megayoco.convert.checkpoints import (
    FORMAT,
    LATEST,
    LAYOUT,
    NOTE,
    Checkpoint,
    checksum,
    open_checkpoint,
    saved_steps,
    verify,
)
from megayoco.convert.training import TrainingState
from megayoco.data.cache import FORMAT as ORDER_FORMAT
from megayoco.dsconfig import precision
from megayoco.errors import UserError
from megayoco.parallel.agreement import all_ranks_agree, barrier
from megayoco.parallel.topology import Topology
from megayoco.train.engine import Engine
from megayoco.train.holdings import layout_of, restore
from megayoco.train.phases import Timeline, trained_model, training_facts

CONFIG = "config.yaml"


def run_identity(run: RunConfig, ds_config: dict[str, Any], step: int) -> dict[str, Any]:
    """What a checkpoint fixes, flat and JSON-able: a resumed run that differs in any of it is refused.

    The model, precision, the seed, and what decides which samples were read until `step`. Everything else may change
    on resume: the layout, learning rates, the length of the current phase, later phases, logging.
    """
    values: dict[str, Any] = {f"model.{key}": value for key, value in model_config_to_dict(run.model).items()}
    values["precision"] = precision(ds_config)
    values["seed"] = run.seed
    values["order of samples"] = ORDER_FORMAT
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


def layout_values(topology: Topology, ds_config: dict[str, Any]) -> dict[str, int]:
    """The layout that the cut of the files follows. A run may go on at another one."""
    axes = {axis: getattr(topology, axis) for axis in ("tensor", "pipeline", "sequence", "data")}
    return {**axes, "ZeRO": ds_config["zero_optimization"]["stage"]}


def layout_text(values: dict[str, int]) -> str:
    """A layout in words."""
    return " x ".join(f"{axis} {size}" for axis, size in values.items() if axis != "ZeRO") + f", ZeRO {values['ZeRO']}"


def digest(identity: dict[str, Any]) -> str:
    """A short name of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def save(engine: Engine, run: RunConfig, directory: Path, step: int, identities: dict[str, Any]) -> Path:
    """Write the checkpoint of a step; returns its folder. Collective. Older ones stay until it is complete.

    Args:
        engine: what is saved.
        run: the resolved config.
        directory: the folder of all checkpoints.
        step: optimizer steps finished.
        identities: of data and tokenizer, JSON-able, for the note.

    Raises:
        UserError: on a rank that cannot write its part, for example to a full disk.
    """
    tag, rank = f"global_step{step}", dist.get_rank()
    partial, folder = directory / f".{tag}.partial", directory / tag
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    layout = layout_of(engine)  # also waits for the folder
    barrier()
    with _told_if_unwritable(partial):
        engine.deepspeed.save_checkpoint(str(directory), tag=partial.name, save_latest=False)
        torch.save(_random_state(engine.device), partial / f"rng_{rank:05d}.pt")
        if rank == 0:
            _write(partial / LAYOUT, json.dumps(layout, separators=(",", ":")))
            save_config(run, partial / CONFIG)
    barrier()
    with _told_if_unwritable(partial):
        files = _manifest(partial)
        if rank == 0:
            _write(partial / NOTE, json.dumps({**_note(engine, run, step), **identities, "files": files}, indent=1))
            _move(partial, folder)
            _write(directory / LATEST, tag)
    barrier()
    return folder


def _note(engine: Engine, run: RunConfig, step: int) -> dict[str, Any]:
    position = Timeline.of(run).position(step)
    identity = run_identity(run, engine.config, step)
    return {
        "format": FORMAT,
        "step": step,
        "position": {
            "phase": position.phase,
            "phase_step": position.phase_step,
            "tokens": position.tokens,
            "consumed_samples": position.consumed_samples,
        },
        "layout": layout_values(engine.topology, engine.config),
        "loss_scale": _loss_scale(engine),
        "model": model_config_to_dict(trained_model(run, step)),
        "facts": training_facts(run, step),
        "digest": digest(identity),
        "identity": identity,
    }


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and checksum of every file, each read by one rank. Collective."""
    world = dist.get_world_size()
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    mine = {
        path.name: {"bytes": path.stat().st_size, "sha256": checksum(path)} for path in paths[dist.get_rank() :: world]
    }
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, mine)
    merged = {name: entry for part in parts for name, entry in part.items()}
    return dict(sorted(merged.items()))


def _move(partial: Path, folder: Path) -> None:
    """Give a complete folder its name, in place of an older one."""
    if not folder.exists():
        partial.rename(folder)
        return
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced)


def prune(directory: Path, step: int, config: CheckpointConfig) -> list[int]:
    """Remove what `keep_last` and `keep_every` do not keep of the checkpoints up to `step`; returns the steps removed.

    Rank 0 alone. The checkpoint of `step` itself always stays, and so do later ones, which an earlier run left.
    """
    if config.keep_last is None:
        return []
    steps = [other for other in saved_steps(directory) if other <= step]
    kept = {step, *steps[-config.keep_last :]}
    removed = [s for s in steps if s not in kept and not (config.keep_every and s % config.keep_every == 0)]
    for other in removed:
        # renamed first: a removal that is cut short leaves nothing that looks complete
        doomed = directory / f".global_step{other}.removed"
        shutil.rmtree(doomed, ignore_errors=True)
        (directory / f"global_step{other}").rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return removed


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


def check_tokenizer(checkpoint: Checkpoint, tokenizer: Any) -> None:
    """Raises UserError unless this tokenizer gives texts the ids that the checkpoint was trained on."""
    before, now = checkpoint.note["tokenizer"], json.loads(json.dumps(tokenizer.identity()))
    if before != now:
        differ = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        raise UserError(
            f"{checkpoint.folder} was trained with another tokenizer ({differ} {before.get(differ)!r}, the data of this"
            f" run has {now.get(differ)!r}). Give the data it was trained on, or start anew with --overwrite."
        )


def check_resumable(checkpoint: Checkpoint, run: RunConfig, topology: Topology, ds_config: dict[str, Any]) -> None:
    """Raises UserError unless this run can go on exactly where the checkpoint ends, at its own layout."""
    total = Timeline.of(run).total_steps
    if checkpoint.step > total:
        raise UserError(
            f"{checkpoint.folder} is of step {checkpoint.step}, the run ends at step {total}. Make the phases longer."
        )
    now = run_identity(run, ds_config, checkpoint.step)
    for key in [*checkpoint.identity, *(key for key in now if key not in checkpoint.identity)]:
        before, after = checkpoint.identity.get(key), now.get(key)
        if before != after:
            raise UserError(
                f"{checkpoint.folder} was made with {key} = {before!r}, this run has {after!r}. Resume with the same"
                " value, or start anew with --overwrite or another output_dir."
            )
    written, asked = checkpoint.note["layout"], layout_values(topology, ds_config)
    if written != asked and on_nvme(ds_config):
        raise UserError(
            f"{checkpoint.folder} was written at {layout_text(written)}; optimizer states on NVMe go on at that layout"
            f" only, not at {layout_text(asked)}. Resume with offload_optimizer.device cpu, or at the same layout."
        )


def verify_together(checkpoint: Checkpoint) -> None:
    """Compare every file with its checksum, each read by one rank. Collective.

    Raises:
        AgreedError: on every rank, a file is damaged.
    """
    with all_ranks_agree():
        verify(checkpoint, sorted(checkpoint.files)[dist.get_rank() :: dist.get_world_size()])


def newest_whole(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that passes every check, and what is wrong with those passed over. Collective.

    The search begins at the one that `latest` names, as far as it is there: later ones belong to a course that the run
    has left, and come last.

    Raises:
        AgreedError: there are checkpoints, but none is whole.
    """
    steps, problems = sorted(saved_steps(directory), reverse=True), []
    named = _named_by_latest(directory)
    if named in steps:
        steps = [step for step in steps if step <= named] + [step for step in steps if step > named]
    elif steps and named is not None:
        problems.append(f"{directory / LATEST} names step {named}, of which there is no complete checkpoint")
    for step in steps:
        try:
            with all_ranks_agree():
                checkpoint = open_checkpoint(directory / f"global_step{step}")
            verify_together(checkpoint)
        except UserError as error:
            problems.append(str(error))
            continue
        return checkpoint, problems
    with all_ranks_agree():
        if problems or any(directory.glob("global_step*")):
            first = problems[0] if problems else f"none of the folders has its {NOTE}"
            raise UserError(
                f"no checkpoint in {directory} is whole ({first}). Restore one, or start anew with --overwrite."
            )
    return None, []


def _named_by_latest(directory: Path) -> int | None:
    try:
        tag = (directory / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    step = tag.removeprefix("global_step")
    return int(step) if tag.startswith("global_step") and step.isascii() and step.isdigit() else None


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put weights, optimizer and random state of a checkpoint into the engine, whatever layout wrote it. Collective.

    Raises:
        UserError: on every rank, the checkpoint lacks something.
        RuntimeError: states on NVMe, DeepSpeed found nothing to load.
    """
    deepspeed = engine.deepspeed
    if on_nvme(engine.config):
        path, _ = deepspeed.load_checkpoint(str(checkpoint.folder.parent), tag=checkpoint.folder.name)
        if path is None:
            raise RuntimeError(f"DeepSpeed did not load {checkpoint.folder}")
    else:
        with all_ranks_agree():
            state = TrainingState(checkpoint.folder)
        restore(engine, state)
        deepspeed.global_steps = checkpoint.step
    scaler = getattr(deepspeed.optimizer, "loss_scaler", None)
    for name, value in checkpoint.note["loss_scale"].items():
        setattr(scaler, name, value)
    file = checkpoint.folder / f"rng_{dist.get_rank():05d}.pt"
    if checkpoint.note["layout"] == layout_values(engine.topology, engine.config) and file.exists():
        _restore_random_state(torch.load(file, map_location="cpu", weights_only=True), engine.device)


def on_nvme(ds_config: dict[str, Any]) -> bool:
    """Whether optimizer states lie in files that DeepSpeed alone reads."""
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device") == "nvme"


def _loss_scale(engine: Engine) -> dict[str, float]:
    """The numbers of the loss scaler; empty where precision needs none."""
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    if scaler is None or precision(engine.config) != "fp16":
        return {}
    return {name: value for name, value in vars(scaler).items() if isinstance(value, (int, float))}


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
