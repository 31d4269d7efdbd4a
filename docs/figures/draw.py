#!/usr/bin/env python
"""Draw the figures of docs/long_context.md: python docs/figures/draw.py writes the SVG files beside itself."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).resolve().parent
RANKS = ["#4c78a8", "#f58518", "#54a24b", "#b279a2"]
GREY = "#d9d9d9"
MIB = 2**20
RESULT = HERE.parent.parent / "benchmarks" / "results" / "long_context_memory.json"


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str, height: float = 0.8) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.5))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=7)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=color, shrinkA=0, shrinkB=0))


def bands() -> Figure:
    """Which rank owns which chunk, and what one band hands to the next."""
    figure, axes = plt.subplots(figsize=(9, 2.6))
    for band in range(3):
        for rank in range(4):
            x = band * 4 + rank
            box(axes, x, 1, 1, f"rank {rank}", RANKS[rank])
            if rank < 3:
                arrow(axes, (x + 0.7, 0.85), (x + 1.3, 0.85))
        axes.text(band * 4 + 2, 2.05, f"band {band}", ha="center", fontsize=9)
        axes.plot([band * 4 + 0.05, band * 4 + 3.95], [1.95, 1.95], color="black", linewidth=0.8)
        if band < 2:
            arrow(axes, (band * 4 + 3.7, 0.55), (band * 4 + 4.3, 0.55), "#d62728")
    axes.text(0, 0.15, "window halo or retention state within a band", fontsize=8)
    axes.text(12, 0.15, "carry from band to band", fontsize=8, color="#d62728", ha="right")
    axes.set_xlim(-0.1, 12.1)
    axes.set_ylim(0, 2.4)
    axes.axis("off")
    return figure


def walk() -> Figure:
    """The order of the work of a fused step with four bands on one rank."""
    figure, axes = plt.subplots(figsize=(11, 3.2))
    time = 0.0
    for band in range(3):
        box(axes, time, band, 1, "self", GREY)
        time += 1
    for band in reversed(range(4)):
        steps = [("self", GREY, 1.2), ("cross, loss\nand back", RANKS[0], 2.4), ("self\nback", RANKS[1], 1.6)]
        for text, color, width in steps:
            box(axes, time, band, width, text, color)
            time += width
        if band:
            arrow(axes, (time, band), (time, band - 0.2), "#d62728")
    axes.plot([3, 3], [-0.3, 4], color="black", linewidth=0.8, linestyle=":")
    axes.text(1.4, 3.95, "pass 1: no graph", ha="center", fontsize=9)
    axes.text(3 + (time - 3) / 2, 3.95, "pass 2: with graph", ha="center", fontsize=9)
    axes.text(time, -0.25, "gradient of the boundary context", fontsize=8, color="#d62728", ha="right")
    axes.set_yticks([band + 0.4 for band in range(4)], [f"band {band}" for band in range(4)])
    axes.set_xticks([])
    axes.set_xlabel("time")
    axes.set_xlim(-0.1, time + 0.1)
    axes.set_ylim(-0.4, 4.2)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure


def memory() -> Figure:
    """What a step holds in each form, and how that grows with the sequence: benchmarks/long_context_memory.py."""
    result = json.loads(RESULT.read_text())
    shape, mixers = result["shape"], result["memory"]
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(3, 2))
    forms = list(reversed(mixers["retention"]["memory"]))
    for number, (mixer, found) in enumerate(mixers.items()):
        places = [place + 0.4 * (0.5 - number) for place in range(len(forms))]
        held = [found["memory"][form]["held"] / MIB for form in forms]
        drawn = bars.barh(places, held, 0.38, color=RANKS[number], label=mixer)
        bars.bar_label(drawn, [f"{size:,.0f}" for size in held], padding=3, fontsize=7)
        tokens = [point["tokens"] / 1024 for point in found["growth"]]
        lines.plot(tokens, [point["held"] / MIB for point in found["growth"]], "o", color=RANKS[number], label=mixer)
        lines.plot(tokens, [point["formula"] / MIB for point in found["growth"]], color=RANKS[number], linewidth=0.8)
    bars.set_yticks(range(len(forms)), forms, fontsize=8)
    bars.set_xlim(0, 1.15 * max(found["memory"]["plain"]["held"] for found in mixers.values()) / MIB)
    bars.set_title(f"{shape['tokens']:,} tokens, {shape['bands']} bands: MiB held by a step", fontsize=9)
    lines.set_title("bands of constant chunk; line: formula", fontsize=9)
    lines.set_xlabel("thousands of tokens (1,024)", fontsize=8)
    lines.set_ylabel("MiB", fontsize=8)
    lines.set_ylim(0)
    for axes in (bars, lines):
        axes.legend(fontsize=7, frameon=False)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    return figure


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "megayoco", "svg.fonttype": "none"})
    for name, draw in (("bands", bands), ("walk", walk), ("memory", memory)):
        figure = draw()
        figure.savefig(HERE / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
