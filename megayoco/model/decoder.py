"""The model as one module: a stack of blocks built from a layer pattern.

Training sees whole sequences (`forward`); inference feeds chunks of any size and keeps what the mixers remember as the
cache (`absorb`, `advance`). Positions that want no logits stop before the cross-decoder: its layers read only the
shared keys and values, which depend on the self-decoder alone, so leaving early is exact.

Shapes: B batch, T tokens of the chunk, D model dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megayoco.config import ModelConfig
from megayoco.layers.context import Positions, Rotary
from megayoco.layers.linear import Builder
from megayoco.layers.shared_kv import SharedKeyValues
from megayoco.model.bands import Bands, Stage, banded_loss
from megayoco.model.blocks import Head, build_embedding, build_layer, run_block
from megayoco.parallel.topology import Topology


class DecoderContext(NamedTuple):
    """Everything the model remembers of the tokens so far: a value, replaced by each call, never changed in place."""

    length: int
    """Tokens so far."""
    layers: tuple[Any, ...]
    """One context per layer with a memory of its own, in stack order; the shared keys and values last (YOCO)."""


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

    def forward(self, tokens: Tensor, targets: Tensor, document_starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss of whole sequences, in the bands that `set_bands` asked for.

        Args:
            tokens: (B, T) int64; on a sequence axis this rank's chunks, band after band (parallel/sequence.py).
            targets: (B, T) int64, the next token of each position, -100 where none is learned.
            document_starts: (B, T) int64, index in the sequence of the first token of each token's document; None: no
                borders.

        Returns:
            Sum of the losses over these targets (fp32, float64 for a float64 model) and their number (int64), both 0-d
            and equal on every tensor rank.
        """
        if self.bands.count > 1:
            return banded_loss(self.stage(), self.bands, tokens, targets, document_starts)
        x = self.embed_tokens(tokens)
        offset = self.bands.offset(0, tokens.shape[1])
        positions = Positions.of_chunk(offset, tokens.shape[1], tokens.device, document_starts)
        x, left, _ = self._self_half(x, positions, self._empty(tokens.shape[0], x.dtype, x.device))
        if self.shared_kv is not None and self.bands.axis is not None:
            left = self.bands.axis.gather_seen(left)
        x = self._cross_half(x, positions, left)
        return self.head(x, targets)  # type: ignore[no-any-return]

    def empty_context(self, batch_size: int) -> DecoderContext:
        """What the model remembers before the first token."""
        weight = self.embed_tokens.weight
        return DecoderContext(0, tuple(self._empty(batch_size, weight.dtype, weight.device)))

    def absorb(self, tokens: Tensor, context: DecoderContext) -> DecoderContext:
        """Reads tokens (B, T) without asking for logits: the self half and the shared keys and values only."""
        _, _, _, right = self._read(tokens, context)
        return right

    def advance(
        self, tokens: Tensor, context: DecoderContext, *, last_only: bool = True
    ) -> tuple[Tensor, DecoderContext]:
        """Reads tokens (B, T) and gives logits (B, 1, V) after the last of them, or (B, T, V) after each."""
        x, positions, shared, right = self._read(tokens, context)
        if last_only:
            # for the LLaMA pattern, too, only the head's work is saved by this
            x, positions = x[:, -1:], positions.last(1)
        return self.head(self._cross_half(x, positions, shared), None), right

    def set_bands(self, count: int, order: str = "fused") -> None:
        """Cuts sequences into so many bands from now on (model/bands.py). Raises ValueError without shared keys and
        values, which bands need."""
        if count > 1 and self.shared_kv is None:
            raise ValueError(f"{count} bands for a model whose layers share no keys and values")
        self.bands = replace(self.bands, count=count, order=order)

    def stage(self) -> Stage:
        """All blocks as the one stage that a walk over bands takes."""
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

    def _read(self, tokens: Tensor, context: DecoderContext) -> tuple[Tensor, Positions, Any, DecoderContext]:
        if len(context.layers) != len(self._owners()):
            raise ValueError(f"a context of {len(context.layers)} layers for a model of {len(self._owners())}")
        positions = Positions.of_chunk(context.length, tokens.shape[1], tokens.device)
        x, shared, rights = self._self_half(self.embed_tokens(tokens), positions, list(context.layers))
        return x, positions, shared, DecoderContext(context.length + tokens.shape[1], tuple(rights))

    def _owners(self) -> list[Any]:
        """The modules that have a context, in the order of `DecoderContext.layers`."""
        owners: list[Any] = [layer.mixer for layer in self.layers[: self.self_layers]]  # type: ignore[union-attr]
        return owners if self.shared_kv is None else [*owners, self.shared_kv]

    def _empty(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> list[Any]:
        return [owner.empty_context(batch_size, dtype, device) for owner in self._owners()]

    def _self_half(self, x: Tensor, positions: Positions, left: list[Any]) -> tuple[Tensor, Any, list[Any]]:
        """Everything up to the shared keys and values, which come second (None without them)."""
        rights = []
        for layer, context in zip(self.layers[: self.self_layers], left, strict=False):
            x, right = self._run(layer, x, positions, context)
            rights.append(right)
        if self.shared_kv is None:
            return x, None, rights
        x, shared = self._run(self.shared_kv, x, positions, left[-1])
        return x, shared, [*rights, shared]

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
