"""LongLLaMA for transformers: a LLaMA some of whose layers remember the keys and values of everything before.

Self-contained: it ships inside the model's folder and imports torch, transformers and the configuration beside it.

An input of T tokens is cut: all but the last `last_context_length` go through the stack window by window, each of
`max_position_embeddings` tokens or less, and memory layers keep what they saw of it; the last ones are the local
context, which the cache goes on with. A layer without memory sees the local context alone. When new tokens would make
it longer than a window, all of what it held leaves: into memory, or for good.

Shapes: B batch, T new tokens, n tokens of the local cache, S = n + T, M tokens of memory, D hidden_size, H heads,
        K head dim. Keys are kept without rotation: local ones are turned by their distance from the first of the local
        context, those in memory never; the query is turned by its own for both.
Source: Focused Transformer, arXiv 2307.03170, and the inference of the released LongLLaMA.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .cache_longllama import LongLlamaCache, Piece
from .configuration_longllama import LongLlamaConfig

logger = logging.get_logger(__name__)

FLOOR = -1e6
"""Score of a key that a query must not see. Finite: a query that sees nothing averages over all of them."""

SCORES = 2**25
"""Scores of queries with memory that are computed at a time at the most, 128 MiB in fp32; a few such tensors exist."""


def widen(dtype: torch.dtype) -> torch.dtype:
    """fp32 for narrower types, float64 as it is."""
    return torch.promote_types(dtype, torch.float32)


def rotary_table(places: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (B, 1, S, K/2) in `dtype`, of places (B, S) times theta ** -(2j / K).

    Made anew by each call instead of kept in a buffer, which casting the model to 16 bits would round.
    """
    device = places.device if places.device.type != "mps" else torch.device("cpu")  # no float64 there
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = (theta**-exponent).to(dtype).to(places.device)
    angle = places[:, None, :, None].to(dtype) * frequencies
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channels (j, j + K/2) of x (B, H, T, K) by their angles, the last T of the table; x's dtype."""
    cos, sin = (part[:, :, -x.shape[2] :] for part in table)
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


def local_scores(q: Tensor, k: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
    """q (B, H, T, K) against k (B, H, S, K), in fp32 or wider; visible: (B or 1, 1, 1 or T, S) bool."""
    scores = (q @ k.mT * scaling).to(widen(q.dtype))
    return scores if visible is None else scores.masked_fill(~visible, FLOOR)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, memory: Sequence[Piece], scaling: float
) -> Tensor:
    """One softmax over local context and memory, written out.

    Args:
        q: (B, H, T, K), rotated.
        k, v: (B, H, S, K), rotated.
        visible: (B or 1, 1, T, S) bool; None: everything is.
        memory: read piece by piece, never copied as a whole.
        scaling: factor of the scores.

    Returns:
        (B, H, T, K) in q's dtype.
    """
    scores = local_scores(q, k, visible, scaling)
    if not memory:
        return scores.softmax(-1).to(q.dtype) @ v
    top = scores.amax(-1, keepdim=True).detach()  # shifts all scores, and so the result depends on it in no way
    weights = (scores - top).exp()
    total, out = weights.sum(-1, keepdim=True), (weights.to(q.dtype) @ v).to(weights.dtype)
    for key, value, seen in _blocks(memory, max(SCORES // max(q[..., 0].numel(), 1), 1)):
        scores = local_scores(q, key.to(q.dtype), None if seen is None else seen[:, None, None], scaling)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True).detach())
        fade, weights, top = (top - higher).exp(), (scores - higher).exp(), higher
        total = total * fade + weights.sum(-1, keepdim=True)
        out = out * fade + weights.to(q.dtype) @ value.to(q.dtype)
    return (out / total).to(q.dtype)


