"""The shape of a model, what follows from it, and how many parameters it has."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from megayoco.config.base import SECTION, NonNegativeInt, PositiveFloat, PositiveInt, refuse
from megayoco.presets import PRESETS

Pattern = Literal["yoco", "llama"]
SelfMixer = Literal["retention", "window"]
RotaryLayout = Literal["interleaved", "half_split"]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ModelConfig:
    """The shape of a model. Give `preset`, `init_from`, or the five sizes `dim`, `layers`, `hidden_dim`, `heads`,
    `vocab_size`."""

    preset: str | None = None
    """Name of a published shape (see megayoco/presets.py); it fills every field of this section that is not given."""

    init_from: str | None = None
    """Folder of a model whose weights the run starts with: an export or a run of ours, a Hugging Face folder (ours,
    LLaMA, LongLLaMA, flash-linear-attention's YOCO), official YOCO, EasyLM. Its shape fills the fields that are not
    given. Default: the seed."""

    pattern: Pattern = "yoco"
    """`yoco`: self-decoder, shared keys and values, cross-decoder. `llama`: full attention in every layer, or with
    `memory_layers` attention inside windows."""

    self_mixer: SelfMixer = "retention"
    """Token mixer of the self-decoder: gated `retention`, or sliding-`window` attention. YOCO only."""

    dim: PositiveInt
    """Width D of the hidden states; divisible by `heads` and `self_heads`."""

    layers: Annotated[int, Field(gt=0, lt=2**16)]
    """Layers of the whole stack, both halves of YOCO together. The shared-KV layer is not counted."""

    hidden_dim: PositiveInt
    """Inner width F of the SwiGLU feed-forward."""

    heads: PositiveInt
    """Query heads of full attention (LLaMA) and of cross attention (YOCO)."""

    vocab_size: PositiveInt
    """Rows of the embedding and of the output head; at least the tokenizer's vocabulary."""

    self_layers: PositiveInt | None = None
    """Layers of the self-decoder; the rest is cross-decoder. Default: half of `layers`, rounded down. YOCO only."""

    self_heads: PositiveInt | None = None
    """Heads of the self-decoder. Default: `heads`. YOCO only."""

    kv_heads: PositiveInt | None = None
    """Key-value heads of full or cross attention; divides `heads`. Default: `heads`."""

    window: PositiveInt | None = None
    """Tokens that a query of the window mixer sees, itself included. Required by `self_mixer: window`, else absent."""

    memory_layers: tuple[NonNegativeInt, ...] = ()
    """Numbers, from 0, of the layers with memory attention (LongLLaMA): a query sees its own window of `memory_window`
    tokens and everything before that window, whose keys carry no position. YOCO: layers of the self-decoder. In the
    LLaMA pattern all other layers then see their own window only. Cannot be combined with `data.document_mask` or
    bands; `parallel.sequence` needs whole windows on every rank, and no random padding of `data.tuning`."""

    memory_window: PositiveInt | None = None
    """Tokens of a window of memory attention; windows follow one another from the first token of a sequence. Required
    with `memory_layers`, else absent."""

    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary embedding; a phase may replace it."""

    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in every RMSNorm."""

    init_std: PositiveFloat | None = None
    """Standard deviation of the initial matrices. Default: 0.02, which suits a D of thousands; at a D of 64 the model
    begins to learn sooner with 1 / sqrt(D). LLaMA pattern only; those of YOCO follow from their shapes."""

    tie_embeddings: bool = False
    """Use the embedding matrix as the output head as well."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        given: Any = data.kwargs if isinstance(data, ArgsKwargs) else data
        name = given.get("preset") if isinstance(given, dict) else None
        if not isinstance(name, str):
            return data
        if name not in PRESETS:
            refuse("preset", f"must be one of {', '.join(PRESETS)}, got {name!r}")
        filled = {**PRESETS[name], **given}
        unused = set()
        if filled["pattern"] != "yoco":
            unused = {"self_mixer", "self_heads", "window"}
        elif filled.get("self_mixer", "retention") != "window":
            unused = {"window"}
        filled = {key: value for key, value in filled.items() if key in given or key not in unused}
        return ArgsKwargs(data.args, filled) if isinstance(data, ArgsKwargs) else filled

    @field_validator("memory_layers", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        # what has passed the validator above is no longer JSON, whose lists strict fields take for tuples
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        for name, heads in (("heads", self.heads), ("self_heads", self.num_self_heads)):
            if self.dim % heads:
                refuse(name, f"must divide dim: {self.dim} / {heads} leaves {self.dim % heads}")
            if self.dim // heads % 2:
                refuse(name, f"must leave an even head dim for the rotary pairs: {self.dim} / {heads} is odd")
        if self.heads % self.num_kv_heads:
            refuse(
                "kv_heads", f"must divide heads: {self.heads} / {self.kv_heads} leaves {self.heads % self.num_kv_heads}"
            )
        if self.pattern == "yoco":
            if not 0 < self.num_self_layers < self.layers:
                field = "layers" if self.self_layers is None else "self_layers"
                refuse(field, f"must leave a layer for each half, got {self.num_self_layers} of {self.layers}")
            if self.self_mixer == "window" and self.window is None:
                refuse("window", "is required by self_mixer window: the tokens that a query sees, itself included")
            if self.self_mixer != "window" and self.window is not None:
                refuse("window", "is used only by self_mixer window: set self_mixer, or leave window out")
            if self.init_std is not None:
                refuse("init_std", "is used only by pattern llama: leave it out")
        else:
            if self.self_mixer == "window":
                refuse("self_mixer", "is used only by pattern yoco: leave it out")
            for name in ("self_layers", "self_heads", "window"):
                if getattr(self, name) is not None:
                    refuse(name, "is used only by pattern yoco: leave it out")
        self._check_memory()
        return self

    def _check_memory(self) -> None:
        if not self.memory_layers:
            if self.memory_window is not None:
                refuse(
                    "memory_window",
                    "is used only with memory_layers: give them, or leave memory_window out (null where init_from has"
                    " one)",
                )
            return
        if self.memory_window is None:
            refuse("memory_window", "is required by memory_layers: the tokens of a window")
        if len(set(self.memory_layers)) < len(self.memory_layers):
            twice = next(layer for layer in self.memory_layers if self.memory_layers.count(layer) > 1)
            refuse("memory_layers", f"names layer {twice} more than once: remove one")
        own = self.num_self_layers if self.pattern == "yoco" else self.layers
        outside = [layer for layer in self.memory_layers if layer >= own]
        if outside and outside[0] < self.layers:
            refuse(
                "memory_layers",
                f"names layer {outside[0]} of the cross-decoder: only the self-decoder's layers 0 to {own - 1} can"
                " have a memory",
            )
        if outside:
            refuse("memory_layers", f"names layer {outside[0]}, but the layers are 0 to {own - 1}: remove it")

    @property
    def head_dim(self) -> int:
        """Head dim K of full and cross attention."""
        return self.dim // self.heads

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads G of full and cross attention, the default resolved."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def num_self_heads(self) -> int:
        """Heads of the self-decoder, the default resolved."""
        return self.heads if self.self_heads is None else self.self_heads

    @property
    def self_head_dim(self) -> int:
        """Head dim of the self-decoder."""
        return self.dim // self.num_self_heads

    @property
    def num_self_layers(self) -> int:
        """Layers of the self-decoder, the default resolved; 0 for LLaMA."""
        if self.pattern != "yoco":
            return 0
        return self.layers // 2 if self.self_layers is None else self.self_layers

    @property
    def rotary_layout(self) -> RotaryLayout:
        """How rotary pairs lie in a head: `interleaved` (0,1), (2,3) ... or `half_split` (0,K/2), (1,K/2+1) ..."""
        return "interleaved" if self.pattern == "yoco" else "half_split"

    @property
    def scale_embeddings(self) -> bool:
        """Whether embeddings are multiplied by the square root of `dim`."""
        return self.pattern == "yoco"

    def layer_pattern(self) -> list[str]:
        """The stack from bottom to top: `retention`, `window`, `full`, `memory`, `block` (attention inside windows of
        `memory_window`), `cross`; `shared_kv` once between the halves."""
        if self.pattern == "llama":
            kind, own = "block" if self.memory_layers else "full", self.layers
        else:
            kind, own = self.self_mixer, self.num_self_layers
        kinds = ["memory" if layer in self.memory_layers else kind for layer in range(own)]
        return kinds if self.pattern == "llama" else [*kinds, "shared_kv", *["cross"] * (self.layers - own)]

    @property
    def memory_heads(self) -> tuple[int, int]:
        """Query and key-value heads of memory attention: in YOCO those of the self-decoder's window attention, else
        those of full attention."""
        if self.pattern == "yoco":
            return self.num_self_heads, self.num_self_heads
        return self.heads, self.num_kv_heads

    @property
    def memory_kv_dim(self) -> int:
        """Numbers of a key of memory attention, all key-value heads together."""
        heads, kv_heads = self.memory_heads
        return kv_heads * (self.dim // heads)

    def parameter_count(self) -> dict[str, int]:
        """Exact numbers of parameters: `body`, `embedding` (with the head, unless tied) and their sum `total`."""
        D, kv_dim = self.dim, self.num_kv_heads * self.head_dim
        mixer = {
            "retention": 5 * D * D + self.num_self_heads * D,  # q, k, v, g, out, and one decay per head
            "window": 4 * D * D,
            "full": 2 * D * D + 2 * kv_dim * D,
            "memory": 2 * D * D + 2 * self.memory_kv_dim * D,
            "block": 2 * D * D + 2 * self.memory_kv_dim * D,
            "cross": 2 * D * D,
        }
        feed_forward = 3 * D * self.hidden_dim
        body = D  # final norm
        for kind in self.layer_pattern():
            # a block has a norm before the mixer and one before the feed-forward; the shared-KV layer has one
            body += 2 * kv_dim * D + D if kind == "shared_kv" else mixer[kind] + feed_forward + 2 * D
        embedding = self.vocab_size * D * (1 if self.tie_embeddings else 2)
        return {"total": body + embedding, "body": body, "embedding": embedding}
