"""One training step in one process and in a parallel layout, without the trainer: what the parity tests compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megayoco.config import CrossBatchConfig, ModelConfig, ParallelConfig
from megayoco.model.decoder import build_decoder
from megayoco.model.parameters import canonical_parameters, gather_canonical, shards_of
from megayoco.model.pipeline import build_pipeline
from megayoco.ops.cross_entropy import row_weights
from megayoco.parallel.sequence import own_chunks
from megayoco.parallel.topology import Topology, build_topology
from tests.model.cases import Batch, decoder, gradients

SEED = 3
VOCAB = 64


@dataclass(frozen=True)
class Case:
    """A layout, and how the global batch is cut into micro-batches."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    bands: int = 1
    order: str = "fused"
    zero: int = 0
    micro_batch: int = 2
    checkpointing: bool = False
    dtype: torch.dtype = torch.float64
    documents: bool = True
    tokens: int = 24
    cross_batch: CrossBatchConfig | None = None
    row: int | None = None
    """Tokens of a row where the loss is the mean over rows."""

    def __str__(self) -> str:
        axes = (("t", self.tensor), ("p", self.pipeline), ("s", self.sequence), ("d", self.data), ("bands", self.bands))
        parts = [f"{name}{size}" for name, size in axes if size > 1]
        parts += [f"zero{self.zero}"] if self.dtype == torch.float32 else []
        parts += [self.order] * (self.order != "fused")
        if self.cross_batch is not None:
            parts += [f"range{self.cross_batch.range}"] + ["neighbour"] * (self.cross_batch.negatives == "neighbour")
        parts += [f"rows{self.row}"] * (self.row is not None)
        parts += [f"micro{self.micro_batch}"] + ["checkpointing"] * self.checkpointing
        return "-".join(parts)

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.pipeline * self.sequence)

    @property
    def rows_together(self) -> int | None:
        """Rows of a micro-batch that one process needs for the same loss; None: any number."""
        if self.cross_batch is None:
            return None
        return self.micro_batch * (self.data if self.cross_batch.negatives == "neighbour" else 1)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(tensor=self.tensor, pipeline=self.pipeline, sequence=self.sequence, bands=self.bands)


def model_config(name: str) -> ModelConfig:
    """Small models with fewer key-value heads than the widest tensor layout, and layers that do not divide by 4."""
    shape: dict[str, Any] = dict(dim=32, layers=4, hidden_dim=48, heads=4, kv_heads=2, vocab_size=VOCAB)
    if name == "llama":
        return ModelConfig(pattern="llama", **shape)
    if name == "longllama":
        return ModelConfig(pattern="llama", memory_layers=(1, 3), memory_window=6, **shape)
    if name == "yoco-memory":
        return ModelConfig(self_heads=4, self_layers=3, memory_layers=(1,), memory_window=6, **shape)
    if name == "yoco-window":
        return ModelConfig(self_mixer="window", window=5, self_heads=4, **shape)
    if name == "yoco-wide":  # a window of several chunks of every layout
        return ModelConfig(self_mixer="window", window=20, self_heads=4, **shape)
    if name == "yoco-tied":
        return ModelConfig(self_heads=4, tie_embeddings=True, self_layers=1, **shape)
    return ModelConfig(self_heads=4, **shape)


