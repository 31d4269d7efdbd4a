"""The tokens of a dataset, read in pieces from PREFIX.bin.

They are read with pread and not mapped: a file that is cut short meanwhile is an error instead of a SIGBUS, and the
thread that waits for the disk does not hold the interpreter.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterable

import numpy as np

from megayoco.data.indexed import outside_vocabulary
from megayoco.errors import UserError


class TokenFile:
    """PREFIX.bin, open for reading.

    Args:
        prefix: of the dataset.
        dtype: of its tokens.
        vocab_size: every id must be below it: files are too large to look at each before training.

    Raises:
        UserError: the file cannot be opened.
    """

    def __init__(self, prefix: str, dtype: np.dtype, vocab_size: int):
        self._prefix, self._dtype, self._vocab_size = prefix, dtype, vocab_size
        self._path = f"{prefix}.bin"
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            remedy = "Raise the limit of open files (ulimit -n)." if error.errno == errno.EMFILE else "Check the path."
            raise UserError(f"{self._path} cannot be opened: {error.strerror}. {remedy}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, pieces: Iterable[tuple[int, int]]) -> np.ndarray:
        """The tokens (n,) int64 of pieces, one after the other; each piece: (first token in the file, tokens).

        Raises:
            UserError: an id lies outside the vocabulary, or the file has become shorter.
        """
        content, size = bytearray(), self._dtype.itemsize
        for first, count in pieces:
            content += self._bytes(first * size, count * size)
        tokens = np.frombuffer(content, self._dtype).astype(np.int64)
        if len(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self._vocab_size:
                raise UserError(outside_vocabulary(self._prefix, low, high, self._vocab_size))
        return tokens

    def _bytes(self, place: int, length: int) -> bytes:
        try:
            piece = os.pread(self._descriptor, length, place)
        except OSError as error:
            raise UserError(f"{self._path} cannot be read at byte {place}: {error.strerror}.") from error
        if len(piece) < length:
            raise UserError(
                f"{self._path} ends before byte {place + length}: it has become shorter since the run began."
                " Restore it, then go on with --resume."
            )
        return piece
