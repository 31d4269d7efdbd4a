"""Examples that a model is tuned on: instructions and conversations, of which only the answers are learned.

Source: the instruction and chat tuning of LongLLaMA (arXiv 2307.03170, released code), whose options these are.
"""

import re
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from megayoco.config.base import SECTION, NonNegativeInt, PositiveFloat, PositiveInt, refuse

Name = Annotated[str, Field(min_length=1)]


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern, re.DOTALL)
    except re.error as error:
        refuse(name, f"{pattern!r} is no regular expression: {error}")


@dataclass(frozen=True, kw_only=True, config=SECTION)
class FilterRule:
    """Records that stay: those of which a text has a certain form or length. Give one of the conditions."""

    path: Name | Annotated[list[Name | int], Field(min_length=1)]
    """Where the text lies in a record: a field, or a list of fields, numbers of list elements (-1 is the last) and `*`
    for every element, as in [conversations, "*", value]."""

    over: Literal["all", "any", "sum"] | None = None
    """With `*`: whether all of the texts must pass, any of them, or the sum of their lengths."""

    matches: str | None = None
    """Regular expression that the text begins with; `.` matches line ends too."""

    characters_below: NonNegativeInt | None = None
    """The text has fewer characters."""

    characters_above: NonNegativeInt | None = None
    """The text has more characters."""

    tokens_below: NonNegativeInt | None = None
    """The text has fewer tokens, tokenised alone."""

    tokens_above: NonNegativeInt | None = None
    """The text has more tokens, tokenised alone."""

    @model_validator(mode="after")
    def _check(self) -> "FilterRule":
        conditions = ("matches", "characters_below", "characters_above", "tokens_below", "tokens_above")
        given = [name for name in conditions if getattr(self, name) is not None]
        if len(given) != 1:
            refuse("matches", f"or another condition is needed, and only one: give one of {', '.join(conditions)}")
        if (self.over is not None) != ("*" in self.steps):
            refuse("over", "says how the texts behind a * in path count: give both, or neither")
        if self.over == "sum" and self.matches is not None:
            refuse("over", "sum adds lengths, and matches has none: use all or any")
        if self.matches is not None:
            _check_pattern("matches", self.matches)
        return self

    @property
    def steps(self) -> list[str | int]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


@dataclass(frozen=True, kw_only=True, config=SECTION)
class InstructionFields:
    """How a record becomes a question without loss and a response with it: beginning of text, then pre_prompt PROMPT
    post_prompt pre_question QUESTION post_question as one text; then pre_response RESPONSE post_response as another,
    and the end of document."""

    prompt_field: Name | None = None
    """Field with what stands before the question, such as system_prompt. Absent: nothing does."""

    question_field: Name = "question"
    """Field with the question."""

    response_field: Name = "response"
    """Field with the response."""

    pre_prompt: str = ""
    """Text before the prompt."""

    post_prompt: str = "\n"
    """Text behind the prompt."""

    pre_question: str = ""
    """Text before the question."""

    post_question: str = "\n"
    """Text behind the question."""

    pre_response: str = ""
    """Text before the response; it is learned."""

    post_response: str = ""
    """Text behind the response; it is learned."""

    max_input_length: PositiveInt | None = None
    """Tokens that prompt and question may have; what is more is cut off at the right. Default: the sequence length."""

    max_output_length: PositiveInt | None = None
    """Tokens that the response may have, cut in the same way. Default: the sequence length."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class Replacement:
    """Every match of a regular expression gives way to a text."""

    pattern: Name
    """Regular expression; `.` matches line ends too."""

    replacement: str
    r"""What stands in its place; \1 is the first group of the pattern."""

    @model_validator(mode="after")
    def _check(self) -> "Replacement":
        _check_pattern("pattern", self.pattern)
        try:
            re.compile(f"(?:{self.pattern})|", re.DOTALL).sub(self.replacement, "")
        except (re.error, IndexError) as error:
            refuse("replacement", f"{self.replacement!r} does not fit pattern {self.pattern!r}: {error}")
        return self


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ChatFields:
    """How a record becomes a conversation: beginning of text and initial_prompt, then for every turn its prefix and its
    text, and the end of document behind those of the model. Only the texts of the model and the ends of document behind
    them are learned. Every piece is tokenised alone."""

    conversations_field: Name = "conversations"
    """Field with the list of turns."""

    text_field: Name = "value"
    """Field of a turn with its text."""

    role_field: Name = "from"
    """Field of a turn that says who speaks."""

    model_role: Name = "gpt"
    """Who speaks where the model does; everybody else is the human."""

    initial_prompt: str = "You are a helpful ASSISTANT.\n\n"
    """Text before the first turn."""

    human_prefix: str = "\nUSER: "
    """Text before each turn of the human."""

    model_prefix: str = "\nASSISTANT: "
    """Text before each turn of the model."""

    replacements: list[Replacement] = field(default_factory=list)
    """What is replaced in the texts of all turns, in this order."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class TuningSource:
    """Files of records, and how they become examples: as `instructions` or as `chat`."""

    files: Name | Annotated[list[Name], Field(min_length=1)]
    """Paths, folders or patterns of files: JSON lines (plain, gzip, zstd), JSON lists, Parquet, Arrow."""

    weight: PositiveFloat | None = None
    """Share of the samples that come from here, relative to the other sources. Give it to all, or to none: then each
    has its number of examples."""

    instructions: InstructionFields | None = None
    """A question and a response per record."""

    chat: ChatFields | None = None
    """A conversation per record."""

    filters: list[FilterRule] = field(default_factory=list)
    """Rules that a record must pass, all of them, or it is left out."""

    @model_validator(mode="after")
    def _check(self) -> "TuningSource":
        if (self.instructions is None) == (self.chat is None):
            refuse("instructions", "or chat says what the records are: give one of them ({} for its defaults)")
        return self

    @property
    def patterns(self) -> list[str]:
        """`files` as a list."""
        return [self.files] if isinstance(self.files, str) else list(self.files)

    def example_settings(self) -> dict[str, Any]:
        """What an example follows from besides record, tokenizer and sequence length, JSON-able."""
        return {name: value for name, value in asdict(self).items() if name not in ("files", "weight")}


@dataclass(frozen=True, kw_only=True, config=SECTION)
class TuningConfig:
    """Instruction and chat tuning: a sample is one example, filled up to the sequence length."""

    sources: Annotated[list[TuningSource], Field(min_length=1)]
    """What is read. The source of each sample is drawn by weight and seed."""

    valid: list[TuningSource] = field(default_factory=list)
    """Examples for validation, each once; weights play no part. Default: those of `data.valid`, if there are any."""

    random_padding: bool = True
    """Whether a random part of what fills up an example, drawn by seed and sample number, stands before it, where
    nothing sees it; else all stands behind it. So any part of the text comes to lie in the memory of
    `model.memory_layers`."""

    workers: PositiveInt = 1
    """Processes that make examples of the records, once, before training."""

    @model_validator(mode="after")
    def _check(self) -> "TuningConfig":
        if len({source.weight is None for source in self.sources}) > 1:
            refuse("sources", "must all have a weight, or none")
        return self

    def order_settings(self) -> dict[str, Any]:
        """What the training samples follow from besides sequence length, seed and tokenizer, JSON-able."""
        return {"sources": [asdict(source) for source in self.sources], "random_padding": self.random_padding}