def packed_batch(rows: int = 8, tokens: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and document starts chosen to hurt: a border inside each row, one row without any target (a whole
    micro-batch of one, a rank's share of another layout), one with few."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (rows, tokens), generator=generator)
    targets = torch.roll(ids, -1, 1)
    targets[:, -1] = -100
    targets[0] = -100
    targets[1, :15] = -100
    starts = torch.zeros_like(ids)
    for row in range(rows):
        border = 3 * row // 2 + 2
        starts[row, border:] = border
    return ids, targets, starts


def one_process(
    model: str,
    batch: tuple[Tensor, ...],
    dtype: torch.dtype,
    documents: bool,
    cross_batch: CrossBatchConfig | None = None,
    micro_batch: int | None = None,
    row: int | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and every gradient of one pass over the whole batch; by micro-batches of so many rows where rows of one see
    one another."""
    decoder = build_decoder(model_config(model), None, seed=SEED, dtype=dtype)
    decoder.set_cross_batch(cross_batch)
    rows = batch[0].shape[0]
    total = denominator(batch[1], row)
    loss = torch.zeros((), dtype=dtype)
    for first in range(0, rows, micro_batch or rows):
        tokens, targets, starts = (part[first : first + (micro_batch or rows)] for part in batch)
        weights = None if row is None else row_weights(targets, row, dtype)
        loss = loss + decoder(tokens, targets, starts if documents else None, weights)[0] / total
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in canonical_parameters(decoder).items()}


def denominator(targets: Tensor, row: int | None) -> int:
    """What the sum of losses is divided by."""
    return int((targets != -100).sum()) if row is None else targets.numel() // row


def parallel_step(model: str, case: Case, batch: tuple[Tensor, ...]) -> tuple[float, dict[str, Tensor]]:
    """The same on this rank of a layout: the loss, and the gradients gathered to full tensors (on the first rank)."""
    config = model_config(model)
    topology = build_topology(case.parallel, config)
    accumulation = batch[0].shape[0] // (case.micro_batch * topology.data)
    total = denominator(batch[1], case.row)
    if case.row is not None:
        batch = (*batch, row_weights(batch[1], case.row, case.dtype))
    micro_batches = []
    for i in range(accumulation):
        first = (i * topology.data + topology.data_rank) * case.micro_batch  # as data/batches.py deals
        own = (topology.sequence_rank, case.sequence, case.bands)
        tokens, targets, starts, *weights = (own_chunks(part[first : first + case.micro_batch], *own) for part in batch)
        micro_batches.append((tokens, targets, starts if case.documents else None, *weights))
    run = _run_pipeline if case.pipeline > 1 else _run_plain if case.dtype == torch.float64 else _run_zero
    loss, gradients, module = run(config, case, topology, micro_batches, total)
    return loss, gather_canonical(gradients, shards_of(module), topology)


def _run_plain(config: ModelConfig, case: Case, topology: Topology, micro_batches: list[Any], total: int) -> Any:
    """Without DeepSpeed, whose engine does not reduce float64 gradients."""
    decoder = build_decoder(config, topology, seed=SEED, dtype=case.dtype, activation_checkpointing=case.checkpointing)
    decoder.set_bands(case.bands, case.order)
    decoder.set_cross_batch(case.cross_batch)
    loss = torch.zeros((), dtype=case.dtype)
    for micro_batch in micro_batches:
        part = decoder(*micro_batch)[0] / total
        part.backward()
        loss += part.detach()
    dist.all_reduce(loss, group=topology.gradient_group)
    gradients = {name: parameter.grad for name, parameter in canonical_parameters(decoder).items()}
    for gradient in gradients.values():
        dist.all_reduce(gradient, group=topology.gradient_group)
    return loss.item(), gradients, decoder


def shared_sequence_steps(steps: list[tuple[str, int, str, Batch]]) -> list[tuple[float, dict[str, Tensor]]]:
    """This rank's part of loss sum and gradients of (model, bands, order, batch) of tests/model/cases.py, where all
    ranks of the world share every sequence. Many steps in one process group: starting one costs more than they do."""
    ranks = dist.get_world_size()
    topology = build_topology(ParallelConfig(sequence=ranks), decoder(steps[0][0]).config)
    models = {name: decoder(name, topology=topology) for name in dict.fromkeys(step[0] for step in steps)}
    results = []
    for name, bands, order, batch in steps:
        model = models[name]
        model.set_bands(bands, order)
        own = (None if x is None else own_chunks(x, topology.sequence_rank, ranks, bands) for x in batch)
        loss, _ = model(*own)
        results.append((loss.item(), gradients(model, loss)))
    return results


def _replicas(topology: Topology) -> int:
    """Ranks that DeepSpeed averages over: to it the ranks of a sequence are replicas like any others."""
    return topology.data * topology.sequence


def _deepspeed_config(case: Case, accumulation: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        # small parameters are cut like large ones
        "zero_optimization": {"stage": case.zero, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": 1_000_000,
    }


def _run_zero(config: ModelConfig, case: Case, topology: Topology, micro_batches: list[Any], total: int) -> Any:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    decoder = build_decoder(config, topology, seed=SEED, dtype=case.dtype, activation_checkpointing=case.checkpointing)
    decoder.set_bands(case.bands, case.order)
    decoder.set_cross_batch(case.cross_batch)
    optimizer = torch.optim.AdamW(decoder.parameters())
    engine, *_ = deepspeed.initialize(
        model=decoder,
        optimizer=optimizer,
        config=_deepspeed_config(case, len(micro_batches)),
        mpu=topology.mpu(),
    )
    loss = torch.zeros((), dtype=torch.float64)
    for i, micro_batch in enumerate(micro_batches):
        part = engine(*micro_batch)[0] / total
        loss += part.detach()
        # the engine divides by the accumulation steps and averages over the data axis
        engine.backward(part * len(micro_batches) * _replicas(topology))
        if i < len(micro_batches) - 1:
            engine.step()
    dist.all_reduce(loss, group=topology.gradient_group)
    gradients = {name: safe_get_full_grad(p).clone() for name, p in canonical_parameters(engine.module).items()}
    return loss.item(), gradients, engine.module


def zero3_bf16_weights(model: str) -> dict[str, Tensor]:
    """The initial weights of a bf16 model that ZeRO 3 cuts while it is built, joined again."""
    import deepspeed

    config = model_config(model)
    topology = build_topology(ParallelConfig(), config)
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
    }
    with deepspeed.zero.Init(
        data_parallel_group=topology.gradient_group, config_dict_or_path=ds_config, mpu=topology.mpu()
    ):
        decoder = build_decoder(config, topology, seed=SEED)
    weights = {}
    for name, parameter in canonical_parameters(decoder).items():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return weights


def _run_pipeline(config: ModelConfig, case: Case, topology: Topology, micro_batches: list[Any], total: int) -> Any:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    module = build_pipeline(
        config,
        topology,
        seed=SEED,
        dtype=case.dtype,
        activation_checkpointing=case.checkpointing,
        sequence_length=micro_batches[0][0].shape[1] * case.sequence,
        documents=case.documents,
    )
    module.set_bands(case.bands, case.order)
    module.set_cross_batch(case.cross_batch)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters()),
        config=_deepspeed_config(case, len(micro_batches)),
    )
    gradients: dict[str, Tensor] = {}
    wide = case.dtype == torch.float64

    def keep_gradients(*_: Any) -> None:
        for name, parameter in canonical_parameters(engine.module).items():
            gradient = parameter.grad if case.zero == 0 else safe_get_full_grad(parameter)
            gradients[name] = gradient.clone()

    engine._take_model_step = keep_gradients
    # DeepSpeed does not reduce float64 gradients over the data axis: done below
    engine.pipeline_enable_backward_allreduce = not wide
    # the engine adds up losses in fp32: keep our own sum
    losses: list[Tensor] = []
    loss_function = module.loss_fn

    def recording_loss(hidden: Tensor, labels: Any) -> Tensor:
        loss = loss_function(hidden, labels)
        losses.append(loss.detach())
        return loss

    module.loss_fn = recording_loss
    scale = torch.tensor(len(micro_batches) * _replicas(topology) / total, dtype=case.dtype)
    engine.train_batch(
        iter([((t, s) if case.documents else (t,), (y, scale, *weights)) for t, y, s, *weights in micro_batches])
    )
    loss = torch.stack(losses).sum().double() if losses else torch.zeros((), dtype=torch.float64)
    if topology.tensor_rank != 0:
        loss = loss * 0
    dist.all_reduce(loss)
    if wide:
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=topology.gradient_group)
            gradient /= _replicas(topology)
    return loss.item() / len(micro_batches) / _replicas(topology), gradients, module
