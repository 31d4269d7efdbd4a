"""Configuration of MegaYOCO models in transformers. Self-contained: it ships inside the model's folder.

Source: YOCO, arXiv 2405.05254.
"""

from typing import Any

from transformers import PreTrainedConfig

SELF_LAYER_TYPES = {"retention": "linear_attention", "window": "sliding_attention"}
"""What transformers calls the layers of each self-decoder mixer, for its caches and masks."""


class MegaYocoConfig(PreTrainedConfig):
    """Shape of a YOCO model: self-decoder, shared keys and values, cross-decoder.

    Raises:
        ValueError: a field is impossible or contradicts another; it is named.
    """

    model_type = "megayoco"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.g_proj": "colwise",
        "layers.*.self_attn.gt_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "k_proj": "colwise",
        "v_proj": "colwise",
    }

    vocab_size: int = 100288
    hidden_size: int = 3072

    intermediate_size: int = 8192
    """Inner width of the SwiGLU feed-forward."""

    num_hidden_layers: int = 26
    """Layers of both halves; what makes the shared keys and values is not counted."""

    num_self_layers: int = 13
    """Layers of the self-decoder, which come first."""

    self_mixer: str = "retention"
    """Mixer of the self-decoder: gated `retention`, or sliding-`window` attention."""

    num_self_heads: int = 24
    """Heads of the self-decoder."""

    num_attention_heads: int = 24
    """Query heads of the cross-decoder."""

    num_key_value_heads: int = 8
    """Heads of the shared keys and values."""

    sliding_window: int | None = None
    """Tokens that a query of the window mixer sees, itself included; None for retention."""

    rope_theta: int | float = 10000.0
    """Base of the rotary embedding. Its exponents are spaced evenly from 0 to 1, both included."""

    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    layer_types: list[str] | None = None
    """Follows from the fields above."""

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_shape()
        self._check_rotary(kwargs)
        upper = self.num_hidden_layers - self.num_self_layers
        layer_types = [SELF_LAYER_TYPES[self.self_mixer]] * self.num_self_layers + ["full_attention"] * upper
        if self.layer_types not in (None, layer_types):
            raise ValueError(
                f"layer_types contradicts self_mixer {self.self_mixer!r}, num_self_layers {self.num_self_layers} and"
                f" num_hidden_layers {self.num_hidden_layers}: leave it out"
            )
        self.layer_types = layer_types
        # save_pretrained enters the class it saves; AutoModel, which serving engines load, would stay out
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_megayoco.MegaYocoConfig",
                "AutoModel": "modeling_megayoco.MegaYocoModel",
                "AutoModelForCausalLM": "modeling_megayoco.MegaYocoForCausalLM",
            },
        )
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Head dim of the cross-decoder and of the shared keys and values."""
        return self.hidden_size // self.num_attention_heads

    @property
    def self_head_dim(self) -> int:
        """Head dim of the self-decoder."""
        return self.hidden_size // self.num_self_heads

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """What each layer does with the shared keys and values: a cache keeps them once, at the first cross layer."""
        upper = self.num_hidden_layers - self.num_self_layers
        return [None] * self.num_self_layers + ["store"] + ["reuse"] * (upper - 1)

    def _check_shape(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_self_layers",
            "num_self_heads",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            _check_positive(self, name)
        for name in ("num_self_heads", "num_attention_heads"):
            heads = getattr(self, name)
            if self.hidden_size % heads or self.hidden_size // heads % 2:
                raise ValueError(f"{name} must cut hidden_size {self.hidden_size} into even head dims, got {heads}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads {self.num_attention_heads},"
                f" got {self.num_key_value_heads}"
            )
        if self.num_self_layers >= self.num_hidden_layers:
            raise ValueError(
                f"num_self_layers must leave a cross layer of num_hidden_layers {self.num_hidden_layers},"
                f" got {self.num_self_layers}"
            )
        if self.self_mixer not in SELF_LAYER_TYPES:
            raise ValueError(f"self_mixer must be one of {', '.join(SELF_LAYER_TYPES)}, got {self.self_mixer!r}")
        if self.self_mixer == "window":
            _check_positive(self, "sliding_window")
            if self.sliding_window == 1:
                raise ValueError("sliding_window must be at least 2: the caches of transformers keep no window of one")
        elif self.sliding_window is not None:
            raise ValueError(f"sliding_window belongs to self_mixer window, got {self.sliding_window}: leave it out")

    def _check_rotary(self, kwargs: dict[str, Any]) -> None:
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("rope_scaling", "rope_parameters"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported: the rotary embedding follows from rope_theta alone")


def _check_positive(config: MegaYocoConfig, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


MegaYocoConfig.register_for_auto_class()
