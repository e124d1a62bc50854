"""Which denoising steps of an iteration are stochastic, and so trained; the others are plain ODE steps."""

from __future__ import annotations

import torch


def stochastic_window(
    mode: str, size: int, reach: tuple[int, int], *, iteration: int, seed: int, every: int = 25, stride: int = 1
) -> tuple[int, ...]:
    """Choose the stochastic steps of one iteration (MixGRPO, arXiv 2507.21802; scattered: Flow-GRPO-Fast).

        fixed      the first `size` steps of the reach
        sliding    from the start of the reach, moved by `stride` every `every` iterations, and round again at its end
        random     `size` neighbouring steps anywhere in the reach
        scattered  any `size` steps of the reach

    Args:
        mode: one of the four.
        size: number of stochastic steps, 1 to the length of the reach.
        reach: first step and end (exclusive).
        iteration: 0-based.
        seed: of the run; the choice is a function of (seed, iteration) alone, so a run can resume.
        every: iterations between two moves.
        stride: steps per move.

    Returns:
        The steps, ascending.
    """
    first, end = reach
    places = end - first - size + 1
    generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) ^ 0x3C6EF372)
    if mode == "scattered":
        chosen: list[int] = torch.randperm(end - first, generator=generator)[:size].sort().values.tolist()
        return tuple(first + step for step in chosen)
    start = 0
    if mode == "sliding":
        start = (iteration // every * stride) % places
    elif mode == "random":
        start = int(torch.randint(places, (1,), generator=generator))
    return tuple(range(first + start, first + start + size))
