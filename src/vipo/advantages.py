"""Group advantages and pixel advantages. Pure functions; everything here is detached from the policy."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .types import check_shape, require_finite


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    std: Literal["population", "sample"] = "population",
    eps: float = 1e-4,
    clip: float | None = 5.0,
) -> Tensor:
    """Normalise rewards within each group (ViPO Eq. 1; docs/equations.md A1).

        A_i = (r_i - mean of its group) / (std of its group + eps), clamped to [-clip, clip]

    A constant group has advantage 0 exactly: it neither helps nor harms. Count such groups with `constant_groups`.

    Args:
        rewards: (N,), samples of a group adjacent; N a multiple of `group_size`.
        group_size: G >= 2.
        std: "population" divides by G, "sample" by G - 1.
        eps: added to the std, in reward units.
        clip: bound of the result, in standard deviations; None for no bound.

    Returns:
        (N,) float32, zero mean in every group (before clamping).

    Raises:
        ValueError: group_size < 2, N not a multiple of it, or an unknown `std`.
        FloatingPointError: a reward is not finite.
    """
    grouped = _grouped(rewards, group_size)
    if std not in ("population", "sample"):
        raise ValueError(f"std: expected population or sample, got {std!r}")
    centred = grouped - grouped.mean(1, keepdim=True)
    spread = grouped.std(1, keepdim=True, correction=0 if std == "population" else 1)
    constant = _constant(grouped)[:, None]
    advantages = torch.where(constant, torch.zeros_like(centred), centred / (spread + eps))
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return advantages.flatten()


def reward_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    std: Literal["population", "sample"] = "population",
    clip: float | None = 5.0,
) -> Tensor:
    """Group advantages of R rewards, each by itself: (R, N) -> (R, N); see `group_advantages`."""
    check_shape("rewards", rewards, "R N")
    return torch.stack([group_advantages(row, group_size, std=std, clip=clip) for row in rewards])


def weighted_advantages(
    rewards: Tensor,
    weights: Tensor,
    group_size: int,
    *,
    combine: Literal["advantages", "rewards"] = "advantages",
    std: Literal["population", "sample"] = "population",
    clip: float | None = 5.0,
) -> Tensor:
    """Combine R rewards (GDPO, arXiv 2601.05242, without its batch rescaling; ViPO's VQ and MQ; docs/equations.md A3).

        advantages:  A = sum_r w_r A_r,  each A_r normalised within its groups
        rewards:     A = the group advantage of sum_r w_r r_r

    Args:
        rewards: (R, N).
        weights: (R,).
        group_size: G >= 2.
        combine: what is summed.
        std: see `group_advantages`, as for the next.
        clip: bound of each normalised advantage, in standard deviations.

    Returns:
        (N,) float32.
    """
    check_shape("rewards", rewards, "R N", check_shape("weights", weights, "R"))
    weights = weights.to(rewards.device, torch.float32)
    if combine == "rewards":
        return group_advantages(weights @ rewards.float(), group_size, std=std, clip=clip)
    if combine != "advantages":
        raise ValueError(f"combine: expected advantages or rewards, got {combine!r}")
    return weights @ reward_advantages(rewards, group_size, std=std, clip=clip)


def constant_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Count the groups whose rewards are all equal, and which therefore teach nothing: 0-dim int64."""
    return _constant(_grouped(rewards, group_size)).sum()


def _constant(grouped: Tensor) -> Tensor:
    return grouped.amax(1) == grouped.amin(1)


def _grouped(rewards: Tensor, group_size: int) -> Tensor:
    check_shape("rewards", rewards, "N")
    if group_size < 2:
        raise ValueError(f"group_size: expected >= 2, got {group_size}: a group of one has no spread to compare with")
    if len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"rewards: expected a multiple of group_size = {group_size} samples, got {len(rewards)}")
    require_finite("rewards", rewards)
    return rewards.detach().to(torch.float32).view(-1, group_size)


def pixel_advantages(advantages: Tensor, maps: Tensor) -> Tensor:
    """Spread each sample's advantage over the latent grid (ViPO Eq. 3; docs/equations.md A2).

        A_i[p] = M_i[p] * A_i

    Args:
        advantages: (N,).
        maps: (N, T, H, W), >= 0; mean 1 per sample preserves the advantage's total.

    Returns:
        (N, T, H, W) float32, detached.

    Raises:
        ValueError: the shapes disagree, or a map has a negative value.
        FloatingPointError: a map is not finite.
    """
    check_shape("maps", maps, "N T H W", check_shape("advantages", advantages, "N"))
    maps = maps.detach().to(torch.float32)
    require_finite("maps", maps)
    if bool((maps < 0).any()):
        raise ValueError(
            f"maps: expected values >= 0, got a minimum of {maps.min():.3g}; a negative weight inverts the reward"
        )
    return advantages.detach().to(torch.float32)[:, None, None, None] * maps


def mixed_pixel_advantages(advantages: Tensor, maps: Tensor) -> Tensor:
    """Spread each reward's advantage by a map of its own (docs/equations.md A4).

        A_i[p] = sum_r w_r A_i^r M_i^r[p]

    Args:
        advantages: w_r A_i^r, (R, N).
        maps: (R, N, T, H, W), >= 0.

    Returns:
        (N, T, H, W) float32, detached.

    Raises:
        ValueError, FloatingPointError: as `pixel_advantages`.
    """
    check_shape("maps", maps, "R N T H W", check_shape("advantages", advantages, "R N"))
    spread = pixel_advantages(advantages.flatten(), maps.flatten(0, 1))
    return spread.view(maps.shape).sum(0)
