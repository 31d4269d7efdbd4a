"""How far an evaluation is, on stderr: a bar with the time left on a terminal, elsewhere a line now and then."""

from __future__ import annotations

from collections.abc import Callable

from megayoco.data.command import ProgressReport

Progress = Callable[[float, float, str], None]
"""progress(done, total, text): so much of the work is done, in any unit, and what to say beside it."""

SECONDS_PER_LINE = 30


class ConsoleProgress:
    """A `Progress` that writes to stderr. Close it in the end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._text = ""
        self._report: ProgressReport | None = None

    def __call__(self, done: float, total: float, text: str) -> None:
        if self._report is None:
            self._report = ProgressReport(self._name, total, lambda seconds: self._text, SECONDS_PER_LINE)
        self._text = text
        self._report.update(done, int(self._report.seconds))

    def close(self) -> None:
        """End the bar."""
        if self._report is not None:
            self._report.close()
