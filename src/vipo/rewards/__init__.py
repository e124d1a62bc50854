"""Rewards: a reward is any callable (frames, prompts) -> (N,); higher is better.

Named ones are in REWARDS; `package.module:function` names anybody's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..types import check_shape
from .preference import ClipPreference
from .rules import redness


class Reward(Protocol):
    """A scorer of samples against their prompts."""

    def __call__(self, frames: Tensor, prompts: Sequence[str], /) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N,), higher is better."""
        ...


REWARDS: dict[str, Callable[[torch.device], Reward]] = {
    "nano": lambda device: ClipPreference.from_pretrained("nano", device=device),
    "redness": lambda device: redness,
}
"""Named rewards: device -> reward."""


def load_reward(name: str, device: torch.device | str = "cpu") -> Reward:
    """Find a reward by its name or as "package.module:function".

    Raises:
        ValueError: no such reward, module or function.
    """
    if name in REWARDS:
        return REWARDS[name](torch.device(device))
    module, separator, function = name.partition(":")
    if not separator:
        raise ValueError(
            f"reward.name: unknown reward {name!r}; expected {', '.join(REWARDS)} or package.module:function"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ValueError(
            f"reward.name: cannot import {module!r} for {name!r}: {error}; is it on PYTHONPATH?"
        ) from error
    except AttributeError:
        raise ValueError(f"reward.name: module {module!r} has no {function!r}") from None
    if not callable(found):
        raise ValueError(f"reward.name: {name!r} is not callable; expected a function (frames, prompts) -> (N,)")
    reward: Reward = found
    return reward


@torch.no_grad()
def score(reward: Reward, frames: Tensor, prompts: Sequence[str]) -> Tensor:
    """Apply a reward and check what comes back: (N,) float32 on the frames' device, maybe not finite.

    Raises:
        ValueError: the reward returned anything but N numbers.
    """
    check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
    rewards = torch.as_tensor(reward(frames, prompts))
    if tuple(rewards.shape) != (len(prompts),):
        raise ValueError(f"reward: expected one number per sample, shape ({len(prompts)},), got {tuple(rewards.shape)}")
    return rewards.to(frames.device, torch.float32)
