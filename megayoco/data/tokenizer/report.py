"""How well tokenizers fit a text: tokens per character, lengths of documents, unused ids, speed."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megayoco.data.tokenizer.base import EncodingError, Tokenizer
from megayoco.errors import UserError

_BATCH = 1 << 20


@dataclass
class Measurement:
    """What a tokenizer made of a text; `lengths` are tokens per document, `counts` is how often each id came."""

    tokenizer: Tokenizer
    characters: int = 0
    text_bytes: int = 0
    seconds: float = 0.0
    lengths: list[np.ndarray] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, texts: list[str]) -> None:
        """Encode some documents. Raises EncodingError with the place of the text that cannot be encoded."""
        start = time.perf_counter()
        tokens, lengths = self.tokenizer.encode_documents(texts)
        self.seconds += time.perf_counter() - start
        self.characters += sum(map(len, texts))
        self.text_bytes += sum(len(text) if text.isascii() else len(text.encode("utf-8", "replace")) for text in texts)
        self.lengths.append(lengths)
        self.counts += np.bincount(tokens, minlength=len(self.counts))

    def summary(self, examples: int = 10) -> dict[str, Any]:
        """The report, JSON-able.

        documents, characters, bytes, tokens; tokens_per_character and tokens_per_byte over all text; tokens_per_sample
        (mean, median, p95, max); fallback_share: tokens that stand for a part of a character, or for one that the
        vocabulary lacks; never_produced: ids that text could give and this one did not, with the text of the first
        `examples` of them that are characters, better two; megabytes_per_second of encoding in one process.
        """
        lengths = np.concatenate(self.lengths)
        vocabulary = self.tokenizer.vocabulary()
        fallback = self.tokenizer.fallback_ids()
        unused = [number for number in sorted(vocabulary) if not self.counts[number]]
        texts = {number: vocabulary[number].decode("utf-8", "replace") for number in unused if number not in fallback}
        shown = sorted(texts, key=lambda number: (len(texts[number]) < 2, number))[:examples]
        total = int(self.counts.sum())
        return {
            "tokenizer": {**self.tokenizer.identity(), "model": self.tokenizer.model},
            "documents": len(lengths),
            "characters": self.characters,
            "bytes": self.text_bytes,
            "tokens": total,
            "tokens_per_character": total / self.characters,
            "tokens_per_byte": total / self.text_bytes,
            "tokens_per_sample": {
                "mean": float(lengths.mean()),
                "median": float(np.median(lengths)),
                "p95": float(np.quantile(lengths, 0.95)),
                "max": int(lengths.max()),
            },
            "fallback_share": float(self.counts[sorted(fallback)].sum() / total),
            "never_produced": {
                "count": len(unused),
                "of": len(vocabulary),
                "examples": {str(number): texts[number] for number in shown},
            },
            "megabytes_per_second": self.text_bytes / 1e6 / self.seconds,
        }


def measure(tokenizers: list[Tokenizer], documents: Iterable[tuple[str, str]]) -> Iterator[list[Measurement]]:
    """Encode a text by every tokenizer, yielding what is known so far after about every MiB of it.

    Args:
        documents: place and text of each; empty ones are left out.

    Raises:
        UserError: a text that a tokenizer cannot encode, with its place; no text at all.
    """
    measurements = [Measurement(one, counts=np.zeros(one.vocab_size, np.int64)) for one in tokenizers]
    places: list[str] = []
    texts: list[str] = []
    size = 0

    def encode() -> None:
        for measurement in measurements:
            try:
                measurement.add(texts)
            except EncodingError as error:
                raise UserError(f"{places[error.document]}: {error}") from error

    for place, text in documents:
        if not text:
            continue
        places.append(place)
        texts.append(text)
        size += len(text)
        if size >= _BATCH:
            encode()
            places, texts, size = [], [], 0
            yield measurements
    if texts:
        encode()
        yield measurements
    if not measurements or not measurements[0].lengths:
        raise UserError("there is no text in the input. Name the keys that hold text by --json-keys.")
