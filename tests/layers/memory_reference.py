"""LongLLaMA written out once more from its papers' formulas: rows of windows, dense scores, no shared code with
megayoco. The oracle of memory attention and of cross-batch training.

Shapes: R rows, each a window of W tokens, H heads, K head dim. A sample of k W tokens is k rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megayoco.config import ModelConfig


def cross_batch_counts(rows: int, pack: int, reach: int, stepping: bool) -> list[int]:
    """n_i - 1, the number of rows before its own that row i attends to, as the training code of FoT has it."""
    n = reach + 1
    step = math.ceil(n / max(pack - 1, 1))
    counts = []
    for i in range(rows):
        n_i = n if pack == 1 or not stepping else min((i % pack) * step + 1, n)
        counts.append(min(n_i, i + 1) - 1)
    return counts


def longllama_logits(
    model: ModelConfig,
    w: Mapping[str, Tensor],
    tokens: Tensor,
    counts: list[int] | None,
    rotate_memory: bool = False,
) -> Tensor:
    """Logits (B, N, V) of samples (B, N). counts: rows that each row remembers; None: all before it in its sample."""
    assert model.memory_window is not None
    B, N = tokens.shape
    W = model.memory_window
    x = w["embed_tokens.weight"][tokens]
    for i in range(model.layers):
        y = _norm(x, w[f"layers.{i}.mixer_norm.weight"], model.norm_eps)
        q, k, v = (_heads(y @ w[f"layers.{i}.mixer.{p}_proj.weight"].T, model.head_dim) for p in "qkv")
        k, v = (t.repeat_interleave(model.heads // model.num_kv_heads, 2) for t in (k, v))
        windows = [[slice(a, min(a + W, N)) for a in range(0, N, W)] for _ in range(B)]
        rows = [(b, at) for b in range(B) for at in windows[b]]
        out = torch.zeros_like(q)
        for number, (b, at) in enumerate(rows):
            if i not in model.memory_layers:
                remembered = []
            elif counts is None:
                remembered = [row for row in rows[:number] if row[0] == b]
            else:
                remembered = [rows[number - back] for back in range(1, counts[number] + 1)]
            local_q, local_k = rotate(q[b : b + 1, at], model.rope_theta), rotate(k[b : b + 1, at], model.rope_theta)
            past = [k[c : c + 1, where] for c, where in remembered]
            if rotate_memory:
                past = [rotate(part, model.rope_theta) for part in past]
            keys = torch.cat([local_k, *past], 1)
            values = torch.cat([v[b : b + 1, at], *(v[c : c + 1, where] for c, where in remembered)], 1)
            scores = torch.einsum("bthk,bshk->bhts", local_q, keys) / math.sqrt(model.head_dim)
            T = local_q.shape[1]
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            future = torch.cat([future, torch.zeros(T, keys.shape[1] - T, dtype=torch.bool)], 1)
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            out[b, at] = torch.einsum("bhts,bshk->bthk", weights, values)[0]
        x = x + out.flatten(2) @ w[f"layers.{i}.mixer.out_proj.weight"].T
        x = x + _ffn(w, f"layers.{i}.ffn", _norm(x, w[f"layers.{i}.ffn_norm.weight"], model.norm_eps))
    head = w.get("lm_head.weight", w["embed_tokens.weight"])
    return _norm(x, w["norm.weight"], model.norm_eps) @ head.T


def windowed_logits(
    model: ModelConfig,
    w: Mapping[str, Tensor],
    tokens: Tensor,
    begins: list[int],
    capacity: int | None = None,
    exact: bool = True,
) -> Tensor:
    """Logits (N, V) of one sample (N,), token by token: token t sees the tokens from begins[t] on as its window, and in
    memory layers those before as memory, the last `capacity` of them.

    exact: angles in float64; else their products in fp32.
    """
    x = w["embed_tokens.weight"][tokens][None]
    N = tokens.shape[0]
    for i in range(model.layers):
        y = _norm(x, w[f"layers.{i}.mixer_norm.weight"], model.norm_eps)
        q, k, v = (_heads(y @ w[f"layers.{i}.mixer.{p}_proj.weight"].T, model.head_dim) for p in "qkv")
        k, v = (t.repeat_interleave(model.heads // model.num_kv_heads, 2) for t in (k, v))
        out = torch.zeros_like(q)
        for t, begin in enumerate(begins[:N]):
            first = begin
            if i in model.memory_layers:
                first = 0 if capacity is None else max(begin - capacity, 0)
            local = torch.cat([k[:, begin : t + 1], q[:, t : t + 1]], 1)
            turned = rotate(local, model.rope_theta, exact, last_twice=True)
            keys = torch.cat([k[:, first:begin], turned[:, :-1]], 1)
            scores = torch.einsum("bhk,bshk->bhs", turned[:, -1], keys) / math.sqrt(model.head_dim)
            out[:, t] = torch.einsum("bhs,bshk->bhk", scores.softmax(-1), v[:, first : t + 1])
        x = x + out.flatten(2) @ w[f"layers.{i}.mixer.out_proj.weight"].T
        x = x + _ffn(w, f"layers.{i}.ffn", _norm(x, w[f"layers.{i}.ffn_norm.weight"], model.norm_eps))
    head = w.get("lm_head.weight", w["embed_tokens.weight"])
    return (_norm(x, w["norm.weight"], model.norm_eps) @ head.T)[0]


def rotate(x: Tensor, theta: float, exact: bool = False, last_twice: bool = False) -> Tensor:
    """(1, T, H, K) at the positions 0 .. T - 1, channels (j, j + K/2), frequencies theta ** -(2 j / K).

    exact: angles in float64; else their products in fp32. last_twice: the last two stand at the same position.
    """
    pairs = x.shape[-1] // 2
    wide = torch.float64 if exact else torch.float32
    frequencies = (theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs)).float().to(wide)
    positions = torch.arange(x.shape[1], dtype=wide)
    if last_twice:
        positions = positions.clamp(max=x.shape[1] - 2)
    angles = positions[:, None] * frequencies
    cos, sin = (f(angles).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _ffn(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    gate = x @ w[f"{name}.gate_proj.weight"].T
    return (gate * torch.sigmoid(gate) * (x @ w[f"{name}.up_proj.weight"].T)) @ w[f"{name}.down_proj.weight"].T
