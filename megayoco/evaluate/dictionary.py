"""Dictionary lookup: values of keys that were defined once, at any distance, and nothing but looking up tells them.

A document is a dictionary, `:kkk=vvv:kkk=vvv...`, of random symbols, then questions about it, `?kkk=vvv...`. Scored are
the values of the questions, given all that stands before them: a question counts if each symbol of its value is the
model's most likely one, which is what greedy decoding would give. The longer the document the more definitions there
are, so a length is also a number of distractors.

Source: Focused Transformer, arXiv 2307.03170, section 4.1: a vocabulary of 64, keys and values of four symbols,
definitions and questions of 256 tokens each in training, the last 256 tokens questions in the test. Here keys and
values have three symbols unless told, so that windows of 256 tokens hold whole records.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megayoco.config.evaluation import DictionaryOptions
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError
from megayoco.evaluate.plots import accuracies
from megayoco.evaluate.progress import Progress
from megayoco.evaluate.results import ResultsFolder, settings_of
from megayoco.evaluate.subject import Subject
from megayoco.evaluate.work import Item, Record, work_through, writes
from megayoco.model.inference import InferenceModel

NAME = "dictionary"
DEFINITION, QUESTION, VALUE = ":", "?", "="
SYMBOLS = (string.ascii_letters + string.digits)[:61]
"""With the three marks a vocabulary of 64."""
PADDING = " "
"""What fills a part up to its length behind its last whole record."""


@dataclass(frozen=True)
class Shape:
    """How long the parts of a record are, in symbols, which are tokens."""

    key: int
    value: int

    @property
    def record(self) -> int:
        """Symbols of a definition, or a question with its answer."""
        return self.key + self.value + 2


def dictionary(generator: random.Random, tokens: int, questions: int, shape: Shape, keys: int | None = None) -> str:
    """A document of exactly `tokens` symbols, of which the last `questions` ask.

    With fewer `keys` than there is room for they are defined again. Questions, and such repetitions, go through all
    keys in a random order, again and again, so that none comes twice as often as another.

    Raises:
        UserError: a part has no room for a record, or there are more definitions than keys.
    """
    count, room = _records(tokens, questions, shape)
    entries: dict[str, str] = {}
    while len(entries) < min(count, keys or count):
        entries[_symbols(generator, shape.key)] = _symbols(generator, shape.value)
    definitions, asked = (
        "".join(f"{mark}{key}{VALUE}{entries[key]}" for key in _again(generator, list(entries), number))
        for mark, number in ((DEFINITION, count), (QUESTION, room))
    )
    return definitions.ljust(tokens - questions, PADDING) + asked.ljust(questions, PADDING)


def _records(tokens: int, questions: int, shape: Shape) -> tuple[int, int]:
    """Definitions and questions of a document. Raises UserError as `dictionary` does."""
    count, room = (tokens - questions) // shape.record, questions // shape.record
    if count < 1 or room < 1:
        raise UserError(
            f"{tokens} tokens with {questions} of questions have no room for definitions and questions of"
            f" {shape.record} tokens each. Give longer ones."
        )
    if 2 * count > len(SYMBOLS) ** shape.key:
        raise UserError(
            f"{count:,} definitions need keys of more than {shape.key} symbols. Give longer keys, or shorter lengths."
        )
    return count, room


def _again(generator: random.Random, keys: list[str], count: int) -> list[str]:
    """So many of them: all in a random order, then in another one, and so on."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += generator.sample(keys, min(len(keys), count - len(drawn)))
    return drawn


def _pairs() -> str:
    """Every symbol beside every other, and beside every mark: a rare pair must not end a run in its middle."""
    pairs = [f"{a}{b}{VALUE}{b}{a}" for a in SYMBOLS for b in SYMBOLS]
    return "".join(f"{mark}{pair}" for mark in (DEFINITION, QUESTION) for pair in pairs)


def _symbols(generator: random.Random, count: int) -> str:
    return "".join(generator.choices(SYMBOLS, k=count))


def check(tokenizer: Tokenizer, options: DictionaryOptions, trained_length: int | None) -> None:
    """Raises the UserError that `run` would."""
    shape = Shape(options.key_tokens, options.value_tokens)
    lengths = _lengths(options, trained_length)
    for length in lengths:
        _records(length, options.question_tokens, shape)
    _encode(tokenizer, _pairs())
    _encode(tokenizer, dictionary(random.Random(0), lengths[0], options.question_tokens, shape))


