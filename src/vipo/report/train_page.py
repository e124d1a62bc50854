"""The page of one training run, as a context for train.html.j2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vipo.report.charts import smoothing_window
from vipo.report.reading import TrainRun, list_at, mapping_at, number, text
from vipo.report.sections import (
    Arm,
    environment_rows,
    health_panels,
    mean_or_none,
    more_panels,
    reward_section,
    series_of,
    sheet_section,
    time_section,
)
from vipo.report.watch_section import evaluation_section, watch_box
from vipo.report.wording import ARM_LABELS, NOT_RECORDED, compact, counted, duration, train_verdict

MOST_STEPS = 12
ANCHORS = (
    ("reward", "Reward"),
    ("evaluation", "Held out"),
    ("sheets", "Samples"),
    ("health", "Health"),
    ("time", "Time"),
    ("again", "Reproduce"),
)


@dataclass(frozen=True)
class Card:
    """One headline number: title, value, what it means."""

    title: str
    value: str
    detail: str


def train_context(run: TrainRun) -> dict[str, object]:
    """Collect everything train.html.j2 shows.

    Args:
        run: a training run as read from its directory.
    """
    arm = Arm("run", ARM_LABELS["run"], run)
    rewards = run.column("reward_mean")
    window = smoothing_window(len(rewards))
    first, last = mean_or_none(rewards[:window]), mean_or_none(rewards[-window:])
    state = text(run.summary.get("state"))
    evaluation = evaluation_section(run)
    return {
        "anchors": [anchor for anchor in ANCHORS if evaluation or anchor[0] != "evaluation"],
        "watch": watch_box(run),
        "evaluation": evaluation,
        "noun": "clip" if any(sheet.animation for sheet in run.samples) else "image",
        "name": run.path.resolve().name,
        "verdict": train_verdict(len(run.records), first, last, window, state),
        "cards": _cards(run, last, window, state),
        "notes": [*run.remarks, *(text(note) for note in list_at(run.summary, "notes")), *_group_remarks(run)],
        "arms": [arm],
        "reward": reward_section([(arm.label, series_of(arm, "reward_mean"))], "reward"),
        "panels": health_panels([arm], "health"),
        "more": more_panels([arm], "health"),
        "sheets": sheet_section([("Samples", run.samples), ("Allocation maps", run.maps)], MOST_STEPS),
        "time": time_section([arm], "time"),
        "config_text": run.config_text,
        "environment": environment_rows(run.summary, mapping_at(run.summary, "versions")),
        "command": text(run.summary.get("command")) or "vipo train config.yaml",
    }


def _cards(run: TrainRun, last: float | None, window: int, state: str) -> list[Card]:
    """Choose the headline numbers of a training run."""
    seconds = number(run.summary.get("seconds"))
    source = "wall-clock time of the run"
    if seconds is None and np.isfinite(run.column("seconds")).any():
        seconds, source = float(np.nansum(run.column("seconds"))), "sum over the recorded iterations"
    span = "the last iteration" if window == 1 else f"the last {window} iterations"
    return [
        Card("Mean reward", compact(last), NOT_RECORDED if last is None else f"over {span}"),
        Card("Iterations", f"{len(run.records):,}", "recorded in metrics.jsonl"),
        Card("Time", duration(seconds), NOT_RECORDED if seconds is None else source),
        Card(
            "State",
            state or NOT_RECORDED,
            "as summary.json says" if state else "still going, or stopped without notice",
        ),
    ]


def _group_remarks(run: TrainRun) -> list[str]:
    """Say how many groups taught nothing, when any did."""
    remarks = []
    for key, why in (
        ("constant_groups", "all their samples earned the same reward"),
        ("dropped_groups", "the run dropped them"),
    ):
        values = run.column(key)
        total = int(np.nansum(values)) if len(values) else 0
        if total:
            remarks.append(f"{counted(total, 'group')} taught nothing: {why}.")
    return remarks
