"""The text that hides needles: lines of files that the user names, or of Python's standard library.

It is a ring: what a prompt takes begins at a line drawn for it, and goes on at the first line behind the last. A prompt
that is longer than the ring reads it again, which `Filler.repeats` tells.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

from megayoco.data.encode import read_documents
from megayoco.data.inputs import find_inputs
from megayoco.data.installation import library_files
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError

MAX_CHARACTERS = 1 << 27
"""Of the user's files that are read: more than a prompt needs, and as much for short ones, whose text would change."""
LIBRARY_CHARACTERS = 1 << 24
# with the white space before it; long words, and text without spaces, are cut
_PIECE = re.compile(r"\s*\S{1,16}")


class Filler:
    """The running text of one prompt, addressed by tokens.

    Args:
        pieces: words with the white space before them.
        ends: (pieces,) float64, tokens of the text up to the end of each piece.
        ring: pieces after which the haystack begins again; None where this is shorter.
    """

    def __init__(self, pieces: list[str], ends: np.ndarray, ring: int | None) -> None:
        self._pieces, self._ends, self._ring = pieces, ends, ring

    def part(self, begin: float, end: float) -> str:
        """The text between two places, in tokens from the beginning, to the nearest word before each.

        Parts that follow one another hold every word once. Text ends with a space, as in YOCO's evaluation, where a
        line is written with a space behind it.
        """
        text = "".join(self._pieces[self._count(begin) : self._count(end)]).strip()
        return f"{text} " if text else ""

    def repeats(self, end: float) -> bool:
        """Whether the text up to `end` tokens holds a part of the haystack twice."""
        return self._ring is not None and self._count(end) > self._ring

    def _count(self, tokens: float) -> int:
        return int(np.searchsorted(self._ends, tokens, side="right"))


class Haystack:
    """Lines of text to draw fillers from.

    Args:
        name: where the text is from.
        documents: (place, text) of each.
        limit: characters after which no further document is read.

    Attributes:
        identity: name and hash of the text, for results.

    Raises:
        UserError: there is no text.
    """

    def __init__(self, name: str, documents: Iterator[tuple[str, str]], limit: int) -> None:
        self._lines: list[str] = []
        size, digest = 0, hashlib.sha256()
        for _, document in documents:
            lines = [line for line in document.splitlines() if line.strip()]
            self._lines += lines
            size += len(document)
            digest.update("\n".join(lines).encode("utf-8", "replace"))
            if size > limit:
                break
        self.identity = {"haystack": name, "haystack_sha256": digest.hexdigest()}
        if not self._lines:
            raise UserError(f"--haystack {name} holds no text. Name files with text, or leave it out.")

    @staticmethod
    def open(source: str | None) -> Haystack:
        """The haystack that the options name.

        Args:
            source: a file, a folder or a pattern; None: the standard library of Python.

        Raises:
            UserError: there is no such file, it cannot be read, or it holds no text.
        """
        if source is None:
            return _library()
        return Haystack(source, read_texts(source, "--haystack"), MAX_CHARACTERS)

    def filler(self, tokenizer: Tokenizer, rng: random.Random, tokens: int) -> Filler:
        """Text of at least `tokens` tokens from a line on that `rng` draws."""
        start = rng.randrange(len(self._lines))
        wanted = tokens // 4 + 16
        while True:
            pieces, ring = self._pieces(start, wanted)
            total = len(tokenizer.encode_array("".join(pieces)))
            if total >= tokens:
                break
            wanted *= 2
        _, counts = tokenizer.encode_documents(pieces)
        ends = counts.cumsum()
        # counted piece by piece the text has a few tokens more or less than as a whole
        return Filler(pieces, ends * (total / max(int(ends[-1]), 1)), ring)

    def _pieces(self, start: int, wanted: int) -> tuple[list[str], int | None]:
        pieces: list[str] = []
        ring = None
        number = start
        while len(pieces) < wanted:
            line = self._lines[number].strip()
            pieces += _PIECE.findall(f" {line}")
            number = (number + 1) % len(self._lines)
            if number == start and ring is None:
                ring = len(pieces)
        return pieces, ring


@cache
def _library() -> Haystack:
    """Read once per process: a run may be evaluated often."""
    return Haystack("the Python standard library", library_files(), LIBRARY_CHARACTERS)


def read_texts(source: str, flag: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every document behind a file, a folder or a pattern; `flag` is what messages call it.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    with _called(flag):
        yield from read_documents(find_inputs([source]).sources, ["text"])


def check_source(source: str, flag: str) -> None:
    """Raises the UserError of `read_texts` for files that are not there, without reading them."""
    with _called(flag):
        find_inputs([source])


@contextmanager
def _called(flag: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--input", flag)) from error
