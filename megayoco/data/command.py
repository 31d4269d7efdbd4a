"""What the command-line tools share: one way to report a user's mistake, Megatron's spelling of flags, progress."""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megayoco.errors import UserError


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM, as batch systems send it before they kill."""


def run_command(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Run a tool's main; returns the exit code: 0, 2 with one line on stderr for a user's mistake, 130 for Ctrl-C.

    SIGTERM ends a tool like Ctrl-C, so that it can clean up, with exit code 143; a closed pipe behind it is 141.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("megayoco").setLevel(logging.INFO)
    try:
        with _termination():
            main(sys.argv[1:] if arguments is None else arguments)
            sys.stdout.flush()  # a closed pipe shows here
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(": ".join(filter(None, ("error: interrupted", str(error)))), file=sys.stderr)
        return 143 if isinstance(error, Terminated) or isinstance(error.__cause__, Terminated) else 130
    except BrokenPipeError:  # the reader of stdout, such as head, has seen enough; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


@contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM raises Terminated in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: cleaning up must not be interrupted
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def dashed(arguments: Sequence[str]) -> list[str]:
    """Flags with underscores, as --output_prefix, in the spelling that the parsers know; values stay as they are."""
    changed = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = name.replace("_", "-") + equals + value
        changed.append(argument)
    return changed


def positive_int(text: str) -> int:
    """An integer above 0, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number <= 0:
        raise argparse.ArgumentTypeError(f"must be an integer above 0, got {text!r}")
    return number


class ProgressReport:
    """A bar on a terminal; elsewhere one line per `interval` items. On stderr.

    Args:
        what: name of the job.
        total: amount of work, in any unit; 0 if it is unknown.
        describe: text of the counts so far, given the seconds since the start.
        interval: items between two lines where there is no terminal.
    """

    def __init__(self, what: str, total: float, describe: Callable[[float], str], interval: int):
        self._what, self._total, self._describe, self._interval = what, total, describe, interval
        self._start, self._next = time.monotonic(), interval
        self._first: float | None = None  # work that was done before, by a run that is resumed
        self._bar: Any = None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def update(self, done: float, items: int) -> None:
        """Report that `done` of the total work and `items` items are finished."""
        if self._first is None:
            self._first = done
            self._next = (items // self._interval + 1) * self._interval
            if sys.stderr.isatty():  # not earlier: the bar has a thread, and processes are best forked before it
                self._bar = _bar(self._what)
                self._task = self._bar.add_task(self._what, total=self._total or None, counts="")
                self._bar.start()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, counts=self._describe(self.seconds))
        elif items >= self._next:
            text = f"{self._what}: {self._describe(self.seconds)}"
            if self._total and done > self._first:
                left = round(self.seconds * (self._total - done) / (done - self._first))
                share = 100 * done / self._total
                text += f", {share:.0f} %, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
            print(text, file=sys.stderr, flush=True)
            self._next = (items // self._interval + 1) * self._interval

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()


def _bar(what: str) -> Any:
    from rich.console import Console  # takes a tenth of a second to import
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    counts = TextColumn("{task.fields[counts]}")
    return Progress(
        TextColumn(what),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        counts,
        console=Console(stderr=True),
    )