def run(
    model: InferenceModel,
    tokenizer: Tokenizer,
    options: DictionaryOptions,
    output: Path | None = None,
    progress: Progress | None = None,
    subject: Subject = Subject(),  # noqa: B008 (immutable)
) -> dict[str, float]:
    """Ask about dictionaries of all lengths. Collective over all ranks; the same on any layout.

    Args:
        model: in evaluation mode.
        tokenizer: the model's; each symbol must be a token, as with bytes.
        options: how long, and how many.
        output: folder of the results, used by the first rank; a folder with a part of them is completed. None: none.
        progress: told after each document, on the first rank.
        subject: what is known of the model.

    Returns:
        dictionary/accuracy, the share of questions that were answered, over all lengths, and
        dictionary/accuracy/LENGTH for each.

    Raises:
        UserError: the tokenizer joins symbols, a length has no room for a record, or the folder cannot be used.
    """
    shape = Shape(options.key_tokens, options.value_tokens)
    lengths = _lengths(options, subject.trained_length)
    check(tokenizer, options, subject.trained_length)

    def evaluate(keys: Sequence[str]) -> Iterator[Record]:
        for key in keys:
            length = int(key.partition("/")[0])
            # a string, so that it does not depend on how Python hashes tuples
            text = dictionary(random.Random(f"{options.seed}/{key}"), length, options.question_tokens, shape)
            ids = _encode(tokenizer, text)
            yield {"key": key, "length": length, **ask(model, ids, text, options, shape)}

    folder = None if output is None else ResultsFolder(output, settings_of(NAME, options, subject, lengths=lengths))
    groups = [[Item(f"{length}/{trial}", length)] for length in lengths for trial in range(options.trials)]
    records = work_through(model, groups, evaluate, folder, progress, _describe)
    rows = table(records)
    summary = {f"{NAME}/accuracy": sum(row["accuracy"] for row in rows) / len(rows)}
    summary |= {f"{NAME}/accuracy/{row['length']}": row["accuracy"] for row in rows}
    if folder is not None and writes(model):
        shown = {"questions": [row["accuracy"] for row in rows], "symbols": [row["symbol_accuracy"] for row in rows]}
        title = f"dictionary lookup, {options.trials} documents per length"
        accuracies(folder.path / "curve.png", title, [row["length"] for row in rows], shown, subject.trained_length)
        folder.finish(summary, rows, subject, [])
    return summary


def ask(
    model: InferenceModel, ids: Sequence[int], text: str, options: DictionaryOptions, shape: Shape
) -> dict[str, int]:
    """Read a document and compare the values of its questions with what is most likely there.

    Args:
        model: every rank of its replica makes the same call.
        ids: (N,) one token per symbol of `text`.
        text: the document.
        options: where its questions begin, and how much is read at once.
        shape: of its records.

    Returns:
        Number of questions, of those answered, of the symbols of their values, and of those that were most likely.
    """
    tokens = torch.tensor([ids], device=model.device)
    first, end = len(ids) - options.question_tokens, len(ids) - 1
    context = model.empty_context(1, reserve=end).announce(end)
    for start in range(0, first, options.prefill_chunk):
        context = model.absorb(tokens[:, start : min(start + options.prefill_chunk, first)], context)
    right: list[bool] = []  # right[i]: whether symbol first + 1 + i of the document was the most likely there
    for start in range(first, end, options.prefill_chunk):
        stop = min(start + options.prefill_chunk, end)
        _, greedy, context = model.losses(tokens[:, start:stop], tokens[:, start + 1 : stop + 1], context)
        right += greedy[0].tolist()
    questions = answered = symbols = likely = 0
    for begin in range(first, len(ids) - shape.record + 1, shape.record):
        if text[begin] != QUESTION:
            break
        value = begin + 2 + shape.key - first - 1
        hits = right[value : value + shape.value]
        questions, answered = questions + 1, answered + all(hits)
        symbols, likely = symbols + len(hits), likely + sum(hits)
    return {"questions": questions, "answered": answered, "symbols": symbols, "likely": likely}


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per length."""
    rows = []
    for length in sorted({record["length"] for record in records}):
        own = [record for record in records if record["length"] == length]
        total = {name: sum(record[name] for record in own) for name in ("questions", "answered", "symbols", "likely")}
        rows.append(
            {
                "length": length,
                "documents": len(own),
                "questions": total["questions"],
                "accuracy": round(total["answered"] / total["questions"], 6),
                "symbol_accuracy": round(total["likely"] / total["symbols"], 6),
            }
        )
    return rows


def _lengths(options: DictionaryOptions, trained_length: int | None) -> list[int]:
    if options.lengths:
        return sorted(set(options.lengths))
    if trained_length is None:
        raise UserError("nothing tells the length that the model was trained for. Give --lengths.")
    return [trained_length]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = [int(token) for token in tokenizer.encode(text)]
    if len(ids) != len(text):
        raise UserError(
            f"the tokenizer makes {len(ids):,} tokens of {len(text):,} symbols. The dictionary needs one that makes a"
            " token of each, such as ByteTokenizer."
        )
    return ids


def _describe(records: Sequence[Record]) -> str:
    questions = sum(record["questions"] for record in records)
    return f"accuracy {sum(record['answered'] for record in records) / questions:.3f}" if questions else ""
