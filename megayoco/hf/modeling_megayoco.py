"""YOCO for transformers: a decoder-decoder whose upper half reads one set of shared keys and values.

Self-contained: it ships inside the model's folder and imports torch, transformers and the configuration beside it.

Shapes: B batch, T tokens of the call, S tokens so far (the call's included), R last tokens whose outputs are wanted,
        D hidden_size, H query heads, G key-value heads, K head dim; heads come before tokens, as transformers has it.
Cache: DynamicCache(config=config) keeps, per layer of the self-decoder, a retention state (B, H, K, K) in fp32 or the
       keys and values of a window; and the shared keys and values (B, G, S, K) once, at the first cross layer.
Early exit: cross layers read of other tokens only the shared keys and values, which depend on the self-decoder alone.
            So tokens whose logits nobody asks for stop before the cross-decoder, and nothing changes for the others.
Source: YOCO, arXiv 2405.05254, and the constants of its released code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, LinearAttentionCacheLayerMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_masks_for_generate,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_megayoco import SELF_LAYER_TYPES, MegaYocoConfig

GATE_TEMPERATURE = 16
"""The decay of retention is sigmoid(gate) ** (1/16)."""

RETENTION_CHUNK = 256
"""Tokens that retention takes at a time: memory grows with T times this, not with T squared."""


def widen(dtype: torch.dtype) -> torch.dtype:
    """fp32 for 16-bit types, float64 as it is."""
    return torch.promote_types(dtype, torch.float32)


def rotary_table(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (B, T, 1, K/2) fp32, of positions (B, T) times theta ** -linspace(0, 1, K/2).

    Made anew by each call instead of kept in a buffer, which casting the model to 16 bits would round.
    """
    device = position_ids.device if position_ids.device.type != "mps" else torch.device("cpu")  # no float64 there
    exponent = torch.linspace(0, 1, head_dim // 2, dtype=torch.float64, device=device)
    frequencies = (theta**-exponent).float().to(position_ids.device)
    angle = position_ids[..., None, None].float() * frequencies
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns neighbouring channels of x (B, T, H, K) by their angles, in fp32 or wider; x's dtype."""
    cos, sin = table
    wide = x.to(widen(x.dtype))
    a, b = wide[..., 0::2], wide[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def gated_retention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention without softmax in which older tokens are faded by the later decays.

    Args:
        q, k, v: (B, H, T, K), rotated, keys scaled.
        log_decay: (B, H, T) fp32 or wider, <= 0; a token fades everything before it.
        state: (B, H, K, K) in log_decay's dtype, what is left of the tokens before these.
        segments: (B, T) int64, number of each token's sequence where several are packed into a row.

    Returns:
        y (B, H, T, K) in q's dtype, and the state after the last token.
    """
    wide, T = log_decay.dtype, q.shape[2]
    if T == 1 and segments is None:
        state = log_decay[..., None].exp() * state + k.to(wide).mT @ v.to(wide)
        return (q.to(wide) @ state).to(q.dtype), state
    outputs = []
    for start in range(0, T, RETENTION_CHUNK):
        part = slice(start, start + RETENTION_CHUNK)
        q_, k_, v_ = (x[:, :, part].to(wide) for x in (q, k, v))
        c = log_decay[:, :, part].cumsum(-1)
        from_left, to_right, across = c.exp(), (c[..., -1:] - c).exp(), c[..., -1:].exp()
        hidden = torch.ones(c.shape[-1], c.shape[-1], dtype=torch.bool, device=c.device).triu(1)
        if segments is not None:
            own, before = segments[:, None, part], segments[:, None, max(start - 1, 0) : max(start, 1)]
            hidden = hidden | (own[..., :, None] != own[..., None, :])
            from_left = from_left.masked_fill(own != before, 0)
            to_right = to_right.masked_fill(own != own[..., -1:], 0)
            across = across.masked_fill(own[..., -1:] != before, 0)
        # hidden before exp: towards the future the differences are positive and would overflow
        fade = (c[..., :, None] - c[..., None, :]).masked_fill(hidden, -torch.inf).exp()
        y = (q_ @ k_.mT * fade) @ v_ + (q_ * from_left[..., None]) @ state
        outputs.append(y.to(q.dtype))
        state = across[..., None] * state + (k_ * to_right[..., None]).mT @ v_
    return torch.cat(outputs, 2), state


def eager_attention_forward(
    module: "MegaYocoAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: the output (B, T, H, K) and the weights (B, H, T, S). The mask is added to the scores."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=widen(query.dtype)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def heads(x: Tensor, head_dim: int, table: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(B, T, H K) as a projection gives it -> (B, H, T, K), rotated if a table is given."""
    x = x.unflatten(-1, (-1, head_dim))
    return (x if table is None else apply_rotary(x, table)).transpose(1, 2)


class MegaYocoRMSNorm(nn.Module):
    """Root-mean-square norm; statistics in fp32 or wider, cast back before the weight is applied."""

    def __init__(self, size: int | None, eps: float) -> None:
        super().__init__()
        self.weight = None if size is None else nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(widen(x.dtype))
        y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return y if self.weight is None else y * self.weight


class MegaYocoEmbedding(nn.Embedding):
    """Token embeddings times sqrt(D)."""

    def __init__(self, config: MegaYocoConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.embed_scale = config.hidden_size**0.5

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class MegaYocoMLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: MegaYocoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MegaYocoRetention(nn.Module):
    """Gated retention. Its state and decays are fp32 or wider whatever the model's dtype: a bf16 decay near 1 never
    fades."""

    def __init__(self, config: MegaYocoConfig, layer_idx: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.layer_idx = layer_idx
        self.head_dim = config.self_head_dim
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.g_proj = nn.Linear(size, size, bias=False)
        self.gt_proj = nn.Linear(size, config.num_self_heads, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.head_norm = MegaYocoRMSNorm(None, config.rms_norm_eps)
        inward: Any = (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.gt_proj)
        outward: Any = self.o_proj
        for projection in inward:
            projection.xavier_gain = 2**-2.5
        outward.xavier_gain = 2**-1

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        segments: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """attention_mask: (B, T), zero at padding. segments: (B, T), see `gated_retention`."""
        q = heads(self.q_proj(hidden_states), self.head_dim, position_embeddings)
        k = heads(self.k_proj(hidden_states), self.head_dim, position_embeddings) * self.head_dim**-0.5
        v = heads(self.v_proj(hidden_states), self.head_dim)
        gate = self.gt_proj(hidden_states).transpose(1, 2)
        log_decay = F.logsigmoid(gate.to(widen(gate.dtype))) / GATE_TEMPERATURE
        if attention_mask is not None:
            # padding adds nothing to the state and leaves it as it is; filled, since 0 times NaN would be NaN
            padding = (attention_mask == 0)[:, None]
            k, v = (x.masked_fill(padding[..., None], 0) for x in (k, v))
            log_decay = log_decay.masked_fill(padding, 0)
        state = self._left(past_key_values, q, log_decay.dtype)
        with maybe_autocast(device_type=q.device.type, enabled=False):
            y, state = gated_retention(q, k, v, log_decay, state, segments)
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
            # transformers sets these from convolution states, which this layer has not
            layer: Any = past_key_values.layers[self.layer_idx]
            layer.has_previous_state[0], layer.dtype, layer.device = True, state.dtype, state.device
        y = self.head_norm(y.transpose(1, 2)).flatten(2)
        return self.o_proj(F.silu(self.g_proj(hidden_states)) * y), None

    def _left(self, past_key_values: Cache | None, q: Tensor, dtype: torch.dtype) -> Tensor:
        """The state before these tokens, (B, H, K, K)."""
        if past_key_values is not None and past_key_values.has_previous_state(self.layer_idx):
            layer: Any = past_key_values.layers[self.layer_idx]
            state: Tensor = layer.recurrent_states[0]
            # the cache is overwritten in place, which a graph that saved it would not survive
            return state.clone() if torch.is_grad_enabled() else state
        return torch.zeros(*q.shape[:2], self.head_dim, self.head_dim, dtype=dtype, device=q.device)


class MegaYocoAttention(nn.Module):
    """What window and cross attention share: softmax attention by the implementation that the config names."""

    is_causal = True

    def __init__(self, config: MegaYocoConfig, layer_idx: int, head_dim: int, num_key_value_groups: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = head_dim
        self.num_key_value_groups = num_key_value_groups
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """q (B, H, T, K), k and v (B, G, S, K) -> the mixer's output (B, T, D) and the weights, if there are any."""
        implementation = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        y, weights = implementation(self, q, k, v, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        return self.o_proj(y.flatten(2)), weights


class MegaYocoWindowAttention(MegaYocoAttention):
    """Self-attention over the last `sliding_window` tokens, the query included."""

    def __init__(self, config: MegaYocoConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.self_head_dim, 1)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        segments: Tensor | None = None,  # the mask knows them
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q = heads(self.q_proj(hidden_states), self.head_dim, position_embeddings)
        k = heads(self.k_proj(hidden_states), self.head_dim, position_embeddings)
        v = heads(self.v_proj(hidden_states), self.head_dim)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        return self.attend(q, k, v, attention_mask, sliding_window=self.config.sliding_window, **kwargs)


class MegaYocoCrossAttention(MegaYocoAttention):
    """Attention over the shared keys and values (B, G, S, K), which are arguments: checkpointing must see them."""

    def __init__(self, config: MegaYocoConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.head_dim, config.num_attention_heads // config.num_key_value_heads)

    def forward(
        self,
        hidden_states: Tensor,
        shared_key: Tensor,
        shared_value: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q = heads(self.q_proj(hidden_states), self.head_dim, position_embeddings)
        return self.attend(q, shared_key, shared_value, attention_mask, **kwargs)


SELF_MIXERS: dict[str, type[nn.Module]] = {"retention": MegaYocoRetention, "window": MegaYocoWindowAttention}


class MegaYocoDecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)), for the layers of both halves."""

    def __init__(self, config: MegaYocoConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = MegaYocoRMSNorm(config.hidden_size, config.rms_norm_eps)
        own = layer_idx < config.num_self_layers
        self.self_attn = (SELF_MIXERS[config.self_mixer] if own else MegaYocoCrossAttention)(config, layer_idx)
        self.post_attention_layernorm = MegaYocoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MegaYocoMLP(config)

    def forward(self, hidden_states: Tensor, *shared: Tensor, **kwargs: Any) -> Tensor:
        """shared: the shared key and value of cross layers; by position, which reentrant checkpointing needs."""
        y, _ = self.self_attn(self.input_layernorm(hidden_states), *shared, **kwargs)
        hidden_states = hidden_states + y
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LastRows:
    """What the mask functions ask a cache, answered for the last R of S tokens after the keys of all S are stored."""

    is_compileable = False

    def __init__(self, seen: int, rows: int) -> None:
        self.seen, self.rows = seen, rows

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.seen - self.rows

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen, 0


class MegaYocoPreTrainedModel(PreTrainedModel):
    config_class = MegaYocoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegaYocoDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MegaYocoDecoderLayer, "attentions": MegaYocoAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MegaYocoRMSNorm) and module.weight is not None:
            init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.Linear):
            gain = getattr(module, "xavier_gain", None)
            if gain is None:
                init.kaiming_uniform_(module.weight, a=5**0.5)
            else:
                init.xavier_uniform_(module.weight, gain=gain)


class MegaYocoModel(MegaYocoPreTrainedModel):
    """The stack without the head."""

    def __init__(self, config: MegaYocoConfig) -> None:
        super().__init__(config)
        self.embed_tokens = MegaYocoEmbedding(config)
        self.layers = nn.ModuleList(MegaYocoDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.kv_norm = MegaYocoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.norm = MegaYocoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        last_rows: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the last tokens.

        Args:
            input_ids: (B, T) int64, or else inputs_embeds (B, T, D) as `get_input_embeddings()` gives them: scaled.
            attention_mask: (B, S), zero at padding; or what `create_masks_for_generate` makes, by layer type.
            position_ids: (B, T) int64. Without mask and cache, positions that start again begin another sequence, which
                sees nothing of the one before.
            past_key_values: what came before, changed in place. A new one is made if `use_cache`.
            last_rows: R, for how many of the last tokens hidden states are wanted; 0 for all of them.

        Returns:
            last_hidden_state (B, R, D), past_key_values (None for packed sequences, which nothing can follow).

        Raises:
            ValueError: a cache that cannot hold this model's context, or a mask of another form.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.get("cache") is not None:
            raise ValueError("paged caches (generate_batch) hold no context of the self-decoder: use generate")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        T, seen, segments = inputs_embeds.shape[1], 0, None
        if past_key_values is not None:
            self._check_cache(past_key_values)
            seen = past_key_values.get_seq_length()
        elif position_ids is not None and attention_mask is None:
            segments = find_packed_sequence_indices(position_ids.expand(inputs_embeds.shape[0], -1))
        if position_ids is None:
            position_ids = (torch.arange(T, device=inputs_embeds.device) + seen)[None]
        if use_cache and past_key_values is None and segments is None:
            past_key_values = DynamicCache(config=self.config)

        # masks that were made for all tokens, and static caches, whose masks depend on their size, want all rows
        fixed = isinstance(attention_mask, dict) or getattr(past_key_values, "is_compileable", False)
        early = 0 < last_rows < T and segments is None and not fixed
        rows = last_rows if early else T
        self_mask, cross_mask = self._masks(attention_mask, inputs_embeds, position_ids, past_key_values, seen, rows)
        table = rotary_table(position_ids, self.config.self_head_dim, self.config.rope_theta)
        shared_table = rotary_table(position_ids, self.config.head_dim, self.config.rope_theta)

        x, own = inputs_embeds, self.config.num_self_layers
        for layer in self.layers[:own]:
            x = layer(
                x,
                position_embeddings=table,
                attention_mask=self_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                segments=segments,
                **kwargs,
            )
        h = self.kv_norm(x)
        k = heads(self.k_proj(h), self.config.head_dim, shared_table)
        v = heads(self.v_proj(h), self.config.head_dim)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, own)
        x, position_ids = x[:, -rows:], position_ids[:, -rows:]
        shared_table = (shared_table[0][:, -rows:], shared_table[1][:, -rows:])
        for layer in self.layers[own:]:
            x = layer(
                x,
                k,
                v,
                position_embeddings=shared_table,
                attention_mask=cross_mask,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x[:, -last_rows:]), past_key_values=past_key_values)

    def _masks(
        self,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        past_key_values: Cache | None,
        seen: int,
        rows: int,
    ) -> tuple[Any, Any]:
        """Masks of the self-decoder, (B, T) for retention, and of the cross-decoder, for queries of the last rows."""
        if isinstance(attention_mask, dict):
            own = SELF_LAYER_TYPES[self.config.self_mixer]
            if not {own, "full_attention"} <= attention_mask.keys():
                raise ValueError(f"attention_mask has no {own} and full_attention, only {sorted(attention_mask)}")
            return attention_mask[own], attention_mask["full_attention"]
        T = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask must be (batch, tokens), zero at padding, got {tuple(attention_mask.shape)}: the"
                " halves of this model see different things, and no mask fits both"
            )
        if attention_mask is not None and attention_mask.shape[1] != seen + T:
            raise ValueError(f"attention_mask must cover the {seen + T} tokens so far, got {attention_mask.shape[1]}")
        asked: dict[str, Any] = dict(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if self.config.self_mixer == "window":
            self_mask = create_sliding_window_causal_mask(**asked)
        else:
            self_mask = None if attention_mask is None else attention_mask[:, -T:]
        if rows < T:
            asked.update(inputs_embeds=inputs_embeds[:, -rows:], past_key_values=LastRows(seen + T, rows))
        return self_mask, create_causal_mask(**asked)

    def _check_cache(self, cache: Cache) -> None:
        """Refuses a cache in which this model's context would be lost."""
        if self.gradient_checkpointing and self.training:
            raise ValueError("past_key_values cannot be used with gradient checkpointing, which would fill it twice")
        own, retention = self.config.num_self_layers, self.config.self_mixer == "retention"
        layers = getattr(cache, "layers", None)
        if layers is None or (retention and len(layers) <= own):
            raise ValueError(
                f"past_key_values of {type(cache).__name__} has no place for retention states: make it with"
                " DynamicCache(config=model.config)"
            )
        for index, layer in enumerate(layers[: own + 1]):
            state = isinstance(layer, LinearAttentionCacheLayerMixin)
            sliding = getattr(layer, "is_sliding", False)
            if state != (retention and index < own) or (sliding and index == own) or isinstance(layer, DummyLayer):
                raise ValueError(
                    f"past_key_values keeps a {type(layer).__name__} for layer {index}, which was not made for this"
                    " model: make it with DynamicCache(config=model.config)"
                )
            if state and layer.record_past:
                raise ValueError(
                    "past_key_values is to be rolled back, but a retention state forgets what it was: assisted and"
                    " prompt-lookup decoding need self_mixer window"
                )


class MegaYocoForCausalLM(MegaYocoPreTrainedModel, GenerationMixin):
    """The stack with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: MegaYocoConfig) -> None:
        super().__init__(config)
        self.model = MegaYocoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._is_stateful = config.self_mixer == "retention"  # generate then refuses assisted decoding by itself
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given. Arguments and errors as in `MegaYocoModel.forward`, and:

        Args:
            labels: (B, T) int64, the tokens themselves, -100 where none is learned; they are shifted here.
            logits_to_keep: for how many of the last tokens logits are wanted, 0 for all: the others leave early. Or
                their numbers in a tensor, which saves only the head's work.
        """
        # who asks for the inner states of all layers gets them for all tokens
        inner = any(kwargs.get(name) or getattr(self.config, name, False) for name in INNER_STATES)
        early = isinstance(logits_to_keep, int) and not inner
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            last_rows=logits_to_keep if early else 0,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
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
            attentions=outputs.attentions,
        )

    @staticmethod
    def create_masks_for_generate(
        config: MegaYocoConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> dict[str, Tensor | None] | Tensor | None:
        """The masks of a static cache. transformers takes a single token for no padding, wrong in prefill by ones."""
        masks = create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs)
        if isinstance(masks, dict) and "linear_attention" in masks and attention_mask is not None:
            masks["linear_attention"] = attention_mask[:, -inputs_embeds.shape[1] :]
        return masks

    def _get_static_cache_init_shape(self) -> None:
        """No sizes in advance: the halves differ in theirs, and a cache finds them at its first use."""


INNER_STATES = ("output_hidden_states", "output_attentions")

MegaYocoModel.register_for_auto_class("AutoModel")
MegaYocoForCausalLM.register_for_auto_class("AutoModelForCausalLM")
