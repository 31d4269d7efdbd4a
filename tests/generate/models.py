"""Small models of every pattern, shared by the tests of export and generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megayoco.config import ModelConfig
from megayoco.model.decoder import Decoder, build_decoder
from megayoco.model.inference import InferenceModel
from megayoco.model.parameters import canonical_parameters

SHAPE: dict[str, Any] = dict(dim=32, layers=4, hidden_dim=48, heads=4, kv_heads=2, vocab_size=264)
MODELS = {
    "retention": ModelConfig(**SHAPE, self_heads=2),
    "window": ModelConfig(**SHAPE, self_mixer="window", window=7, tie_embeddings=True),
    "uneven": ModelConfig(**SHAPE, self_layers=1, rope_theta=5e5),
    "llama": ModelConfig(**SHAPE, pattern="llama"),
    "longllama": ModelConfig(**SHAPE, pattern="llama", memory_layers=(1, 2), memory_window=5),
    "memory": ModelConfig(**SHAPE, self_heads=2, self_layers=3, memory_layers=(1,), memory_window=4),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 3) -> Decoder:
    """A model with large random weights: its choices depend on all it has read, even with a tied head."""
    decoder = build_decoder(MODELS[name], None, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in canonical_parameters(decoder).items():
            if parameter.dim() == 2:
                gain = 1.0 if key == "embed_tokens.weight" else 3.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain * parameter.shape[1] ** -0.5)
    return decoder.eval()


def inference(name: str, dtype: torch.dtype = torch.float32, storage: torch.dtype | None = None) -> InferenceModel:
    return InferenceModel.of(build(name, dtype), storage=storage)


def weights(decoder: Decoder) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in canonical_parameters(decoder).items()}
