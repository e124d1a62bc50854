"""What the watch for reward hacking found, and the curves of its evaluations, as plain records for train.html.j2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vipo.report.charts import Series, Size, line_chart
from vipo.report.reading import TrainRun, list_at, number, objects_at, text
from vipo.report.sections import Panel, mean_or_none
from vipo.report.wording import compact, counted, duration

EVALUATED = {
    "eval/diversity": (
        "Diversity within prompts",
        "cosine distance",
        "How unlike the samples of one prompt are: a fall means that the model makes one picture only.",
    ),
    "eval/distance": (
        "Distance from the base",
        "cosine distance",
        "How far samples moved from the base's of the same noise. Training means to move them: it has no bound.",
    ),
    "eval/kl": (
        "KL to the reference",
        "nats",
        "Per element and step, on the iteration's own samples: how far the policy itself moved. watch.kl is its bound.",
    ),
}
"""Measurements of an evaluation that are no reward: title, unit, sentence."""
SECONDS = "eval/seconds"


@dataclass(frozen=True)
class Warned:
    """One warning: where and what, with which numbers, what to do."""

    heading: str
    sentence: str
    advice: str


@dataclass(frozen=True)
class WatchBox:
    """What the first screen says: every warning, and sentences on what was watched."""

    title: str
    warnings: tuple[Warned, ...]
    coverage: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationSection:
    """Curves of the evaluations; `lede` says what was evaluated."""

    lede: str
    panels: tuple[Panel, ...]


def watch_box(run: TrainRun) -> WatchBox:
    """Word watch.json; a run without one was not watched."""
    if not run.watch:
        return WatchBox("", (), ("Nothing was watched for reward hacking: the run has no watch.json.",))
    found = objects_at(run.watch, "warnings")
    warnings = tuple(
        Warned(
            f"Iteration {text(entry.get('iteration'))}: {text(entry.get('kind'))}.",
            _sentence(text(entry.get("sentence"))),
            _sentence(text(entry.get("advice"))),
        )
        for entry in found
    )
    watched, missing = (
        "; ".join(text(entry) for entry in list_at(run.watch, key)) for key in ("watched", "not_watched")
    )
    outcome = "" if found else f" Nothing was found in {counted(len(run.records), 'iteration')}."
    coverage = [f"Watched for reward hacking: {watched}.{outcome}"] if watched else ["Nothing was watched."]
    if missing:
        coverage.append(f"Not watched: {missing}.")
    ended = ", and watch.stop ended the run" if run.watch.get("stopped") is True else ""
    return WatchBox(f"{counted(len(found), 'warning')}{ended}", warnings, tuple(coverage))


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}." if words else ""


def evaluation_section(run: TrainRun) -> EvaluationSection | None:
    """Draw what the evaluations measured, the base as iteration 0; None without evaluations."""
    records = (run.base, *run.records)
    keys = {key: None for record in records for key in record if key.startswith("eval/") and key != SECONDS}
    in_domain = {text(name) for name in list_at(run.watch, "in_domain")}
    panels = []
    for position, key in enumerate(keys):
        points = [(number(record.get("iteration")), number(record.get(key))) for record in records]
        drawn = np.array([(i, v) for i, v in points if i is not None and v is not None], dtype=np.float64)
        if not len(drawn):
            continue
        name = key.removeprefix("eval/")
        kind = "trained on" if name in in_domain else "held out"
        seen = "Trained on." if name in in_domain else "Held out: scored, never trained on."
        title, unit, sentence = EVALUATED.get(key, (f"{name} ({kind})", "reward", seen))
        alt = f"{title} per evaluation: from {compact(drawn[0, 1])} to {compact(drawn[-1, 1])}."
        line = Series("run", drawn[:, 0], drawn[:, 1])
        chart = line_chart(f"evaluation-{position}", [line], Size(325, 200), y_label=unit, alt=alt)
        panels.append(Panel(title, sentence, chart, ""))
    if not panels:
        return None
    seconds = mean_or_none(np.array([number(record.get(SECONDS)) or math.nan for record in records]))
    what = _sentence(text(run.watch.get("evaluations")))
    return EvaluationSection(f"{what} {duration(seconds)} each.".lstrip(), tuple(panels))
