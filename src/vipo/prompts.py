"""Prompt files -> groups of G samples, in a seeded order that any iteration can be started from."""

from __future__ import annotations

from pathlib import Path

import torch

from .nano import ASSETS
from .types import PromptBatch

_SEED_RANGE = 2**31 - 1


def read_prompts(path: str) -> list[str]:
    """Read one prompt per line ("nano" for the embedded training prompts); blank lines are skipped.

    Raises:
        ValueError: the file is missing, empty or not UTF-8.
    """
    file = ASSETS / "prompts_train.txt" if path == "nano" else Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"prompts.path: no such file: {file}") from None
    except IsADirectoryError:
        raise ValueError(f"prompts.path: {file} is a folder, expected a text file with one prompt per line") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompts.path: {file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts.path: {file} is empty; expected one prompt per line")
    return prompts


def prompt_batch(
    prompts: list[str],
    iteration: int,
    *,
    per_iteration: int,
    group_size: int,
    seed: int,
    same_initial_noise: bool = True,
) -> PromptBatch:
    """Choose the prompts and seeds of one iteration; a function of (seed, iteration) alone, so a run can resume.

    Args:
        prompts: all prompts; each epoch is a new permutation of them.
        iteration: 0-based.
        per_iteration: B.
        group_size: G.
        seed: of the run.
        same_initial_noise: give the samples of a group one initial noise.

    Returns:
        N = B * G prompts with their seeds.
    """
    first = iteration * per_iteration
    chosen: list[int] = []
    for position in range(first, first + per_iteration):
        epoch, place = divmod(position, len(prompts))
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen.append(int(order[place]))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) ^ 0x9E3779B9)
    seeds = torch.randint(0, _SEED_RANGE, (per_iteration, group_size), generator=generator)
    initial = seeds[:, :1].expand_as(seeds) if same_initial_noise else seeds
    indices = [index for index in chosen for _ in range(group_size)]
    return PromptBatch(
        [prompts[index] for index in indices], indices, seeds.flatten().tolist(), initial.flatten().tolist(), group_size
    )
