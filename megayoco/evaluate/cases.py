"""The prompts of a retrieval evaluation: which there are, and how each gets exactly the length it is labelled with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from megayoco.config.evaluation import RetrievalOptions, StartToken
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError

SLACK = 8
"""Tokens that a prompt may be shorter than its label: less than a word more would fit."""
CORRECTIONS = 6


@dataclass(frozen=True)
class Case:
    """What tells one prompt of an evaluation from all others."""

    length: int
    """Tokens of prompt and answer; characters of filler where those were asked for."""
    depth: float | None
    """Share of the text before the needle; None: drawn with the prompt."""
    trial: int
    needles: int = 1
    query: int = 0
    """Which of the needles is asked for, from 0, where all of them are."""

    @property
    def key(self) -> str:
        """A name for it, by which results are found again."""
        depth = "drawn" if self.depth is None else f"{self.depth:.6g}"
        return f"length {self.length}, needles {self.needles}, depth {depth}, trial {self.trial}, query {self.query}"


@dataclass(frozen=True)
class Prompt:
    """A question to the model."""

    case: Case
    depth: float
    """Share of the text before the needle that is asked for."""
    tokens: list[int]
    answer: str
    """Digits of the number."""
    drawn: bool = False
    """Whether the depth is a random number, to be shown in a range of them."""
    repeats: bool = False
    """Whether the haystack was too short and is read more than once."""


@dataclass(frozen=True)
class RetrievalTask:
    """A retrieval evaluation, ready to be asked.

    Attributes:
        name: of the evaluation.
        groups: the cases; those of a group have the longest common beginnings, and go to one replica.
        build: the prompts of some cases of a group, in their order; a pure function of the cases.
        identity: what decides the prompts besides the options.
        unit: of the lengths, tokens or characters.
    """

    name: str
    groups: Sequence[Sequence[Case]]
    build: Callable[[Sequence[Case]], list[Prompt]]
    identity: dict[str, str]
    unit: str = "tokens"


def start_tokens(choice: StartToken, tokenizer: Tokenizer) -> list[int]:
    """What stands before a text, by the option `start_token`. Raises UserError for a `bos` that there is not."""
    if choice == "none":
        return []
    if choice == "bos" and tokenizer.bos is None:
        raise UserError("--start-token bos: the tokenizer has no such token. Say eod, none or auto.")
    return [tokenizer.eod if choice == "eod" or tokenizer.bos is None else tokenizer.bos]


def wanted_lengths(options: RetrievalOptions, trained_length: int | None) -> list[int]:
    """The lengths of an evaluation, ascending. Raises UserError if neither the options nor the model tell any."""
    lengths = options.resolved_lengths() or [length for length in (trained_length,) if length]
    if not lengths:
        raise UserError("nothing tells the length that the model was trained for. Give --lengths.")
    return lengths


def draws(*what: object) -> random.Random:
    """Random numbers that follow from `what` alone."""
    return random.Random("/".join(map(str, what)))


class PromptWriter:
    """Texts to the tokens of prompts, as the options say.

    Raises:
        UserError: `start_token` bos, and the tokenizer has none.
    """

    def __init__(self, tokenizer: Tokenizer, options: RetrievalOptions) -> None:
        self._tokenizer = tokenizer
        self._start = start_tokens(options.start_token, tokenizer)
        self._strip = options.strip_prompt
        self._max_new_tokens = options.max_new_tokens

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, what stands before it included."""
        return [*self._start, *self._tokenizer.encode(text.rstrip(" ") if self._strip else text)]

    def room(self, length: int) -> int:
        """Tokens of a prompt that, with its answer, has `length`."""
        return length - self._max_new_tokens

    def check(self, length: int, text: str) -> None:
        """Raises UserError if `text`, the longest prompt without filler, does not fit into `length` tokens."""
        needed = len(self.encode(text))
        if needed > self.room(length):
            raise too_short(length, self.room(length), needed)

    def fit(self, build: Callable[[int], str], length: int) -> tuple[list[int], int]:
        """The prompt that comes nearest to `length` tokens with its answer, and the amount of filler that gives it.

        Tokens at the borders of a prompt's parts join or do not, so its length is known only when it is made.

        Args:
            build: the prompt with about so many tokens of filler.
            length: the label.

        Raises:
            UserError: the prompt does not fit even without filler.
        """
        limit = self.room(length)
        budget = max(limit - len(self.encode(build(0))), 0)
        best: tuple[list[int], int] | None = None
        for attempt in count():
            tokens = self.encode(build(budget))
            spare = limit - len(tokens)
            if spare >= 0 and (best is None or len(tokens) > len(best[0])):
                best = tokens, budget
            if best is not None and (0 <= spare <= SLACK or attempt >= CORRECTIONS):
                break
            if spare < 0 and budget == 0:
                raise too_short(length, limit, len(tokens))
            budget = max(budget + spare, 0)
        assert best is not None
        return best


def too_short(length: int, room: int, needed: int) -> UserError:
    """The error for a length without room for what must be in a prompt."""
    return UserError(
        f"length {length:,}: the answer leaves {max(room, 0):,} tokens for the prompt, which needs at least"
        f" {needed:,}. Give a greater length, fewer needles, or fewer new tokens."
    )
