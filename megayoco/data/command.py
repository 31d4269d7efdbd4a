"""What the command-line tools share: one way to report a user's mistake, Megatron's spelling of flags, progress."""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megayoco.errors import UserError


def run_command(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Run a tool's main; returns the exit code: 0, 2 with one line on stderr for a user's mistake, 130 for Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("megayoco").setLevel(logging.INFO)
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


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
        total: amount of work, in any unit.
        describe: text of the counts so far, given the seconds since the start.
        interval: items between two lines where there is no terminal.
    """

    def __init__(self, what: str, total: float, describe: Callable[[float], str], interval: int):
        self._console = Console(stderr=True)
        self._describe, self._interval = describe, interval
        self._start, self._next = time.monotonic(), interval
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn(what),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[counts]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(what, total=total, counts="")
            self._bar.start()
        self._what, self._total = what, total

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def update(self, done: float, items: int) -> None:
        """Report that `done` of the total work and `items` items are finished."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, counts=self._describe(self.seconds))
        elif items >= self._next:
            share = 100 * done / self._total if self._total else 100
            print(f"{self._what}: {share:.0f} %, {self._describe(self.seconds)}", file=sys.stderr, flush=True)
            self._next = (items // self._interval + 1) * self._interval

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
