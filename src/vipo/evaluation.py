"""Base against trained on held-out prompts: paired, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .policy import DiffusersPolicy

RESAMPLES = 4000
BATCH = 8
"""Samples per pipeline call where the config names no sampling.micro_batch."""
Values = NDArray[np.float64]


def bootstrap_mean(values: Values, *, seed: int = 0, tail: float = 0.025) -> dict[str, float | None]:
    """Mean of (n,) values with a percentile bootstrap interval, 95 % by default; NaN values do not count.

    Args:
        values: (n,).
        seed: of the resamples.
        tail: share of the resampled means left out on either side.

    Returns:
        mean, low, high; None where no value counts.
    """
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return {"mean": None, "low": None, "high": None}
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), [tail, 1 - tail])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def paired_difference(
    new: Values, old: Values, *, higher_is_better: bool = True, seed: int = 0, tail: float = 0.025
) -> dict[str, float | None]:
    """Mean of new - old over the same prompts and seeds, its interval, and how often new is better.

    Returns:
        mean, low, high, win_rate (ties count half); None where no pair counts.
    """
    difference = new - old
    counted = difference[~np.isnan(difference)]
    better = counted if higher_is_better else -counted
    wins = float((better > 0).mean() + 0.5 * (better == 0).mean()) if len(better) else None
    return {**bootstrap_mean(difference, seed=seed, tail=tail), "win_rate": wins}


def sign_test(better: int, worse: int) -> float:
    """Exact two-sided sign test: the chance of a split at least as uneven if better and worse were equally likely.

        p = min(1, 2 sum_{k <= min(better, worse)} C(n, k) / 2^n),   n = better + worse                 (ties left out)

    Args:
        better: pairs that got better, >= 0.
        worse: pairs that got worse, >= 0.

    Returns:
        p in (0, 1]; 1 without a pair.
    """
    n = better + worse
    tail, term = 0, 1
    for k in range(min(better, worse) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << n))  # the integers are exact, their quotient is rounded once


def compare_groups(trained: Values, base: Values, *, seed: int = 0, tail: float = 0.025) -> dict[str, Any]:
    """Compare paired values (P, S) of P prompts with S seeds each; higher is better.

    The seeds of a prompt are averaged first and prompts are resampled, not samples: samples of one prompt are alike,
    and intervals that took them for independent would be too narrow. A pair with a value that is not finite does not
    count.

    Returns:
        base, trained and difference with intervals (difference with the win rate over prompts), sign_test over prompts,
        how many pairs have failed, and the means per prompt (P,), NaN where none counts.
    """
    counted = np.isfinite(trained) & np.isfinite(base)
    number = counted.sum(1)
    means = [
        np.where(number > 0, np.where(counted, side, 0.0).sum(1) / np.maximum(number, 1), np.nan)
        for side in (trained, base)
    ]
    difference = means[0] - means[1]
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    return {
        "base": bootstrap_mean(means[1], seed=seed, tail=tail),
        "trained": bootstrap_mean(means[0], seed=seed, tail=tail),
        "difference": paired_difference(means[0], means[1], seed=seed, tail=tail),
        "sign_test": {
            "better": better,
            "worse": worse,
            "equal": int((difference == 0).sum()),
            "p": sign_test(better, worse),
        },
        "failed": int((~counted).sum()),
        "per_prompt": {"trained": means[0], "base": means[1], "difference": difference},
    }


def evaluate(
    policy: DiffusersPolicy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    measures: Callable[[Tensor, Sequence[str]], dict[str, Tensor]],
    *,
    batch: int = 32,
    on_batch: Callable[[int], None] | None = None,
    **call: Any,
) -> tuple[Tensor, dict[str, Values]]:
    """Generate one sample per prompt and measure it.

    Args:
        policy: with the weights to evaluate.
        prompts: n prompts.
        seeds: n seeds of the initial noise.
        measures: (frames, prompts) -> name -> (n,).
        batch: samples per pipeline call.
        on_batch: called with the number of samples done (a progress bar).
        call: keywords of `DiffusersPolicy.generate`.

    Returns:
        Frames (n, F, 3, Y, X) and the values (n,) by name.
    """
    frames, values = [], []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        frames.append(policy.generate(part, seeds=seeds[start : start + batch], **call))
        values.append(measures(frames[-1], part))
        if on_batch:
            on_batch(len(part))
    gathered = {name: torch.cat([v[name] for v in values]).double().cpu().numpy() for name in values[0]}
    return torch.cat(frames), gathered
