"""The model as one module for training: a stack of blocks built from a layer pattern. With a cache the same blocks run
in model/inference.py.

Shapes: B batch, T tokens of the chunk, D model dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megayoco.config import CrossBatchConfig, ModelConfig
from megayoco.layers.context import Positions, Rotary
from megayoco.layers.linear import Builder
from megayoco.layers.memory_attention import MemoryAttention
from megayoco.layers.shared_kv import SharedKeyValues
from megayoco.model.bands import Bands, Stage, banded_loss
from megayoco.model.blocks import Head, build_embedding, build_layer, run_block
from megayoco.parallel.topology import Topology


class Decoder(nn.Module):
    """A whole model on one rank of every axis but the tensor one.

    Args:
        model: shapes and pattern.
        builder: tensor-parallel place, seed, dtype.
        activation_checkpointing: keep only each block's input for backward and recompute the rest.
    """

    def __init__(self, model: ModelConfig, builder: Builder, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = model
        self.activation_checkpointing = activation_checkpointing
        self.bands = Bands(1, builder.sequence)
        self.embed_tokens = build_embedding(model, builder)
        self.layers = nn.ModuleList()
        self.shared_kv: SharedKeyValues | None = None
        self.self_layers = 0
        for position in range(len(model.layer_pattern())):
            block = build_layer(model, position, builder)
            if isinstance(block, SharedKeyValues):
                self.shared_kv = block
                self.self_layers = len(self.layers)
            else:
                self.layers.append(block)
        if self.shared_kv is None:
            self.self_layers = len(self.layers)
        self.head = Head(model, builder, tied=self.embed_tokens if model.tie_embeddings else None)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        document_starts: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss of whole sequences, in the bands that `set_bands` asked for.

        Args:
            tokens: (B, T) int64; on a sequence axis this rank's chunks, band after band (parallel/sequence.py).
            targets: (B, T) int64, the next token of each position, -100 where none is learned.
            document_starts: (B, T) int64, index in the sequence of the first token of each token's document; None: no
                borders.
            weights: (B, T) floating point, factors of the targets' losses; None: 1.

        Returns:
            Weighted sum of the losses over these targets (fp32, float64 for a float64 model) and their number (int64),
            both 0-d and equal on every tensor rank.
        """
        if self.bands.count > 1:
            return banded_loss(self.stage(), self.bands, tokens, targets, document_starts, weights=weights)
        x = self.embed_tokens(tokens)
        offset = self.bands.offset(0, tokens.shape[1])
        positions = Positions.of_chunk(offset, tokens.shape[1], tokens.device, document_starts)
        x, left = self._self_half(x, positions, self._empty(tokens.shape[0], x.dtype, x.device))
        if self.shared_kv is not None and self.bands.axis is not None:
            left = self.bands.axis.gather_seen(left)
        x = self._cross_half(x, positions, left)
        return self.head(x, targets, weights)  # type: ignore[no-any-return]

    def set_bands(self, count: int, order: str = "fused") -> None:
        """Cuts sequences into so many bands from now on (model/bands.py). Raises ValueError unless the shared keys
        and values are all that grows with the sequence."""
        if count > 1 and (self.shared_kv is None or self.config.memory_layers):
            raise ValueError(f"{count} bands for a model with layers whose keys and values grow with the sequence")
        self.bands = replace(self.bands, count=count, order=order)

    first_block = 0
    """Number of this rank's first block in [embedding, layer pattern ..., head]."""

    def stage(self) -> Stage:
        """All blocks as one stage."""
        layers: Any = self.layers
        return Stage(
            self.embed_tokens,
            layers[: self.self_layers],
            self.shared_kv,
            layers[self.self_layers :],
            self.head,
            recompute=self.activation_checkpointing and self.training,
        )

    def set_rope_theta(self, theta: float) -> None:
        """Changes the rotary base of every layer, for a phase of length extension."""
        set_rope_theta(self, theta)

    def set_cross_batch(self, cross_batch: CrossBatchConfig | None) -> None:
        """Changes what the memory layers remember in training, for a phase."""
        set_cross_batch(self, cross_batch)

    def _empty(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> list[Any]:
        owners: list[Any] = [layer.mixer for layer in self.layers[: self.self_layers]]  # type: ignore[union-attr]
        owners += [] if self.shared_kv is None else [self.shared_kv]
        return [owner.empty_context(batch_size, dtype, device) for owner in owners]

    def _self_half(self, x: Tensor, positions: Positions, left: list[Any]) -> tuple[Tensor, Any]:
        """Everything up to the shared keys and values, which come second (None without them)."""
        for layer, context in zip(self.layers[: self.self_layers], left, strict=False):
            x, _ = self._run(layer, x, positions, context)
        return (x, None) if self.shared_kv is None else self._run(self.shared_kv, x, positions, left[-1])

    def _cross_half(self, x: Tensor, positions: Positions, shared: Any) -> Tensor:
        for layer in self.layers[self.self_layers :]:
            x, _ = self._run(layer, x, positions, shared)
        return x

    def _run(self, block: Any, x: Tensor, positions: Positions, left: Any) -> tuple[Tensor, Any]:
        return run_block(block, x, positions, left, self.activation_checkpointing and self.training)


def set_rope_theta(module: nn.Module, theta: float) -> None:
    """Changes the rotary base of every layer inside `module`."""
    for part in module.modules():
        rotary = getattr(part, "rotary", None)
        if isinstance(rotary, Rotary):
            rotary.theta = theta


def set_cross_batch(module: nn.Module, cross_batch: CrossBatchConfig | None) -> None:
    """Changes what the memory layers inside `module` remember in training; None: their own sequence."""
    for part in module.modules():
        if isinstance(part, MemoryAttention) and part.remembers:
            part.cross_batch = cross_batch


def build_decoder(
    model: ModelConfig,
    topology: Topology | None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
) -> Decoder:
    """The plain module of this rank. `topology` None: the whole model in this process, without torch.distributed.

    Under `torch.device("meta")` nothing is allocated or initialised.
    """
    return Decoder(model, Builder.of(topology, seed, dtype), activation_checkpointing)
