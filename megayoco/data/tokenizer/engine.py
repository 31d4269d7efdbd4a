"""tiktoken's encoder for many documents at once, without its limits, and with a check that no text is lost.

tiktoken cuts text by a regular expression and merges inside each piece. Three things go wrong with it on real data:

- a call per document is slow for short documents: here all documents of a batch are one text, with a private special
  token between them. tiktoken matches what lies between two special tokens alone: the ids are those of separate calls;
- runs of more than about 300,000 blanks exceed the stack of its regular expressions, and a single word of n bytes needs
  66 n bytes of memory: such documents go through `long_text`, which gives the same ids;
- a pattern that does not match everything drops what it does not match: the bytes of the ids are counted.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import tiktoken

from megayoco.data.tokenizer.base import REPLACEMENT, EncodingError, encodable
from megayoco.data.tokenizer.long_text import encode_long, longest_run
from megayoco.data.tokenizer.ranks import CL100K_PATTERN, format_ranks
from megayoco.errors import UserError

SEPARATOR = "\x00<|between two documents of one batch|>"
"""Begins with a character that it does not hold again, so that no document's end can make an earlier one of it."""

LONG = 1 << 22
"""Characters; a longer document is searched for runs of this length."""

PLAIN = {
    CL100K_PATTERN: (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s+$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$|\s+(?!\S)|\s"
    ),
}
"""Patterns of cl100k and of r50k without possessive quantifiers, which tiktoken runs a quarter slower.

They match the same: what stands behind a possessive quantifier can match nothing of what it took (no letter is a sign
that may stand before letters, the end of the text is no blank), or is nothing, or matches the empty text too.
"""


class TiktokenEngine:
    """Byte-level BPE of tiktoken.

    Args:
        model: the vocabulary's name in errors.
        ranks: token bytes -> id; lower ids are merged first.
        pattern: regular expression whose matches are merged, each alone.
        special_tokens: name -> id.

    Attributes:
        size: one more than the largest id.

    Raises:
        UserError: the pattern is no regular expression, or an id is too large.
    """

    def __init__(self, model: str, ranks: dict[bytes, int], pattern: str, special_tokens: Mapping[str, int]):
        self.model, self.ranks, self.pattern, self.special_tokens = model, ranks, pattern, dict(special_tokens)
        self.size = max(*ranks.values(), *special_tokens.values(), -1) + 1
        try:
            self._encoding = tiktoken.Encoding(
                Path(model).name,
                pat_str=PLAIN.get(pattern, pattern),
                mergeable_ranks=ranks,
                special_tokens=self.special_tokens | {SEPARATOR: self.size},
            )
        except ValueError as error:  # the pattern is no regular expression
            raise UserError(f"{model}: tiktoken refuses its pattern {pattern!r}: {error}") from error
        except OverflowError as error:
            raise UserError(f"{model}: a rank or the id of a special token is too large for tiktoken") from error
        self._bytes = np.zeros(self.size, np.uint32)
        for token, number in ranks.items():
            self._bytes[number] = len(token)
        for name, number in self.special_tokens.items():
            self._bytes[number] = len(name.encode())

    def encode(self, texts: Sequence[str], allow_special: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after the other (n,) uint32, and the number of ids of each (len(texts),) int64.

        Raises:
            EncodingError: a text that the pattern does not match as a whole, or that tiktoken cannot encode.
        """
        joined = SEPARATOR.join(texts)
        try:
            size = len(joined) if joined.isascii() else len(joined.encode())
        except UnicodeEncodeError:
            return self.encode([encodable(text) for text in texts], allow_special)
        separators = len(texts) - 1
        if len(joined) < LONG and joined.count(SEPARATOR) == separators:
            try:
                tokens = self._encode(joined, {SEPARATOR} | self._allowed(allow_special))
            except _LimitError:
                pass  # of one document: find it
            else:
                borders = np.flatnonzero(tokens == self.size)
                lengths = np.diff(borders, prepend=-1, append=len(tokens)) - 1
                tokens = np.delete(tokens, borders) if separators else tokens
                if self._bytes[tokens].sum(dtype=np.int64) == size - separators * len(SEPARATOR):
                    return tokens, lengths
        parts = [self._encode_one(number, text, allow_special) for number, text in enumerate(texts)]
        tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
        return tokens, np.array([len(part) for part in parts], np.int64)

    def bytes_of(self, number: int) -> bytes:
        """The bytes of an id; an id without a token gives U+FFFD."""
        if number < self.size:
            try:
                return self._encoding.decode_single_token_bytes(number)
            except KeyError:  # a gap between the special tokens
                pass
        return REPLACEMENT

    def fingerprint(self) -> Iterable[bytes]:
        """Everything that decides the ids of a text."""
        yield self.pattern.encode()
        yield json.dumps(self.special_tokens, sort_keys=True).encode()
        yield format_ranks(self.ranks)

    def _allowed(self, allow_special: bool) -> set[str]:
        return set(self.special_tokens) if allow_special else set()

    def _encode(self, text: str, allowed: set[str]) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        except ValueError as error:
            raise _LimitError(str(error)) from error

    def _encode_one(self, number: int, text: str, allow_special: bool) -> np.ndarray:
        """Ids of one text without lone surrogates, whatever its length, with all checks."""
        allowed = self._allowed(allow_special)
        tokens: np.ndarray | None = None
        if len(text) < LONG or longest_run(text) < LONG:
            with suppress(_LimitError):
                tokens = self._encode(text, allowed)
        if tokens is None:
            tokens = encode_long(text, self._encoding, self.pattern, self.special_tokens if allow_special else {})
        if tokens is None:
            raise EncodingError(
                f"a text of {len(text):,} characters exceeds what tiktoken can match: a run of more than 300,000 blanks"
                f" or the like. Shorten the run, or leave the text out (--on-error skip).",
                number,
            )
        if (found := int(self._bytes[tokens].sum(dtype=np.int64))) != len(text.encode()):
            raise EncodingError(
                f"{self.model}: its pattern leaves out {len(text.encode()) - found:,} bytes of the text that begins"
                rf" {text[:40]!r}. Give it a pattern that matches every text, such as one that ends in |\s+|.",
                number,
            )
        return tokens


class _LimitError(Exception):
    """tiktoken gave up on a text."""
