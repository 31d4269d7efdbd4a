"""What one rank will need, before anything is allocated: a run that cannot fit fails in seconds, not at step one; and
the number of bands that makes a phase fit.

Model states are counted exactly, stage by stage; activations by megayoco/train/activations.py, which measured peaks
confirm to 10 %. Not counted: fragmentation and the libraries' own workspaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as dist

from megayoco.config import ModelConfig, RunConfig
from megayoco.dsconfig import precision
from megayoco.errors import UserError
from megayoco.train.activations import Activations, StageBlocks, Work, step_activations
from megayoco.train.phases import phase_label

GIB = 1024**3

TOLERANCE = 0.1
"""How far the estimate of activations may be off: a run is refused only where it cannot fit even so."""
AUTO_SHARE = 0.85
"""Share of the free memory that `bands: auto` fills; the rest is for fragmentation and the libraries' buffers."""
SMALLEST_CHUNK = 256
"""Tokens of a chunk that `bands: auto` does not go below: smaller ones starve every kernel."""


class Layout(Protocol):
    """The sizes of the parallel axes: a Topology, or a plan for one."""

    @property
    def tensor(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def data(self) -> int: ...
    @property
    def pipeline(self) -> int: ...


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that the fullest rank holds at once, on the device unless offloaded."""

    weights: float
    gradients: float
    optimizer: float
    """Moments, and the fp32 copy of the weights where there is one."""
    activations: float
    """Kept between forward and backward, of the phase that needs most; with bands also the shared keys and values and
    the sums of gradients of a walk."""
    host: float
    """Main memory that offloaded states need."""
    gathered: float = 0.0
    """ZeRO 3: parameters of other ranks that are whole at a time."""
    buckets: float = 0.0
    """DeepSpeed's buffers for gradients on their way to other ranks (on a GPU)."""
    parts: Activations = field(default_factory=Activations)
    """The activations by what they are."""

    @property
    def device(self) -> float:
        """All that lies on the device."""
        return self.least + TOLERANCE * self.activations + self.gathered + self.buckets

    @property
    def least(self) -> float:
        """What the device needs even if the activations were estimated too high."""
        return self.weights + self.gradients + self.optimizer + (1 - TOLERANCE) * self.activations

    def describe(self) -> str:
        """One line for the start of a run."""
        names = ("weights", "gradients", "optimizer", "activations", "gathered", "buckets")
        parts = [(name, getattr(self, name)) for name in names]
        shown = ", ".join(f"{name} {size_text(size)}" for name, size in parts if size or name in names[:4])
        text = f"about {size_text(self.device)} per process: {shown}"
        return text + (f"; {size_text(self.host)} offloaded to main memory" if self.host else "")


def estimate_memory(
    run: RunConfig, ds_config: dict[str, Any], layout: Layout, gpu: bool | None = None
) -> MemoryEstimate:
    """The need of the fullest rank, in the phase that needs most; one with `bands: auto` counts with the most that it
    may get. `gpu` None: as this machine."""
    estimates = []
    for number in range(len(run.phases)):
        bands = run.phase_bands(number)
        if bands == "auto":
            *_, bands = possible_bands(run, number, layout)
        estimates.append(estimate_phase(run, number, ds_config, layout, bands, gpu))
    return max(estimates, key=lambda estimate: estimate.device)


def estimate_phase(
    run: RunConfig, number: int, ds_config: dict[str, Any], layout: Layout, bands: int, gpu: bool | None = None
) -> MemoryEstimate:
    """The need of the fullest rank in phase `number` with so many bands."""
    gpu = torch.cuda.is_available() if gpu is None else gpu
    work = phase_work(run, number, layout, compute_width(ds_config), bands, gpu)
    estimates = []
    for stage in stage_blocks(run, number, layout):
        parts = step_activations(work, stage, stage_parameters(run.model, stage, layout.tensor))
        estimates.append(estimate_stage(work, stage, parts, ds_config, layout))
    return max(estimates, key=lambda estimate: estimate.device + estimate.host)


def estimate_stage(
    work: Work, stage: StageBlocks, parts: Activations, ds_config: dict[str, Any], layout: Layout
) -> MemoryEstimate:
    """The need of a rank that holds `stage`, given its activations."""
    zero = ds_config.get("zero_optimization", {})
    level = zero.get("stage", 0)
    shards = layout.data * layout.sequence
    width = work.width
    local = sum(stage_parameters(work.model, stage, layout.tensor))
    weights = local * width / (shards if level == 3 else 1)
    fp32_sums = ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    gradients = local * (4 if fp32_sums else width) / (shards if level >= 2 else 1)
    master = 0 if width == 4 and level == 0 else 4
    optimizer = local * (master + 8) / (shards if level >= 1 else 1)
    host = gathered = buckets = 0.0
    if level == 3:
        live = local if work.bands > 1 else min(local, zero.get("stage3_max_live_parameters", 1e9))
        gathered = live * width * (1 - 1 / shards)
    if work.gpu and level in (1, 2):
        copies = 2 if zero.get("overlap_comm") and layout.pipeline == 1 else 1
        staged = 4 if level == 1 and fp32_sums else width
        buckets = zero.get("reduce_bucket_size", 5e8) * staged * copies
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        host, optimizer = host + optimizer, 0.0
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        host, weights = host + weights, 0.0
    return MemoryEstimate(weights, gradients, optimizer, parts.total, host, gathered, buckets, parts)


def compute_width(ds_config: dict[str, Any]) -> int:
    """Bytes of a number of the compute dtype."""
    return 4 if precision(ds_config) == "fp32" else 2


def phase_work(run: RunConfig, number: int, layout: Layout, width: int, bands: int, gpu: bool) -> Work:
    """What the activations of a phase depend on; `width` as of `compute_width`."""
    phase = run.phases[number]
    return Work(
        model=run.model,
        batch=phase.micro_batch_size,
        length=phase.sequence_length,
        width=width,
        tensor=layout.tensor,
        sequence=layout.sequence,
        bands=bands,
        order=run.parallel.band_order,
        checkpointing=run.parallel.activation_checkpointing,
        gpu=gpu,
        cross_batch=phase.cross_batch,
        replicas=layout.data,
    )


def stage_blocks(run: RunConfig, number: int, layout: Layout) -> list[StageBlocks]:
    """The blocks of every pipeline stage in order, and how many micro-batches of phase `number` each has under way: one
    more than there are stages behind it, since forward and backward take turns."""
    kinds = ["embedding", *run.model.layer_pattern(), "head"]
    stages = layout.pipeline
    if stages == 1:
        return [StageBlocks(kinds)]
    from megayoco.model.pipeline import split_stages  # late: takes seconds

    borders = split_stages(run.model, stages, run.phases[0].sequence_length)
    most = run.phases[number].micro_batches(layout.data)
    found = []
    for stage, (start, stop) in enumerate(pairwise(borders)):
        made_before, made = "shared_kv" in kinds[:start], "shared_kv" in kinds[:stop]
        blocks = StageBlocks(
            kinds[start:stop],
            in_flight=min(stages - stage, most),
            shared_in=made_before and "cross" in kinds[start:],
            shared_out=made and "cross" in kinds[stop:],
        )
        found.append(blocks)
    return found


def stage_parameters(model: ModelConfig, stage: StageBlocks, tensor: int) -> tuple[float, float]:
    """Parameters that one tensor rank has of a stage: in front of the cross layers, and in them with the head."""
    before = sum(block_parameters(model, kind, tensor) for kind in stage.kinds if kind not in ("cross", "head"))
    behind = sum(block_parameters(model, kind, tensor) for kind in stage.kinds if kind in ("cross", "head"))
    if model.tie_embeddings and stage.has_head and "embedding" not in stage.kinds:
        behind += block_parameters(model, "embedding", tensor)  # the last stage's copy
    return before, behind


def block_parameters(model: ModelConfig, kind: str, tensor: int) -> float:
    """Parameters that one tensor rank has of a block: an entry of `layer_pattern()`, `embedding` or `head`. Key-value
    heads fewer than ranks are replicated, norms always."""
    D, kv_dim = model.dim, max(model.num_kv_heads // tensor, 1) * model.head_dim
    if kind == "embedding":
        return model.vocab_size * D / tensor
    if kind == "head":
        return D + (0 if model.tie_embeddings else model.vocab_size * D / tensor)
    if kind == "shared_kv":
        return 2 * kv_dim * D + D
    heads, kv_heads = model.memory_heads
    memory_dim = max(kv_heads // tensor, 1) * (D // heads)
    mixer = {
        "retention": (5 * D * D + model.num_self_heads * D) / tensor,
        "window": 4 * D * D / tensor,
        "full": 2 * D * D / tensor + 2 * kv_dim * D,
        "cross": 2 * D * D / tensor,
        **dict.fromkeys(("memory", "block"), 2 * D * D / tensor + 2 * memory_dim * D),
    }[kind]
    return mixer + 3 * D * model.hidden_dim / tensor + 2 * D


# -- bands: auto -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BandChoice:
    """How many bands a phase gets, and why."""

    bands: int
    line: str
    """For the start of a run."""


def possible_bands(run: RunConfig, number: int, layout: Layout) -> Iterator[int]:
    """Numbers of bands that divide this rank's tokens of a sequence into chunks not too small, ascending; 1 always."""
    length, ranks = run.phases[number].sequence_length, layout.sequence
    yield 1
    if run.model.pattern != "yoco" or run.model.memory_layers or length % ranks:
        return
    tokens = length // ranks
    yield from (n for n in range(2, tokens // SMALLEST_CHUNK + 1) if tokens % n == 0)


def choose_bands(
    run: RunConfig,
    number: int,
    ds_config: dict[str, Any],
    layout: Layout,
    free: float,
    gpu: bool | None = None,
) -> BandChoice:
    """The fewest bands with which phase `number` fits.

    Args:
        ds_config: as the engine gets it.
        layout: sizes of the axes.
        free: bytes that one process may use, before anything of the run is allocated; the least of all ranks.
        gpu: whether that is a GPU's memory; None: as this machine.

    Raises:
        UserError: even the smallest chunk does not fit.
    """
    label, length = f"phase {phase_label(run.phases, number)}", run.phases[number].sequence_length
    if run.model.pattern != "yoco":
        return BandChoice(1, f"{label}: 1 (auto; the {run.model.pattern} pattern has no shared keys and values)")
    if run.model.memory_layers:
        return BandChoice(1, f"{label}: 1 (auto; layers with memory cannot be trained in bands)")
    gpu = torch.cuda.is_available() if gpu is None else gpu
    room, bands, estimate = AUTO_SHARE * free, 1, None
    for bands in possible_bands(run, number, layout):
        estimate = estimate_phase(run, number, ds_config, layout, bands, gpu)
        need = estimate.device + (0.0 if gpu else estimate.host)
        if need <= room:
            chunk = length // (layout.sequence * bands)
            return BandChoice(
                bands,
                f"{label}: {bands} (auto), chunks of {chunk:,} tokens; about {size_text(need)} of {size_text(room)},"
                f" {AUTO_SHARE:.0%} of what is free",
            )
    assert estimate is not None
    chunk = length // (layout.sequence * bands)
    raise UserError(
        f"phases.{number}: bands auto finds no number that fits: {bands}, with chunks of {chunk} tokens, still need"
        f" {estimate.describe()}; {AUTO_SHARE:.0%} of what is free are {size_text(room)}. {_remedy(run)}"
    )


def resolve_bands(
    run: RunConfig, ds_config: dict[str, Any], layout: Layout, device: torch.device, local_size: int
) -> tuple[RunConfig, list[str]]:
    """The run with a number in place of every `bands: auto`, and what was chosen, line by line. Collective where
    processes must agree: the one with the least free memory decides.

    Raises:
        UserError: a phase cannot fit.
    """
    wanted = [number for number in range(len(run.phases)) if run.phase_bands(number) == "auto"]
    if not wanted:
        return run, []
    free = free_memory(device, local_size)
    if dist.is_initialized() and dist.get_world_size() > 1:
        least = torch.tensor(free, dtype=torch.float64, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        free = float(least)
    phases, lines = list(run.phases), []
    for number in wanted:
        choice = choose_bands(run, number, ds_config, layout, free, device.type == "cuda")
        phases[number] = replace(phases[number], bands=choice.bands)
        lines.append(choice.line)
    return replace(run, phases=phases), lines


# -- what there is -----------------------------------------------------------------------------------------------------


def free_memory(device: torch.device, local_size: int) -> float:
    """Bytes that one process may still use on its device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return available_host_memory() / local_size


def available_memory(device: torch.device, local_size: int) -> tuple[float, str]:
    """Bytes that one process may use on its device, and what they are called in a message."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return float(total), f"{torch.cuda.get_device_name(device)} has {size_text(total)} ({size_text(free)} free now)"
    host = available_host_memory()
    share = host / local_size
    processes = "process has" if local_size == 1 else f"of {local_size} processes on this machine has"
    return share, f"this machine has {size_text(host)} free, so each {processes} {size_text(share)}"


def available_host_memory() -> float:
    """Free main memory in bytes, within the limit of a container if there is one."""
    free = float(psutil.virtual_memory().available)
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = (Path(name).read_text().strip() for name in (limit_file, used_file))
            if limit != "max":
                free = min(free, max(0.0, float(limit) - float(used)))
        except (OSError, ValueError):
            continue
    return free


def check_memory(estimate: MemoryEstimate, device: torch.device, local_size: int, run: RunConfig | None = None) -> None:
    """Raises UserError if the estimate exceeds what this rank's device, or the machine for offloaded states, has. `run`
    lets the message name what helps it."""
    capacity, words = available_memory(device, local_size)
    need = estimate.least + (estimate.host if device.type == "cpu" else 0.0)
    if need > capacity:
        raise UserError(f"The run needs {estimate.describe()}; {words}. {_remedy(run)}")
    if device.type != "cpu" and estimate.host > available_host_memory() / local_size:
        raise UserError(
            f"The run offloads {size_text(estimate.host)} per process to main memory; each of {local_size} processes "
            f"on this machine has {size_text(available_host_memory() / local_size)}. {_remedy(run)}"
        )


def _remedy(run: RunConfig | None) -> str:
    has_memory = run is not None and bool(run.model.memory_layers)
    bands = "parallel.bands, " if run is not None and run.model.pattern == "yoco" and not has_memory else ""
    axes = (
        "parallel.tensor or parallel.pipeline"
        if has_memory
        else ("parallel.tensor, parallel.pipeline or parallel.sequence")
    )
    return (
        f"Use more processes with {axes}, {bands}a higher ZeRO stage, "
        "parallel.activation_checkpointing=true, a smaller micro_batch_size or a smaller model."
    )


def size_text(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 1024**2:.1f} MiB"
