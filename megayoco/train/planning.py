"""Memory, bytes sent, time and utilisation of a run on a cluster, before it runs; and the layout that suits it best.

Time is counted, not simulated: operations over peak times an assumed efficiency, bytes over bandwidth times an assumed
efficiency, nothing overlapped but what DeepSpeed overlaps on the data axis: with its overlap_comm, and no pipeline, up
to half of the computation's time hides traffic, which is told apart. Its use is to compare layouts.

    a micro-batch on a stage   products / (peak e_m) + attention / (peak e_a) + its bytes on every axis / bandwidth
    a step of M micro-batches  the sum over stages, and M - 1 times the slowest of them (the pipeline's bubble included)
                               + gradients and parameters over the data axis + offloaded states over the host link

Forward parts count as often as they run (megayoco/train/volume.py), backward of products twice, of attention, whose
scores are made again, 2.5 times. Causal attention is counted without its masked half. Of the P ranks of a sequence the
busiest has 1 + (1 - 1/P) / n times the mean of full and cross attention. What retention does within and between its
pieces counts as attention.

Model FLOP utilisation = operations that the model needs (megayoco/model/flops.py: forward and twice as much for
backward, nothing that runs again; document borders are taken to hide no pair) / (seconds x peak of all GPUs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from megayoco.config import ModelConfig, RunConfig
from megayoco.errors import UserError
from megayoco.model.flops import block_flops, block_pairs, training_flops_per_sequence, visible_pairs
from megayoco.train.activations import Activations, StageBlocks, Work, step_activations
from megayoco.train.memory import (
    AUTO_SHARE,
    MemoryEstimate,
    choose_bands,
    compute_width,
    estimate_stage,
    phase_work,
    possible_bands,
    stage_blocks,
    stage_parameters,
)
from megayoco.train.phases import phase_label
from megayoco.train.volume import forward_runs, is_recomputed, micro_batch_volume, step_volume

MOST_BANDS = 1024
GOOD_CHUNK = 4096
"""Tokens of a chunk that a search goes below only for want of memory: its model of time does not know that small ones
are slow."""
HIDDEN = 0.5
"""Share of a step's computation that can hide DeepSpeed's traffic where its overlap_comm is on."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run would have; rates are of one GPU."""

    gpus: int
    gpu_memory: float
    """Bytes."""
    gpus_per_node: int
    intra_node: float
    """Bytes per second that a GPU sends to others of its node."""
    interconnect: float
    """Bytes per second that a GPU sends to other nodes."""
    host_link: float
    """Bytes per second between a GPU and main memory."""
    peak: float
    """Operations per second in the run's precision."""
    matmul_efficiency: float
    attention_efficiency: float
    network_efficiency: float
    memory_share: float = AUTO_SHARE
    """Share of the memory that may be filled."""

    def bandwidth(self, stride: int, size: int) -> float:
        """Bytes per second of a ring over `size` ranks, `stride` ranks apart. One that leaves the node has as many of
        the node's links to the network as it has members there."""
        if stride * size <= self.gpus_per_node:
            return self.intra_node * self.network_efficiency
        inside = max(1, self.gpus_per_node // stride)
        return min(self.intra_node, inside * self.interconnect) * self.network_efficiency


@dataclass(frozen=True)
class Axes:
    """Sizes of the parallel axes."""

    tensor: int
    pipeline: int
    sequence: int
    data: int

    def __str__(self) -> str:
        return f"tensor {self.tensor} x pipeline {self.pipeline} x sequence {self.sequence} x data {self.data}"


@dataclass(frozen=True)
class PhasePlan:
    """What is expected of one phase."""

    label: str
    sequence_length: int
    bands: int
    chunk: int
    micro_batches: int
    memory: MemoryEstimate
    """Of the fullest rank."""
    fits: bool
    sent: dict[str, float]
    """Bytes that a rank of the slowest stage sends per step, by purpose."""
    model_flops: float
    """Operations of a step that the model needs, per GPU."""
    executed_flops: float
    """Operations of a step that run, per GPU on average."""
    seconds: dict[str, float]
    """Of a step, by cause."""
    hidden_seconds: float
    """Of the traffic on the data axis, beside those: what runs behind the computation."""
    seconds_per_step: float
    mfu: float
    tokens_per_second: float
    """Of all GPUs."""
    steps: int

    @property
    def total_seconds(self) -> float:
        """Of the whole phase."""
        return self.steps * self.seconds_per_step


@dataclass(frozen=True)
class Plan:
    """A run in one layout."""

    axes: Axes
    zero: int
    checkpointing: bool
    phases: list[PhasePlan]

    @property
    def total_seconds(self) -> float:
        """Of all phases."""
        return sum(phase.total_seconds for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return all(phase.fits for phase in self.phases)


def check_batches(run: RunConfig, data: int) -> None:
    """Raises UserError unless the batch of every phase divides over `data` replicas."""
    for number, phase in enumerate(run.phases):
        try:
            phase.micro_batches(data)
        except UserError as error:
            raise UserError(f"phases.{number}: {error}") from None


# -- one layout --------------------------------------------------------------------------------------------------------


def plan_run(run: RunConfig, ds_config: dict[str, Any], axes: Axes, cluster: Cluster) -> Plan:
    """The plan of a run as its config says; `bands: auto` is chosen as the trainer would.

    Args:
        ds_config: as the engine gets it.

    Raises:
        UserError: the batch of a phase does not divide over the replicas, or none of its bands fit.
    """
    phases = []
    for number in range(len(run.phases)):
        bands = run.phase_bands(number)
        if bands == "auto":
            free = cluster.gpu_memory * cluster.memory_share / AUTO_SHARE
            bands = choose_bands(run, number, ds_config, axes, free, gpu=True).bands
        phases.append(plan_phase(run, number, ds_config, axes, bands, cluster))
    return Plan(axes, _zero_stage(ds_config), run.parallel.activation_checkpointing, phases)


def plan_phase(
    run: RunConfig, number: int, ds_config: dict[str, Any], axes: Axes, bands: int, cluster: Cluster
) -> PhasePlan:
    """The plan of one phase with so many bands."""
    draft = _Draft(run, number, axes, bands, compute_width(ds_config), cluster, stage_blocks(run, number, axes))
    return draft.finish(ds_config)


class _Draft:
    """What of a phase does not depend on ZeRO: a search asks for it once."""

    def __init__(
        self,
        run: RunConfig,
        number: int,
        axes: Axes,
        bands: int,
        width: int,
        cluster: Cluster,
        stages: list[StageBlocks],
    ) -> None:
        self.run, self.number, self.axes, self.cluster, self.stages = run, number, axes, cluster, stages
        self.work: Work = phase_work(run, number, axes, width, bands, gpu=True)
        model, documents = run.model, run.phase_data(number).has_borders
        self.micro_batches = run.phases[number].micro_batches(axes.data)
        self.parts: list[Activations] = [
            step_activations(self.work, stage, stage_parameters(model, stage, axes.tensor)) for stage in stages
        ]
        self.volumes = [micro_batch_volume(self.work, stage, documents) for stage in stages]
        self.flops = [_executed_flops(self.work, stage) for stage in stages]
        self.seconds = [self._stage_seconds(*both) for both in zip(self.flops, self.volumes, strict=True)]

    def memory(self, ds_config: dict[str, Any]) -> MemoryEstimate:
        """The need of the fullest rank."""
        found = [
            estimate_stage(self.work, stage, parts, ds_config, self.axes)
            for stage, parts in zip(self.stages, self.parts, strict=True)
        ]
        return max(found, key=lambda estimate: estimate.device)

    def step_seconds(self, ds_config: dict[str, Any]) -> tuple[dict[str, float], float]:
        """Time of a step by cause, and that of the traffic behind it, which counts no more."""
        totals = [sum(seconds.values()) for seconds in self.seconds]
        slowest = self.seconds[totals.index(max(totals))]
        seconds = {cause: self.micro_batches * value for cause, value in slowest.items()}
        seconds["bubble"] = sum(totals) - max(totals)
        computing = sum(seconds.values())
        axes, zero = self.axes, ds_config.get("zero_optimization", {})
        replicas = axes.data * axes.sequence
        data = sum(self.step_volume(ds_config).values()) / self.cluster.bandwidth(axes.tensor, replicas)
        hidden = 0.0
        if zero.get("overlap_comm", _zero_stage(ds_config) == 3) and axes.pipeline == 1:
            hidden = min(data, HIDDEN * computing)
        seconds["data"] += data - hidden
        if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
            # gradients down and parameters up, of this rank's share
            seconds["host"] = self._parameters() / replicas * 2 * self.work.width / self.cluster.host_link
        return seconds, hidden

    def step_volume(self, ds_config: dict[str, Any]) -> dict[str, float]:
        """Bytes over the data axis."""
        replicas = self.axes.data * self.axes.sequence
        return step_volume(self._parameters(), replicas, self.micro_batches, ds_config, self.work.width)

    def finish(self, ds_config: dict[str, Any]) -> PhasePlan:
        """The plan under one DeepSpeed config."""
        phase, cluster = self.run.phases[self.number], self.cluster
        memory, (seconds, hidden) = self.memory(ds_config), self.step_seconds(ds_config)
        total = sum(seconds.values())
        totals = [sum(part.values()) for part in self.seconds]
        volume = self.volumes[totals.index(max(totals))]
        sent = {name: self.micro_batches * count for name, count in volume.items()} | self.step_volume(ds_config)
        needed = training_flops_per_sequence(self.run.model, phase.sequence_length) * phase.batch_size
        executed = sum(sum(flops) for flops in self.flops) * self.micro_batches / self.axes.pipeline
        return PhasePlan(
            label=phase_label(self.run.phases, self.number),
            sequence_length=phase.sequence_length,
            bands=self.work.bands,
            chunk=self.work.chunk,
            micro_batches=self.micro_batches,
            memory=memory,
            fits=memory.device <= cluster.memory_share * cluster.gpu_memory,
            sent=sent,
            model_flops=needed / cluster.gpus,
            executed_flops=executed,
            seconds=seconds,
            hidden_seconds=hidden,
            seconds_per_step=total,
            mfu=needed / (total * cluster.gpus * cluster.peak),
            tokens_per_second=phase.tokens_per_step / total,
            steps=phase.num_steps,
        )

    def _parameters(self) -> float:
        """Of the fullest stage."""
        return max(sum(stage_parameters(self.run.model, stage, self.axes.tensor)) for stage in self.stages)

    def _stage_seconds(self, flops: _Flops, volume: dict[str, float]) -> dict[str, float]:
        """Of a micro-batch on its busiest rank."""
        axes, cluster = self.axes, self.cluster
        busiest = 1 + (1 - 1 / axes.sequence) / self.work.bands
        attention = flops.local + busiest * flops.causal
        seconds = {
            "products": flops.products / (cluster.peak * cluster.matmul_efficiency),
            "attention": attention / (cluster.peak * cluster.attention_efficiency),
        }
        rates = {
            "tensor": cluster.bandwidth(1, axes.tensor),
            "sequence": cluster.bandwidth(axes.tensor, axes.sequence),
            "pipeline": cluster.bandwidth(axes.tensor * axes.sequence * axes.data, axes.pipeline),
            "data": cluster.bandwidth(axes.tensor * axes.sequence, axes.data),  # negatives of memory layers
        }
        for group, rate in rates.items():
            seconds[group] = sum(count for name, count in volume.items() if name.startswith(group)) / rate
        return seconds


class _Flops(NamedTuple):
    """Operations of a micro-batch on one rank, the mean over the ranks of a sequence."""

    products: float
    """Matrix products over tokens."""
    local: float
    """Retention, windows and blocks."""
    causal: float
    """Cross, full and memory attention."""


def _executed_flops(work: Work, stage: StageBlocks) -> _Flops:
    products = local = causal = 0.0
    share = work.batch / (work.sequence * work.tensor)
    for kind in stage.kinds:
        product, pairs = _forward_flops(work.model, kind, work.length)
        runs = forward_runs(work, stage, kind) + (1.0 if is_recomputed(work, kind) else 0.0)
        products += share * product * (runs + 2)
        if kind in ("cross", "full", "memory"):
            causal += share * pairs * (runs + 2.5)
        else:
            local += share * pairs * (runs + 2.5)
    return _Flops(products, local, causal)


@cache
def _forward_flops(model: ModelConfig, kind: str, length: int) -> tuple[float, float]:
    """Operations of one block's forward over a sequence: matrix products over tokens, and the rest."""
    kinds = ["embedding", *model.layer_pattern(), "head"]
    total = _block_flops(model, length)[kinds.index(kind)]
    if kind in ("cross", "full", "memory"):
        rest = 4 * model.dim * visible_pairs(length)
    elif kind == "window":
        rest = 4 * model.dim * visible_pairs(length, model.window)
    elif kind == "block":
        rest = 4 * model.dim * block_pairs(length, model.memory_window)
    elif kind == "retention":
        per_token = 10 * model.dim**2 + 2 * model.dim * model.num_self_heads + 6 * model.dim * model.hidden_dim
        rest = total - per_token * length
    else:
        rest = 0
    return float(total - rest), float(rest)


@cache
def _block_flops(model: ModelConfig, length: int) -> list[int]:
    return block_flops(model, length)


# -- the search --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchResult:
    """The layouts that fit, fastest first, and why others do not serve."""

    plans: list[Plan]
    dropped: Counter[str]
    """How many layouts, by reason."""
    tried: int


def search_layouts(run: RunConfig, ds_config: dict[str, Any], cluster: Cluster) -> SearchResult:
    """Tries tensor, pipeline and sequence sizes, bands of every phase, ZeRO stages and checkpointing; batch sizes and
    what else the configs say stay.

    Args:
        ds_config: as the engine gets it; its ZeRO stage is replaced.
    """
    plans: list[Plan] = []
    dropped: Counter[str] = Counter()
    tried = 0
    width = compute_width(ds_config)
    for axes in _axes(cluster.gpus):
        reason = _unfit(run, axes, cluster)
        levels = _zero_levels(axes, width)
        if reason is not None:
            tried += 1
            dropped[reason] += 1
            continue
        for checkpointing in (False, True):
            variant = replace(run, parallel=replace(run.parallel, activation_checkpointing=checkpointing))
            drafts = [_drafts(variant, number, axes, width, cluster) for number in range(len(run.phases))]
            for level in levels:
                tried += 1
                config = {**ds_config, "zero_optimization": {**ds_config.get("zero_optimization", {}), "stage": level}}
                chosen = [_fastest(options, config, cluster) for options in drafts]
                if all(chosen):
                    found = [draft.finish(config) for draft in chosen if draft is not None]
                    plans.append(Plan(axes, level, checkpointing, found))
                else:
                    number = chosen.index(None)
                    label = phase_label(run.phases, number)
                    dropped[f"phase {label} does not fit into {cluster.memory_share:.0%} of the memory"] += 1
    plans.sort(key=lambda plan: (round(plan.total_seconds, 6), plan.zero, plan.axes.pipeline, plan.axes.tensor))
    return SearchResult(plans, dropped, tried)


def _axes(gpus: int) -> Iterator[Axes]:
    """Every way to write the number of GPUs as a product of four."""
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tensor in divisors:
        for pipeline in (n for n in divisors if gpus % (tensor * n) == 0):
            rest = gpus // (tensor * pipeline)
            for sequence in (n for n in divisors if rest % n == 0):
                yield Axes(tensor, pipeline, sequence, rest // sequence)


def _unfit(run: RunConfig, axes: Axes, cluster: Cluster) -> str | None:
    """Why a layout cannot be, whatever its memory."""
    if axes.tensor > cluster.gpus_per_node:
        return "tensor ranks on several nodes"
    parallel = replace(run.parallel, tensor=axes.tensor, pipeline=axes.pipeline, sequence=axes.sequence, bands=1)
    try:
        parallel.validate(run.model, cluster.gpus)
    except UserError:
        return "the model does not divide over the tensor or pipeline ranks"
    for number, phase in enumerate(run.phases):
        label = phase_label(run.phases, number)
        if phase.batch_size % (phase.micro_batch_size * axes.data):
            return f"batch_size of phase {label} does not divide over the replicas"
        unit = 1 if run.model.memory_window is None or axes.sequence == 1 else run.model.memory_window
        if phase.sequence_length % (axes.sequence * unit):
            return f"sequence_length of phase {label} does not divide over the sequence ranks"
    return None


def _zero_levels(axes: Axes, width: int) -> list[int]:
    # 16-bit training without ZeRO runs as ZeRO 1; with one replica nothing can be cut; pipelines take 0 and 1
    first = 0 if width == 4 else 1
    if axes.data * axes.sequence == 1:
        return [first]
    return [level for level in (0, 1, 2, 3) if level >= first and (level <= 1 or axes.pipeline == 1)]


def _drafts(run: RunConfig, number: int, axes: Axes, width: int, cluster: Cluster) -> list[_Draft]:
    """One for each number of bands worth trying: powers of two."""
    stages = stage_blocks(run, number, axes)
    counts = [n for n in possible_bands(run, number, axes) if n <= MOST_BANDS and n & (n - 1) == 0]
    return [_Draft(run, number, axes, bands, width, cluster, stages) for bands in counts]


def _fastest(drafts: list[_Draft], ds_config: dict[str, Any], cluster: Cluster) -> _Draft | None:
    limit = cluster.memory_share * cluster.gpu_memory
    fitting = [draft for draft in drafts if draft.memory(ds_config).device <= limit]
    good = [draft for draft in fitting if draft.work.bands == 1 or draft.work.chunk >= GOOD_CHUNK]
    return min(good or fitting[:1], key=lambda draft: sum(draft.step_seconds(ds_config)[0].values()), default=None)


def _zero_stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))
