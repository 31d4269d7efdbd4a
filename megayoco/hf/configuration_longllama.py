"""Configuration of LongLLaMA models in transformers. Self-contained: it ships inside the model's folder.

Field names and defaults are those of the released LongLLaMA. Source: Focused Transformer, arXiv 2307.03170.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

MEMORY_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
"""What `mem_dtype` may be: integers would cut the values off."""


class LongLlamaConfig(PreTrainedConfig):
    """Shape of a LLaMA some of whose layers have a memory, and how long inputs are cut.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as in LLaMA.
        num_key_value_heads, head_dim: num_attention_heads and hidden_size / num_attention_heads, nothing else.
        hidden_act: silu.
        max_position_embeddings: tokens of a window, and the most that the local cache holds.
        initializer_range, rms_norm_eps: as in LLaMA.
        rope_theta: base of the rotary embedding, with the frequencies theta ** -(2j / K).
        use_cache, tie_word_embeddings, pad_token_id, bos_token_id, eos_token_id: as in LLaMA.
        last_context_length: last tokens of an input that are read as local context; what is before them goes through
            memory, window by window. At most max_position_embeddings; with that value only what does not fit one
            window is cut.
        mem_layers: numbers, from 0, of the layers that have a memory.
        mem_positionals: whether memory layers have rotary positions, for their local part as well.
        mem_dtype: what keys and values are stored as in memory; they are read in the model's own dtype.
        mem_attention_grouping: (heads, queries) that memory layers take at a time; None: all of them.
        torch_attention: attention by `scaled_dot_product_attention` of torch, where it is more than one query.
        gradient_checkpoint_every_ith: with gradient checkpointing, layers whose number is a multiple of this are
            computed again in backward.

    Raises:
        ValueError: a field is impossible, contradicts another, or asks for what the model has not; it is named.
    """

    model_type = "longllama"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        last_context_length: int = 1024,
        mem_layers: Sequence[int] = (),
        mem_positionals: bool = True,
        mem_dtype: str = "bfloat16",
        mem_attention_grouping: Sequence[int] | None = None,
        torch_attention: bool = False,
        gradient_checkpoint_every_ith: int = 1,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        self.hidden_act, self.initializer_range, self.rms_norm_eps = hidden_act, initializer_range, rms_norm_eps
        self.max_position_embeddings, self.last_context_length = max_position_embeddings, last_context_length
        self.rope_theta, self.use_cache = rope_theta, use_cache
        self.mem_layers, self.mem_positionals, self.mem_dtype = list(mem_layers or ()), mem_positionals, mem_dtype
        self.mem_attention_grouping = None if mem_attention_grouping is None else list(mem_attention_grouping)
        self.torch_attention = torch_attention
        self.gradient_checkpoint_every_ith = gradient_checkpoint_every_ith
        self._take_rotary(kwargs)
        self._check_shape(kwargs)
        self._check_memory()
        # save_pretrained enters the class it saves; AutoModel would stay out
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_longllama.LongLlamaConfig",
                "AutoModel": "modeling_longllama.LongLlamaModel",
                "AutoModelForCausalLM": "modeling_longllama.LongLlamaForCausalLM",
            },
        )
        kwargs.update(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id)
        kwargs.update(tie_word_embeddings=tie_word_embeddings)
        super().__init__(**kwargs)

    def _take_rotary(self, kwargs: dict[str, Any]) -> None:
        """rope_theta, also from where transformers 5 keeps it."""
        for name in ("rope_scaling", "rope_parameters"):
            given = kwargs.pop(name, None)
            if given is None:
                continue
            kind = given.get("rope_type", given.get("type", "default")) if isinstance(given, dict) else None
            if kind != "default" or given.get("partial_rotary_factor", 1.0) != 1.0:
                raise ValueError(f"{name} {given} is not supported: the rotary embedding follows from rope_theta alone")
            self.rope_theta = given.get("rope_theta", self.rope_theta)
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")

    def _check_shape(self, kwargs: dict[str, Any]) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "last_context_length",
            "gradient_checkpoint_every_ith",
        ):
            _check_positive(name, getattr(self, name))
        heads, size = self.num_attention_heads, self.hidden_size
        if size % heads or size // heads % 2:
            raise ValueError(f"num_attention_heads must cut hidden_size {size} into even head dims, got {heads}")
        for name, only in (("num_key_value_heads", heads), ("head_dim", size // heads)):
            if getattr(self, name) not in (None, only):
                raise ValueError(f"{name} must be {only} in LongLLaMA, got {getattr(self, name)}")
            setattr(self, name, only)
        if self.hidden_act not in ("silu", "swish"):
            raise ValueError(f"hidden_act must be silu, got {self.hidden_act!r}")
        for name in ("attention_bias", "mlp_bias", "attention_dropout"):
            if kwargs.get(name):
                raise ValueError(f"{name} {kwargs[name]} is not supported: LongLLaMA has no biases and no dropout")

    def _check_memory(self) -> None:
        layers = self.mem_layers
        if len(set(layers)) < len(layers):
            raise ValueError(f"mem_layers names a layer more than once: {layers}")
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"mem_layers names layer {layer!r}, but the layers are 0 to {self.num_hidden_layers - 1}"
                )
        if self.last_context_length > self.max_position_embeddings:
            raise ValueError(
                f"last_context_length {self.last_context_length} is more than a window of max_position_embeddings"
                f" {self.max_position_embeddings}: positions would be stretched. Give at most that"
            )
        if self.mem_dtype not in MEMORY_DTYPES:
            raise ValueError(f"mem_dtype must be one of {', '.join(MEMORY_DTYPES)}, got {self.mem_dtype!r}")
        if self.mem_attention_grouping is not None:
            if len(self.mem_attention_grouping) != 2:
                raise ValueError(f"mem_attention_grouping must be (heads, queries), got {self.mem_attention_grouping}")
            for number in self.mem_attention_grouping:
                _check_positive("mem_attention_grouping", number)


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


LongLlamaConfig.register_for_auto_class()
