"""The sections both pages share (reward, health, time, sheets, environment) as plain records for the templates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from vipo.report.charts import FloatArray, Series, Size, line_chart, moving_mean, smoothing_window, thin, time_chart
from vipo.report.images import Picture, embed, embed_clips
from vipo.report.reading import Sheet, TrainRun
from vipo.report.wording import compact, counted, duration, listed

SHEET_BUDGET = 1_700_000
PHASES = {
    "seconds_rollout": "Rollout",
    "seconds_reward": "Reward",
    "seconds_map": "Map",
    "seconds_update": "Update",
}
REST = "Rest"
HEALTH = {
    "clip_fraction": (
        "Clip fraction",
        "share of ratios",
        "The share of likelihood ratios whose update the clip range took away: they no longer teach.",
    ),
    "kl": (
        "Distance from the start",
        "KL, nats",
        "How far the model has moved from the one it started as, where the loss holds a KL term: a jump is a warning.",
    ),
    "grad_norm": (
        "Gradient norm",
        "norm",
        "The length of the gradient before it is cut to its maximum: spikes mark unstable steps.",
    ),
    "map_entropy": (
        "Map entropy",
        "share of the maximum",
        "How widely the allocation maps spread the advantage: 1 is even, less means that fewer positions receive it.",
    ),
    "constant_groups": (
        "Constant groups",
        "groups",
        "Groups whose samples all earned the same reward: they have no advantage and teach nothing.",
    ),
}
MORE = {
    "group_std": ("Spread within groups", "reward"),
    "reward_std": ("Spread of rewards", "reward"),
    "approx_kl": ("KL to the previous policy", "nats"),
    "loss": ("Loss", "loss"),
    "ratio_mean": ("Mean ratio", "ratio"),
    "ratio_max": ("Largest ratio", "ratio"),
    "advantage_abs": ("Size of the advantages", "mean of |A|"),
    "map_border_ratio": ("Map, border to centre", "ratio"),
    "map_border_to_centre": ("Map, border to centre", "ratio"),
    "map_mean": ("Map, mean", "weight"),
    "map_max": ("Map, largest", "weight"),
    "map_flicker": ("Map, flicker", "mean |change| between latent frames"),
    "map_constant": ("Map, samples without structure", "samples"),
    "dropped_groups": ("Dropped groups", "groups"),
}
COUNTS = ("constant_groups", "dropped_groups", "map_constant")
NOT_MEASUREMENTS = ("iteration", "reward_mean", "seconds")


@dataclass(frozen=True)
class Arm:
    """One training run on the page: key names its colour ("grpo", "vipo", "run")."""

    key: str
    label: str
    run: TrainRun


@dataclass(frozen=True)
class Chart:
    """A chart drawn twice, for wide and for narrow windows, so that its text keeps its size."""

    wide: Markup
    narrow: Markup


@dataclass(frozen=True)
class Panel:
    """One small chart; `chart` is None when no arm recorded the measurement, `missing` names the arms that did not."""

    title: str
    sentence: str
    chart: Markup | None
    missing: str


@dataclass(frozen=True)
class RewardSection:
    """The reward curve; `chart` is None when no reward was recorded."""

    chart: Chart | None
    caption: str


@dataclass(frozen=True)
class TimeRow:
    """Mean seconds per iteration of one arm, by phase; None where not recorded."""

    arm: Arm
    seconds: tuple[float | None, ...]
    total: float | None
    iterations: int


@dataclass(frozen=True)
class TimeSection:
    """Where the time goes; `chart` is None when no phase was recorded."""

    phases: tuple[str, ...]
    rows: tuple[TimeRow, ...]
    chart: Chart | None


@dataclass(frozen=True)
class SheetStep:
    """The sheets of one iteration, one per column, None where that column has none."""

    iteration: int
    pictures: tuple[Picture | None, ...]


@dataclass(frozen=True)
class SheetSection:
    """Contact sheets over the iterations."""

    columns: tuple[str, ...]
    steps: tuple[SheetStep, ...]
    recompressed: bool
    left_out: int


def finite_or_none(value: float) -> float | None:
    """Return None for NaN."""
    return None if math.isnan(value) else value


def mean_or_none(values: FloatArray) -> float | None:
    """Average the finite values, None when there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def series_of(arm: Arm, key: str) -> Series:
    """Return one measurement of an arm over its iterations."""
    return Series(arm.key, arm.run.column("iteration"), arm.run.column(key))


