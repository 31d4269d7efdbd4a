"""Small models twice: the decoder that trains, and the transformers model with its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from megayoco.config import ModelConfig
from megayoco.hf.configuration_megayoco import MegaYocoConfig
from megayoco.hf.modeling_megayoco import MegaYocoForCausalLM
from megayoco.model.decoder import Decoder, build_decoder
from megayoco.model.inference import InferenceModel
from megayoco.model.parameters import canonical_parameters

SHAPE: dict[str, Any] = dict(dim=32, layers=4, hidden_dim=48, heads=4, kv_heads=2, vocab_size=64)
MODELS = {
    "retention": ModelConfig(**SHAPE, self_heads=2),
    "window": ModelConfig(**SHAPE, self_mixer="window", window=7, rope_theta=5e5),
    "wide-window": ModelConfig(**{**SHAPE, "kv_heads": 1}, self_mixer="window", window=100, self_heads=8),
    "tied": ModelConfig(**{**SHAPE, "kv_heads": 4}, self_layers=3, norm_eps=1e-3, tie_embeddings=True),
}
BOTH = ("retention", "window")
"""One model of each mixer."""

ATTENTIONS = ("sdpa", "eager", "bottom-right")


def bottom_right(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What flash attention makes of its arguments: the last queries, a window, and the mask of padded keys (B, S)."""
    T, S = query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    place = torch.arange(S)
    visible = place <= place[-T:, None]
    if sliding_window is not None:
        visible = visible & (place > place[-T:, None] - sliding_window)
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None]
    p = (query @ key.mT * scaling).masked_fill(~visible, -torch.inf).softmax(-1)
    return (p.nan_to_num(0) @ value).transpose(1, 2), None


AttentionInterface.register("bottom-right", bottom_right)
AttentionMaskInterface.register("bottom-right", flash_attention_mask)

OUTER = {"lm_head.weight": "lm_head.weight", "shared_kv.norm.weight": "model.kv_norm.weight"}
PARTS = {
    "shared_kv.": "",
    ".mixer_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".mixer.out_proj.": ".self_attn.o_proj.",
    ".mixer.": ".self_attn.",
    ".ffn.": ".mlp.",
}


def renamed(name: str) -> str:
    """The name in the transformers model of a parameter of the decoder."""
    if name in OUTER:
        return OUTER[name]
    for ours, theirs in PARTS.items():
        name = name.replace(ours, theirs)
    return f"model.{name}"


def weights(decoder: Decoder) -> dict[str, Tensor]:
    return {renamed(name): parameter.detach() for name, parameter in canonical_parameters(decoder).items()}


def hf_config(model: ModelConfig, **changes: Any) -> MegaYocoConfig:
    fields = dict(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.hidden_dim,
        num_hidden_layers=model.layers,
        num_self_layers=model.num_self_layers,
        self_mixer=model.self_mixer,
        num_self_heads=model.num_self_heads,
        num_attention_heads=model.heads,
        num_key_value_heads=model.num_kv_heads,
        sliding_window=model.window,
        rope_theta=model.rope_theta,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
    )
    return MegaYocoConfig(**{**fields, **changes})


def build(
    name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa"
) -> tuple[Decoder, MegaYocoForCausalLM]:
    """Both with the same large random weights: what they compute depends on everything they have read."""
    decoder = build_decoder(MODELS[name], None, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in canonical_parameters(decoder).values():
            gain = 0.3 if parameter.dim() == 1 else 2 * parameter.shape[1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain + (parameter.dim() == 1))
    model = MegaYocoForCausalLM._from_config(hf_config(MODELS[name]), attn_implementation=attention, dtype=dtype)
    left_out = model.load_state_dict(weights(decoder), strict=False)
    assert not left_out.unexpected_keys
    assert left_out.missing_keys == (["lm_head.weight"] if MODELS[name].tie_embeddings else [])
    return decoder, model.eval()


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decoder_logits(decoder: Decoder, ids: Tensor) -> Tensor:
    model = InferenceModel.of(decoder)
    return model.advance(ids, model.empty_context(ids.shape[0]), last_only=False)[0]
