"""The page of a demo, base against GRPO against ViPO, as a context for demo.html.j2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from vipo.report.charts import Series, Size, forest_chart
from vipo.report.images import Picture, embed
from vipo.report.reading import (
    DemoRun,
    Estimate,
    JsonObject,
    Metric,
    Sheet,
    inside,
    list_at,
    mapping_at,
    number,
    objects_at,
    read_evaluation,
    text,
)
from vipo.report.sections import (
    Arm,
    environment_rows,
    health_panels,
    more_panels,
    reward_section,
    series_of,
    sheet_section,
    time_section,
)
from vipo.report.wording import (
    ARM_LABELS,
    PAIR_LABELS,
    PAIRS,
    VERDICT_WORDS,
    classify,
    decimals_for,
    demo_verdict,
    fixed,
)

GALLERY_BUDGET = 1_000_000
MOST_STEPS = 8
ARMS = ("base", "grpo", "vipo")
TIME_LABELS = {"train_grpo": "Train GRPO", "train_vipo": "Train ViPO", "evaluate": "Evaluate", "total": "Total"}
ANCHORS = (
    ("idea", "Idea"),
    ("reward", "Reward"),
    ("held-out", "Held-out"),
    ("gallery", "Gallery"),
    ("sheets", "Samples"),
    ("health", "Health"),
    ("time", "Time"),
    ("signal", "Signal"),
    ("again", "Reproduce"),
)
Estimates = dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class Difference:
    """One paired difference and what it amounts to."""

    pair: str
    label: str
    estimate: Estimate
    verdict: str


@dataclass(frozen=True)
class MetricRow:
    """One row of the held-out table and its panel of the forest plot."""

    metric: Metric
    decimals: int
    means: tuple[tuple[str, Estimate], ...]
    differences: tuple[Difference, ...]
    forest: Markup | None


@dataclass(frozen=True)
class Cell:
    """One image or clip of the gallery, None where it was not recorded."""

    key: str
    label: str
    picture: Picture | None
    reward: float | None


@dataclass(frozen=True)
class Sample:
    """One prompt of the gallery with what each model made of it."""

    prompt: str
    cells: tuple[Cell, ...]


def demo_context(run: DemoRun) -> dict[str, object]:
    """Collect everything demo.html.j2 shows.

    Args:
        run: a demo as read from its directory.

    Raises:
        ValueError: the summary holds something of the wrong kind, or a path that leaves the run directory.
    """
    summary = run.summary
    metrics, means, differences = read_evaluation(summary)
    prompts = _whole(mapping_at(summary, "evaluation").get("prompts"))
    arms = [Arm(key, ARM_LABELS[key], sub) for key, sub in (("grpo", run.grpo), ("vipo", run.vipo)) if sub is not None]
    rows = [_metric_row(position, metric, means, differences) for position, metric in enumerate(metrics)]
    samples = _gallery(run.path, summary)
    seed = _whole(summary.get("seed"))
    clips = text(summary.get("modality")) == "video"
    command = "vipo demo" + (" --video" if clips else "") + ("" if seed is None else f" --seed {seed}")
    return {
        "noun": "clip" if clips else "image",
        "anchors": [anchor for anchor in ANCHORS if anchor[0] != "signal" or mapping_at(summary, "signal")],
        "version": text(summary.get("vipo_version")),
        "threads": _whole(summary.get("threads")),
        "verdict": demo_verdict(metrics, differences, prompts),
        "notes": [text(note) for note in list_at(summary, "notes")]
        + [f"{arm.label}: {remark}" for arm in arms for remark in arm.run.remarks],
        "prompts": prompts,
        "seed": seed,
        "headline": next((row for row in rows if row.metric.in_domain), rows[0] if rows else None),
        "held_out": _held_out(rows),
        "rows": rows,
        "arm_labels": [ARM_LABELS[key] for key in ARMS],
        "pair_labels": [PAIR_LABELS[pair] for pair in PAIRS],
        "arms": arms,
        "reward": reward_section(_curves(summary, arms), "reward"),
        "samples": samples,
        "example": next((cells for cells in (_example(sample) for sample in samples) if cells), None),
        "panels": health_panels(arms, "health"),
        "more": more_panels(arms, "health"),
        "sheets": sheet_section(_sheet_columns(run), MOST_STEPS),
        "time": time_section(arms, "time"),
        "times": _times(summary),
        "total": number(mapping_at(summary, "times").get("total")),
        "signal": _signal(summary),
        "config_text": run.config_text,
        "environment": environment_rows(summary, mapping_at(summary, "versions")),
        "command": text(summary.get("command")) or command,
    }


def _whole(value: object) -> int | None:
    """Return a count or seed as an integer, None when not recorded."""
    recorded = number(value)
    return None if recorded is None else int(recorded)


def _metric_row(position: int, metric: Metric, means: Estimates, differences: Estimates) -> MetricRow:
    """Collect one metric over the arms and pairs, with its panel of the forest plot."""
    nothing = Estimate(None)
    arms = tuple((ARM_LABELS[key], means.get(key, {}).get(metric.name, nothing)) for key in ARMS)
    pairs = []
    for pair in PAIRS:
        estimate = differences.get(pair, {}).get(metric.name, nothing)
        pairs.append(Difference(pair, PAIR_LABELS[pair], estimate, classify(metric, estimate)))
    decimals = decimals_for([estimate for _, estimate in arms] + [difference.estimate for difference in pairs])
    return MetricRow(metric, decimals, arms, tuple(pairs), _forest(position, metric, pairs, decimals))


def _forest(position: int, metric: Metric, pairs: Sequence[Difference], decimals: int) -> Markup | None:
    """Draw one metric's panel of the forest plot, None when no pair has an interval."""
    drawn = [d for d in pairs if d.verdict != "missing"]
    if not drawn:
        return None
    parts = [
        f"{d.label} {fixed(d.estimate.mean, decimals, signed=True)}, "
        f"interval {fixed(d.estimate.low, decimals, signed=True)} to {fixed(d.estimate.high, decimals, signed=True)}, "
        f"{VERDICT_WORDS[d.verdict]}"
        for d in drawn
    ]
    return forest_chart(
        f"forest-{position}",
        [(d.pair, d.label, d.estimate, d.verdict) for d in drawn],
        Size(325, 60 + 30 * len(drawn)),
        higher_is_better=metric.higher_is_better,
        alt=f"{metric.label}, paired differences: {'; '.join(parts)}.",
    )


