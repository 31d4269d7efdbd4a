"""From records to examples: tokens, and which of them are learned.

An example is (n,) int32: the id of a token that is learned, and ~id (so below 0) of one that is not.
Source: instruction and chat tuning of LongLLaMA (arXiv 2307.03170, released code); differences: an end of document is
seen by attention in conversations as well, and an example of which nothing is learned is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megayoco.config.tuning import ChatFields, InstructionFields, TuningSource
from megayoco.data.tokenizer import Tokenizer
from megayoco.data.tuning_filters import passes
from megayoco.data.tuning_records import Piece
from megayoco.errors import UserError


@dataclass
class Counts:
    """What became of records: `left_out` by filters, `unlabelled` because nothing of them would be learned, `cut` to
    the lengths allowed; all others are examples as they are. `tokens` of the examples, `labelled` of them."""

    records: int = 0
    left_out: int = 0
    unlabelled: int = 0
    cut: int = 0
    tokens: int = 0
    labelled: int = 0

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Recipe:
    """What makes examples of records.

    Attributes:
        source: fields, texts, limits and filters.
        length: tokens of the longest example.
    """

    source: TuningSource
    length: int

    def examples(self, piece: Piece, tokenizer: Tokenizer) -> tuple[list[np.ndarray], Counts]:
        """The examples of the records of a piece.

        Raises:
            UserError: a record lacks a field, has something else than text there, or an empty answer; with its place.
        """
        counts = Counts()
        kept = []
        for place, record in piece.records():
            counts.records += 1
            if passes(record, self.source.filters, tokenizer, place):
                kept.append((place, record))
            else:
                counts.left_out += 1
        found = []
        for example, was_cut in self._made(kept, tokenizer):
            labelled = int((example[1:] >= 0).sum())
            if not labelled:
                counts.unlabelled += 1
                continue
            found.append(example)
            counts.cut += was_cut
            counts.tokens += len(example)
            counts.labelled += labelled
        return found, counts

    def _made(
        self, records: Sequence[tuple[str, dict[str, Any]]], tokenizer: Tokenizer
    ) -> Iterable[tuple[np.ndarray, bool]]:
        """(example, whether it was cut) of each record."""
        if self.source.chat is not None:
            chat = self.source.chat
            turns = [conversation_texts(record, chat, place) for place, record in records]
            fixed = _encoded([chat.initial_prompt, chat.human_prefix, chat.model_prefix], tokenizer)
            encoded = iter(_encoded([text for conversation in turns for text, _ in conversation], tokenizer))
            for conversation in turns:
                texts = [(next(encoded), by_model) for _, by_model in conversation]
                yield _conversation(texts, fixed, tokenizer, self.length)
        elif self.source.instructions is not None:
            fields = self.source.instructions
            pairs = [instruction_texts(record, fields, place) for place, record in records]
            encoded = iter(_encoded([text for pair in pairs for text in pair], tokenizer))
            for _ in pairs:
                yield _instruction(next(encoded), next(encoded), fields, tokenizer, self.length)


def instruction_texts(record: dict[str, Any], fields: InstructionFields, place: str) -> tuple[str, str]:
    """The text without loss and the text with it, of a record with a question and a response."""
    before = ""
    if fields.prompt_field is not None:
        prompt = _text(record, fields.prompt_field, "instructions.prompt_field", place)
        before = fields.pre_prompt + prompt + fields.post_prompt
    question = _text(record, fields.question_field, "instructions.question_field", place)
    response = _text(record, fields.response_field, "instructions.response_field", place)
    if not response.strip():
        raise UserError(
            f"{place}: the response ({fields.response_field!r}) is empty. Repair or remove the record, or leave such"
            f" records out by a filter: {{path: {fields.response_field}, matches: '\\s*\\S'}}."
        )
    return (
        before + fields.pre_question + question + fields.post_question,
        fields.pre_response + response + fields.post_response,
    )


def conversation_texts(record: dict[str, Any], chat: ChatFields, place: str) -> list[tuple[str, bool]]:
    """(text, whether it is the model's) of each turn."""
    field = chat.conversations_field
    turns = record.get(field)
    if not isinstance(turns, list):
        found = f"no field {field!r}, only {_names(record)}" if field not in record else f"{field!r} is no list"
        raise UserError(f"{place}: {found}. Name the list of turns by chat.conversations_field.")
    texts = []
    for number, turn in enumerate(turns, 1):
        at = f"{place}, turn {number}"
        if not isinstance(turn, dict):
            raise UserError(f"{at}: expected an object with fields, got {type(turn).__name__}. Repair the record.")
        by_model = _text(turn, chat.role_field, "chat.role_field", at) == chat.model_role
        text = _text(turn, chat.text_field, "chat.text_field", at)
        if by_model and not text.strip():
            raise UserError(
                f"{at}: the answer ({chat.text_field!r}) is empty. Repair or remove the record, or leave such records"
                f" out by a filter: {{path: [{field}, '*', {chat.text_field}], over: all, matches: '\\s*\\S'}}."
            )
        for rule in chat.replacements:
            text = re.sub(rule.pattern, rule.replacement, text, flags=re.DOTALL)
        if by_model and not text.strip():
            raise UserError(
                f"{at}: nothing of the answer ({chat.text_field!r}) is left by chat.replacements. Correct them, or"
                " leave such records out by a filter."
            )
        texts.append((text, by_model))
    return texts


def _instruction(
    question: np.ndarray, response: np.ndarray, fields: InstructionFields, tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, bool]:
    x = np.concatenate([_begin(tokenizer), ~question])
    y = np.append(response, np.int32(tokenizer.eod))
    whole = len(x) + len(y)
    x, y = x[: fields.max_input_length], y[: fields.max_output_length]
    example = np.concatenate([x, y])[:length]
    return example, len(example) < whole


def _conversation(
    turns: Sequence[tuple[np.ndarray, bool]], fixed: Sequence[np.ndarray], tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, bool]:
    """fixed: tokens of the initial prompt, of the human's prefix and of the model's."""
    initial, human, model = fixed
    parts = [_begin(tokenizer), ~initial]
    for text, by_model in turns:
        parts += [~model, text, np.array([tokenizer.eod], np.int32)] if by_model else [~human, ~text]
    example = np.concatenate(parts)
    return example[:length], len(example) > length


def _begin(tokenizer: Tokenizer) -> np.ndarray:
    """The beginning of text, where the tokenizer has one."""
    return np.array([] if tokenizer.bos is None else [~tokenizer.bos], np.int32)


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids (n,) int32 of each text, in one call of the tokenizer's engine."""
    if not texts:
        return []
    tokens, lengths = tokenizer.encode_documents(texts)
    return np.split(tokens.astype(np.int32), np.cumsum(lengths)[:-1])


def _text(record: dict[str, Any], field: str, key: str, place: str) -> str:
    value = record.get(field)
    if isinstance(value, str):
        return value
    if field not in record:
        raise UserError(f"{place}: no field {field!r}, only {_names(record)}. Name the right one by {key}.")
    kind = "null" if value is None else type(value).__name__
    raise UserError(
        f"{place}: the value of {field!r} is {kind}, not text. Repair or remove the record, or correct {key}."
    )


def _names(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "none"
