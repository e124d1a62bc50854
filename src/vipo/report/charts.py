"""Draw charts as inline SVG whose text is text and whose colours are the page's CSS variables.

matplotlib writes literal colours, so each chart is drawn in placeholder colours (`INKS`) that are then replaced by CSS
variables: the same SVG follows the light, dark and print style of the page. No text from a file enters a chart.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, MaxNLocator
from numpy.typing import NDArray

from vipo.report.reading import Estimate
from vipo.report.wording import compact, fixed

FloatArray = NDArray[np.float64]

INKS = {
    "ink": "#0a0001",
    "muted": "#0a0002",
    "grid": "#0a0003",
    "surface": "#0a0004",
    "base": "#0a0005",
    "grpo": "#0a0006",
    "vipo": "#0a0007",
    "run": "#0a0008",
    "better": "#0a0009",
    "worse": "#0a000a",
    "unclear": "#0a000b",
    "changed": "#0a000c",
    "phase-0": "#0a0010",
    "phase-1": "#0a0011",
    "phase-2": "#0a0012",
    "phase-3": "#0a0013",
    "phase-4": "#0a0014",
    "phase-5": "#0a0015",
}
DASHES = {"grpo": (0, (5.0, 2.2)), "base": (0, (1.2, 1.8))}
PAIR_MARKERS = {"vipo-base": "o", "grpo-base": "s", "vipo-grpo": "D"}
MAX_POINTS = 240
MAX_PHASES = 6


@dataclass(frozen=True)
class Series:
    """One line of a chart: what an arm measured over the iterations (NaN where not recorded)."""

    arm: str
    iterations: FloatArray
    values: FloatArray


@dataclass(frozen=True)
class Size:
    """Size of a chart in CSS pixels, text 12 px high at that size."""

    width: int
    height: int


class TickFormatter(Formatter):
    """Write ticks with as many decimals as their spacing needs, below 1e-4 in short scientific form."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Format one value on its own."""
        return self.format_ticks([x])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Format all ticks of an axis alike."""
        ticks = np.asarray(values, dtype=np.float64)
        step = float(np.diff(ticks).min()) if len(ticks) > 1 else float(np.abs(ticks).max())
        decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
        ticks = np.where(np.abs(ticks) < 1e-6 * step, 0.0, ticks)
        if decimals > 4 and np.abs(ticks).max() < 1e-2:
            return [compact(float(tick), 2) for tick in ticks]
        return [fixed(float(tick), decimals) for tick in ticks]


def smoothing_window(count: int) -> int:
    """Return the odd width of the moving mean for a series of `count` points: about a tenth of it, 1 below 10."""
    return 1 if count < 10 else 2 * (count // 20) + 1


def moving_mean(values: FloatArray, window: int) -> FloatArray:
    """Average over a centred window, cut at the ends, leaving out NaN.

    out[i] = sum_j values[j] / count, over the finite values[j] with |j - i| <= window // 2.

    Args:
        values: (n,) any range, NaN where not recorded.
        window: odd, >= 1.

    Returns:
        (n,) NaN where a window holds no finite value.
    """
    finite = np.isfinite(values)
    kernel = np.ones(window)
    half = window // 2
    total = np.convolve(np.where(finite, values, 0.0), kernel)[half : half + len(values)]
    count = np.convolve(finite.astype(np.float64), kernel)[half : half + len(values)]
    return np.where(count > 0.5, total / np.maximum(count, 1.0), np.nan)


def thin(count: int, limit: int = MAX_POINTS) -> NDArray[np.intp]:
    """Return at most `limit` evenly spaced indices of a series of `count` points, the first and the last included."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.intp))


