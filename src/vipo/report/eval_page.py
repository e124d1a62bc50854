"""The page of an evaluation, base against trained, as a context for eval.html.j2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vipo.report.images import Picture, embed
from vipo.report.reading import (
    Estimate,
    EvalRun,
    JsonObject,
    Metric,
    flag,
    inside,
    list_at,
    mapping_at,
    number,
    objects_at,
    read_estimate,
    text,
)
from vipo.report.sections import environment_rows
from vipo.report.wording import classify, counted, decimals_for, listed

PICTURE_BUDGET = 2_000_000
CELLS = (("base", "Base"), ("trained", "Trained"), ("map", "Base\u2019s map"))
GROUPS = (
    (
        True,
        "Rewards that were trained on",
        "That these rise says that training works, not that the samples got better.",
    ),
    (False, "Held-out rewards", "Training never saw these: they tell whether the samples got better."),
    (None, "Rewards", "Whether the model was trained on one of these is not known."),
)
ANCHORS = (
    ("rewards", "Rewards"),
    ("looks", "Diversity and drift"),
    ("pairs", "Pairs"),
    ("prompts", "Prompts"),
    ("again", "Reproduce"),
)


@dataclass(frozen=True)
class RewardRow:
    """One reward of both sides."""

    metric: Metric
    decimals: int
    base: Estimate
    trained: Estimate
    difference: Estimate
    verdict: str
    better: int
    worse: int
    equal: int
    p: float | None


@dataclass(frozen=True)
class Pair:
    """One prompt's base and trained sample, the map of the base sample, and the scores of these very samples."""

    prompt: str
    pictures: tuple[tuple[str, str, Picture | None], ...]
    scores: tuple[tuple[str, float | None, float | None, int], ...]
    drift: tuple[float | None, float | None]


def eval_context(run: EvalRun) -> dict[str, object]:
    """Collect everything eval.html.j2 shows.

    Args:
        run: an evaluation as read from its directory.

    Raises:
        ValueError: eval.json holds something of the wrong kind, or a path that leaves the directory.
    """
    record = run.record
    rows = [_reward_row(entry) for entry in objects_at(record, "rewards")]
    prompts = int(number(mapping_at(record, "prompts").get("count")) or 0)
    seeds = int(number(record.get("seeds")) or 0)
    diversity = _difference(record, "diversity")
    drift = mapping_at(record, "drift")
    moved = {key: read_estimate(drift, key) for key in ("inside", "outside", "whole", "difference")}
    decimals = {row.metric.name: row.decimals for row in rows}
    pairs = _pairs(run.path, record, decimals)
    subject = mapping_at(record, "subject")
    return {
        "anchors": ANCHORS,
        "noun": "image",
        "subject": ", ".join(f"{key} {value}" for key, value in subject.items()),
        "title": Path(text(subject.get("run") or subject.get("lora") or subject.get("trained"))).name,
        "prompts": prompts,
        "seeds": seeds,
        "source": text(mapping_at(record, "prompts").get("path")),
        "verdict": eval_verdict(rows, prompts, seeds),
        "looks_verdict": _looks_verdict(diversity, moved),
        "notes": [text(note) for note in list_at(record, "notes")],
        "groups": [
            (title, about, chosen)
            for known, title, about in GROUPS
            if (chosen := [row for row in rows if row.metric.in_domain is known])
        ],
        "categories": _categories(record),
        "rows": rows,
        "diversity": diversity,
        "diversity_measure": text(mapping_at(record, "diversity").get("measure")),
        "drift": moved,
        "drift_decimals": decimals_for([moved["inside"], moved["outside"]]),
        "drift_measure": text(drift.get("measure")),
        "pairs": pairs,
        "table": _table(record),
        "config_text": None,
        "environment": [
            *environment_rows(record, mapping_at(record, "versions")),
            *((key, text(value)) for key, value in mapping_at(record, "sampling").items() if value is not None),
        ],
        "command": text(record.get("command")) or "vipo eval RUN",
    }


def _reward_row(entry: JsonObject) -> RewardRow:
    name = text(entry.get("name"))
    metric = Metric(name, name, True, flag(entry.get("in_domain")), "")
    base, trained, difference = (read_estimate(entry, key) for key in ("base", "trained", "difference"))
    test = mapping_at(entry, "sign_test")
    better, worse, equal = (int(number(test.get(key)) or 0) for key in ("better", "worse", "equal"))
    return RewardRow(
        metric,
        decimals_for([base, trained, difference]),
        base,
        trained,
        difference,
        classify(metric, difference),
        better,
        worse,
        equal,
        number(test.get("p")),
    )


def _difference(record: JsonObject, key: str) -> RewardRow | None:
    """Diversity as a row whose direction is nobody's goal; None where one seed per prompt leaves it unknown."""
    entry = mapping_at(record, key)
    if not entry:
        return None
    metric = Metric(key, key, None, None, "")
    base, trained, difference = (read_estimate(entry, part) for part in ("base", "trained", "difference"))
    decimals = decimals_for([base, trained, difference])
    return RewardRow(metric, decimals, base, trained, difference, classify(metric, difference), 0, 0, 0, None)


