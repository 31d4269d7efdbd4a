"""Everything that happens before the first step: all checks, then the directory, then the engine.

The order matters: what can be refused is refused while nothing has been written, deleted or allocated.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megayoco.config import RunConfig
from megayoco.config.parallel import check_bands
from megayoco.convert.checkpoints import recover
from megayoco.convert.weights import Weights
from megayoco.data.batches import Batches, ValidationBatches
from megayoco.data.datasets import Datasets, build_datasets, resolve_tokenizer, with_blend_files
from megayoco.dsconfig import load_deepspeed_config, precision
from megayoco.errors import UserError
from megayoco.model.parameters import count_parameters
from megayoco.ops.backends import describe_backends
from megayoco.parallel.agreement import all_ranks_agree, barrier
from megayoco.parallel.launch import Launch
from megayoco.parallel.topology import Topology, build_topology
from megayoco.train.checkpoint import (
    check_resumable,
    check_tokenizer,
    layout_text,
    layout_values,
    load,
    newest_whole,
    on_nvme,
    verify_together,
)
from megayoco.train.engine import Engine, engine_config
from megayoco.train.evaluation import check_evaluations
from megayoco.train.holdings import restore
from megayoco.train.memory import MemoryEstimate, check_memory, estimate_memory, resolve_bands
from megayoco.train.metrics import Peak, find_peak
from megayoco.train.output import OutputPlan, check_data, plan_output, prepare_output, record_data, recorded_data
from megayoco.train.phases import Timeline, phase_label, phase_notes
from megayoco.train.starting import StartingState, check_start, load_run, read_start, start_lines


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    config: str
    deepspeed_config: str | None
    overrides: tuple[str, ...]
    resume: str | None
    """`latest`, `auto` or a tag: see `plan_output`."""
    overwrite: bool


class Session:
    """A checked and built run, standing before its next step.

    Args:
        request: the command line.
        launch, device: where this process stands; torch.distributed is initialised.

    Raises:
        UserError: on every rank, for whatever any rank finds wrong.
    """

    def __init__(self, request: Request, launch: Launch, device: torch.device) -> None:
        self.launch, self.device = launch, device
        with all_ranks_agree():
            self.run: RunConfig = with_blend_files(load_run(request.config, list(request.overrides)))
            data_size = self._check_layout()
            self.ds_config = load_deepspeed_config(request.deepspeed_config, self.run, data_size, device)
            self._check_precision()
            self.backends = describe_backends(device)
        self.topology: Topology = build_topology(self.run.parallel, self.run.model)
        config = engine_config(self.ds_config)
        # the same numbers on every rank, so an error is everyone's
        self.run, self._band_lines = resolve_bands(self.run, config, self.topology, device, launch.local_size or 1)
        self.timeline = Timeline.of(self.run)
        with all_ranks_agree():
            self.memory: MemoryEstimate = estimate_memory(self.run, config, self.topology)
            check_memory(self.memory, device, launch.local_size or 1, self.run)
        self.plan: OutputPlan = self._plan(request)
        with all_ranks_agree():
            if self.plan.checkpoint is not None:
                check_resumable(self.plan.checkpoint, self.run, self.topology, config)
        with all_ranks_agree():
            self.tokenizer = self._tokenizer()
            if self.plan.checkpoint is not None:
                check_tokenizer(self.plan.checkpoint, self.tokenizer)
            step = self.plan.checkpoint.step if self.plan.checkpoint else 0
            check_evaluations(self.run, self.tokenizer, self.timeline.position(step).phase)
        with all_ranks_agree():
            start = self._starting_weights()
        self.step = self.plan.checkpoint.step if self.plan.checkpoint else 0
        # the data of every phase, so that a prefix missing in the last one does not end the run after a week
        position = self.timeline.position(self.step)
        first = position.phase
        datasets = {number: self._build_datasets(number) for number in range(first, len(self.run.phases))}
        self._data_lines = [line for number in datasets for line in self._describe_data(number, datasets[number])]
        self._datasets: dict[int, Datasets] = {first: datasets[first]}
        with all_ranks_agree():
            if self.plan.checkpoint is not None and position.consumed_samples:
                check_data(self.plan, first, datasets[first])
        with all_ranks_agree():
            if launch.rank == 0:
                prepare_output(self.plan, self.run)
                record_data(self.plan, datasets)
                self.tokenizer.save(self.directory / "tokenizer")
        torch.manual_seed(self.run.seed)
        self.engine = Engine(self.run, self.ds_config, self.topology, device)
        self.engine.begin_phase(first)
        if self.plan.checkpoint is not None:
            load(self.engine, self.plan.checkpoint)
        elif start is not None:
            restore(self.engine, StartingState(start))
        self.parameters = count_parameters(self.engine.module, self.topology)
        self.peak: Peak = find_peak(device, precision(self.ds_config))
        barrier()

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return self.plan.directory

    def batches(self, number: int, consumed_samples: int) -> Batches:
        """Training batches of a phase from the given sample on."""
        return Batches(
            self._datasets_of(number).train, consumed_samples=consumed_samples, **self._batch_arguments(number)
        )

    def validation_batches(self, number: int) -> ValidationBatches | None:
        """The validation batches of a phase; None where it has no validation data."""
        valid = self._datasets_of(number).valid
        if valid is None:
            return None
        return ValidationBatches(valid, num_batches=self.run.validation.batches, **self._batch_arguments(number))

    def banner(self) -> list[str]:
        """What the run is, line by line."""
        run, topology = self.run, self.topology
        body = run.model.parameter_count()["body"]
        zero = self.engine.config["zero_optimization"]["stage"]
        layout = f"tensor {topology.tensor} x pipeline {topology.pipeline} x sequence {topology.sequence}"
        start = f"resumed at step {self.step}" if self.plan.checkpoint else "new run"
        lines = {
            "model": f"{run.model.pattern}, {self.parameters:,} parameters ({body:,} without embeddings), "
            f"{run.model.layers} layers of {run.model.dim}",
            "layout": f"{layout} x data {topology.data} = {topology.world_size} processes "
            f"(launcher: {self.launch.launcher}), {torch.get_num_threads()} thread(s) each",
            "engine": f"DeepSpeed ZeRO {zero}, {precision(self.ds_config)}, {self.engine.optimizer_name}, "
            f"on {self._device_name()}",
            **self.backends,
            "memory": self.memory.describe(),
            "peak": self.peak.source,
            "run": f"{start}, {self.timeline.total_steps} steps in {len(run.phases)} phase(s), "
            f"{self.timeline.total_tokens:,} tokens, output {self.directory}",
        }
        width = max(map(len, lines))
        more = [("weights", line) for line in self._start_lines]
        more += [("checkpoint", line) for line in self._checkpoint_lines()]
        more += [("bands", line) for line in self._band_lines]
        more += [("data", line) for line in self._data_lines] + [("note", line) for line in phase_notes(run)]
        return [f"{name:<{width}}  {value}" for name, value in [*lines.items(), *more]]

    def identities(self) -> dict[str, Any]:
        """Of tokenizer and data, for the note of a checkpoint."""
        return {"tokenizer": self.tokenizer.identity(), "data": recorded_data(self.plan)}

    def _plan(self, request: Request) -> OutputPlan:
        """What to do with the output directory. The checkpoint to go on from is whole, byte for byte."""
        with all_ranks_agree():
            if self.launch.rank == 0 and request.resume:
                recover(Path(self.run.output_dir) / "checkpoints")
        with all_ranks_agree():
            plan = plan_output(self.run, resume=request.resume, overwrite=request.overwrite)
        self._damaged: list[str] = []
        if request.resume == "auto":
            checkpoint, self._damaged = newest_whole(plan.checkpoints)
            return dataclasses.replace(plan, checkpoint=checkpoint)
        if plan.checkpoint is not None:
            verify_together(plan.checkpoint)
        return plan

    def _starting_weights(self) -> Weights | None:
        """What a new run starts with in place of its seed."""
        self._start_lines: list[str] = []
        if self.run.model.init_from is None or self.plan.checkpoint is not None:
            return None
        if on_nvme(self.ds_config):
            raise UserError(
                "model.init_from cannot fill optimizer states on NVMe. Set zero_optimization.offload_optimizer.device"
                " to cpu; after the first checkpoint, --resume goes on there with cpu as well."
            )
        source = Path(self.run.model.init_from).resolve()
        if any(source == path.resolve() or path.resolve() in source.parents for path in self.plan.remove) or (
            self.plan.remove and source == self.directory.resolve()
        ):
            raise UserError(
                f"--overwrite would delete model.init_from {source} before it is read. Choose another output_dir."
            )
        weights = read_start(self.run.model.init_from)
        check_start(weights, self.run.model)
        self._start_lines = start_lines(weights, self.run.model, self.tokenizer)
        return weights

    def _checkpoint_lines(self) -> list[str]:
        """Which checkpoint the run goes on from, where that is not a matter of course."""
        lines = [f"passed over: {problem}" for problem in self._damaged]
        if self.plan.checkpoint is not None:
            written = self.plan.checkpoint.note["layout"]
            now = layout_values(self.topology, self.engine.config)
            if written != now:
                lines.append(f"{self.plan.checkpoint.folder.name} was written at {layout_text(written)}: resharded")
        return lines

    def _check_layout(self) -> int:
        run, world = self.run, self.launch.world_size
        run.parallel.validate(run.model, world)
        data_size = run.parallel.data(world)
        for number, phase in enumerate(run.phases):
            check_bands(run.phase_bands(number), run.model, f"phases.{number}.bands")
            try:
                phase.micro_batches(data_size)
            except UserError as error:
                raise UserError(f"phases.{number}: {error}") from None
        return data_size

    def _check_precision(self) -> None:
        # a walk over bands makes all gradients before DeepSpeed's loss scale is known: what overflows in it would
        # overflow at every scale
        if precision(self.ds_config) != "fp16":
            return
        for number, phase in enumerate(self.run.phases):
            if self.run.phase_bands(number) != 1:
                key = "parallel.bands" if phase.bands is None else f"phases.{number}.bands"
                raise UserError(
                    f"{key} needs bf16 or fp32: in fp16 the loss scale does not reach into bands. Set it to 1."
                )

    def _tokenizer(self) -> Any:
        tokenizer = resolve_tokenizer(self.run.data, *map(self.run.phase_data, range(len(self.run.phases))))
        if tokenizer.vocab_size > self.run.model.vocab_size:
            raise UserError(
                f"The tokenizer {tokenizer.model or tokenizer.type} has {tokenizer.vocab_size} ids, model.vocab_size "
                f"is {self.run.model.vocab_size}. Set model.vocab_size to at least {tokenizer.vocab_size}."
            )
        return tokenizer

    def _build_datasets(self, number: int) -> Datasets:
        with all_ranks_agree():
            return build_datasets(
                self.run.phase_data(number),
                sequence_length=self.run.phases[number].sequence_length,
                seed=self.run.seed,
                vocab_size=self.run.model.vocab_size,
                batch_size=self.run.phases[number].batch_size,
                tokenizer=self.tokenizer,
                default_cache_dir=os.path.join(self.run.output_dir, "data_cache"),
            )

    def _describe_data(self, number: int, datasets: Datasets) -> list[str]:
        """What a phase reads, and how often: many epochs of a small dataset are rarely meant."""
        tokens = self.timeline.samples_until_end(number) * self.run.phases[number].sequence_length
        label, sources, most = phase_label(self.run.phases, number), datasets.shares, 10
        lines = [
            f"phase {label}: {100 * source.share:.4g} % of the samples from {source.prefix}, "
            f"{source.tokens_per_epoch:,} tokens an epoch, {source.share * tokens / source.tokens_per_epoch:.3g} epochs"
            for source in sources[:most]
        ]
        if len(sources) > most:
            lines.append(f"phase {label}: and {len(sources) - most} more datasets")
        return lines + [f"phase {label}: {note}" for note in datasets.notes]

    def _datasets_of(self, number: int) -> Datasets:
        if number not in self._datasets:
            self._datasets = {number: self._build_datasets(number)}
        return self._datasets[number]

    def _batch_arguments(self, number: int) -> dict[str, Any]:
        phase = self.run.phases[number]
        return {
            "batch_size": phase.batch_size,
            "micro_batch_size": phase.micro_batch_size,
            "data_rank": self.topology.data_rank,
            "data_size": self.topology.data,
            "document_mask": self.run.phase_data(number).document_mask,
        }

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