def reward_section(lines: Sequence[tuple[str, Series]], chart_id: str) -> RewardSection:
    """Draw the reward of every arm over the iterations.

    Args:
        lines: (label, series) per arm.
        chart_id: unique on the page.
    """
    drawn = [(label, line) for label, line in lines if np.isfinite(line.values).any()]
    if not drawn:
        return RewardSection(None, "The reward was not recorded.")
    spans = []
    for label, line in drawn:
        smooth = moving_mean(line.values, smoothing_window(int(np.isfinite(line.values).sum())))
        where = np.flatnonzero(np.isfinite(smooth))
        first, last = (f"{compact(float(smooth[i]))} at iteration {line.iterations[i]:.0f}" for i in where[[0, -1]])
        spans.append(f"{label} from {first} to {last}" if len(where) > 1 else f"{label} {first}")
    alt = f"Mean reward per iteration: {'; '.join(spans)}."
    wide, narrow = (
        line_chart(f"{chart_id}-{name}", [line for _, line in drawn], size, y_label="mean reward", alt=alt)
        for name, size in (("wide", Size(1100, 370)), ("narrow", Size(350, 280)))
    )
    windows = sorted({smoothing_window(int(np.isfinite(line.values).sum())) for _, line in drawn})
    if windows[-1] == 1:
        caption = "Points: the mean reward of each iteration's samples."
    else:
        caption = (
            "Faint points: the mean reward of each iteration's samples. "
            f"{'Lines' if len(drawn) > 1 else 'Line'}: their moving mean over "
            f"{listed([str(window) for window in windows])} iterations."
        )
    longest = max(len(line.values) for _, line in drawn)
    if len(thin(longest)) < longest:
        caption += f" {len(thin(longest))} of {counted(longest, 'iteration')} are drawn."
    absent = [label for label, line in lines if not np.isfinite(line.values).any()]
    if absent:
        caption += f" {listed(absent)}: not recorded."
    return RewardSection(Chart(wide, narrow), caption)


def health_panels(arms: Sequence[Arm], prefix: str) -> list[Panel]:
    """Draw the five measurements that tell whether a training is well."""
    return [
        _panel(arms, key, f"{prefix}-{key.replace('_', '-')}", title, unit, sentence)
        for key, (title, unit, sentence) in HEALTH.items()
    ]


def more_panels(arms: Sequence[Arm], prefix: str) -> list[Panel]:
    """Draw every other recorded measurement, those this page has no words for under their own key."""
    found = {key: None for arm in arms for key in arm.run.measurements()}
    keys = [key for key in MORE if key in found]
    shown = (*HEALTH, *MORE, *NOT_MEASUREMENTS)
    keys += [key for key in found if key not in shown and not key.startswith(("seconds_", "eval/"))]
    panels = []
    for position, key in enumerate(keys):
        title, unit = MORE.get(key, (key, "value"))
        panels.append(_panel(arms, key, f"{prefix}-more-{position}", title, unit, ""))
    return panels


def _panel(arms: Sequence[Arm], key: str, chart_id: str, title: str, unit: str, sentence: str) -> Panel:
    """Draw one measurement of every arm that recorded it."""
    drawn = [arm for arm in arms if np.isfinite(arm.run.column(key)).any()]
    absent = "" if len(drawn) == len(arms) else f"{listed([a.label for a in arms if a not in drawn])}: not recorded."
    if not drawn:
        return Panel(title, sentence, None, "")
    lines = [series_of(arm, key) for arm in drawn]
    last = "; ".join(
        f"{arm.label} {compact(float(_last(line.values)))}" for arm, line in zip(drawn, lines, strict=True)
    )
    alt = f"{title} per iteration; last recorded value: {last}."
    chart = line_chart(chart_id, lines, Size(325, 200), y_label=unit, alt=alt, whole=key in COUNTS)
    return Panel(title, sentence, chart, absent)


