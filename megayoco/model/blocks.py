"""The blocks of a stack, from embedding to head, and the table that turns a layer pattern into them.

The same block list becomes a plain module (model/decoder.py) or pipeline stages (model/pipeline.py). Every layer block
is `(x, positions, left) -> (x, right)`; blocks never know in what order chunks come, nor where they run.

Shapes: B batch, T tokens of the chunk, D model dim, V vocabulary (v of one tensor rank), M rows that carry a target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megayoco.config import ModelConfig
from megayoco.layers.context import Positions, Rotary
from megayoco.layers.cross_attention import CrossAttention
from megayoco.layers.feed_forward import FeedForward
from megayoco.layers.linear import (
    Builder,
    Embedding,
    Init,
    RMSNorm,
    fan_in_uniform,
    xavier_uniform,
)
from megayoco.layers.memory_attention import MemoryAttention
from megayoco.layers.retention import GatedRetention
from megayoco.layers.self_attention import SelfAttention
from megayoco.layers.shared_kv import SharedKeyValues
from megayoco.ops.cross_entropy import linear_cross_entropy, linear_token_losses
from megayoco.parallel.collectives import gather_last_dim
from megayoco.parallel.shards import mark, row_shard

LLAMA_INIT_STD = 0.02
"""Every matrix of the LLaMA pattern, embedding and head included."""


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)). `(x, positions, left) -> (x, right)`."""

    def __init__(self, model: ModelConfig, index: int, make_mixer: Callable[..., nn.Module], builder: Builder) -> None:
        super().__init__()
        name = f"layers.{index}"
        init_in, init_out = _matrix_init(model, model.dim), _matrix_init(model, model.hidden_dim)
        self.mixer_norm = RMSNorm(model.dim, model.norm_eps, f"{name}.mixer_norm", builder)
        self.mixer = make_mixer(model, f"{name}.mixer", builder)
        self.ffn_norm = RMSNorm(model.dim, model.norm_eps, f"{name}.ffn_norm", builder)
        self.ffn = FeedForward(model.dim, model.hidden_dim, f"{name}.ffn", init_in, init_out, builder)

    def forward(self, x: Tensor, positions: Positions, left: Any) -> tuple[Tensor, Any]:
        y, right = self.mixer(self.mixer_norm(x), positions, left)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), right


