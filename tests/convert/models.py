"""What the tests of all formats share: small models as weights, and the comparison of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megayoco.config import ModelConfig
from megayoco.convert.names import tensor_shapes
from megayoco.convert.weights import HeldTensors, Weights
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.generate.loading import load_weights
from tests.generate.models import MODELS, SHAPE

FACTS: dict[str, Any] = {"step": 7, "sequence_length": 4096, "phases": [{"sequence_length": 4096, "rope_theta": 1e4}]}
TIED_LLAMA = ModelConfig(**SHAPE, pattern="llama", tie_embeddings=True)
PLAIN_LLAMA = ModelConfig(**{**SHAPE, "kv_heads": None}, pattern="llama")
LONGLLAMA = ModelConfig(**{**SHAPE, "kv_heads": None}, pattern="llama", memory_layers=(1, 2), memory_window=6)
EXPRESSED: dict[str, ModelConfig | str] = {"llama": "llama", "longllama": LONGLLAMA, "easylm": LONGLLAMA}
"""A model for the formats that cannot hold a YOCO."""


def random_weights(model: ModelConfig | str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Random weights under which a model's logits depend on everything, its norms included."""
    if isinstance(model, str):
        model = MODELS[model]
    generator = torch.Generator().manual_seed(seed)
    tensors = HeldTensors()
    for name, shape in tensor_shapes(model).items():
        value = torch.randn(shape, generator=generator)
        tensors[name] = (1 + 0.1 * value if len(shape) == 1 else 2 * value * shape[1] ** -0.5).to(dtype)
    return Weights(model, tensors, ByteTokenizer(), FACTS)


def logits(weights: Weights, tokens: Tensor) -> Tensor:
    """(T, V) fp32 by our decoder; tokens (T,)."""
    model = load_weights(weights, dtype=torch.float32)
    return model.advance(tokens[None], model.empty_context(), last_only=False)[0][0]


def assert_same(found: Weights, expected: Weights) -> None:
    """Both are the same model to the last bit."""
    assert resolved(found.model) == resolved(expected.model)
    assert set(found.tensors.keys()) == set(expected.tensors.keys())
    for name in expected.tensors:
        assert found.tensors.shape(name) == expected.tensors.shape(name)
        assert found.tensors.dtype(name) == found.tensors[name].dtype == expected.tensors.dtype(name), name
        assert torch.equal(found.tensors[name], expected.tensors[name]), name


def resolved(model: ModelConfig) -> tuple[Any, ...]:
    """Everything that decides what a model computes."""
    sizes = (model.dim, model.hidden_dim, model.heads, model.num_kv_heads, model.num_self_heads, model.vocab_size)
    rest = (model.window, model.memory_window, model.rope_theta, model.norm_eps, model.tie_embeddings)
    return (model.pattern, tuple(model.layer_pattern()), sizes, rest)


def listing(folder: Path) -> set[str]:
    """Names in a folder, hidden ones too."""
    return {path.name for path in folder.iterdir()}
