"""Options of each evaluation of a trained model: flags of `python -m megayoco.evaluate`, keys of a run's YAML."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from megayoco.config.base import SECTION, NonNegativeInt, PositiveInt, refuse

StartToken = Literal["auto", "bos", "eod", "none"]
Depth = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Some = Annotated[list[PositiveInt], Field(min_length=1)]

MAX_NEEDLES = 69
"""Each needle of a prompt has a city of its own, and there are 69 of them."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class RetrievalOptions:
    """What all retrieval evaluations share: how long the prompts are, and how they are read."""

    lengths: Some | None = None
    """Tokens of a prompt and its answer together, each a column of the table. Default: the multiples of `interval`, or
    else the longest length that the model was trained for."""

    interval: PositiveInt | None = None
    """With `max_length`, in place of `lengths`: all multiples of this up to there."""

    max_length: PositiveInt | None = None
    """With `interval`: the longest length."""

    trials: PositiveInt = 10
    """Prompts per length and depth, each with its own text and numbers."""

    seed: Seed = 0
    """Number that texts, places and numbers follow from."""

    max_new_tokens: PositiveInt = 20
    """Tokens that the model may answer with, taken from the most likely ones."""

    start_token: StartToken = "auto"
    """What stands before the prompt: the tokenizer's token for the beginning of a text (`bos`), the one that ends
    documents (`eod`), or nothing (`none`). `auto`: `bos` where the tokenizer has one, else `eod`."""

    strip_prompt: bool = False
    """Leave out the spaces that a prompt ends with: for tokenizers that join a space to the number behind it."""

    prefill_chunk: PositiveInt = 2048
    """Prompt tokens that are read at once; results do not depend on it."""

    @model_validator(mode="after")
    def _check(self) -> "RetrievalOptions":
        if (self.interval is None) != (self.max_length is None):
            refuse("interval", "and max_length belong together: give both, or neither")
        if self.interval is not None and self.max_length is not None:
            if self.lengths is not None:
                refuse("lengths", "and interval say the same: give one of them")
            if self.interval > self.max_length:
                refuse("interval", f"{self.interval} exceeds max_length {self.max_length}: no length is left")
        return self

    def resolved_lengths(self) -> list[int]:
        """The lengths asked for, ascending, each once; empty if the model's own is meant."""
        if self.interval is not None and self.max_length is not None:
            return list(range(self.interval, self.max_length + 1, self.interval))
        return sorted(set(self.lengths or ()))


