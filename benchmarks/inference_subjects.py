"""What benchmarks/inference.py compares: models that read a prompt and continue it, behind one interface."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import megayoco.parallel  # noqa: F401  (before the layers: it keeps megatron-core quiet)
from megayoco.config import ModelConfig
from megayoco.convert import llama
from megayoco.generate.generation import prefill
from megayoco.model.decoder import Decoder, build_decoder
from megayoco.model.inference import InferenceModel, cache_bytes
from megayoco.model.parameters import canonical_parameters

YOCO = ("YOCO, retention", "YOCO, window")
LLAMA, TRANSFORMERS = "LLaMA", "LLaMA of transformers"
SUBJECTS = (*YOCO, LLAMA, TRANSFORMERS)


@dataclass(frozen=True)
class Setting:
    """Where and how subjects run."""

    model: str
    """Preset of the YOCO pattern."""
    baseline: str
    """Preset of the LLaMA pattern."""
    layers: int | None
    """In place of those of the presets."""
    device: str
    dtype: str
    chunk: int
    """Prompt tokens per call of ours."""
    transformers_chunk: int
    """Prompt tokens per call of transformers; 0: all in one."""
    clock: str = "wall"
    """`wall`, or `cpu` for the seconds that the process computes."""
    self_layers: int | None = None
    """Layers of YOCO's self-decoder; None: those of the preset."""


class Subject(Protocol):
    """A model, and memories of what it has read, which are values."""

    def read(self, tokens: list[int], reserve: int) -> Any:
        """The memory of a prompt, with room for `reserve` tokens where that can be said."""

    def branch(self, memory: Any) -> Any:
        """A memory that may be continued and leaves the given one as it is."""

    def next(self, token: int, memory: Any) -> tuple[int, Any]:
        """Reads one token; the one most likely to follow it."""

    def logits(self, tokens: list[int]) -> Tensor:
        """(1, V), after all of them."""

    def cache_bytes(self, memory: Any) -> int:
        """Bytes of keys, values and states."""


class Ours:
    """A decoder of this package, whose prompt is read in chunks."""

    def __init__(self, decoder: Decoder, chunk: int) -> None:
        self.model, self.chunk = InferenceModel.of(decoder), chunk

    def read(self, tokens: list[int], reserve: int) -> Any:
        return prefill(self.model, tokens, chunk=self.chunk, reserve=reserve)

    def branch(self, memory: Any) -> Any:
        return memory

    def next(self, token: int, memory: Any) -> tuple[int, Any]:
        logits, memory = self.model.advance(torch.tensor([[token]], device=self.model.device), memory)
        return int(logits[0, -1].argmax()), memory

    def logits(self, tokens: list[int]) -> Tensor:
        row = torch.tensor([tokens], device=self.model.device)
        return self.model.advance(row, self.model.empty_context())[0][:, -1]

    def cache_bytes(self, memory: Any) -> int:
        return cache_bytes(memory)


class OfTransformers:
    """`LlamaForCausalLM` with the weights of a decoder of ours, as a user of transformers runs it."""

    def __init__(self, decoder: Decoder, chunk: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        model, weight = decoder.config, decoder.embed_tokens.weight
        config = LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.dim,
            intermediate_size=model.hidden_dim,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.num_kv_heads,
            rms_norm_eps=model.norm_eps,
            rope_theta=model.rope_theta,
            tie_word_embeddings=model.tie_embeddings,
            attn_implementation="sdpa",
        )
        with torch.device(weight.device):
            network = LlamaForCausalLM(config).to(weight.dtype).eval()
        foreign = llama.names(model)
        state = {foreign[name]: parameter for name, parameter in canonical_parameters(decoder).items()}
        network.load_state_dict(state)
        self.network, self.chunk, self.device = network, chunk, weight.device

    @torch.inference_mode()
    def read(self, tokens: list[int], reserve: int) -> Any:
        from transformers import DynamicCache

        cache, step = DynamicCache(config=self.network.config), self.chunk or len(tokens)
        for start in range(0, len(tokens), step):
            row = torch.tensor([tokens[start : start + step]], device=self.device)
            self.network.model(input_ids=row, past_key_values=cache, use_cache=True)  # without the head
        return cache

    def branch(self, memory: Any) -> Any:
        branched = copy.copy(memory)
        branched.layers = [copy.copy(layer) for layer in memory.layers]  # a step makes new tensors
        return branched

    @torch.inference_mode()
    def next(self, token: int, memory: Any) -> tuple[int, Any]:
        row = torch.tensor([[token]], device=self.device)
        out = self.network(input_ids=row, past_key_values=memory, use_cache=True)
        return int(out.logits[0, -1].argmax()), memory

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        row = torch.tensor([tokens], device=self.device)
        return self.network(input_ids=row, logits_to_keep=1).logits[:, -1]

    def cache_bytes(self, memory: Any) -> int:
        return sum(x.numel() * x.element_size() for layer in memory.layers for x in (layer.keys, layer.values))


def config_of(subject: str, setting: Setting) -> ModelConfig:
    """The preset with the subject's mixer."""
    fields: dict[str, Any] = {"preset": setting.model if subject in YOCO else setting.baseline}
    if subject in YOCO:
        fields["self_mixer"] = subject.split(", ")[1]
    if setting.layers is not None:
        fields["layers"] = setting.layers
    if subject in YOCO and setting.self_layers is not None:
        fields["self_layers"] = setting.self_layers
    return ModelConfig(**fields)


def build(subject: str, setting: Setting) -> Subject:
    """With random weights, always the same."""
    dtype = getattr(torch, setting.dtype)
    decoder = build_decoder(config_of(subject, setting), None, dtype=dtype).to(setting.device).eval()
    if subject == TRANSFORMERS:
        return OfTransformers(decoder, setting.transformers_chunk)
    return Ours(decoder, setting.chunk)


def cache_formula(model: ModelConfig, width: int) -> tuple[int, int]:
    """Bytes that a cache grows by with every token, and those that do not grow, for sequences beyond the window.

    width: bytes of a stored number. The retention state is fp32 (spec: YOCO, arXiv 2405.05254, section 2.2).
    """
    keys_and_values = 2 * model.num_kv_heads * model.head_dim * width
    if model.pattern == "llama":
        return model.layers * keys_and_values, 0
    if model.self_mixer == "retention":
        layer = 4 * model.num_self_heads * (model.self_head_dim**2 + 1)  # the state, and the sum of log-decays
    else:
        assert model.window is not None
        layer = 2 * (model.window - 1) * model.dim * width
    return keys_and_values, model.num_self_layers * layer
