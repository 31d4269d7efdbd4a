"""The same blocks as DeepSpeed pipeline stages.

Between stages goes ONE tensor, packed along the last dimension: the hidden states; behind the shared-KV block also this
tensor rank's shard of the shared keys and values, as long as cross layers follow; with document borders, four columns
that spell each token's document start. DeepSpeed's engine runs one backward per tensor over the same graph and fails
where a stage leaves one unused, so a tuple would not serve. Inside a stage the parts travel unpacked.

Shapes: B batch, T tokens of this rank, D model dim, g key-value heads of this tensor rank, K head dim;
        packed (B, T, D [+ 2 g K] [+ 4]).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from megayoco.config import CrossBatchConfig, ModelConfig
from megayoco.errors import UserError
from megayoco.layers.context import KeyValues, Positions
from megayoco.layers.linear import Builder
from megayoco.layers.shared_kv import SharedKeyValues
from megayoco.model.bands import Bands, Stage, banded_loss, banded_stage
from megayoco.model.blocks import Head, Layer, build_embedding, build_layer, remark_tied_head, run_block
from megayoco.model.decoder import set_cross_batch, set_rope_theta
from megayoco.model.flops import block_flops
from megayoco.parallel.sequence import SequenceAxis
from megayoco.parallel.topology import Topology, pipeline_topology
from megayoco.traffic import TRAFFIC

_START_COLUMNS = 4
"""Base-256 digits of a document start: each is exact in bf16, which holds integers to 256."""


class _Flow(NamedTuple):
    """What travels between the blocks of one stage."""

    hidden: Tensor
    positions: Positions
    shared: KeyValues | None = None
    """The shared keys and values of this rank's tokens."""
    seen: KeyValues | None = None
    """Those of every token up to its last, which cross layers read: gathered once per stage."""


