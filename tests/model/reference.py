"""YOCO written out once more, straight from the paper and the constants of the official code: no chunks, no contexts,
no shared code with megayoco. The oracle of the decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megayoco.config import ModelConfig


def yoco_logits(model: ModelConfig, w: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits (T, V) of one sequence (T,), in the dtype of the weights."""
    x = math.sqrt(model.dim) * w["embed_tokens.weight"][tokens]
    half = model.num_self_layers
    for i in range(half):
        mixer = _retention if model.self_mixer == "retention" else _window
        x = x + mixer(model, w, f"layers.{i}.mixer", _norm(x, w[f"layers.{i}.mixer_norm.weight"], model.norm_eps))
        x = x + _ffn(w, f"layers.{i}.ffn", _norm(x, w[f"layers.{i}.ffn_norm.weight"], model.norm_eps))
    h = _norm(x, w["shared_kv.norm.weight"], model.norm_eps)
    k = _rotate(_heads(h @ w["shared_kv.k_proj.weight"].T, model.head_dim), model.rope_theta)
    v = _heads(h @ w["shared_kv.v_proj.weight"].T, model.head_dim)
    repeat = model.heads // model.num_kv_heads
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    for i in range(half, model.layers):
        y = _norm(x, w[f"layers.{i}.mixer_norm.weight"], model.norm_eps)
        q = _rotate(_heads(y @ w[f"layers.{i}.mixer.q_proj.weight"].T, model.head_dim), model.rope_theta)
        x = x + _attention(q, k, v, len(tokens)) @ w[f"layers.{i}.mixer.out_proj.weight"].T
        x = x + _ffn(w, f"layers.{i}.ffn", _norm(x, w[f"layers.{i}.ffn_norm.weight"], model.norm_eps))
    head = w.get("lm_head.weight", w["embed_tokens.weight"])
    return _norm(x, w["norm.weight"], model.norm_eps) @ head.T


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def _ffn(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    gate = x @ w[f"{name}.gate_proj.weight"].T
    return (gate * torch.sigmoid(gate) * (x @ w[f"{name}.up_proj.weight"].T)) @ w[f"{name}.down_proj.weight"].T


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """(T, H K) -> (H, T, K)"""
    return x.reshape(len(x), -1, head_dim).transpose(0, 1)


def _rotate(x: Tensor, theta: float) -> Tensor:
    """The paper's complex form: pairs (0, 1), (2, 3), ... turned by position * theta ** -linspace(0, 1)."""
    pairs = x.shape[-1] // 2
    exponents = torch.linspace(0, 1, pairs)
    frequencies = (theta**-exponents).to(x.dtype)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequencies.float()).to(x.dtype)
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], pairs, 2).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def _attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """(H, T, K) each -> (T, H K); a query sees itself and the window - 1 tokens before it."""
    T = q.shape[1]
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    hidden = (distance < 0) | (distance >= window)
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def _window(model: ModelConfig, w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    assert model.window is not None
    q, k, v = (_heads(x @ w[f"{name}.{p}_proj.weight"].T, model.self_head_dim) for p in "qkv")
    q, k = _rotate(q, model.rope_theta), _rotate(k, model.rope_theta)
    return _attention(q, k, v, model.window) @ w[f"{name}.out_proj.weight"].T


def _retention(model: ModelConfig, w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    q, k, v = (_heads(x @ w[f"{name}.{p}_proj.weight"].T, model.self_head_dim) for p in "qkv")
    q, k = _rotate(q, model.rope_theta), _rotate(k, model.rope_theta) / math.sqrt(model.self_head_dim)
    decay = torch.sigmoid(x @ w[f"{name}.gt_proj.weight"].T) ** (1 / 16)
    state = torch.zeros(q.shape[0], q.shape[2], v.shape[2], dtype=x.dtype)
    outputs = []
    for t in range(len(x)):
        state = decay[t, :, None, None] * state + k[:, t, :, None] * v[:, t, None, :]
        outputs.append(_norm((q[:, t, None] @ state)[:, 0], None, model.norm_eps).flatten())
    gate = x @ w[f"{name}.g_proj.weight"].T
    return (gate * torch.sigmoid(gate) * torch.stack(outputs)) @ w[f"{name}.out_proj.weight"].T
