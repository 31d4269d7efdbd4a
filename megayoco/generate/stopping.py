"""Strings that end a continuation, found in its text as it comes."""

from __future__ import annotations

from collections.abc import Sequence

from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError
from megayoco.generate.text import TextStream


class StopStrings:
    """The text of one continuation, token after token, up to the first stop string.

    A stop string may begin and end inside tokens. The one that is complete first counts; of those that are complete at
    the same character, the longest. So the text does not depend on where the tokens are cut.

    Args:
        tokenizer: of the tokens.
        stops: the strings; none: all text passes.

    Attributes:
        stopped: the stop string that was met, None before.

    Raises:
        UserError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise UserError("a stop string is empty, and would end every text before it begins. Give it a character.")
        self.stopped: str | None = None
        self._stream = TextStream(tokenizer)
        self._stops = tuple(stops)
        self._held = ""

    def push(self, token: int) -> str:
        """The characters that this token makes certain, perhaps none: what could begin a stop string waits."""
        return self._pass(self._stream.push(token))

    def finish(self) -> str:
        """What was waiting when the tokens ended: nothing if a stop string was met."""
        text = self._pass(self._stream.finish()) + self._held
        self._held = ""
        return text

    def _pass(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.stopped = min(found)
            self._held = ""
            return text[:start]
        waiting = self._begun(text)
        self._held = text[len(text) - waiting :]
        return text[: len(text) - waiting]

    def _begun(self, text: str) -> int:
        """The most characters at the end of `text` that a stop string begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
