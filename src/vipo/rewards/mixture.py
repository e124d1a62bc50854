"""One or several rewards of a run: scored together, checked, dropped by group where one has failed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..types import NonFiniteError
from . import Reward, Scores, score

log = logging.getLogger(__name__)


class RewardMixture:
    """Several rewards by name, in the order of their weights.

    Args:
        rewards: by name.
        weights: by name, any sign but not 0; default 1 each.
        device: where the rewards want their frames, if not where these are.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.rewards, self.device = dict(rewards), device
        self.weights = torch.tensor([1.0 if weights is None else weights[name] for name in self.rewards])

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Scores:
        """Score frames (N, F, 3, Y, X) for N prompts.

        Returns:
            `rewards` (R, N), and the `credit` of the one reward that returned one.

        Raises:
            ValueError: a reward returned something else, or several returned a credit map.
        """
        found = {name: score(reward, frames, prompts, name, self.device) for name, reward in self.rewards.items()}
        credits = {name: scores.credit for name, scores in found.items() if scores.credit is not None}
        if len(credits) > 1:
            raise ValueError(f"reward: expected a credit map of one reward at most, got {', '.join(credits)}")
        return Scores(torch.stack([scores.rewards for scores in found.values()]), next(iter(credits.values()), None))

    def means(self, rewards: Tensor) -> dict[str, Tensor]:
        """Mean of each reward over the samples of (R, N), by name, where there are several."""
        return dict(zip(self.rewards, rewards.mean(1), strict=True)) if len(self.rewards) > 1 else {}

    def keep(
        self,
        rewards: Tensor,
        prompts: Sequence[str],
        group_size: int,
        on_failure: str,
        *,
        max_dropped: float = 1.0,
    ) -> Tensor:
        """Find the groups without a failure.

        Args:
            rewards: (R, N), NaN or infinite where a reward has failed.
            prompts: N.
            group_size: G.
            on_failure: "stop", or "drop" to do without the group of a failure.
            max_dropped: largest share of the groups that may be dropped; at least one must stay.

        Returns:
            Which samples are kept: (N,) bool.

        Raises:
            NonFiniteError: a reward has failed and on_failure is "stop", or in too many groups.
        """
        bad = ~torch.isfinite(rewards)
        if bool(bad.any()):
            row, first = bad.nonzero()[0].tolist()
            message = (
                f"reward {list(self.rewards)[row]!r} returned {rewards[row, first].item()} for sample {first} of "
                f"{len(prompts)}, prompt {prompts[first]!r}"
            )
            if on_failure == "stop":
                hint = "set reward.on_failure=drop to drop such groups and go on"
                raise NonFiniteError(f"{message}; {hint}", "rewards", rewards)
            log.warning("%s: its group is dropped", message)
        failed = bad.view(len(bad), -1, group_size).any(2)  # (R, B)
        dropped = failed.any(0)
        count, groups = int(dropped.sum()), len(dropped)
        if count == groups or count / groups > max_dropped:
            found = [f"{name!r} in {n}" for name, n in zip(self.rewards, failed.sum(1).tolist(), strict=True) if n]
            excess = "all of them" if count == groups else f"more than reward.max_dropped={max_dropped:g} allows"
            message = (
                f"reward {' and '.join(found)} of {groups} groups is NaN or infinite: {count} would be dropped, "
                f"{excess}; mend the reward (a server that is down, a model that overflows) or raise reward.max_dropped"
            )
            raise NonFiniteError(message, "rewards", rewards)
        return (~dropped).repeat_interleave(group_size)
