"""The study in one picture: what every arm gains over scalar GRPO, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...files import write_atomically

BEYOND, WITHIN, SEED = "#b03a2e", "#2c3e50", "#95a5a6"
ROW = 0.24
"""Inches per arm."""


class Row(NamedTuple):
    """One arm: its differences by seed, their mean, and the half-width of its interval (NaN for one seed)."""

    label: str
    seeds: Sequence[float]
    mean: float
    half: float


def draw_differences(panels: Sequence[tuple[str, Sequence[Row]]], file: Path) -> None:
    """Write a PNG of panels (title, rows) side by side, see `draw_panel`."""
    height = 1.1 + ROW * max(len(rows) for _, rows in panels)
    figure = Figure(figsize=(5.2 * len(panels), height), layout="constrained", facecolor="white")
    for axes, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, title, rows)
    FigureCanvasAgg(figure)
    write_atomically(file, lambda partial: figure.savefig(partial, format="png", dpi=110, metadata={"Software": None}))


def draw_panel(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    """Draw a grey point per seed, and the mean with its interval, red where that leaves 0 (three seeds or more).

    A row far beyond all others (its mean is more than three times as far from 0 as the median row reaches) is not drawn
    to scale: its number stands at the edge.
    """
    ends = [max(map(abs, [*row.seeds, row.mean + _half(row), row.mean - _half(row)])) for row in rows]
    bound = 3 * sorted(ends)[len(ends) // 2]
    reach = 1.05 * max(end for row, end in zip(rows, ends, strict=True) if abs(row.mean) <= bound)
    axes.axvline(0, color="#cccccc", linewidth=1, zorder=0)
    for place, row in enumerate(rows):
        colour = BEYOND if len(row.seeds) > 2 and abs(row.mean) > row.half else WITHIN
        if abs(row.mean) > bound:
            side = math.copysign(1, row.mean)
            words = f"{row.mean:+.1f} ± {row.half:.1f}"
            axes.text(side * reach, place, words, ha="left" if side < 0 else "right", va="center", color=colour)
            continue
        axes.plot(row.seeds, [place] * len(row.seeds), "o", color=SEED, markersize=3, zorder=1)
        axes.errorbar(row.mean, place, xerr=_half(row), fmt="D", color=colour, markersize=4, capsize=2, linewidth=1.2)
    axes.set(title=title, xlabel="less scalar GRPO", xlim=(-reach, reach), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), [f"{row.label} ({len(row.seeds)})" for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _half(row: Row) -> float:
    return 0.0 if math.isnan(row.half) else row.half