def _blocks(memory: Iterable[Piece], tokens: int) -> Iterator[Piece]:
    for key, value, visible in memory:
        for begin in range(0, key.shape[2], tokens):
            part = slice(begin, begin + tokens)
            yield Piece(key[:, :, part], value[:, :, part], None if visible is None else visible[:, part])


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, memory: Sequence[Piece], scaling: float
) -> Tensor:
    """The same by torch's own attention, which wants all keys in one tensor and a mask over them."""
    mask = None
    if visible is not None or any(piece.visible is not None for piece in memory):
        seen = [(piece.key, None if piece.visible is None else piece.visible[:, None, None]) for piece in memory]
        both = torch.cat([_dense(part, q, key) for key, part in (*seen, (k, visible))], -1)
        # added, not a mask of bool: a query that sees nothing gets an average instead of NaN
        mask = q.new_zeros(both.shape).masked_fill(~both, torch.finfo(q.dtype).min)
    if memory:
        k = torch.cat([*(piece.key.to(q.dtype) for piece in memory), k], 2)
        v = torch.cat([*(piece.value.to(q.dtype) for piece in memory), v], 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)


def _dense(visible: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """(B, 1, T, S) bool."""
    shape = (len(q), 1, q.shape[2], k.shape[2])
    return torch.ones(shape, dtype=torch.bool, device=q.device) if visible is None else visible.expand(shape)


class LongLlamaRMSNorm(nn.Module):
    """Root-mean-square norm; statistics in fp32 or wider, cast back before the weight is applied."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(widen(x.dtype))
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class LongLlamaMLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: LongLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LongLlamaAttention(nn.Module):
    """Attention over the local context, and the memory where there is one."""

    def __init__(self, config: LongLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.has_memory = layer_idx in config.mem_layers
        self.has_positions = config.mem_positionals or not self.has_memory
        size = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(
        self,
        hidden_states: Tensor,
        table: tuple[Tensor, Tensor],
        visible: Tensor | None,
        local: tuple[Tensor, Tensor] | None,
        memory: Sequence[Piece],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mixer's output (B, T, D), and keys and values (B, H, T, K) of the new tokens, not rotated.

        Args:
            hidden_states: (B, T, D).
            table: of the S places of the local context, the new tokens' last.
            visible: (B or 1, 1, T, S) bool; None: everything is.
            local: keys and values (B, H, n, K) of the local context before, not rotated.
            memory: of this layer.
        """
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in projections)
        own = (k, v)
        if local is not None:
            k, v = torch.cat([local[0], k], 2), torch.cat([local[1], v], 2)
        if self.has_positions:
            q, k = apply_rotary(q, table), apply_rotary(k, table)
        y = self._attend(q, k, v, visible, memory)
        return self.o_proj(y.transpose(1, 2).flatten(2)), *own

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, memory: Sequence[Piece]) -> Tensor:
        H, T = q.shape[1:3]
        # a single query has few scores, and pieces of memory need no copy then
        by_torch = self.config.torch_attention and not (memory and T == 1)
        attend = torch_attention if by_torch else eager_attention
        grouping = self.config.mem_attention_grouping if self.has_memory else None
        scaling = self.head_dim**-0.5
        if grouping is None:
            return attend(q, k, v, visible, memory, scaling)
        by_heads = []
        for first in range(0, H, grouping[0]):
            h = slice(first, first + grouping[0])
            pieces = [Piece(piece.key[:, h], piece.value[:, h], piece.visible) for piece in memory]
            by_queries = []
            for begin in range(0, T, grouping[1]):
                t = slice(begin, begin + grouping[1])
                seen = None if visible is None else visible[:, :, t]
                by_queries.append(attend(q[:, h, t], k[:, h], v[:, h], seen, pieces, scaling))
            by_heads.append(torch.cat(by_queries, 2))
        return torch.cat(by_heads, 1)


class LongLlamaDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)). It stores nothing itself: it may be computed twice."""

    def __init__(self, config: LongLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LongLlamaAttention(config, layer_idx)
        self.mlp = LongLlamaMLP(config)
        self.input_layernorm = LongLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LongLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **context: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What `LongLlamaAttention.forward` takes and gives, the whole layer's output in place of the mixer's."""
        y, key, value = self.self_attn(self.input_layernorm(hidden_states), **context)
        hidden_states = hidden_states + y
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), key, value


