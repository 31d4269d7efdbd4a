"""One training step, the same to the caller whether DeepSpeed runs a plain module (ZeRO 0-3) or pipeline stages (0-1).

The loss of a step is the sum of the losses of all targets of the global batch, divided by their number, in every
layout; with `loss: row_mean` the mean over all rows of the global batch of their targets' mean. DeepSpeed averages
gradients over data ranks (and pipeline micro-batches) whatever they held, so every micro-batch's loss is multiplied
beforehand by what will be divided out, over the global number of targets or rows.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megayoco.config import RunConfig
from megayoco.data.batches import IGNORE, MicroBatch, ValidationBatches
from megayoco.dsconfig import precision
from megayoco.model.decoder import build_decoder
from megayoco.model.pipeline import build_pipeline
from megayoco.ops.cross_entropy import row_weights
from megayoco.parallel.agreement import AgreedError
from megayoco.parallel.sequence import own_chunks
from megayoco.parallel.topology import Topology
from megayoco.traffic import TRAFFIC
from megayoco.train.optimizer import NormAndClip, build_optimizer, parameter_groups, reset_state


class StepResult(NamedTuple):
    """What a step gave, equal on all ranks but for the last entry."""

    loss: float
    """Of the global batch, before the update: mean per target, or per row where the phase weighs rows."""
    grad_norm: float
    """2-norm of the whole gradient before clipping."""
    skipped: bool
    """fp16 only: the gradient overflowed, the update was left out and the loss scale lowered."""
    bytes_sent: dict[str, int]
    """What this rank sent, by group and purpose (megayoco/traffic.py); differs between ranks."""


class Engine:
    """The model of this rank inside a DeepSpeed engine.

    Args:
        run: the whole run; the module is built for its first phase.
        ds_config: as `load_deepspeed_config` returns it; not changed.
        topology: groups of this rank.
        device: where the module lives.
    """

    def __init__(self, run: RunConfig, ds_config: dict[str, Any], topology: Topology, device: torch.device) -> None:
        import deepspeed  # late: takes seconds, and asks for the launch environment

        self.topology, self.device = topology, device
        self._run = run
        self._pipelined = topology.pipeline > 1
        self._bands = 1
        self._row_length: int | None = None
        self._rows = 0
        self._documents = any(run.phase_data(number).has_borders for number in range(len(run.phases)))
        config = engine_config(ds_config)
        # to DeepSpeed the ranks of a sequence are replicas like any others
        config["train_batch_size"] *= topology.sequence
        self.config = config
        module = self._build(run)
        groups = parameter_groups(module, run.optimizer.weight_decay)
        optimizer, self.optimizer_name = build_optimizer(groups, run.optimizer, config, device)
        self._clip: NormAndClip | None = None
        if config["zero_optimization"]["stage"] == 0:
            config["gradient_clipping"] = 0.0  # NormAndClip does it
            maximum = run.optimizer.gradient_clipping
            self._clip = NormAndClip(optimizer, module.parameters(), maximum, topology)
        self.deepspeed = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=config,
            mpu=None if self._pipelined else topology.mpu(),
            dist_init_required=False,
        )[0]
        self._fp16 = precision(config) == "fp16"
        self._accumulation = self.deepspeed.gradient_accumulation_steps()

    @property
    def module(self) -> Any:
        """The module of this rank: a Decoder, or the stage of a PipelineDecoder."""
        return self.deepspeed.module

    @property
    def reads_data(self) -> bool:
        """Whether this rank's steps need micro-batches: the first stage reads tokens, the last one targets."""
        return self.topology.is_first_stage or self.topology.is_last_stage

    def begin_phase(self, number: int) -> None:
        """Take over batch size, micro-batch size, sequence length, rotary base, cross-batch range, loss and bands of a
        phase."""
        phase = self._run.phases[number]
        engine = self.deepspeed
        engine.set_train_micro_batch_size(phase.micro_batch_size)
        engine.set_train_batch_size(phase.batch_size * self.topology.sequence)
        self._accumulation = engine.gradient_accumulation_steps()
        if hasattr(engine.optimizer, "gradient_accumulation_steps"):
            engine.optimizer.gradient_accumulation_steps = self._accumulation
        if self._pipelined:
            engine.micro_batch_size = phase.micro_batch_size
            engine.reset_activation_shape()
        self.module.set_rope_theta(self._run.phase_rope_theta(number))
        self.module.set_cross_batch(phase.cross_batch)
        self._row_length = self._run.row_length(number)
        self._rows = 0 if self._row_length is None else phase.tokens_per_step // self._row_length
        bands = self._run.phase_bands(number)
        assert bands != "auto"  # the session has chosen
        self._bands = bands
        self.module.set_bands(bands, self._run.parallel.band_order)

    def reset_optimizer(self) -> None:
        """Forget the running means of the optimizer, as a phase may ask for."""
        reset_state(self.deepspeed.basic_optimizer)

    def train_step(self, micro_batches: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        """Forward, backward and update over the micro-batches of this rank (none on middle stages). Collective.

        Raises:
            AgreedError: loss or gradient norm is NaN or infinite; the update is not kept by any checkpoint.
        """
        for group in self.deepspeed.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        TRAFFIC.take()
        batches = [self._to_device(batch, self._row_length) for batch in micro_batches]
        if self._row_length is None:
            total = self._global_targets(batches)
        else:
            total = torch.tensor(self._rows, device=self.device)
        with _overflow_ends_the_run():
            if self._pipelined:
                loss = self._pipeline_step(batches, total)
            else:
                loss = self._plain_step(batches, total)
        norm = self._clip.norm if self._clip is not None else self.deepspeed.get_global_grad_norm()
        # one transfer from the device for both numbers
        values = torch.stack([loss.double(), torch.as_tensor(norm, device=loss.device).double()]).tolist()
        skipped = self._fp16 and bool(getattr(self.deepspeed.optimizer, "overflow", False))
        return StepResult(values[0], values[1], skipped, TRAFFIC.take())

    @torch.no_grad()
    def evaluate(self, batches: ValidationBatches) -> float:
        """Mean loss per target over all validation batches together. Collective; weights do not change."""
        flat = [self._to_device(micro) for step in batches for micro in step] if self.reads_data else []
        total = self._global_targets(flat)
        engine = self.deepspeed
        if self._pipelined:
            number = len(batches) * self._accumulation
            iterator = self._pipeline_iterator(flat, number * self._data_ranks / total)
            return float(engine.eval_batch(iterator, num_micro_batches=number).item())
        engine.eval()
        sums = [engine(*micro)[0] for micro in flat]
        engine.train()
        return float(self._sum_over_data(sums).item() / total.item())

    @property
    def _data_ranks(self) -> int:
        return self.topology.data * self.topology.sequence

    def _build(self, run: RunConfig) -> Any:
        common = {"seed": run.seed, "activation_checkpointing": run.parallel.activation_checkpointing}
        if self._pipelined:
            # the cut decides where weights lie, so it follows the first phase, which no later edit changes
            with redirect_stdout(io.StringIO()):  # DeepSpeed prints its grid
                return build_pipeline(
                    run.model,
                    self.topology,
                    sequence_length=run.phases[0].sequence_length,
                    documents=self._documents,
                    **common,  # type: ignore[arg-type]
                )
        with self._cut_while_building():
            return build_decoder(run.model, self.topology, **common)  # type: ignore[arg-type]

    def _cut_while_building(self) -> AbstractContextManager[Any]:
        """ZeRO 3 cuts each parameter as soon as it is made: the whole model never lies in one process."""
        if self.config["zero_optimization"]["stage"] != 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.Init(  # type: ignore[no-any-return]
            data_parallel_group=self.topology.gradient_group,
            config_dict_or_path=self.config,
            mpu=self.topology.mpu(),
        )

    def _to_device(self, batch: MicroBatch, row_length: int | None = None) -> MicroBatch:
        """This rank's part of the sequences, on its device; with `row_length` every row of so many tokens weighs the
        same."""
        if row_length is not None:  # before sequences are cut: a row may have targets on several ranks
            batch = batch._replace(weights=row_weights(batch.targets, row_length))
        axis = (self.topology.sequence_rank, self.topology.sequence, self._bands)
        if self.topology.sequence > 1:
            batch = batch._replace(**{k: own_chunks(x, *axis) for k, x in batch._asdict().items() if x is not None})
        starts = batch.document_starts
        if starts is None and self._pipelined and self._documents:
            starts = torch.zeros_like(batch.tokens)  # stages were built to pass borders on: one document per sequence
        if self.device.type == "cpu":
            return batch._replace(document_starts=starts)
        tokens, targets = (x.pin_memory().to(self.device, non_blocking=True) for x in batch[:2])
        rest = (None if x is None else x.to(self.device, non_blocking=True) for x in (starts, batch.weights))
        return MicroBatch(tokens, targets, *rest)

    def _global_targets(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Number of targets in the global batch, 0-d on the device, at least 1."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in batches:
            total += (batch.targets != IGNORE).sum()
        if self._data_ranks > 1:
            dist.all_reduce(total, group=self.topology.gradient_group)
        return total.clamp(min=1)

    def _sum_over_data(self, sums: Sequence[Tensor]) -> Tensor:
        total = torch.stack(list(sums)).double().sum()
        if self._data_ranks > 1:
            dist.all_reduce(total, group=self.topology.gradient_group)
        return total

    def _plain_step(self, batches: Sequence[MicroBatch], total: Tensor) -> Tensor:
        engine, sums = self.deepspeed, []
        scale = self._data_ranks / total
        for number, batch in enumerate(batches):
            # our count, not DeepSpeed's: that one starts anew on resume and goes wrong when the accumulation changes
            engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            loss_sum, _ = engine(*batch)
            engine.backward(loss_sum * scale, scale_wrt_gas=False)
            engine.step()
            sums.append(loss_sum.detach())
        return self._sum_over_data(sums) / total

    def _pipeline_step(self, batches: Sequence[MicroBatch], total: Tensor) -> Tensor:
        # the engine divides by the micro-batches as well
        scale = self._accumulation * self._data_ranks / total
        loss: Tensor = self.deepspeed.train_batch(self._pipeline_iterator(batches, scale))
        return loss

    def _pipeline_iterator(self, batches: Sequence[MicroBatch], scale: Tensor) -> Any:
        scale = scale.float()
        for tokens, targets, starts, weights in batches:
            labels = (targets, scale) if weights is None else (targets, scale, weights)
            yield (tokens,) if starts is None else (tokens, starts), labels


def engine_config(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The config that the engine really gets: a copy with what this trainer decides itself."""
    config = copy.deepcopy(ds_config)
    # sum or mean, the result is ours to define; the losses are scaled for the mean
    config.pop("gradient_allreduce_op", None)
    # DeepSpeed times steps with two device synchronisations each; the trainer has its own clock
    config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    # ZeRO 3 would replace F.linear in the whole process, for good
    config["zero_optimization"].setdefault("memory_efficient_linear", False)
    if precision(config) != "fp32" and config["zero_optimization"]["stage"] == 0:
        # the norm of DeepSpeed's 16-bit optimizer without ZeRO leaves out the shards of all tensor ranks but the first;
        # ZeRO 1 does the same arithmetic and counts right
        config["zero_optimization"]["stage"] = 1
    return config


@contextmanager
def _overflow_ends_the_run() -> Iterator[None]:
    """DeepSpeed's own exception for a loss scale that cannot fall further, told as what it means."""
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise AgreedError(
            "Gradients overflow in fp16 at the smallest loss scale. Use bf16 or fp32, or a lower learning rate."
        ) from error