def line_chart(
    chart_id: str, series: Sequence[Series], size: Size, *, y_label: str, alt: str, whole: bool = False
) -> Markup:
    """Draw raw points faintly and their moving mean as a line, one pair per arm.

    Args:
        chart_id: unique on the page; prefixes every id of the SVG.
        series: at least one with a finite value.
        size: of the chart.
        y_label: quantity and unit of the vertical axis.
        alt: what the chart shows, for readers who cannot see it.
        whole: True when the quantity is a count, for whole-number ticks.
    """
    figure, axes = _canvas(size, left=52, right=14, top=30, bottom=40)
    for line in series:
        chosen = thin(len(line.values)) if len(line.values) else np.zeros(0, dtype=np.intp)
        window = smoothing_window(int(np.isfinite(line.values).sum()))
        smooth = moving_mean(line.values, window)
        ink = INKS[line.arm]
        if window > 1:
            axes.plot(line.iterations[chosen], line.values[chosen], "o", color=ink, alpha=0.36, markersize=3.4, mew=0)
        style = DASHES.get(line.arm, "solid")
        marker = "o" if window == 1 else ""
        axes.plot(
            line.iterations[chosen], smooth[chosen], color=ink, lw=2.2, ls=style, marker=marker, markersize=5, mew=0
        )
    axes.xaxis.set_major_locator(MaxNLocator(5 if size.width < 480 else 9, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4 if size.height < 240 else 6, integer=whole, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02, y=0.08)
    if all(len(line.values) < 2 for line in series):
        axes.set_xlim(series[0].iterations[0] - 1, series[0].iterations[0] + 1)
    if whole:
        most = max(1.0, *(float(np.nanmax(line.values)) for line in series))
        axes.set_ylim(-0.04 * most, 1.08 * most)
    _name_axes(axes, size, "iteration", y_label)
    return _to_svg(figure, chart_id, alt)


def forest_chart(
    chart_id: str,
    rows: Sequence[tuple[str, str, Estimate, str]],
    size: Size,
    *,
    higher_is_better: bool | None,
    alt: str,
) -> Markup:
    """Draw paired differences with their 95 % intervals around a zero line, better to the right.

    Args:
        chart_id: unique on the page.
        rows: (pair, label, difference, verdict), first row on top; every difference has a complete interval.
        size: of the chart.
        higher_is_better: False mirrors the axis, so that better is always to the right; None leaves it unnamed.
        alt: what the chart shows, for readers who cannot see it.
    """
    figure, axes = _canvas(size, left=92, right=16, top=8, bottom=44)
    reach = 0.0
    for height, (pair, _, difference, verdict) in zip(range(len(rows))[::-1], rows, strict=True):
        mean, low, high = (0.0 if v is None else v for v in (difference.mean, difference.low, difference.high))
        ink = INKS[verdict]
        axes.plot([low, high], [height, height], color=ink, lw=2.4, solid_capstyle="round")
        face = INKS["surface"] if verdict == "unclear" else ink
        axes.plot([mean], [height], PAIR_MARKERS[pair], markersize=8, mew=2, markeredgecolor=ink, markerfacecolor=face)
        reach = max(reach, abs(low), abs(high), abs(mean))
    reach = 1.14 * reach or 1.0
    axes.axvline(0.0, color=INKS["muted"], lw=1.2, zorder=0.5)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim((reach, -reach) if higher_is_better is False else (-reach, reach))
    axes.grid(False, axis="y")
    axes.set_yticks(range(len(rows))[::-1], [label for _, label, _, _ in rows])
    axes.tick_params(axis="y", labelcolor=INKS["ink"])
    axes.xaxis.set_major_locator(MaxNLocator(4, symmetric=True, steps=[1, 2, 5, 10]))
    if higher_is_better is not None:
        _write(axes, 0.0, 4 / size.height, "\u2190 worse", ha="left", ink="muted")
        _write(axes, 1.0, 4 / size.height, "better \u2192", ha="right", ink="muted")
    return _to_svg(figure, chart_id, alt)


def time_chart(chart_id: str, rows: Sequence[tuple[str, Sequence[float]]], size: Size, *, alt: str) -> Markup:
    """Draw one stacked bar per arm: seconds per iteration by phase.

    Args:
        chart_id: unique on the page.
        rows: (label, seconds by phase), the same phases in each row, first row on top.
        size: of the chart.
        alt: what the chart shows, for readers who cannot see it.
    """
    figure, axes = _canvas(size, left=64, right=16, top=4, bottom=40)
    for height, (_, seconds) in zip(range(len(rows))[::-1], rows, strict=True):
        start = 0.0
        for phase, width in enumerate(seconds):
            ink = INKS[f"phase-{min(phase, MAX_PHASES - 1)}"]
            axes.barh([height], [width], left=start, height=0.56, color=ink, edgecolor=INKS["surface"], lw=1.5)
            start += width
    axes.grid(False, axis="y")
    axes.set_ylim(-0.55, len(rows) - 0.45)
    axes.set_yticks(range(len(rows))[::-1], [label for label, _ in rows])
    axes.tick_params(axis="y", labelcolor=INKS["ink"])
    axes.set_xlim(left=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(4 if size.width < 480 else 8, steps=[1, 2, 5, 10]))
    _write(axes, 1.0, 4 / size.height, "seconds per iteration", ha="right", ink="muted")
    return _to_svg(figure, chart_id, alt)


def _canvas(size: Size, *, left: int, right: int, top: int, bottom: int) -> tuple[Figure, Axes]:
    """Return an empty figure and its one axes, margins in CSS pixels, in the quiet style of the page."""
    figure = Figure(figsize=(size.width / 72, size.height / 72), dpi=72)
    box = (left / size.width, bottom / size.height)
    axes = figure.add_axes((*box, 1 - (left + right) / size.width, 1 - (top + bottom) / size.height))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INKS["grid"])
    axes.set_axisbelow(True)
    axes.grid(True, color=INKS["grid"], lw=0.8)
    axes.grid(False, axis="x")
    axes.tick_params(length=0, labelsize=12, pad=6, labelcolor=INKS["muted"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(TickFormatter())
    return figure, axes


def _name_axes(axes: Axes, size: Size, x_label: str, y_label: str) -> None:
    """Write the axis names: the vertical one flat above the plot, the horizontal one below it on the right."""
    figure = axes.figure
    assert figure is not None
    figure.text(0.0, 1 - 4 / size.height, y_label, ha="left", va="top", fontsize=12, color=INKS["muted"])
    _write(axes, 1.0, 4 / size.height, x_label, ha="right", ink="muted")


def _write(axes: Axes, x: float, y: float, words: str, *, ha: str, ink: str) -> None:
    """Write words at x in axes fractions and y in figure fractions."""
    figure = axes.figure
    assert figure is not None
    box = axes.get_position()
    figure.text(box.x0 + x * box.width, y, words, ha=ha, va="bottom", fontsize=12, color=INKS[ink])


def _to_svg(figure: Figure, chart_id: str, alt: str) -> Markup:
    """Return the figure as an inline SVG: no prolog or metadata, ids made unique, colours as CSS variables."""
    FigureCanvasSVG(figure)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vipo-report"}):
        quiet = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(stream, format="svg", transparent=True, metadata=quiet)
    svg = stream.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    body = svg[svg.index(">", view_box.end()) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'href="#([^"]+)"', body)) | set(re.findall(r"url\(#([^)]+)\)", body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{chart_id}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'xlink:href="#', f'href="#{chart_id}-', body)
    body = body.replace("url(#", f"url(#{chart_id}-")
    body = re.sub(r"font-family: [^;\"]+;? ?", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0]), body)
    for ink, colour in INKS.items():
        body = body.replace(colour, f"var(--{ink})")
    body = re.sub(r">\s+<", "><", body).strip()
    title = (
        f'<svg class="chart" {view_box[0]} role="img" aria-label="{escape(alt)}" preserveAspectRatio="xMinYMin meet">'
    )
    return Markup(f"{title}{body}</svg>")