def _held_out(rows: Sequence[MetricRow]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Count the verdicts of the metrics that training did not see, by pair; empty when there is no such metric."""
    unseen = [row for row in rows if row.metric.in_domain is False]
    counts = []
    for position, pair in enumerate(PAIRS):
        verdicts = [row.differences[position].verdict for row in unseen]
        found = [(verdict, verdicts.count(verdict)) for verdict in VERDICT_WORDS if verdict in verdicts]
        counts.append((PAIR_LABELS[pair], found))
    return counts if unseen else []


def _curves(summary: JsonObject, arms: Sequence[Arm]) -> list[tuple[str, Series]]:
    """Return the reward curves: from the summary where it has them, else from the runs' own metrics."""
    curves = mapping_at(summary, "curves")
    lines = []
    for key in ("grpo", "vipo"):
        curve = mapping_at(curves, key)
        arm = next((arm for arm in arms if arm.key == key), None)
        if curve:
            lines.append((ARM_LABELS[key], _curve(key, curve)))
        elif arm is not None:
            lines.append((arm.label, series_of(arm, "reward_mean")))
    return lines


def _curve(key: str, curve: JsonObject) -> Series:
    """Read one reward curve of the summary.

    Raises:
        ValueError: its lists differ in length, or an iteration is no number.
    """
    iterations = [number(value) for value in list_at(curve, "iteration")]
    rewards = [number(value) for value in list_at(curve, "reward_mean")]
    if len(iterations) != len(rewards) or None in iterations:
        raise ValueError(
            f"summary.json: curves.{key} has {len(iterations)} iterations and {len(rewards)} reward means; "
            "expected two lists of one length and every iteration a number; write the summary again"
        )
    columns = [np.array([np.nan if v is None else v for v in values]) for values in (iterations, rewards)]
    return Series(key, columns[0], columns[1])


def _gallery(run_dir: Path, summary: JsonObject) -> list[Sample]:
    """Embed the samples of the summary within `GALLERY_BUDGET` bytes."""
    entries = objects_at(summary, "samples")
    budget = GALLERY_BUDGET // max(1, 4 * len(entries))
    samples = []
    for entry in entries:
        rewards = mapping_at(entry, "reward")
        cells = []
        for key in (*ARMS, "map"):
            label = ARM_LABELS.get(key, "ViPO\u2019s map")
            cells.append(Cell(key, label, _embed(run_dir, entry.get(key), budget), number(rewards.get(key))))
        samples.append(Sample(text(entry.get("prompt")), tuple(cells)))
    return samples


def _embed(run_dir: Path, relative: object, budget: int) -> Picture | None:
    """Embed an image or clip named by the summary, None when it names none or the file is absent."""
    if relative is None:
        return None
    path = inside(run_dir, text(relative))
    return embed(path, budget) if path.is_file() else None


def _example(sample: Sample) -> dict[str, object] | None:
    """Return ViPO's image or clip of a sample and its map, for the explanation of what a map is; None without both."""
    found = {cell.key: cell.picture for cell in sample.cells if cell.picture is not None}
    if "vipo" not in found or "map" not in found:
        return None
    return {"prompt": sample.prompt, "image": found["vipo"], "map": found["map"]}


def _sheet_columns(run: DemoRun) -> list[tuple[str, tuple[Sheet, ...]]]:
    """Name the contact sheets of the two trainings."""
    columns = [("GRPO samples", run.grpo.samples)] if run.grpo is not None else []
    if run.vipo is not None:
        columns += [("ViPO samples", run.vipo.samples), ("ViPO\u2019s allocation maps", run.vipo.maps)]
    return columns


def _times(summary: JsonObject) -> list[tuple[str, float | None]]:
    """List the recorded times in seconds, known names first."""
    times = mapping_at(summary, "times")
    order = [key for key in TIME_LABELS if key in times and key != "total"]
    order += [key for key in times if key not in TIME_LABELS]
    order += ["total"] if "total" in times else []
    return [(TIME_LABELS.get(key, key), number(times.get(key))) for key in order]


def _signal(summary: JsonObject) -> list[tuple[str, Estimate]]:
    """Read the optional gradient signal: {name: number} or {name: {mean, low, high}}."""
    signal = mapping_at(summary, "signal")
    rows = []
    for name, value in signal.items():
        entry: Mapping[str, object] = value if isinstance(value, Mapping) else {"mean": value}
        mean, low, high = (number(entry.get(key)) for key in ("mean", "low", "high"))
        rows.append((ARM_LABELS.get(name, name), Estimate(mean, low, high)))
    return rows