def eval_verdict(rows: Sequence[RewardRow], prompts: int, seeds: int) -> str:
    """Say what moved beyond its interval, what was trained on and what was held out apart; one or two sentences."""
    clauses, verdicts = [], {}
    for known, label in ((True, "trained on"), (False, "held out"), (None, "")):
        group = [row for row in rows if row.metric.in_domain is known]
        if group:
            verdicts[known] = {row.verdict for row in group}
            clauses.append((f"of the rewards {label}, " if label else "") + _moves(group))
    if not clauses:
        return "No reward was compared, so nothing can be said about what training changed."
    where = f"On {counted(prompts, 'prompt')} with {counted(seeds, 'seed')} each"
    sentence = f"{where}: {'; '.join(clauses)}."
    if "better" in verdicts.get(True, ()) and "worse" in verdicts.get(False, ()):
        sentence += " A reward that rises while held-out ones fall is a sign of over-optimisation."
    return sentence


def _moves(rows: Sequence[RewardRow]) -> str:
    verbs = {"better": "rose", "worse": "fell", "unclear": "did not move beyond the interval", "missing": "is unknown"}
    named = {verdict: [row.metric.label for row in rows if row.verdict == verdict] for verdict in verbs}
    return listed([f"{listed(names)} {verbs[verdict]}" for verdict, names in named.items() if names])


def _looks_verdict(diversity: RewardRow | None, moved: dict[str, Estimate]) -> str:
    """Say in words whether samples of a prompt became more alike, and whether the change is where the map looks."""
    if diversity is None:
        alike = "Diversity needs two seeds per prompt."
    elif diversity.verdict == "changed" and diversity.difference.mean is not None:
        rose = diversity.difference.mean > 0
        alike = (
            f"Samples of one prompt became {'less' if rose else 'more'} alike: diversity {'rose' if rose else 'fell'}."
        )
    else:
        alike = "Diversity within prompts did not move beyond the interval."
    low, high = moved["difference"].low, moved["difference"].high
    if low is None or high is None:
        return f"{alike} The maps were even, so there is no inside to compare."
    if low == high == 0:
        return f"{alike} No pixel changed."
    where = (
        "more inside than outside"
        if low > 0
        else "less inside than outside"
        if high < 0
        else "alike inside and outside"
    )
    return f"{alike} Training changed the pictures {where} the allocation map."


def _pairs(folder: Path, record: JsonObject, decimals: dict[str, int]) -> list[Pair]:
    """Embed the pairs, worst regressions first, within `PICTURE_BUDGET` bytes."""
    entries, rows = objects_at(record, "pairs"), objects_at(record, "per_prompt")
    budget = PICTURE_BUDGET // max(1, len(CELLS) * len(entries))
    pairs = []
    for entry in entries:
        row = rows[int(number(entry.get("prompt")) or 0)]
        pictures = []
        for key, label in CELLS:
            file = inside(folder, text(entry.get(key)))
            pictures.append((key, label, embed(file, budget) if file.is_file() else None))
        scores = mapping_at(entry, "rewards")
        shown = []
        for name in scores:
            base, trained = (number(mapping_at(scores, name).get(side)) for side in ("base", "trained"))
            shown.append((name, base, trained, decimals.get(name, 3)))
        moved = mapping_at(row, "drift")
        pairs.append(
            Pair(
                text(row.get("prompt")),
                tuple(pictures),
                tuple(shown),
                (number(moved.get("inside")), number(moved.get("outside"))),
            )
        )
    return pairs


def _categories(record: JsonObject) -> list[tuple[str, int, list[tuple[Estimate, str]]]]:
    """Name, prompts and the difference of every reward, per category of the prompt set."""
    found = []
    for entry in objects_at(record, "categories"):
        differences = mapping_at(entry, "differences")
        cells = [read_estimate(differences, name) for name in differences]
        judged = [(cell, classify(Metric("", "", True, None, ""), cell)) for cell in cells]
        found.append((text(entry.get("category")) or "no category", int(number(entry.get("prompts")) or 0), judged))
    return found


def _table(record: JsonObject) -> list[tuple[str, list[tuple[float | None, float | None, float | None]]]]:
    """Prompt -> (base, trained, difference) of every reward, worst regressions first."""
    rows = objects_at(record, "per_prompt")
    order = sorted(rows, key=lambda row: number(row.get("regression")) or 0.0)
    table = []
    for row in order:
        rewards = mapping_at(row, "rewards")
        cells = []
        for name in rewards:
            base, trained, difference = (
                number(mapping_at(rewards, name).get(key)) for key in ("base", "trained", "difference")
            )
            cells.append((base, trained, difference))
        table.append((text(row.get("prompt")), cells))
    return table
