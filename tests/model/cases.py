"""Small models and batches for training in bands, in one process and on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megayoco.config import ModelConfig
from megayoco.model.decoder import Decoder, build_decoder
from megayoco.parallel.topology import Topology

VOCAB = 40
MODELS: dict[str, dict[str, Any]] = {
    "retention": dict(self_heads=2),
    "window": dict(self_mixer="window", window=6, self_heads=4),
    "long window": dict(self_mixer="window", window=20, self_heads=4),
    "tied": dict(self_heads=2, tie_embeddings=True, self_layers=1, layers=3),
    "retention, one layer": dict(self_heads=2, layers=2),
    "long window, one layer": dict(self_mixer="window", window=20, self_heads=4, layers=2),
}
"""The windows are longer than some documents, the long one also than chunks of 12, 6 and 3 tokens."""

Batch = tuple[Tensor, Tensor, Tensor | None]


def decoder(
    name: str, dtype: torch.dtype = torch.float64, checkpointing: bool = False, topology: Topology | None = None
) -> Decoder:
    shape = dict(dim=16, layers=4, hidden_dim=24, heads=4, kv_heads=2, vocab_size=VOCAB)
    model = ModelConfig(**{**shape, **MODELS[name]})
    return build_decoder(model, topology, seed=5, dtype=dtype, activation_checkpointing=checkpointing)


def batch(tokens: int, rows: int = 2, share: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets of which about `share` count, and documents with borders everywhere."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, tokens), generator=generator)
    targets = torch.where(torch.rand(rows, tokens, generator=generator) < share, ids.roll(-1, 1), -100)
    new = torch.rand(rows, tokens, generator=generator) < 0.12
    starts = torch.where(new, torch.arange(tokens), 0).cummax(1).values
    return ids, targets, starts


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _without_targets(*stretches: slice) -> Batch:
    ids, targets, starts = batch(48)
    for stretch in stretches:
        targets[:, stretch] = -100
    return ids, targets, starts


def _one_target(place: int) -> Batch:
    ids, targets, starts = batch(48)
    only = torch.full_like(targets, -100)
    only[1, place] = targets[1, place]
    return ids, only, starts


def _documents_of(length: int) -> Batch:
    ids, targets, _ = batch(48)
    return ids, targets, (torch.arange(48) // length * length).expand(2, -1)


CASES: dict[str, Callable[[], Batch]] = {
    "a chunk without targets": lambda: _without_targets(slice(12, 24)),
    "the last chunk without targets": lambda: _without_targets(slice(36, 48)),
    "no target at all": lambda: _without_targets(slice(0, 48)),
    "one target, in the first token": lambda: _one_target(0),
    "one target, before a chunk's edge": lambda: _one_target(23),
    "one target, behind a chunk's edge": lambda: _one_target(24),
    "one target, in the last token": lambda: _one_target(47),
    "borders on the edges of chunks": lambda: _documents_of(12),
    "documents shorter than a window": lambda: _documents_of(4),
    "documents of one token": lambda: _documents_of(1),
    "no document at all": lambda: (*batch(48)[:2], None),
}
"""Of 48 tokens; chunks of 12, 6 and 3 have edges at 12, 24 and 36."""
