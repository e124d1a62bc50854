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
Values = NDArray[np.float64]


def bootstrap_mean(values: Values, *, seed: int = 0) -> dict[str, float | None]:
    """Mean of (n,) values with a 95 % percentile bootstrap interval; NaN values do not count.

    Returns:
        mean, low, high; None where no value counts.
    """
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return {"mean": None, "low": None, "high": None}
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def paired_difference(
    new: Values, old: Values, *, higher_is_better: bool = True, seed: int = 0
) -> dict[str, float | None]:
    """Mean of new - old over the same prompts and seeds, its 95 % interval, and how often new is better.

    Returns:
        mean, low, high, win_rate (ties count half); None where no pair counts.
    """
    difference = new - old
    counted = difference[~np.isnan(difference)]
    better = counted if higher_is_better else -counted
    wins = float((better > 0).mean() + 0.5 * (better == 0).mean()) if len(better) else None
    return {**bootstrap_mean(difference, seed=seed), "win_rate": wins}


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
