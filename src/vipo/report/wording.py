"""Turn records into words: number formats, verdicts and the sentence that opens a page.

A difference is called better or worse only when its 95 % interval excludes 0; everything else is "unclear".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from vipo.report.reading import Estimate, Metric

NOT_RECORDED = "not recorded"
MINUS = "\u2212"
ARM_LABELS = {"base": "Base model", "grpo": "GRPO", "vipo": "ViPO", "run": "This run"}
PAIRS = ("vipo-base", "grpo-base", "vipo-grpo")
PAIR_LABELS = {
    "vipo-base": f"ViPO {MINUS} base",
    "grpo-base": f"GRPO {MINUS} base",
    "vipo-grpo": f"ViPO {MINUS} GRPO",
}
VERDICT_SYMBOLS = {"better": "\u2713", "worse": "\u2715", "changed": "\u2022", "unclear": "\u223c", "missing": ""}
VERDICT_WORDS = {
    "better": "better",
    "worse": "worse",
    "changed": "changed",
    "unclear": "unclear",
    "missing": NOT_RECORDED,
}


def classify(metric: Metric, difference: Estimate | None) -> str:
    """Judge one paired difference.

    Returns:
        "better" or "worse" when the interval excludes 0, "changed" when it does and the metric has no known direction,
        "unclear" when it holds 0, "missing" without a complete interval.
    """
    if difference is None or difference.mean is None or difference.low is None or difference.high is None:
        return "missing"
    if difference.low <= 0.0 <= difference.high:
        return "unclear"
    if metric.higher_is_better is None:
        return "changed"
    return "better" if (difference.low > 0.0) == metric.higher_is_better else "worse"


def decimals_for(estimates: Iterable[Estimate | None]) -> int:
    """Choose the decimals of one metric: two significant digits of its narrowest interval's half-width.

    Returns:
        0..5; 3 when no interval is recorded.
    """
    widths = [
        (estimate.high - estimate.low) / 2
        for estimate in estimates
        if estimate is not None and estimate.low is not None and estimate.high is not None
    ]
    narrowest = min((width for width in widths if width > 0), default=None)
    if narrowest is None:
        return 3
    return min(5, max(0, 1 - math.floor(math.log10(narrowest))))


def fixed(value: float | None, decimals: int, *, signed: bool = False) -> str:
    """Format a number with fixed decimals and a true minus sign; None is "not recorded"."""
    if value is None:
        return NOT_RECORDED
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", MINUS)


def compact(value: float | None, digits: int = 3) -> str:
    """Format a number with a few significant digits; None is "not recorded"."""
    if value is None:
        return NOT_RECORDED
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value)}".replace("-", MINUS)
    return f"{value:.{digits}g}".replace("-", MINUS)


def percent(value: float | None, decimals: int = 0) -> str:
    """Format a fraction in 0..1 as per cent; None is "not recorded"."""
    return NOT_RECORDED if value is None else f"{100 * value:.{decimals}f}\u202f%"


def duration(seconds: float | None) -> str:
    """Format seconds for people: milliseconds, seconds, minutes or hours; None is "not recorded"."""
    if seconds is None:
        return NOT_RECORDED
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def counted(count: int, singular: str) -> str:
    """Write a count with its noun: "1 prompt", "2 prompts"."""
    return f"{count:,} {singular}{'' if count == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """Join words as a sentence does: "a", "a and b", "a, b and c"."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def in_sentence(label: str) -> str:
    """Lower the first letter of a label unless it is a name or an abbreviation ("HPS score", "CLIP")."""
    return label if label[1:2].isupper() or not label[:1].isupper() else label[0].lower() + label[1:]


def demo_verdict(metrics: Sequence[Metric], differences: dict[str, dict[str, Estimate]], prompts: int | None) -> str:
    """Say what moved beyond its interval, against the base model and head to head.

    Args:
        metrics: the held-out metrics in order of importance.
        differences: paired differences by pair and metric.
        prompts: number of evaluation prompts, None when not recorded.

    Returns:
        One sentence; better and worse are named alike.
    """
    changes = {pair: _changes(metrics, differences.get(pair, {})) for pair in PAIRS}
    if not any(changes.values()):
        return "No paired comparison was recorded, so nothing can be said about what training changed."
    where = "" if prompts is None else f" on {counted(prompts, 'held-out prompt')}"
    against_base = [
        f"{name} {changes[pair]}" for name, pair in (("ViPO", "vipo-base"), ("GRPO", "grpo-base")) if changes[pair]
    ]
    clauses = [f"Against the base model{where}, {', while '.join(against_base)}"] if against_base else []
    if changes["vipo-grpo"]:
        clauses.append(
            f"{'against' if clauses else 'Against'} GRPO{'' if clauses else where}, ViPO {changes['vipo-grpo']}"
        )
    return f"{'; '.join(clauses)}."


def _changes(metrics: Sequence[Metric], differences: dict[str, Estimate]) -> str:
    """Word one pair: which metrics improved and which worsened; empty when the pair was not compared."""
    by_verdict: dict[str, list[str]] = {verdict: [] for verdict in VERDICT_SYMBOLS}
    for metric in metrics:
        by_verdict[classify(metric, differences.get(metric.name))].append(in_sentence(metric.label))
    verbs = {"better": "improved", "worse": "worsened", "changed": "changed"}
    parts = [f"{verb} {listed(by_verdict[verdict])}" for verdict, verb in verbs.items() if by_verdict[verdict]]
    if not parts:
        return "moved no metric beyond its interval" if by_verdict["unclear"] else ""
    return " but ".join(parts) if len(parts) == 2 else listed(parts)


def train_verdict(iterations: int, first: float | None, last: float | None, window: int, state: str) -> str:
    """Say how far the reward moved in a training run.

    Args:
        iterations: number of recorded iterations.
        first: mean reward over the first `window` iterations, None when not recorded.
        last: mean reward over the last `window` iterations, None when not recorded.
        window: how many iterations each of the two means covers.
        state: "finished", "stopped" or the empty string.

    Returns:
        One sentence.
    """
    if iterations == 0:
        return "No iteration was recorded yet."
    opening = {"finished": "The run finished after", "stopped": "The run was stopped after"}.get(
        state, "The run recorded"
    )
    opening = f"{opening} {counted(iterations, 'iteration')}"
    if first is None or last is None:
        return f"{opening}; its reward was not recorded."
    if iterations == 1:
        return f"{opening}: mean reward {compact(last)}."
    verb = "rose" if last > first else "fell" if last < first else "stayed"
    span = "iteration" if window == 1 else f"{window} iterations"
    return f"{opening}: mean reward {verb} from {compact(first)} (first {span}) to {compact(last)} (last {span})."
