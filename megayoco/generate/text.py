"""Tokens to text as they come."""

from __future__ import annotations

import codecs

from megayoco.data.tokenizer import Tokenizer

TERMINAL_SAFE = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    **dict.fromkeys(range(0x7F, 0xA0), 0xFFFD),
}
"""For str.translate: control characters, which could reprogram a terminal, to their pictures or U+FFFD."""


class TextStream:
    """Turns token after token into text. A token may end inside a character: its bytes wait for the next token.

    Bytes that cannot become a character are U+FFFD, as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """U+FFFD if a character was left incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)