class Head(nn.Module):
    """Final norm and output projection: the loss of hidden states, or their logits.

    Args:
        tied: the embedding whose weight is also the head's, or None for a head of its own.
    """

    def __init__(self, model: ModelConfig, builder: Builder, tied: Embedding | None = None) -> None:
        super().__init__()
        self.group, self.ranks = builder.group, builder.ranks
        self.norm = RMSNorm(model.dim, model.norm_eps, "norm", builder)
        if tied is not None:
            self.weight = tied.weight
        else:
            rows = model.vocab_size // builder.ranks
            self.weight = nn.Parameter(self.norm.weight.new_empty(rows, model.dim))
            shard = row_shard(model.vocab_size, model.dim, builder.rank, builder.ranks)
            builder.finish(self.weight, "lm_head.weight", shard, _matrix_init(model, model.dim))
        self.first_row = builder.rank * (model.vocab_size // builder.ranks)

    def forward(self, x: Tensor, targets: Tensor | None, weights: Tensor | None = None) -> Any:
        """x (B, T, D); targets (B, T) int64 with -100 for none; weights (B, T) of their losses, None: 1 each.

        Returns the weighted sum of losses over the targets (fp32, 0-d) and their number (int64, 0-d), equal on every
        tensor rank; without targets the logits (B, T, V) of the whole vocabulary.
        """
        x = self.norm(x)
        if targets is None:
            return gather_last_dim(F.linear(x, self.weight), self.group)
        group = self.group if self.ranks > 1 else None
        return linear_cross_entropy(
            x.flatten(0, 1),
            self.weight,
            targets.flatten(),
            weights=None if weights is None else weights.flatten(),
            group=group,
            rank_offset=self.first_row,
        )

    def token_losses(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, R, D), targets (B, R) int64: -log p of each target (B, R), fp32 or wider, and whether it was the most
        likely entry of the vocabulary (B, R) bool. Without gradient; equal on every tensor rank."""
        group = self.group if self.ranks > 1 else None
        losses, greedy = linear_token_losses(
            self.norm(x).flatten(0, 1), self.weight, targets.flatten(), group=group, rank_offset=self.first_row
        )
        return losses.view(targets.shape), greedy.view(targets.shape)


def _matrix_init(model: ModelConfig, fan_in: int) -> Init:
    return _llama_init(model) if model.pattern == "llama" else fan_in_uniform(fan_in)


def _llama_init(model: ModelConfig) -> Init:
    return Init("normal", LLAMA_INIT_STD if model.init_std is None else model.init_std)


def _rotary(model: ModelConfig, head_dim: int) -> Rotary:
    return Rotary(head_dim, model.rope_theta, model.rotary_layout)


def _retention(model: ModelConfig, name: str, builder: Builder) -> nn.Module:
    return GatedRetention(
        model.dim,
        model.num_self_heads,
        model.norm_eps,
        _rotary(model, model.self_head_dim),
        name,
        init_in=xavier_uniform(model.dim, model.dim, 2**-2.5),
        init_gate=xavier_uniform(model.num_self_heads, model.dim, 2**-2.5),
        init_out=xavier_uniform(model.dim, model.dim, 2**-1),
        builder=builder,
    )


def _window(model: ModelConfig, name: str, builder: Builder) -> nn.Module:
    heads, init = model.num_self_heads, _matrix_init(model, model.dim)
    rotary = _rotary(model, model.self_head_dim)
    return SelfAttention(model.dim, heads, heads, model.window, rotary, name, init, builder)


def _full(model: ModelConfig, name: str, builder: Builder) -> nn.Module:
    init = _matrix_init(model, model.dim)
    rotary = _rotary(model, model.head_dim)
    return SelfAttention(model.dim, model.heads, model.num_kv_heads, None, rotary, name, init, builder)


def _memory(model: ModelConfig, name: str, builder: Builder, remembers: bool = True) -> nn.Module:
    init = _matrix_init(model, model.dim)
    heads, kv_heads = model.memory_heads
    assert model.memory_window is not None
    return MemoryAttention(
        model.dim,
        heads,
        kv_heads,
        model.memory_window,
        remembers,
        _rotary(model, model.dim // heads),
        name,
        init,
        builder,
    )


def _cross(model: ModelConfig, name: str, builder: Builder) -> nn.Module:
    init = _matrix_init(model, model.dim)
    return CrossAttention(model.dim, model.heads, _rotary(model, model.head_dim), name, init, builder)


# What a new mixer needs besides its line here: docs/design.md, "Adding a mixer".
MIXERS: dict[str, Callable[[ModelConfig, str, Builder], nn.Module]] = {
    "retention": _retention,
    "window": _window,
    "full": _full,
    "memory": _memory,
    "block": partial(_memory, remembers=False),
    "cross": _cross,
}


def build_embedding(model: ModelConfig, builder: Builder) -> Embedding:
    """Token embedding; YOCO scales it by sqrt(D)."""
    scale = model.dim**0.5 if model.scale_embeddings else 1.0
    init = _llama_init(model) if model.pattern == "llama" else Init("normal", model.dim**-0.5)
    return Embedding(model.vocab_size, model.dim, scale, "embed_tokens", init, builder)


def build_layer(model: ModelConfig, position: int, builder: Builder) -> Layer | SharedKeyValues:
    """The block at `position` of `model.layer_pattern()`."""
    pattern = model.layer_pattern()
    kind = pattern[position]
    if kind == "shared_kv":
        return SharedKeyValues(
            model.dim,
            model.num_kv_heads,
            model.head_dim,
            model.norm_eps,
            _rotary(model, model.head_dim),
            "shared_kv",
            _matrix_init(model, model.dim),
            builder,
        )
    index = sum(other != "shared_kv" for other in pattern[:position])
    return Layer(model, index, MIXERS[kind], builder)


def run_block(
    block: Layer | SharedKeyValues, x: Tensor, positions: Positions, left: Any, recompute: bool
) -> tuple[Tensor, Any]:
    """One block, recomputed in backward where asked. Non-reentrant: contexts enter as arguments, and their gradients
    (those of the shared keys and values above all) flow as without checkpointing."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, positions, left, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
    return block(x, positions, left)  # type: ignore[no-any-return]


def remark_tied_head(weight: nn.Parameter, counted: bool) -> None:
    """Gives a tied head its embedding's name and shard; a copy on another pipeline stage does not count."""
    mark(weight, "embed_tokens.weight", replace(weight.shard, counted=counted))  # type: ignore[attr-defined]
