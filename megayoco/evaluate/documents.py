"""Documents that are long enough to be read whole: from text, or from an indexed dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megayoco.data.indexed import check_vocabulary, read_meta
from megayoco.data.pair import open_pair
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError
from megayoco.evaluate.haystack import read_texts


@dataclass(frozen=True)
class Documents:
    """The first documents of a source that have enough tokens.

    Attributes:
        tokens: of each, (needed,) int64.
        excluded: documents that were looked at and are shorter.
        sha256: of all tokens.
    """

    tokens: list[np.ndarray]
    excluded: int
    sha256: str


def long_documents(
    tokenizer: Tokenizer, needed: int, count: int, *, text: str | None, data: str | None, vocab_size: int
) -> Documents:
    """The first `count` documents of at least `needed` tokens, cut there; fewer if there are not so many.

    Args:
        tokenizer: of the model.
        needed: tokens per document.
        count: documents at most.
        text: a file, folder or pattern of texts; or None, and
        data: the prefix of an indexed dataset.
        vocab_size: of the model.

    Raises:
        UserError: the source cannot be read, is of another tokenizer, or has no document that is long enough.
    """
    if text is not None:
        source = _from_text(tokenizer, needed, text)
    else:
        source = _from_data(tokenizer, needed, str(data), vocab_size)
    kept: list[np.ndarray] = []
    excluded = longest = 0
    for size, tokens in source:
        longest = max(longest, size)
        if tokens is None:
            excluded += 1
            continue
        kept.append(tokens)
        if len(kept) == count:
            break
    if not kept:
        place = f"--text {text}" if text is not None else f"--data {data}"
        raise UserError(
            f"{place}: none of its {excluded:,} documents has {needed:,} tokens, the"
            f" longest about {longest:,}. Give a smaller --length, or longer documents."
        )
    digest = hashlib.sha256()
    for document in kept:
        digest.update(document.tobytes())
    return Documents(kept, excluded, digest.hexdigest())


Found = tuple[int, np.ndarray | None]
"""Tokens of a document, at most; and the first of them, None if they are too few."""


def _from_text(tokenizer: Tokenizer, needed: int, text: str) -> Iterator[Found]:
    for _, document in read_texts(text, "--text"):
        size = len(document.encode("utf-8", "replace"))
        if size < needed:  # no token is shorter than a byte
            yield size, None
            continue
        tokens = tokenizer.encode_array(document)
        yield len(tokens), tokens[:needed].astype(np.int64) if len(tokens) >= needed else None


def _from_data(tokenizer: Tokenizer, needed: int, prefix: str, vocab_size: int) -> Iterator[Found]:
    pair = open_pair(prefix)
    meta = read_meta(prefix) or {}
    made_with = meta.get("tokenizer", {}).get("sha256")
    if made_with is not None and made_with != tokenizer.identity()["sha256"]:
        raise UserError(
            f"--data {prefix} was made with another tokenizer than the model's: their hashes differ. Rebuild it with"
            " tools/preprocess_data.py, or give --text."
        )
    check_vocabulary(prefix, pair.dtype, vocab_size)
    lengths = np.concatenate([*pair.blocks("lengths"), np.zeros(0, "<i4")]).astype(np.int64)
    borders = np.concatenate([*pair.blocks("documents"), np.zeros(0, "<i8")])
    begins = np.concatenate([[0], lengths.cumsum()])[borders]
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        size = end - begin
        yield size, pair.tokens(begin, needed).astype(np.int64) if size >= needed else None
