"""What an evaluation reports: eval.json, the remarks, the table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation import Values, bootstrap_mean, compare_groups, paired_difference
from ..prompts import read_prompts
from ..safety import versions
from ..types import Prompt
from .samples import sampling_settings
from .sides import Contest

FEW = 20
"""Prompts below which the page warns: percentile intervals of so few cover too little."""


@dataclass(frozen=True)
class EvalOptions:
    """On what the sides are compared.

    Attributes:
        prompts: prompt file or name, see `read_prompts`; None for the one that was trained on.
        seeds: S, samples per prompt and side.
        seed: another one gives other noise throughout.
        limit: evaluate so many prompts, evenly spread over the file; None for all.
        command: that repeats this, for the page.
    """

    prompts: str | None = None
    seeds: int = 2
    seed: int = 0
    limit: int | None = None
    command: str = ""


@dataclass(frozen=True)
class Measured:
    """Raw numbers of P prompts with S samples each.

    Attributes:
        scores: by reward and side ("base", "trained"), (P, S).
        diversity: by side, (P,).
        changes: "inside", "outside", "whole", (P,).
    """

    scores: dict[str, dict[str, Values]]
    diversity: dict[str, Values]
    changes: dict[str, Values]


def make_record(
    contest: Contest, options: EvalOptions, prompts: Sequence[Prompt], repeated: int, measured: Measured
) -> dict[str, Any]:
    """Put together what eval.json has; without times, so that a repetition gives the same bytes.

    Args:
        contest: the two sides.
        options: of the evaluation.
        prompts: P prompts.
        repeated: how many repetitions of prompts were left out.
        measured: the raw numbers.
    """
    compared = {name: compare_groups(sides["trained"], sides["base"]) for name, sides in measured.scores.items()}
    per_prompt = {name: found.pop("per_prompt") for name, found in compared.items()}
    rewards = [
        {"name": name, "in_domain": None if contest.in_domain is None else name in contest.in_domain, **found}
        for name, found in compared.items()
    ]
    return {
        "kind": "eval",
        "subject": contest.subject,
        "command": options.command,
        **versions(),
        "fingerprints": {"base": contest.base.fingerprint, "trained": contest.trained.fingerprint},
        "sampling": sampling_settings(contest.config),
        "prompts": {"path": options.prompts or contest.trained_on, "count": len(prompts)},
        "seeds": options.seeds,
        "seed": options.seed,
        "notes": _notes(contest, prompts, repeated, rewards),
        "rewards": rewards,
        "categories": _categories(prompts, per_prompt),
        **_looks(contest, options, measured),
        "per_prompt": _rows(prompts, per_prompt, measured),
        "samples": {
            name: {side: [[_number(v) for v in row] for row in values] for side, values in both.items()}
            for name, both in measured.scores.items()
        },
    }


def _looks(contest: Contest, options: EvalOptions, measured: Measured) -> dict[str, Any]:
    """Diversity and drift over all prompts, with what they are in words."""
    mapping, diversity, changes = contest.config.map, measured.diversity, measured.changes
    spread = {
        "measure": f"mean pairwise cosine distance of the mean patch feature of backbone {mapping.backbone}",
        "base": bootstrap_mean(diversity["base"]),
        "trained": bootstrap_mean(diversity["trained"]),
        "difference": paired_difference(diversity["trained"], diversity["base"]),
    }
    moved = {
        "measure": "mean absolute pixel change, weighed by the allocation map of the base sample over its maximum "
        f"(psm, backbone {mapping.backbone}, orientation {mapping.orientation}), and by the rest to 1",
        **{name: bootstrap_mean(values) for name, values in changes.items()},
        "difference": bootstrap_mean(changes["inside"] - changes["outside"]),
    }
    return {"diversity": spread if options.seeds > 1 else None, "drift": moved}


def _rows(
    prompts: Sequence[Prompt], per_prompt: dict[str, dict[str, Values]], measured: Measured
) -> list[dict[str, Any]]:
    """The numbers of every prompt, in the order of the file."""
    harm = regression({name: means["difference"] for name, means in per_prompt.items()})
    return [
        {
            "prompt": prompt.text,
            "category": prompt.category,
            "rewards": {
                name: {key: _number(values[key][i]) for key in ("base", "trained", "difference")}
                for name, values in per_prompt.items()
            },
            "diversity": {name: _number(values[i]) for name, values in measured.diversity.items()},
            "drift": {name: _number(values[i]) for name, values in measured.changes.items()},
            "regression": _number(harm[i]),
        }
        for i, prompt in enumerate(prompts)
    ]


def regression(differences: dict[str, Values]) -> Values:
    """How a prompt has fared, for ordering: the mean over rewards of its difference in standard deviations; (P,).

    A reward whose differences are all equal orders nothing; one that failed on a prompt does not count there.
    """
    scaled = []
    for values in differences.values():
        spread = float(np.nanstd(values)) if np.isfinite(values).any() else 0.0
        scaled.append(values / spread if spread > 0 else np.where(np.isnan(values), np.nan, 0.0))
    return prompt_means(np.stack(scaled, 1))


def _categories(prompts: Sequence[Prompt], per_prompt: dict[str, dict[str, Values]]) -> list[dict[str, Any]]:
    """Paired differences by the categories of a published prompt set, where it has several."""
    names = list(dict.fromkeys(prompt.category for prompt in prompts))
    if len(names) < 2:
        return []
    found = []
    for category in names:
        rows = [i for i, prompt in enumerate(prompts) if prompt.category == category]
        differences = {
            name: paired_difference(values["trained"][rows], values["base"][rows])
            for name, values in per_prompt.items()
        }
        found.append({"category": category, "prompts": len(rows), "differences": differences})
    return found


def _notes(contest: Contest, prompts: Sequence[Prompt], repeated: int, rewards: list[dict[str, Any]]) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes = ["The intervals cover prompts, not training runs: another training seed may turn out otherwise."]
    if len(prompts) < FEW:
        notes.append(
            f"Bootstrap intervals of {len(prompts)} prompts are too narrow; believe the sign test, or add some."
        )
    if contest.base.fingerprint == contest.trained.fingerprint:
        notes.append("Both sides have the same weights: every difference is 0 by construction.")
    if contest.trained_on is not None:
        seen = {prompt.text for prompt in read_prompts(contest.trained_on)} & {prompt.text for prompt in prompts}
        if seen:
            notes.append(f"{len(seen)} of {len(prompts)} prompts were trained on; held-out prompts are the fair test.")
    if all(reward["in_domain"] for reward in rewards):
        notes.append("No held-out reward was asked for: a rise of what was trained on alone may be over-optimisation.")
    if repeated:
        notes.append(f"{repeated} repeated prompts of the file were left out.")
    for reward in rewards:
        if reward["failed"]:
            notes.append(f"{reward['name']} gave no finite score for {reward['failed']} pairs, which do not count.")
    return notes


def prompt_means(values: Values) -> Values:
    """Mean over the seeds of (P, S) that are not NaN: (P,)."""
    counted = ~np.isnan(values)
    sums, numbers = np.where(counted, values, 0.0).sum(1), counted.sum(1)
    return np.where(numbers > 0, sums / np.maximum(numbers, 1), np.nan)


def _number(value: Any) -> float | None:
    """A float as JSON has it; None for NaN and infinities."""
    return float(value) if np.isfinite(value) else None


def tables(record: dict[str, Any]) -> list[Any]:
    """The rewards, in-domain and held-out apart, and diversity and drift, as tables of rich."""
    from rich.table import Table

    found = []
    for title, flag in (("trained on", True), ("held-out", False), ("rewards", None)):
        rows = [reward for reward in record["rewards"] if reward["in_domain"] is flag]
        if not rows:
            continue
        count, seeds = record["prompts"]["count"], record["seeds"]
        table = Table(title=f"{title}: {count} prompts x {seeds} seeds, mean [95 % interval over prompts]")
        for heading in ("reward", "base", "trained", "difference", "win rate", "sign test p"):
            table.add_column(heading, justify="left" if heading == "reward" else "right")
        for row in rows:
            rate = row["difference"]["win_rate"]
            cells = [_cell(row[key]) for key in ("base", "trained", "difference")]
            shown = "-" if rate is None else f"{rate:.0%}"
            table.add_row(row["name"], *cells, shown, f"{row['sign_test']['p']:.3g}")
        found.append(table)
    looks = Table(title="besides the rewards")
    for heading in ("", "base", "trained", "difference"):
        looks.add_column(heading, justify="left" if not heading else "right")
    if record["diversity"] is not None:
        looks.add_row("diversity", *(_cell(record["diversity"][key]) for key in ("base", "trained", "difference")))
    for key, label in (("inside", "change inside the map"), ("outside", "change outside the map")):
        looks.add_row(label, "", "", _cell(record["drift"][key]))
    return [*found, looks]


def _cell(entry: dict[str, Any]) -> str:
    return "-" if entry["mean"] is None else f"{entry['mean']:.4g} [{entry['low']:.4g}, {entry['high']:.4g}]"