def _last(values: FloatArray) -> float:
    """Return the last finite value of a column that has one."""
    return float(values[np.isfinite(values)][-1])


def time_section(arms: Sequence[Arm], chart_id: str) -> TimeSection:
    """Average the seconds of every phase over the iterations of every arm."""
    found = {key: None for arm in arms for key in arm.run.measurements() if key.startswith("seconds_")}
    keys = [key for key in PHASES if key in found] + [key for key in found if key not in PHASES]
    rows, bars = [], []
    for arm in arms:
        seconds = [mean_or_none(arm.run.column(key)) for key in keys]
        total = mean_or_none(arm.run.column("seconds"))
        known = sum(value for value in seconds if value is not None)
        rest = None if total is None else max(0.0, total - known)
        rows.append(TimeRow(arm, (*seconds, rest), total, len(arm.run.records)))
        bars.append((arm.label, [value or 0.0 for value in (*seconds, rest)]))
    phases = (*(PHASES.get(key, key.removeprefix("seconds_")) for key in keys), REST)
    if not any(sum(bar) > 0 for _, bar in bars):
        return TimeSection(phases, tuple(rows), None)
    parts = [
        f"{row.arm.label}: " + ", ".join(f"{p} {duration(s)}" for p, s in zip(phases, row.seconds, strict=True))
        for row in rows
    ]
    alt = f"Mean time per iteration by phase. {'. '.join(parts)}."
    wide, narrow = (
        time_chart(f"{chart_id}-{name}", bars, Size(width, 56 + 44 * len(bars)), alt=alt)
        for name, width in (("wide", 1100), ("narrow", 350))
    )
    return TimeSection(phases, tuple(rows), Chart(wide, narrow))


def sheet_section(columns: Sequence[tuple[str, tuple[Sheet, ...]]], most_steps: int) -> SheetSection | None:
    """Embed contact sheets, of clips animated ones, evenly spaced over the iterations, within `SHEET_BUDGET` bytes.

    Args:
        columns: (caption, sheets) of each kind of sheet; kinds without sheets are left out.
        most_steps: how many iterations to show at most, the first and the last included.

    Returns:
        None when there is no sheet at all.
    """
    kept = [(caption, {sheet.iteration: sheet for sheet in sheets}) for caption, sheets in columns if sheets]
    iterations = sorted({iteration for _, sheets in kept for iteration in sheets})
    if not iterations:
        return None
    chosen = [iterations[index] for index in thin(len(iterations), most_steps)]
    budget = SHEET_BUDGET // (len(chosen) * len(kept))
    steps = [
        SheetStep(
            iteration,
            tuple(_embed_sheet(sheets[iteration], budget) if iteration in sheets else None for _, sheets in kept),
        )
        for iteration in chosen
    ]
    recompressed = any(picture is not None and picture.recompressed for step in steps for picture in step.pictures)
    return SheetSection(
        tuple(caption for caption, _ in kept), tuple(steps), recompressed, len(iterations) - len(chosen)
    )


def _embed_sheet(sheet: Sheet, budget: int) -> Picture:
    """Embed a sheet: of clips the animation, and the film strip for readers who want no motion."""
    return embed(sheet.path, budget) if sheet.animation is None else embed_clips(sheet.animation, sheet.path, budget)


def environment_rows(summary: Mapping[str, object], versions: Mapping[str, object]) -> list[tuple[str, str]]:
    """List what the run said about its environment: (name, value), nothing that it did not say."""
    names = {"vipo_version": "vipo", "seed": "seed", "threads": "threads"}
    rows = [(label, str(summary[key])) for key, label in names.items() if summary.get(key) is not None]
    return rows + [(name, str(version)) for name, version in versions.items() if version is not None]