class _Wire:
    """Packing and unpacking at one stage border."""

    def __init__(self, model: ModelConfig, builder: Builder, position: int, documents: bool) -> None:
        pattern = model.layer_pattern()
        made = "shared_kv" in pattern[:position]
        self.heads = max(model.num_kv_heads // builder.ranks, 1)
        self.head_dim = model.head_dim
        self.dim = model.dim
        self.carries_shared = made and "cross" in pattern[position:]
        self.carries_documents = documents
        self.sequence = builder.sequence

    def pack(self, flow: _Flow) -> Tensor:
        parts = [flow.hidden]
        if self.carries_shared:
            assert flow.shared is not None
            parts += [flow.shared.key.flatten(2), flow.shared.value.flatten(2)]
        if self.carries_documents:
            assert flow.positions.start is not None
            digits = [flow.positions.start >> (8 * i) & 255 for i in range(_START_COLUMNS)]
            parts.append(torch.stack(digits, -1).to(flow.hidden.dtype))
        packed = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        TRAFFIC.message("pipeline/activations", packed)
        return packed

    def unpack(self, packed: Tensor) -> _Flow:
        width = self.heads * self.head_dim if self.carries_shared else 0
        documents = _START_COLUMNS if self.carries_documents else 0
        if packed.requires_grad:
            TRAFFIC.message("pipeline/gradient", packed)
        hidden, key, value, digits = packed.split([self.dim, width, width, documents], -1)
        start = None
        if documents:
            weights = torch.tensor([256**i for i in range(_START_COLUMNS)], device=packed.device)
            start = (digits.detach().long() * weights).sum(-1)
        shared = None
        if self.carries_shared:
            shape = (self.heads, self.head_dim)
            shared = KeyValues(key.unflatten(-1, shape), value.unflatten(-1, shape))
        return _Flow(hidden, _positions(hidden, self.sequence, start), shared)


def _positions(x: Tensor, sequence: SequenceAxis | None, start: Tensor | None) -> Positions:
    """Of the tokens that this rank has of a sequence: x is (B, T, ...)."""
    offset = 0 if sequence is None else sequence.rank * x.shape[1]
    return Positions.of_chunk(offset, x.shape[1], x.device, start)


class _EmbedStage(nn.Module):
    """(tokens,) or (tokens, document_starts) -> _Flow, packed where the stage ends here."""

    def __init__(self, model: ModelConfig, builder: Builder, documents: bool, ends: bool) -> None:
        super().__init__()
        self.embed_tokens = build_embedding(model, builder)
        self.sequence = builder.sequence
        self.wire_out = _Wire(model, builder, 0, documents) if ends else None

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> _Flow | Tensor:
        tokens, start = self.split(inputs)
        flow = _Flow(self.embed_tokens(tokens), _positions(tokens, self.sequence, start))
        return flow if self.wire_out is None else self.wire_out.pack(flow)

    @staticmethod
    def split(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Tokens, and document starts where they came along."""
        tokens, *starts = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        return tokens, starts[0] if starts else None


class _LayerStage(nn.Module):
    """One block of the pattern between unpacking (at a stage's start) and packing (at its end)."""

    def __init__(
        self,
        model: ModelConfig,
        position: int,
        builder: Builder,
        documents: bool,
        starts: bool,
        ends: bool,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.block = build_layer(model, position, builder)
        self.wire_in = _Wire(model, builder, position, documents) if starts else None
        self.wire_out = _Wire(model, builder, position + 1, documents) if ends else None
        self.is_cross = model.layer_pattern()[position] == "cross"
        self.recompute = recompute
        self.sequence = builder.sequence

    def forward(self, inputs: _Flow | Tensor) -> _Flow | Tensor:
        flow = inputs if self.wire_in is None else self.wire_in.unpack(inputs)  # type: ignore[arg-type]
        assert isinstance(flow, _Flow)
        x, positions, shared, seen = flow
        if self.is_cross:
            assert shared is not None
            if seen is None:
                seen = shared if self.sequence is None else self.sequence.gather_seen(shared)
            left: Any = seen
        else:
            owner: Any = self.block if isinstance(self.block, SharedKeyValues) else self.block.mixer
            left = owner.empty_context(x.shape[0], x.dtype, x.device)
        x, right = run_block(self.block, x, positions, left, self.recompute and self.training)
        if isinstance(self.block, SharedKeyValues):
            shared = right
        flow = _Flow(x, positions, shared, seen)
        return flow if self.wire_out is None else self.wire_out.pack(flow)


class _HeadStage(nn.Module):
    """Takes the hidden states out of the flow; the loss function of the pipeline then asks `head` for the loss."""

    def __init__(self, model: ModelConfig, builder: Builder, documents: bool, starts: bool) -> None:
        super().__init__()
        self.head = Head(model, builder)
        self.wire_in = _Wire(model, builder, len(model.layer_pattern()), documents) if starts else None

    def forward(self, inputs: _Flow | Tensor) -> Tensor:
        flow = inputs if self.wire_in is None else self.wire_in.unpack(inputs)  # type: ignore[arg-type]
        assert isinstance(flow, _Flow)
        return flow.hidden


def _pass_through(_: nn.Module, inputs: Any) -> Any:
    """The last stage's copy of a tied embedding only lends its weight to the head."""
    return inputs


class PipelineDecoder(PipelineModule):  # type: ignore[misc]  # DeepSpeed is untyped
    """This rank's stage. Built by `build_pipeline`; run by DeepSpeed's pipeline engine."""

    def __init__(
        self,
        model: ModelConfig,
        topology: Topology,
        builder: Builder,
        *,
        sequence_length: int,
        activation_checkpointing: bool,
        documents: bool,
    ) -> None:
        self.config = model
        self.recompute = activation_checkpointing
        self.bands = Bands(1, builder.sequence)
        self.stage_borders = split_stages(model, topology.pipeline, sequence_length)
        specs = stage_specs(model, builder, self.stage_borders, activation_checkpointing, documents)
        super().__init__(layers=specs, topology=pipeline_topology(topology), loss_fn=self._loss)
        if model.tie_embeddings and topology.is_last_stage:
            embedding = self.tied_modules["embedding"].embed_tokens
            self._head().weight = embedding.weight
            remark_tied_head(embedding.weight, counted=topology.is_first_stage and topology.tensor_rank == 0)

    def set_rope_theta(self, theta: float) -> None:
        """Changes the rotary base of every layer of this stage."""
        set_rope_theta(self, theta)

    def set_bands(self, count: int, order: str = "fused") -> None:
        """Cuts sequences into so many bands from now on (model/bands.py). Raises ValueError unless the shared keys
        and values are all that grows with the sequence."""
        if count > 1 and (self.config.pattern != "yoco" or self.config.memory_layers):
            raise ValueError(f"{count} bands for a model with layers whose keys and values grow with the sequence")
        self.bands = replace(self.bands, count=count, order=order)

    def set_cross_batch(self, cross_batch: CrossBatchConfig | None) -> None:
        """Changes what the memory layers of this stage remember in training, for a phase."""
        set_cross_batch(self, cross_batch)

    @property
    def first_block(self) -> int:
        """Number of this stage's first block in [embedding, layer pattern ..., head]."""
        return self.stage_borders[self.stage_id]

    def stage(self) -> Stage:
        """The blocks of this stage."""
        first, last = self.forward_funcs[0], self.forward_funcs[-1]
        own: list[Layer] = []
        cross: list[Layer] = []
        shared = None
        for stage in self.forward_funcs:
            if isinstance(stage, _LayerStage):
                if isinstance(stage.block, SharedKeyValues):
                    shared = stage.block
                else:
                    (cross if stage.is_cross else own).append(stage.block)
        return Stage(
            first.embed_tokens if isinstance(first, _EmbedStage) else None,
            own,
            shared,
            cross,
            last.head if isinstance(last, _HeadStage) else None,
            recompute=self.recompute and self.training,
        )

    def forward(self, inputs: Any) -> Any:
        """What DeepSpeed sends to the next stage; in bands, the last stage leaves all to `_loss`, which has the
        targets."""
        if self.bands.count == 1:
            return super().forward(inputs)
        blocks = self.forward_funcs
        if isinstance(blocks[-1], _HeadStage):
            return inputs
        flow = self._received(inputs)
        hidden, shared = banded_stage(self.stage(), self.bands, flow.hidden, flow.positions.start, flow.shared)
        return blocks[-1].wire_out.pack(_Flow(hidden, flow.positions, shared))

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self.stage_borders
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _received(self, inputs: Any) -> _Flow:
        """What a stage begins with; the hidden states of the first one are still tokens."""
        first: Any = next(block for block in self.forward_funcs if isinstance(block, nn.Module))
        if isinstance(first, _EmbedStage):
            tokens, start = first.split(inputs)
            return _Flow(tokens, _positions(tokens, self.bands.axis, start))
        assert first.wire_in is not None
        return first.wire_in.unpack(inputs)  # type: ignore[no-any-return]

    def _head(self) -> Head:
        return self.forward_funcs[-1].head  # type: ignore[no-any-return]

    def _loss(self, hidden: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        """Labels: targets (B, T) int64, the 0-d factor that turns the sum of losses into the engine's loss, and the
        weights of the losses (B, T) where they have some."""
        targets, scale, *rest = labels
        weights = rest[0] if rest else None
        if self.bands.count > 1:  # `hidden` is what the stage received
            flow = self._received(hidden)
            start = flow.positions.start
            loss_sum, _ = banded_loss(self.stage(), self.bands, flow.hidden, targets, start, flow.shared, weights)
        else:
            loss_sum, _ = self._head()(hidden, targets, weights)
        return loss_sum * scale


def stage_specs(
    model: ModelConfig, builder: Builder, borders: list[int], recompute: bool, documents: bool
) -> list[LayerSpec]:
    """What DeepSpeed builds of the list of layers, each stage its own part; `borders` are those of `split_stages`.

    With tied embeddings the list has one more entry, in front of the head: the last stage's copy of the embedding.
    """
    count = len(model.layer_pattern())
    embedding_arguments = (model, builder, documents, 1 in borders)
    head = LayerSpec(_HeadStage, model, builder, documents, count + 1 in borders)
    layers = [
        LayerSpec(_LayerStage, model, i, builder, documents, i + 1 in borders, i + 2 in borders, recompute)
        for i in range(count)
    ]
    if not model.tie_embeddings:
        return [LayerSpec(_EmbedStage, *embedding_arguments), *layers, head]
    weight = "embed_tokens.weight"
    first = TiedLayerSpec("embedding", _EmbedStage, *embedding_arguments, tied_weight_attr=weight)
    last = TiedLayerSpec(
        "embedding", _EmbedStage, *embedding_arguments, forward_fn=_pass_through, tied_weight_attr=weight
    )
    return [first, *layers, last, head]


def split_stages(model: ModelConfig, stages: int, sequence_length: int) -> list[int]:
    """Borders of the stages in the list [embedding, pattern..., head], cut so that the costliest stage is cheapest.

    The cost of a block is its forward FLOPs at `sequence_length` tokens: the cross half grows with the square of the
    length, the self half linearly, so the best cut depends on the phase.

    Raises:
        UserError: fewer blocks than stages.
    """
    costs = block_flops(model, sequence_length)
    if len(costs) < stages:
        raise UserError(
            f"parallel.pipeline={stages} needs at least {stages} blocks, the model has {len(costs)} (embedding,"
            f" {len(costs) - 2} layers, head). Use fewer stages or more layers."
        )
    # smallest possible maximum: best[s][i] is the cost of the first i blocks in s stages
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    count = len(costs)
    best = [[float("inf")] * (count + 1) for _ in range(stages + 1)]
    cut = [[0] * (count + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for s in range(1, stages + 1):
        for i in range(s, count + 1):
            for j in range(s - 1, i):
                worst = max(best[s - 1][j], sums[i] - sums[j])
                if worst < best[s][i]:
                    best[s][i], cut[s][i] = worst, j
    borders = [count]
    for s in range(stages, 0, -1):
        borders.append(cut[s][borders[-1]])
    borders.reverse()
    if model.tie_embeddings:
        borders[-1] += 1
    return borders


def build_pipeline(
    model: ModelConfig,
    topology: Topology,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
    sequence_length: int,
    documents: bool = False,
) -> PipelineDecoder:
    """The pipeline stage of this rank.

    A micro-batch of the engine is `((tokens[, document_starts]), (targets, scale[, weights]))`: tokens, starts, targets
    (B, T) int64, on a sequence axis those of this rank, -100 in targets for none; the engine's loss is the sum of
    losses, weighted by `weights` (B, T, float), times `scale` (0-d, float). With `documents` every micro-batch must
    carry document starts.
    """
    builder = Builder.of(topology, seed, dtype)
    return PipelineDecoder(
        model,
        topology,
        builder,
        sequence_length=sequence_length,
        activation_checkpointing=activation_checkpointing,
        documents=documents,
    )