class LongLlamaPreTrainedModel(PreTrainedModel):
    config: LongLlamaConfig
    config_class = LongLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongLlamaDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LongLlamaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Embedding | nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        given = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and given.get("use_reentrant", False):
            raise ValueError("use_reentrant must be False: gradients would not flow through memory")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        every = self.config.gradient_checkpoint_every_ith
        if enable and every > 1:
            for module in self.modules():
                if isinstance(module, LongLlamaDecoderLayer):
                    module.gradient_checkpointing &= module.self_attn.layer_idx % every == 0


class LongLlamaModel(LongLlamaPreTrainedModel):
    """The stack without the head, with the windows of long inputs."""

    def __init__(self, config: LongLlamaConfig) -> None:
        super().__init__(config)
        # no padding_idx: the row of that token is trained like any other
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LongLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LongLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LongLlamaCache | Sequence[Sequence[Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        last_context_length: int | None = None,
        last_rows: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the last tokens.

        Args:
            input_ids: (B, T) int64, or else inputs_embeds (B, T, D).
            attention_mask: (B, n + T) or longer, zero at padding; the last n + T columns count.
            position_ids: (B, T) int64. Default: they go on from the largest of the local context.
            past_key_values: what came before, changed in place; or the six tensors per layer of the released code.
            use_cache: whether the last tokens become the local context of the next call. False: memory layers remember
                them as well, and the cache that is returned holds the memory alone.
            last_context_length: in place of the config's.
            last_rows: R, for how many of the last tokens hidden states are wanted; 0 for all of them.
            output_hidden_states: also those of all tokens before each layer.

        Returns:
            last_hidden_state (B, R, D), past_key_values (None if there is nothing to keep).

        Raises:
            ValueError: a mask, cache or length that cannot be used; attentions, which nobody keeps; an input longer
                than last_context_length without any layer that would remember it.
        """
        inner = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions is not supported: attention goes by windows and pieces of memory")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        (B, T), cache = x.shape[:2], self._cache(past_key_values, len(x))
        n = cache.local_tokens
        if n and not use_cache:
            raise ValueError("past_key_values has a local context, which needs use_cache=True")
        positions = self._positions(position_ids, cache, x)
        valid = _valid(attention_mask, B, n, T)
        windows = self._windows(T, n, last_context_length)

        kept: list[Tensor] = []
        states: list[list[Tensor]] = [[] for _ in range(len(self.layers) + 1)]
        wanted = T if inner or not 0 < last_rows < T else last_rows
        for begin, end in windows:
            local = cache.local_tokens
            keeps = use_cache and (end == T or local > 0)
            seen = None if valid is None else valid[:, n + begin - local : n + end]
            y = self._window(x[:, begin:end], positions[:, begin:end], seen, cache, keeps, states if inner else None)
            if end > T - wanted:
                kept.append(y[:, max(T - wanted - begin, 0) :])
        hidden = self.norm(torch.cat(kept, 1))
        hidden_states = None
        if inner:
            states[-1] = [hidden]
            hidden_states = tuple(torch.cat(parts, 1) for parts in states)
        cache.seen += T
        return BaseModelOutputWithPast(
            last_hidden_state=hidden[:, -last_rows:],
            past_key_values=cache if use_cache or self.config.mem_layers else None,
            hidden_states=hidden_states,
        )

    def _window(
        self,
        x: Tensor,
        positions: Tensor,
        valid: Tensor | None,
        cache: LongLlamaCache,
        keeps: bool,
        states: list[list[Tensor]] | None,
    ) -> Tensor:
        """Once through the stack, without the last norm.

        Args:
            x: (B, T, D).
            positions: (B, T) int64.
            valid: (B, n + T) bool, False at padding; None: there is none.
            cache: changed.
            keeps: whether the tokens are added to the local context; if not there is none, and they go into memory.
            states: where the inputs of all layers are collected.
        """
        T, n = x.shape[1], cache.local_tokens
        if n and n + T > self.config.max_position_embeddings:
            if not self.config.mem_layers:
                logger.warning_once("the window is full and no layer has a memory: everything before is forgotten")
            cache.flush(None if valid is None else valid[:, :n])
            valid, n = None if valid is None else valid[:, n:], 0
        if cache.positions is not None:
            positions = torch.cat([cache.positions, positions], 1)
        places = positions - positions.amin(1, keepdim=True)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        table = rotary_table(places, head_dim, self.config.rope_theta, widen(x.dtype))
        visible = _visible(valid, n, T, x.device)
        for number, (layer, stored) in enumerate(zip(self.layers, cache.layers, strict=True)):
            if states is not None:
                states[number].append(x)
            local = None if stored.keys is None or stored.values is None else (stored.keys, stored.values)
            x, key, value = layer(x, table=table, visible=visible, local=local, memory=stored.pieces())
            if keeps:
                stored.update(key, value)
            else:  # after it was read: a window does not see itself in memory
                stored.remember(key, value, valid)
        if keeps:
            cache.positions = positions
        return x

    def _windows(self, tokens: int, cached: int, last_context_length: int | None) -> list[tuple[int, int]]:
        """Begin and end of each pass through the stack, the local context's last."""
        window = self.config.max_position_embeddings
        last = self.config.last_context_length if last_context_length is None else last_context_length
        if not 1 <= last <= window:
            raise ValueError(f"last_context_length must be 1 to max_position_embeddings {window}, got {last}")
        prefix = max(tokens - last, 0)
        if prefix and not cached and not self.config.mem_layers:
            raise ValueError(
                f"{tokens} tokens are more than last_context_length {last}, and no layer has a memory (mem_layers is"
                f" empty): the first {prefix} would be forgotten. Give fewer, or last_context_length up to {window}"
            )
        return [*((i, min(prefix, i + window)) for i in range(0, prefix, window)), (prefix, tokens)]

    def _cache(self, given: LongLlamaCache | Sequence[Sequence[Tensor]] | None, batch: int) -> LongLlamaCache:
        if given is None:
            return LongLlamaCache(self.config)
        if isinstance(given, tuple | list):
            given = LongLlamaCache.from_legacy_cache(given, self.config)
        if not isinstance(given, LongLlamaCache):
            raise ValueError(
                f"past_key_values of {type(given).__name__} has no place for memory: leave it out, and go on with the"
                " one that is returned"
            )
        if len(given.layers) != len(self.layers):
            raise ValueError(f"past_key_values has {len(given.layers)} layers, the model {len(self.layers)}")
        if given.batch_rows not in (None, batch):
            raise ValueError(f"past_key_values has {given.batch_rows} rows, the input {batch}")
        return given

    def _positions(self, given: Tensor | None, cache: LongLlamaCache, x: Tensor) -> Tensor:
        """(B, T) int64."""
        B, T = x.shape[:2]
        if given is not None:
            if given.ndim != 2 or given.shape[1] != T or given.shape[0] not in (1, B):
                raise ValueError(f"position_ids must be ({B}, {T}), got {tuple(given.shape)}")
            return given.long().expand(B, T)
        first = 0 if cache.positions is None else cache.positions.amax(1, keepdim=True) + 1
        return torch.arange(T, device=x.device).expand(B, T) + first


def _valid(attention_mask: Tensor | None, batch: int, cached: int, tokens: int) -> Tensor | None:
    """(B, n + T) bool, None if nothing is padding."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or len(attention_mask) != batch or attention_mask.shape[1] < cached + tokens:
        raise ValueError(
            f"attention_mask must be (batch, tokens), zero at padding, and cover the {cached} tokens of the local"
            f" context and {tokens} new ones for {batch} rows, got {tuple(attention_mask.shape)}"
        )
    valid = attention_mask[:, -(cached + tokens) :] != 0
    return None if tokens > 1 and bool(valid.all()) else valid  # the question costs more than a single token's mask


def _visible(valid: Tensor | None, cached: int, tokens: int, device: torch.device) -> Tensor | None:
    """(B or 1, 1, T, n + T) bool: no later tokens, and no padding; None if all see everything."""
    padding = None if valid is None else valid[:, None, None]
    if tokens == 1:
        return padding
    causal = torch.ones(tokens, cached + tokens, dtype=torch.bool, device=device).tril(cached)[None, None]
    return causal if padding is None else causal & padding


def mask_positions(attention_mask: Tensor) -> Tensor:
    """Positions (B, S) of all tokens; padding in front is at -1, as in the released code."""
    return attention_mask.long().cumsum(-1) - 1


def _parent(parent: Any) -> Any:
    """super() without its types: those of generation ask for more than a model with a head."""
    return parent


class LongLlamaForCausalLM(LongLlamaPreTrainedModel, GenerationMixin):
    """The stack with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _is_stateful = True  # generate then refuses by itself what would roll the cache back

    def __init__(self, config: LongLlamaConfig) -> None:
        super().__init__(config)
        self.model = LongLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LongLlamaCache | Sequence[Sequence[Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        last_context_length: int | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given. Arguments and errors as in `LongLlamaModel.forward`, and:

        Args:
            labels: (B, T) int64, the tokens themselves, -100 where none is learned; they are shifted here, across the
                windows' borders.
            logits_to_keep: for how many of the last tokens logits are wanted, 0 for all; or their numbers in a tensor.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            last_context_length=last_context_length,
            last_rows=logits_to_keep if isinstance(logits_to_keep, int) else 0,
            **{name: kwargs.pop(name) for name in _INNER if name in kwargs},
        )
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep])
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"labels {tuple(labels.shape)} need logits of all their tokens: leave out logits_to_keep"
                )
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        mask, parent = kwargs.get("attention_mask"), _parent(super())
        if next_sequence_length is not None and next_sequence_length < 1:  # transformers would take all of them again
            raise ValueError(
                f"past_key_values has read {input_ids.shape[1] - next_sequence_length} tokens, and input_ids has"
                f" {input_ids.shape[1]}: give those and new ones, or the new ones alone with the mask of all"
            )
        if mask is not None and kwargs.get("position_ids") is None:  # in versions that make them here
            kwargs["position_ids"] = mask_positions(mask)
        if next_sequence_length is not None:
            kwargs["next_sequence_length"] = next_sequence_length
        return parent.prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[no-any-return]

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        for name in ("cache_implementation", "prefill_chunk_size"):
            if getattr(generation_config, name, None) is not None:
                raise ValueError(f"{name} cannot be used: the model has a cache, and windows, of its own. Leave it out")
        if not generation_config.use_cache:
            if model_kwargs.get("past_key_values") is not None:
                raise ValueError("use_cache=False reads everything anew: leave out past_key_values")
            return
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LongLlamaCache(self.config)
        elif not isinstance(model_kwargs["past_key_values"], LongLlamaCache):
            kind = type(model_kwargs["past_key_values"]).__name__
            raise ValueError(f"past_key_values must be a LongLlamaCache, as this model returns it, got {kind}")

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is None:
            return _parent(super())._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)  # type: ignore[no-any-return]
        return mask_positions(attention_mask)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        criteria = _parent(super())._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if hasattr(criterion, "max_position_embeddings"):
                criterion.max_position_embeddings = None  # a window is no limit: it would warn of nothing
        return criteria

    def _update_model_kwargs_for_generation(  # type: ignore[override]
        self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        model_kwargs = _parent(super())._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if not model_kwargs.get("use_cache", True):  # the next step reads everything again, and must not remember it
            model_kwargs.pop("past_key_values", None)
        return model_kwargs


_INNER = ("output_hidden_states", "output_attentions")

LongLlamaModel.register_for_auto_class("AutoModel")
LongLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
