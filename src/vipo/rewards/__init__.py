"""Rewards: a reward is any callable (frames, prompts) -> (N,), higher is better; it may add a credit map.

Named ones are in REWARDS; `package.module:function` names anybody's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..named import import_function
from ..nano import assets_path
from ..types import check_shape
from .judge import JudgeReward as JudgeReward
from .preference import ClipPreference
from .remote import RemoteReward as RemoteReward
from .rules import redness


class Reward(Protocol):
    """A scorer of samples against their prompts."""

    def __call__(self, frames: Tensor, prompts: Sequence[str], /) -> Tensor | tuple[Tensor, Tensor]:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N,), higher is better.

        A reward that knows where it looked returns (scores (N,), credit (N, F, h, w) >= 0), for map.source=reward.
        """
        ...


class Scores(NamedTuple):
    """What a reward gave: `rewards` (N,) float32, maybe not finite, and `credit` (N, F, h, w) float32 or None."""

    rewards: Tensor
    credit: Tensor | None

    def credit_of(self, kept: Tensor) -> Tensor | None:
        """Return the credit with ones for the samples that are not kept (N,): a dropped sample has no say."""
        return None if self.credit is None else torch.where(kept.view(-1, 1, 1, 1), self.credit, 1)


REWARDS: dict[str, Callable[[torch.device], Reward]] = {
    "nano": lambda device: ClipPreference.from_pretrained("nano", device=device),
    "nano_vq": lambda device: ClipPreference.from_pretrained(assets_path("scorer_vq"), device=device),
    "nano_mq": lambda device: ClipPreference.from_pretrained(assets_path("scorer_mq"), device=device),
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
    if ":" not in name:
        raise ValueError(
            f"reward.name: unknown reward {name!r}; expected {', '.join(REWARDS)} or package.module:function"
        )
    reward: Reward = import_function("reward.name", name, "(frames, prompts) -> (N,)")
    return reward


@torch.no_grad()
def score(reward: Reward, frames: Tensor, prompts: Sequence[str]) -> Scores:
    """Apply a reward and check what comes back, on the frames' device; the rewards may not be finite.

    Raises:
        ValueError: the reward returned anything but N numbers, or these and a credit map (N, F, h, w).
    """
    sizes = check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
    found = reward(frames, prompts)
    values, credit = found if isinstance(found, tuple) else (found, None)
    rewards = torch.as_tensor(values)
    if tuple(rewards.shape) != (len(prompts),):
        raise ValueError(f"reward: expected one number per sample, shape ({len(prompts)},), got {tuple(rewards.shape)}")
    if credit is not None:
        credit = torch.as_tensor(credit)
        check_shape("reward's credit map", credit, "N F h w", {"N": sizes["N"], "F": sizes["F"]})
        credit = credit.to(frames.device, torch.float32)
    return Scores(rewards.to(frames.device, torch.float32), credit)
