"""LongLLaMA's inference written out from its formulas, in float64 and without any code of megayoco: the oracle of
everything that reads, writes or runs such models. Slow and plain on purpose.

Shapes: B batch, T new tokens, n tokens of the local cache, M tokens of memory, H heads, K head dim, D model dim,
        W window (`max_position_embeddings`).
Past: a list with one tuple per layer: local keys, values (B, H, n, K) and positions (B, 1, n, 1), memory keys, values
      (B, H, M, K) in mem_dtype and additive mask (B, 1, M, 1). All keys are without rotation. What is absent is
      (B, 0, 0, 0). None: there is nothing at all.
Source: Focused Transformer, arXiv 2307.03170, and the inference of the released LongLLaMA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Layer = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Past = Sequence[Layer]

FLOOR = -1e6
"""What the score of a hidden key becomes: a query that sees nothing averages over all keys."""
HIDDEN = torch.finfo(torch.float64).min


class Reference:
    """A model.

    Args:
        state_dict: tensors under the names of LlamaForCausalLM.
        config: the fields of config.json. Read are num_hidden_layers, num_attention_heads, max_position_embeddings,
            rms_norm_eps, rope_theta, tie_word_embeddings, use_cache, last_context_length, mem_layers, mem_positionals
            and mem_dtype.
    """

    def __init__(self, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.weights = {name: tensor.double() for name, tensor in state_dict.items()}  # gradients flow back to them
        self.config = dict(config)
        self.layers = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.window = int(config["max_position_embeddings"])
        self.mem_layers = tuple(config.get("mem_layers", ()))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Past | None = None,
        use_cache: bool | None = None,
        last_context_length: int | None = None,
    ) -> tuple[Tensor, list[Layer] | None]:
        """Logits (B, T, V) of all tokens, and the past after them.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, n + T) or longer, zero at padding; the last n + T columns count.
            position_ids: (B, T); default: they go on from the largest position of the local cache.
            past: what an earlier call returned.
            use_cache: default: the config's, which is True.
            last_context_length: lc, tokens at the end that do not go through the windows before; default: the config's.
        """
        B, T = input_ids.shape
        if use_cache is None:
            use_cache = bool(self.config.get("use_cache", True))
        lc = self.config.get("last_context_length", 1024) if last_context_length is None else last_context_length
        cached = 0 if past is None else past[0][0].shape[2]
        if cached and not use_cache:
            raise ValueError("a local cache needs use_cache")
        if position_ids is None:
            first = past[0][2].reshape(B, -1).amax(1, keepdim=True) + 1 if past is not None and cached else 0
            position_ids = torch.arange(T)[None].expand(B, -1) + first
        valid = torch.ones(B, cached + T) if attention_mask is None else attention_mask[:, -(cached + T) :]
        valid = valid.bool()

        prefix = max(T - lc, 0)
        windows = [(i, min(prefix, i + self.window)) for i in range(0, prefix, self.window)]
        outputs = []
        for begin, end in [*windows, (prefix, T)]:
            local = 0 if past is None else past[0][0].shape[2]
            keeps = use_cache if begin == prefix or local else False
            seen = valid[:, cached + begin - local : cached + end]
            x, past = self._window(input_ids[:, begin:end], seen, position_ids[:, begin:end], past, keeps)
            outputs.append(x)
        head = "model.embed_tokens.weight" if self.config.get("tie_word_embeddings", False) else "lm_head.weight"
        nothing = past is None or all(part.shape[2] == 0 for layer in past for part in layer)
        return torch.cat(outputs, 1) @ self.weights[head].T, None if nothing or past is None else list(past)

    def _window(
        self, input_ids: Tensor, valid: Tensor, positions: Tensor, past: Past | None, use_cache: bool
    ) -> tuple[Tensor, list[Layer]]:
        """Normed hidden states (B, T, D) of one pass through the stack; valid: (B, n + T)."""
        w, eps = self.weights, float(self.config.get("rms_norm_eps", 1e-6))
        x = w["model.embed_tokens.weight"][input_ids]
        after = []
        for i in range(self.layers):
            name = f"model.layers.{i}"
            before = _empty(len(input_ids)) if past is None else past[i]
            y, layer = self._attention(
                i, _norm(x, w[f"{name}.input_layernorm.weight"], eps), valid, positions, before, use_cache
            )
            after.append(layer)
            x = x + y
            y = _norm(x, w[f"{name}.post_attention_layernorm.weight"], eps)
            gate, up = y @ w[f"{name}.mlp.gate_proj.weight"].T, y @ w[f"{name}.mlp.up_proj.weight"].T
            x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{name}.mlp.down_proj.weight"].T
        return _norm(x, w["model.norm.weight"], eps), after

    def _attention(
        self, i: int, x: Tensor, valid: Tensor, positions: Tensor, before: Layer, use_cache: bool
    ) -> tuple[Tensor, Layer]:
        name = f"model.layers.{i}.self_attn"
        q, k, v = (self._heads(x @ self.weights[f"{name}.{part}_proj.weight"].T) for part in "qkv")
        own_k, own_v = k, v
        positions = positions[:, None, :, None]
        local_k, local_v, local_positions, *memory = before
        remembers, n, T = i in self.mem_layers, local_k.shape[2], q.shape[2]
        window_mode = remembers and n == 0 and not use_cache
        if n:
            k, v = torch.cat([local_k, k], 2), torch.cat([local_v, v], 2)
            positions = torch.cat([local_positions, positions], 2)
            if n + T > self.window:  # the whole cache leaves, not what is too much
                if remembers:
                    memory = self._remember(memory, k[:, :, :n], v[:, :, :n], valid[:, :n])
                k, v, positions, valid = k[:, :, n:], v[:, :, n:], positions[:, :, n:], valid[:, n:]
        kept = (k, v, positions) if use_cache else _empty(len(x))[:3]

        rotated_q, rotated_k = q, k
        if not remembers or self.config.get("mem_positionals", True):
            places = (positions - positions.amin(2, keepdim=True))[:, 0, :, 0]
            rotated_q, rotated_k = self._rotate(q, places[:, -T:]), self._rotate(k, places)
        S = k.shape[2]
        hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1) | ~valid[:, None, None]
        scores = (rotated_q @ rotated_k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, FLOOR)
        values = v
        if memory[0].shape[2]:
            mem_k, mem_v, mem_mask = (part.double() for part in memory)
            mem_scores = rotated_q @ mem_k.mT / math.sqrt(q.shape[-1]) + mem_mask.mT
            scores, values = torch.cat([scores, mem_scores.clamp(min=FLOOR)], 3), torch.cat([v, mem_v], 2)
        y = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        if window_mode:
            memory = self._remember(memory, own_k, own_v, valid)
        return y @ self.weights[f"{name}.o_proj.weight"].T, (*kept, *memory)  # type: ignore[return-value]

    def _remember(self, memory: Sequence[Tensor], k: Tensor, v: Tensor, valid: Tensor) -> list[Tensor]:
        dtype = getattr(torch, self.config.get("mem_dtype", "bfloat16"))
        mask = torch.zeros(len(k), 1, k.shape[2], 1, dtype=torch.float64)
        new = [k.to(dtype), v.to(dtype), mask.masked_fill(~valid[:, None, :, None], HIDDEN)]
        if memory[0].shape[2] == 0:
            return new
        return [torch.cat([old, more], 2) for old, more in zip(memory, new, strict=True)]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _rotate(self, x: Tensor, places: Tensor) -> Tensor:
        """x (B, H, T, K) turned by places (B, T): channels (j, j + K/2), frequencies theta ** -(2 j / K)."""
        pairs = x.shape[-1] // 2
        frequencies = float(self.config.get("rope_theta", 1e4)) ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        angles = places[:, None, :, None].double() * frequencies
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def mask_positions(attention_mask: Tensor) -> Tensor:
    """Positions (B, S) as generation derives them from a mask (B, S): padding in front is at -1."""
    return attention_mask.long().cumsum(-1) - 1


def greedy(
    reference: Reference,
    input_ids: Tensor,
    new_tokens: int,
    attention_mask: Tensor | None = None,
    past: Past | None = None,
    last_context_length: int | None = None,
) -> tuple[Tensor, list[Layer] | None]:
    """The tokens (B, T + new_tokens) of greedy generation, positions from the mask, and the past before the last.

    Args:
        reference: the model.
        input_ids: (B, T) int64, the tokens that follow the past.
        new_tokens: how many to generate.
        attention_mask: (B, all tokens so far), zero at padding; needed with a past.
        past: what an earlier call returned.
        last_context_length: default: the config's.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    fed = input_ids
    after: list[Layer] | None = None if past is None else list(past)
    for _ in range(new_tokens):
        positions = mask_positions(mask)[:, -fed.shape[1] :]
        logits, after = reference.forward(
            fed, mask, positions, past=after, use_cache=True, last_context_length=last_context_length
        )
        fed = logits[:, -1:].argmax(-1)
        input_ids, mask = torch.cat([input_ids, fed], 1), torch.cat([mask, torch.ones_like(fed)], 1)
    return input_ids, after


def select_rows(past: Past, rows: Tensor) -> list[Layer]:
    """The past of some rows of the batch, as beam search takes it."""
    return [tuple(part.index_select(0, rows) for part in layer) for layer in past]  # type: ignore[misc]


def random_state_dict(
    config: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Weights under the names of LlamaForCausalLM that make the logits depend on everything, the norms included."""
    generator = torch.Generator().manual_seed(seed)
    V, D, hidden = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (D, D) for part in "qkvo"}
        shapes |= {f"{name}.mlp.{part}_proj.weight": (hidden, D) for part in ("gate", "up")}
        shapes |= {f"{name}.mlp.down_proj.weight": (D, hidden)}
        shapes |= {f"{name}.{part}.weight": (D,) for part in ("input_layernorm", "post_attention_layernorm")}
    return {
        name: (
            1 + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
            if len(shape) == 1
            else 2 * torch.randn(shape, generator=generator, dtype=torch.float64) * shape[1] ** -0.5
        ).to(dtype)
        for name, shape in shapes.items()
    }


def _empty(batch: int) -> Layer:
    nothing = torch.empty(batch, 0, 0, 0, dtype=torch.float64)
    return (nothing,) * 6


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
