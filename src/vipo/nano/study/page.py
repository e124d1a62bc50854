"""Records of the study -> the tables of docs/evidence.md, which stand between two marks; the text around them stays."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...demo_kinds import CLIPS, IMAGES, Kind
from ...files import write_atomically
from .arms import AGAIN, FIRST, REDNESS, REST, VIDEO_REST, Arm, in_domain
from .figure import Row, draw_differences
from .runs import equal_redness

BEGIN, END = "<!-- vipo.nano.study: begin -->", "<!-- vipo.nano.study: end -->"
KINDS = {"image": IMAGES, "video": CLIPS}
T975 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.306, 9: 2.2622}
"""The .975 quantile of Student's t by degrees of freedom."""
FIGURE = "differences.png"
"""In the folder of the records."""
BY_SEED = dict[int, dict[str, float]]
"""Metrics of one arm by seed."""


class Difference(NamedTuple):
    """Mean of paired differences over seeds, half-width of its 95 % t interval (NaN for one seed), and the seeds."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        """+.120 +- .034, bold where the interval leaves 0; of fewer than three seeds it says too little to be bold."""
        text = (
            f"{number(self.mean, sign=True)} ± {number(self.half)}" if self.seeds > 1 else number(self.mean, sign=True)
        )
        return f"**{text}**" if self.seeds > 2 and abs(self.mean) > self.half else text


def number(value: float, *, sign: bool = False) -> str:
    """Three digits after the point, four where the number is below .01."""
    digits = 4 if abs(value) < 0.01 else 3
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def difference(new: BY_SEED, old: BY_SEED, metric: str) -> Difference:
    """Paired over the seeds that both have.

    half = t_{.975, n-1} s / sqrt(n)
    """
    seeds = sorted(set(new) & set(old))
    values = np.array([new[seed][metric] - old[seed][metric] for seed in seeds])
    n = len(values)
    half = float(T975[n - 1] * values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return Difference(float(values.mean()) if n else float("nan"), half, n)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; equal values share the mean of their ranks."""
    ranks = [[np.mean(np.flatnonzero(np.sort(values) == value)) for value in values] for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_page(page: Path, records: Path) -> None:
    """Write the tables of the records in a folder between the marks of a page; a new page gets a title."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(records.glob("*.json"))}
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# Evidence\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    parts = [part for part in (*_modality(found, "image"), *_modality(found, "video")) if part]
    if panels := _panels(found):
        draw_differences(panels, records / FIGURE)
        words = "Each arm less scalar GRPO: grey a seed, the mean with its 95 % interval, red where that leaves 0"
        parts.insert(0, f"![{words}]({records.name}/{FIGURE})\n\n{words}; seeds in brackets.")
    body = "\n\n".join(parts)
    write_atomically(page, f"{before}{BEGIN}\n{body}\n{END}{rest.partition(END)[2]}")


def _modality(found: Mapping[str, Any], modality: str) -> list[str]:
    arms = by_arm(found.get("arms", {}), modality)
    if "grpo" not in arms:
        return []
    kind, rest = KINDS[modality], REST if modality == "image" else VIDEO_REST
    title = "Pictures" if modality == "image" else "Clips"
    base = found["arms"].get(f"base/{modality}", {}).get("metrics")
    parts = [f"## {title}", _sweep(found.get("sweep", {}), modality), _means(kind, arms, base, (*FIRST, *rest))]
    parts.append(_differences(kind, arms, "grpo", (*FIRST[1:], *rest), "less scalar GRPO"))
    parts.append(_differences(kind, arms, "vipo", (*FIRST[3:], *rest), "less ViPO with the default map"))
    parts.append(_again(kind, AGAIN[modality], by_arm(found.get("again", {}), modality), arms))
    if modality == "image":
        parts += [_clips(found.get("clips", {})), _epochs(kind, found.get("epochs", {}), arms)]
        parts += [
            _redness(found.get("redness", {})),
            _signal(found.get("signal", {}), _ends(arms, found.get("redness", {}))),
        ]
    return parts


def _panels(found: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """Of pictures and clips, how far each arm's (visual quality) score is above scalar GRPO's, on all seeds."""
    panels = []
    for modality, metric, rest in (("image", "reward", REST), ("video", "reward_vq", VIDEO_REST)):
        arms = by_arm({**found.get("arms", {}), **found.get("again", {})}, modality)
        base = arms.get("grpo", {})
        rows = []
        for arm in (*FIRST[1:], *rest):
            seeds = {s: m[metric] - base[s][metric] for s, m in arms.get(arm.name, {}).items() if s in base}
            if seeds:
                gain = difference(arms[arm.name], base, metric)
                rows.append(Row(arm.label, list(seeds.values()), gain.mean, gain.half))
        if rows:
            label = next(m.label for m in KINDS[modality].metrics if m.name == metric)
            panels.append((f"{'Pictures' if modality == 'image' else 'Clips'}: {label.lower()}", rows))
    return panels


def by_arm(records: Mapping[str, Any], modality: str) -> dict[str, BY_SEED]:
    """Metrics by arm and seed.

    Raises:
        ValueError: two records of one arm and seed, as another chosen setting leaves them.
    """
    arms: defaultdict[str, BY_SEED] = defaultdict(dict)
    for key, record in records.items():
        if "arm" in record and key.split("/")[1] == modality:
            if record["seed"] in arms[record["arm"]]:
                raise ValueError(f"{key}: a second record of this arm and seed; remove the one of the earlier setting")
            arms[record["arm"]][record["seed"]] = record.get("metrics", {})
    return dict(arms)


def _settings(
    records: Mapping[str, Any], modality: str, setting: str, score: Callable[[Mapping[str, float]], float] = in_domain
) -> dict[str, dict[float, float]]:
    """Mean in-domain score over the tuning seeds, by arm and setting."""
    scores: defaultdict[str, defaultdict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, record in records.items():
        if key.split("/")[1] == modality:
            scores[record["arm"]][record["changes"][setting]].append(score(record["metrics"]))
    return {arm: {key: float(np.mean(v)) for key, v in sorted(found.items())} for arm, found in scores.items()}


def _setting_rows(found: Mapping[str, Mapping[float, float]]) -> list[list[str]]:
    labels = {arm.name: arm.label for arm in FIRST}
    settings = sorted({setting for scores in found.values() for setting in scores})
    rows = []
    for name, scores in found.items():
        best = max(scores, key=lambda setting: scores[setting])
        cells = [number(scores[s]) if s in scores else "" for s in settings]
        rows.append([labels[name]] + [f"**{c}**" if s == best else c for s, c in zip(settings, cells, strict=True)])
    return [["", *(f"{s:g}" for s in settings)], *rows]


def _sweep(records: Mapping[str, Any], modality: str) -> str:
    found = _settings(records, modality, "optimizer.learning_rate")
    if not found:
        return ""
    heads, *rows = _setting_rows(found)
    return f"Score after training by learning rate, on prompts and seeds that choose only this:\n\n{table(heads, rows)}"


def _clips(records: Mapping[str, Any]) -> str:
    found = _settings(records, "image", "loss.clip_range")
    if not found:
        return ""
    heads, *rows = _setting_rows(found)
    words = "Two epochs per rollout: score by clip range, on prompts and a seed that choose only this"
    return f"{words}:\n\n{table(heads, rows)}"


def _means(kind: Kind, arms: Mapping[str, BY_SEED], base: Mapping[str, float] | None, order: Sequence[Arm]) -> str:
    names = [m.name for m in kind.metrics] + ["drift_inside", "drift_outside"]
    labels = [m.label for m in kind.metrics] + ["drift inside", "drift outside"]
    rows = [["base", "", *(number(base[name]) for name in names)]] if base else []
    for arm in order:
        seeds = arms.get(arm.name, {})
        if seeds:
            means = [number(float(np.mean([m[name] for m in seeds.values()]))) for name in names]
            rows.append([arm.label, str(len(seeds)), *means])
    return f"Means over prompts and seeds:\n\n{table(['arm', 'seeds', *labels], rows)}"


def _differences(kind: Kind, arms: Mapping[str, BY_SEED], against: str, order: Sequence[Arm], words: str) -> str:
    names = [m.name for m in kind.metrics] + ["drift_inside", "drift_outside"]
    labels = [m.label for m in kind.metrics] + ["drift inside", "drift outside"]
    rows = []
    for arm in order:
        if arm.name in arms:
            found = [difference(arms[arm.name], arms[against], name) for name in names]
            rows.append([arm.label, str(found[0].seeds), *map(str, found)])
    if not rows:
        return ""
    return f"Paired differences, {words}; bold where the 95 % t interval over seeds leaves 0:\n\n" + table(
        ["arm", "seeds", *labels], rows
    )


def _again(kind: Kind, order: Sequence[Arm], again: Mapping[str, BY_SEED], arms: Mapping[str, BY_SEED]) -> str:
    """Differences on fresh seeds alone, and on these and the earlier ones together."""
    if "grpo" not in again:
        return ""
    names = [m.name for m in kind.metrics] + ["drift_inside", "drift_outside"]
    labels = [m.label for m in kind.metrics] + ["drift inside", "drift outside"]
    both = {arm: {**arms.get(arm, {}), **seeds} for arm, seeds in again.items()}
    rows = []
    order = [arm for arm in order if arm.name in again]
    for arm in order[1:]:
        for other in order[: order.index(arm)]:
            for runs in (again, both):
                found = [difference(runs[arm.name], runs[other.name], name) for name in names]
                rows.append([arm.label, other.label, str(found[0].seeds), *map(str, found)])
    words = "The same on seeds that no arm was chosen by, and with those above"
    return f"{words}:\n\n" + table(["arm", "less", "seeds", *labels], rows)


def _epochs(kind: Kind, records: Mapping[str, Any], arms: Mapping[str, BY_SEED]) -> str:
    twice = by_arm(records, "image")
    if "grpo" not in twice:
        return ""
    names = [m.name for m in kind.metrics]
    rows = []
    for arm in FIRST[:3]:
        if arm.name in twice:
            rows.append(
                [arm.label, "its own one epoch", *(str(difference(twice[arm.name], arms[arm.name], n)) for n in names)]
            )
            for other in FIRST[: FIRST.index(arm)]:
                if other.name in twice:
                    found = [str(difference(twice[arm.name], twice[other.name], n)) for n in names]
                    rows.append([arm.label, f"{other.label}, two epochs", *found])
    return "Two epochs, paired differences:\n\n" + table(["arm", "less", *(m.label for m in kind.metrics)], rows)


def _redness(records: Mapping[str, Any]) -> str:
    """Metrics where every run has the same redness: the highest that all runs of GRPO, ViPO and the oracle reach."""
    traces: defaultdict[str, dict[int, list[dict[str, Any]]]] = defaultdict(dict)
    for record in records.values():
        traces[record["arm"]][record["seed"]] = record["trace"]
    if not {"grpo", "vipo", "oracle"} <= set(traces):
        return ""
    peaks = [max(look["redness"] for look in t) for arm in ("grpo", "vipo", "oracle") for t in traces[arm].values()]
    target = min(peaks)
    names = (
        "iteration",
        "structure",
        "shape_iou",
        "shape_accuracy",
        "colour_error",
        "background_dirt",
        "drift_inside",
        "drift_outside",
    )
    reached: dict[str, BY_SEED] = {}
    rows = []
    for arm in REDNESS:
        runs = traces.get(arm.name, {})
        known = {s: t for s, t in runs.items() if max(look["redness"] for look in t) >= target}
        final = float(np.mean([t[-1]["redness"] for t in runs.values()])) if runs else float("nan")
        reached[arm.name] = {seed: equal_redness(t, target) for seed, t in known.items()}
        if known:
            cells = [str(difference(reached[arm.name], reached["grpo"], n)) for n in names]
            if arm.name == "grpo":
                cells = [number(float(np.mean([m[n] for m in reached["grpo"].values()]))) for n in names]
            rows.append([arm.label, f"{len(known)} of {len(runs)}", number(final), *cells])
        elif runs:
            rows.append([arm.label, f"0 of {len(runs)}", number(final), *[""] * len(names)])
    start = next(iter(traces["grpo"].values()))[0]["redness"]
    heads = ["arm", "runs that reach it", "redness at the end", *names]
    words = (
        f"Reward redness, at equal redness {target:.3f} (base {start:.3f}); scalar GRPO's means, then differences to it"
    )
    return f"{words}:\n\n{table(heads, rows)}"


def _ends(arms: Mapping[str, BY_SEED], redness: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By reward, what training with it came to, by arm: the mean over seeds of the score, or of the last redness."""
    reached: defaultdict[str, list[float]] = defaultdict(list)
    for record in redness.values():
        reached[record["arm"]].append(record["trace"][-1]["redness"])
    scores = {name: [in_domain(m) for m in seeds.values()] for name, seeds in arms.items()}
    return {
        reward: {name: float(np.mean(values)) for name, values in found.items()}
        for reward, found in (("nano", scores), ("redness", reached))
    }


def _signal(records: Mapping[str, Any], ends: Mapping[str, Mapping[str, float]]) -> str:
    parts = []
    labels = {arm.name: arm.label for arm in (*FIRST, *REST)}
    for key, record in sorted(records.items()):
        reward, maps = key.split("/")[1], record["maps"]
        after = ends.get(reward, {})
        rows = []
        for name, found in maps.items():
            signal = f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"
            rows.append([labels[name], signal, number(after[name]) if name in after else ""])
        words = f"Gradient signal fraction before training, reward {reward}, {record['groups']} groups"
        pairs = [(found["value"], after[name]) for name, found in maps.items() if name in after]
        if len(pairs) > 2:
            rank = rank_correlation(*zip(*pairs, strict=True))
            words += f"; rank correlation with the reward after training {rank:.2f} over {len(pairs)} maps"
        parts.append(f"{words}:\n\n{table(['map', 'signal fraction', 'reward after training'], rows)}")
    return "\n\n".join(parts)
