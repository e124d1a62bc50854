"""The learning rate as a function of the iteration alone: a resumed run has nothing to restore."""

from __future__ import annotations

import math

from .config import OptimizerConfig


def learning_rate(settings: OptimizerConfig, iteration: int, iterations: int) -> float:
    """Return the rate of an iteration: linear warm-up, then the schedule.

    eta(i) = eta * min(1, (i + 1) / W) * s(p),  p = max(0, i - W) / (I - W),
    s = 1 (constant), 1 - p (linear) or (1 + cos(pi p)) / 2 (cosine).

    The first iteration already learns, and so does the last.

    Args:
        settings: eta, W = warmup, and the schedule.
        iteration: i, 0-based.
        iterations: I, of the whole run.
    """
    warmth = 1.0 if settings.warmup == 0 else min(1.0, (iteration + 1) / settings.warmup)
    progress = max(0, iteration - settings.warmup) / max(1, iterations - settings.warmup)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return settings.learning_rate * warmth * decay[settings.schedule]
