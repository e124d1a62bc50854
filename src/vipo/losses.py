"""The clipped surrogate of GRPO at position or sample level, and the KL to the reference weights. Pure functions."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .types import check_shape

Level = Literal["position", "sample"]
ChannelReduction = Literal["mean", "sum"]


class LossStats(NamedTuple):
    """Detached 0-dim tensors of one `policy_loss`.

    Attributes:
        clip_fraction: share of ratios for which the clipped term is the active one (their gradient is zero).
        approx_kl: mean of (ratio - 1) - log ratio, an estimate of KL(old || new) that is >= 0.
        ratio_mean: mean ratio.
        ratio_max: largest ratio.
    """

    clip_fraction: Tensor
    approx_kl: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float | tuple[float, float],
    level: Level = "position",
    channel_reduction: ChannelReduction = "mean",
) -> tuple[Tensor, LossStats]:
    """Clipped surrogate, to be minimised (ViPO Eq. 4; docs/equations.md O1).

        L = -mean over samples and positions of min(rho A, clip(rho, 1 - low, 1 + high) A)

    position: rho[i, p] = exp(reduce over channels of log_probs - old_log_probs at p), A[i, p] as given: ViPO.
    sample:   rho[i] = exp(reduce over channels, then mean over positions), A[i] = mean over p of A[i, p]: scalar GRPO
              (and what the released FLUX code does with a map). A map then acts through its mean only.

    Args:
        log_probs: (N, C, T, H, W), per element, nats; carries the gradient.
        old_log_probs: same shape, of the rollout; detached here.
        advantages: (N, T, H, W) pixel advantages; detached here.
        clip_range: half-width of the clip, or (low, high). A local ratio moves sqrt(T*H*W) times as far as a sample's
            mean: position level needs a range 100..1000 times scalar GRPO's 1e-4 (docs/log.md).
        level: where the ratio is taken.
        channel_reduction: "mean" or "sum" over the C channels of a position, before the ratio.

    Returns:
        The 0-dim loss and its statistics.

    Raises:
        ValueError: shapes disagree, or an option is unknown or out of range.
    """
    sizes = check_shape("log_probs", log_probs, "N C T H W")
    check_shape("old_log_probs", old_log_probs, "N C T H W", sizes)
    check_shape("advantages (latents and map must share T, H, W)", advantages, "N T H W", sizes)
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if not (0 < low < 1 and high > 0):
        raise ValueError(f"clip_range: expected 0 < low < 1 and high > 0, got ({low}, {high})")
    log_ratio = _reduce_channels(log_probs - old_log_probs.detach(), channel_reduction)
    advantages = advantages.detach()
    if level == "sample":
        log_ratio, advantages = log_ratio.mean((1, 2, 3)), advantages.mean((1, 2, 3))
    elif level != "position":
        raise ValueError(f"level: expected position or sample, got {level!r}")
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    with torch.no_grad():
        clipped = ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))
        stats = LossStats(clipped.float().mean(), (ratio - 1 - log_ratio).mean(), ratio.mean(), ratio.max())
    return -surrogate.mean(), stats


def _reduce_channels(values: Tensor, reduction: ChannelReduction) -> Tensor:
    if reduction == "mean":
        return values.mean(1)
    if reduction == "sum":
        return values.sum(1)
    raise ValueError(f"channel_reduction: expected mean or sum, got {reduction!r}")


def reference_kl(mean: Tensor, reference_mean: Tensor, std: float) -> Tensor:
    """KL of a step from the same step under the reference weights (docs/equations.md O2).

        KL(N(mean, std^2) || N(reference_mean, std^2)) = (mean - reference_mean)^2 / (2 std^2), per element

    Args:
        mean: any shape; carries the gradient.
        reference_mean: same shape; detached here.
        std: of both, > 0.

    Returns:
        Same shape, nats, >= 0.
    """
    return (mean - reference_mean.detach()).square() / (2 * std**2)
