"""What a run tells: lines and a bar on the console, TensorBoard, and metrics.jsonl. Only rank 0 says anything."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS_FILE = "metrics.jsonl"


class Reporter:
    """Writes progress to the console and to the run's directory; on other ranks than 0 every call does nothing.

    Args:
        directory: the run's directory; metrics.jsonl is appended to, TensorBoard files go to `tensorboard/`.
        total_steps, first_step: length of the bar, and where a resumed run starts on it.
        tensorboard: whether to write TensorBoard files.
        bar: whether to show a bar on a terminal. mpirun gives every rank a terminal of its own, wherever the output
            goes, so there none can be drawn.
        enabled: True on rank 0.
    """

    def __init__(
        self, directory: Path, total_steps: int, first_step: int, *, tensorboard: bool, bar: bool, enabled: bool
    ) -> None:
        self.enabled = enabled
        self._total = total_steps
        if not enabled:
            return
        self._metrics = (directory / METRICS_FILE).open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # late: takes a second to import

            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)
        self._progress: Progress | None = None
        if bar and sys.stdout.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            # two updates a second cost nothing measurable, ten would show on a small model
            self._progress = Progress(*columns, console=Console(highlight=False), refresh_per_second=2)
            self._task = self._progress.add_task("train", total=total_steps, completed=first_step)
            self._progress.start()

    def line(self, text: str) -> None:
        """One line on the console."""
        if not self.enabled:
            return
        if self._progress is None:
            print(text, flush=True)
        else:
            self._progress.console.print(text, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self.enabled and self._progress is not None:
            self._progress.update(self._task, completed=step)

    def record(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl. `values` has at least `step`."""
        if self.enabled:
            self._metrics.write(json.dumps(values) + "\n")

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """Points for TensorBoard by tag; None has none."""
        if self.enabled and self._writer is not None:
            for tag, value in values.items():
                if value is not None:
                    self._writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Put everything on disk; called before a checkpoint names the step, and at the end."""
        if self.enabled:
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
            if self._writer is not None:
                self._writer.flush()

    def close(self) -> None:
        """Flush and release; further calls do nothing."""
        if not self.enabled:
            return
        self.flush()
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()
        self._metrics.close()
        self.enabled = False


def step_line(values: dict[str, Any], total_steps: int) -> str:
    """The console line of one step; `values` as in metrics.jsonl."""
    width = len(str(total_steps))
    norm = "overflow" if values["grad_norm"] is None else f"{values['grad_norm']:.3g}"
    return (
        f"step {values['step']:>{width}}/{total_steps}  phase {values['phase']}  loss {values['loss']:.4f}"
        f"  grad norm {norm}  lr {values['learning_rate']:.3e}"
        f"  tokens {_thousands(values['tokens'])}  {_thousands(values['tokens_per_second'])} tokens/s"
        f"  mfu {100 * values['mfu']:.1f}%  memory {values['peak_memory_bytes'] / 1024**3:.2f} GiB"
    )


def truncate_metrics(directory: Path, last_step: int) -> None:
    """Drop the lines of metrics.jsonl after `last_step`: what an interrupted run wrote after its last checkpoint.

    A line cut short by a crash is dropped too. The file is replaced in one move.
    """
    path = directory / METRICS_FILE
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            later = json.loads(line)["step"] > last_step
        except (ValueError, KeyError, TypeError):
            continue
        if not later:
            kept.append(line + "\n")
    partial = path.with_suffix(".jsonl.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _thousands(count: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if count >= limit:
            return f"{count / (1e3 if unit == 'k' else limit):.1f}{unit}"
    return f"{count:.0f}"
