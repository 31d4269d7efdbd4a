"""Tokens to text as they come, and text to and from a terminal."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Callable

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


def terminal_writer() -> Callable[[str], None]:
    """Writes text to stdout at once, as UTF-8 whatever the locale says; a terminal gets no control characters."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a lone surrogate of the command line's becomes "?"
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    table = TERMINAL_SAFE if sys.stdout.isatty() else {}

    def write(text: str) -> None:
        print(text.translate(table), end="", flush=True)

    return write


def turn_reader() -> Callable[[], str | None]:
    """Reads one line of standard input after another, UTF-8, with a question where it is a terminal; None at its end.

    Ctrl-C at a terminal gives an empty line.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    return _ask if sys.stdin.isatty() else lambda: sys.stdin.readline() or None


def _ask() -> str | None:
    import readline  # noqa: F401  # gives input() its line editing and history

    try:
        return input("> " if sys.stdout.isatty() else "")
    except EOFError:
        print(file=sys.stderr)
        return None
    except KeyboardInterrupt:
        print("\n/exit or Ctrl-D ends the conversation", file=sys.stderr)
        return ""