@dataclass(frozen=True, kw_only=True, config=SECTION)
class NeedleOptions(RetrievalOptions):
    """One number hidden in a text. Defaults as in YOCO's evaluation: 11 depths, 10 trials, seed 0."""

    depths: Annotated[list[Depth], Field(min_length=1)] = Field(
        default_factory=lambda: [number / 10 for number in range(11)]
    )
    """Shares of the text that precede the needle, each a row of the table. Default: 0, 0.1, ... 1."""

    haystack: str | None = None
    """The text that hides the needle: a file, a folder or a pattern of what tools/preprocess_data.py reads. Default:
    the sources of Python's standard library."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class MultiNeedleOptions(RetrievalOptions):
    """Several numbers hidden in a text. Defaults as in YOCO's evaluation: 10 depths, 5 trials, seed 42."""

    needles: Annotated[list[Annotated[int, Field(ge=1, le=MAX_NEEDLES)]], Field(min_length=1)] = Field(
        default_factory=lambda: [1, 2, 4, 8]
    )
    """How many needles a prompt holds, each its own table."""

    query: Literal["one", "all"] = "one"
    """Which needles are asked for: the `one` at the depth, or `all`, each by a prompt of its own."""

    depths: Annotated[list[Depth], Field(min_length=1)] = Field(
        default_factory=lambda: [number / 11 for number in range(1, 11)]
    )
    """Shares of the text that precede the needle that is asked for. Default: 1/11, 2/11, ... 10/11."""

    trials: PositiveInt = 5
    """Prompts per length, number of needles and depth, each with its own text and numbers."""

    seed: Seed = 42
    """Number that texts, places and numbers follow from."""

    haystack: str | None = None
    """The text that hides the needles: a file, a folder or a pattern of what tools/preprocess_data.py reads. Default:
    the sources of Python's standard library."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class PasskeyOptions(RetrievalOptions):
    """A number hidden in sentences that repeat, after Landmark Attention and LongLLaMA."""

    characters: Some | None = None
    """Characters of filler, in place of `lengths`: LongLLaMA's own prompts, place and number drawn by numpy from
    `seed`, `seed` + 1, ..."""

    depths: Annotated[list[Depth], Field(min_length=1)] | None = None
    """Shares of the filler that precede the number. Default: a place drawn for each prompt, shown in tenths."""

    trials: PositiveInt = 50
    """Prompts per length; with `depths`, per length and depth."""

    @model_validator(mode="after")
    def _check_characters(self) -> "PasskeyOptions":
        if self.characters is not None:
            if self.lengths is not None or self.interval is not None:
                refuse("characters", "and lengths say the same: give one of them")
            if self.depths is not None:
                refuse("depths", "are drawn where characters are given: leave out one of them")
        return self


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DictionaryOptions:
    """Values of random keys, defined far before, after the Focused Transformer. The tokenizer must make a token of each
    character."""

    lengths: Some | None = None
    """Tokens of a document, definitions and questions. Default: the longest length that the model was trained for."""

    question_tokens: PositiveInt = 256
    """The last tokens of a document, which ask; all before them are definitions."""

    key_tokens: PositiveInt = 3
    """Symbols of a key, of 61."""

    value_tokens: PositiveInt = 3
    """Symbols of a value, of 61."""

    trials: PositiveInt = 20
    """Documents per length."""

    seed: Seed = 0
    """Number that the documents follow from."""

    prefill_chunk: PositiveInt = 2048
    """Tokens that are read at once; results do not depend on it."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class PerplexityOptions:
    """Loss by position in long documents."""

    text: str | None = None
    """Documents: a file, a folder or a pattern of what tools/preprocess_data.py reads. Give this or `data`."""

    data: str | None = None
    """Documents: an indexed dataset, its path without .bin and .idx. Give this or `text`."""

    length: PositiveInt | None = None
    """Tokens that are read of each document; shorter documents are left out. Default: the longest length that the
    model was trained for."""

    documents: PositiveInt = 16
    """Documents that are read: the first that are long enough."""

    bin_width: PositiveInt | None = None
    """Positions per point of the curve. Default: half an octave, so that the curve is even on a logarithmic axis."""

    contexts: Some | None = None
    """Context ablation: the loss of the last `ablation_tokens` tokens given so many tokens before them, for each of
    these numbers."""

    ablation_tokens: PositiveInt | None = None
    """With `contexts`: tokens at the end of each document that the ablation scores. Default: 2048."""

    start_token: StartToken = "auto"
    """What stands before the document, as in the retrieval evaluations."""

    prefill_chunk: PositiveInt = 2048
    """Tokens that are read at once; results do not depend on it."""

    @model_validator(mode="after")
    def _check(self) -> "PerplexityOptions":
        if (self.text is None) == (self.data is None):
            refuse("text", "or data names the documents: give exactly one of them")
        if self.length is not None and self.contexts is not None:
            longest = max(self.contexts) + self.num_ablation_tokens
            if longest > self.length:
                refuse(
                    "contexts",
                    f"{max(self.contexts)} and ablation_tokens {self.num_ablation_tokens} need a length of {longest},"
                    f" more than {self.length}",
                )
        if self.ablation_tokens is not None and self.contexts is None:
            refuse("ablation_tokens", "belongs to contexts: give both, or neither")
        return self

    @property
    def num_ablation_tokens(self) -> int:
        """`ablation_tokens`, the default resolved."""
        return 2048 if self.ablation_tokens is None else self.ablation_tokens


@dataclass(frozen=True, kw_only=True, config=SECTION)
class HarnessOptions:
    """Tasks of lm-evaluation-harness (lm-eval)."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Names of tasks, groups or tags, apart or with commas; `*` stands for anything. Looked for in `include_path` and
    among ours (`megayoco_basics` is small and needs no network), then among lm-eval's."""

    include_path: list[str] | None = None
    """Folders with task files (YAML) of your own."""

    limit: PositiveInt | None = None
    """Documents of each task, the first ones. Default: all."""

    num_fewshot: NonNegativeInt | None = None
    """Solved examples before each question. Default: as each task says, else none."""

    batch_size: PositiveInt = 8
    """Requests that are read together; those longer than `prefill_chunk` are read alone."""

    max_length: PositiveInt | None = None
    """Longest input in tokens, with the answer. What exceeds it is cut off at its beginning, counted and reported.
    Default: nothing is cut off."""

    start_token: StartToken = "auto"
    """What stands before each context, as in the retrieval evaluations; nothing before a chat template with `auto`.
    lm-eval's own models put `bos` there if their tokenizer does so by itself, else nothing."""

    apply_chat_template: bool = False
    """Put each prompt into the tokenizer's chat template."""

    system_instruction: str | None = None
    """Text before each prompt; with a chat template, the system's turn."""

    gen_kwargs: str | None = None
    """How text is generated, in place of what tasks say: `temperature=0.7,do_sample=True,max_gen_toks=64`."""

    metadata: str | None = None
    """JSON object for tasks that make their own data: RULER takes `{"max_seq_lengths": [4096, 8192]}`."""

    log_samples: bool = False
    """Write each task's prompts, answers and scores to `samples_TASK.jsonl`."""

    prefill_chunk: PositiveInt = 2048
    """Tokens of a request that are read at once."""

    @model_validator(mode="after")
    def _check(self) -> "HarnessOptions":
        for part in (self.gen_kwargs or "").split(","):
            if part and not all(part.partition("=")):
                refuse("gen_kwargs", f"has {part!r}, which is no name=value. Write temperature=0.7,max_gen_toks=64")
        return self
