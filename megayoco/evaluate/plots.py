"""Pictures of results, drawn without a display and without matplotlib's process-wide state."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megayoco.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDEST_ANNOTATED = 16
"""Columns up to which a cell has room for its number."""


def heat_map(
    path: Path,
    title: str,
    panels: Mapping[str, Sequence[Sequence[float | None]]],
    rows: Sequence[str],
    columns: Sequence[str],
    column_name: str,
) -> None:
    """Draw tables of accuracies, side by side.

    Args:
        path: the PNG to write.
        title: above all.
        panels: one table per name, (rows, columns) of accuracies 0 to 1; None: no prompt there.
        rows, columns: their names; column_name: what the columns are.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    width = max(3.0, 0.75 * len(columns) + 1.6)
    figure = Figure(figsize=(width * len(panels) + 0.8, 0.34 * len(rows) + 1.9), layout="constrained")
    axes_row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    image = None
    for number, (axes, (name, table)) in enumerate(zip(axes_row, panels.items(), strict=True)):
        values = [[math.nan if value is None else value for value in row] for row in table]
        image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=45 if len(columns) > 4 else 0)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(column_name)
        if number == 0:
            axes.set_ylabel("depth of the needle")
        if name:
            axes.set_title(name, fontsize="medium")
        if len(columns) <= WIDEST_ANNOTATED:
            _write_numbers(axes, values)
    if image is not None:
        figure.colorbar(image, ax=list(axes_row), label="exact answers")
    figure.suptitle(title)
    save(figure, path)


def _write_numbers(axes: Axes, values: Sequence[Sequence[float]]) -> None:
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if not math.isnan(value):
                color = "black" if 0.15 < value < 0.9 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=color)


def curves(
    path: Path, title: str, x: Sequence[float], lines: Mapping[str, Sequence[float]], vertical: float | None
) -> None:
    """Draw losses against position on a logarithmic axis.

    Args:
        path: the PNG to write.
        title: above it.
        x: positions, ascending, above 0.
        lines: name -> losses at these positions.
        vertical: a position to mark: the length that the model was trained for.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, y in lines.items():
        axes.plot(x, y, marker=".", label=name)
    if vertical is not None and vertical < max(x):
        axes.axvline(vertical, color="gray", linestyle="--", label="longest trained length")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the document, tokens")
    axes.set_ylabel("negative log-likelihood per token, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title, fontsize="medium")
    save(figure, path)


def accuracies(
    path: Path, title: str, x: Sequence[int], lines: Mapping[str, Sequence[float]], vertical: float | None
) -> None:
    """Draw accuracies 0 to 1 against length on a logarithmic axis.

    Args:
        path: the PNG to write.
        title: above it.
        x: lengths in tokens, ascending.
        lines: name -> accuracies at these lengths.
        vertical: a length to mark: that which the model was trained for.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, y in lines.items():
        axes.plot(x, y, marker=".", label=name)
    if vertical is not None:
        axes.axvline(vertical, color="gray", linestyle="--", label="longest trained length")
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("length of the document, tokens")
    axes.set_ylabel("share that is right")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title, fontsize="medium")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; it appears whole or not at all. Raises UserError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
