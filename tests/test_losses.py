"""The surrogate: float64 oracle, gradient reach of the map, equivalence with scalar GRPO, clipping, KL."""

import numpy as np
import pytest
import torch

from vipo.advantages import pixel_advantages
from vipo.losses import policy_loss, reference_kl

SHAPE = (4, 3, 2, 5, 6)  # N C T H W


def draw(seed, scale=0.05):
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(SHAPE, generator=g)
    return old + scale * torch.randn(SHAPE, generator=g), old, torch.randn(SHAPE[0], generator=g)


def maps_of_mean_one(seed):
    maps = torch.rand(SHAPE[0], *SHAPE[2:], generator=torch.Generator().manual_seed(seed))
    return maps / maps.mean((1, 2, 3), keepdim=True)


def gradient(log_probs, old, advantages, **options):
    leaf = log_probs.clone().requires_grad_(True)
    loss, stats = policy_loss(leaf, old, advantages, **{"clip_range": 0.2, **options})
    loss.backward()
    return leaf.grad, loss.detach(), stats


@pytest.mark.parametrize("level", ["position", "sample"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clip", [0.02, (0.01, 0.05)])
def test_matches_the_float64_oracle(level, reduction, clip):
    new, old, advantages = draw(0)
    spread = pixel_advantages(advantages, maps_of_mean_one(1))
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    ratio = getattr(np, reduction)((new - old).double().numpy(), 1)
    a = spread.double().numpy()
    if level == "sample":
        ratio, a = ratio.mean((1, 2, 3)), a.mean((1, 2, 3))
    ratio = np.exp(ratio)
    expected = -np.minimum(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a).mean()
    clipped = ((ratio > 1 + high) & (a > 0)) | ((ratio < 1 - low) & (a < 0))
    loss, stats = policy_loss(new, old, spread, clip_range=clip, level=level, channel_reduction=reduction)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert stats.clip_fraction.item() == pytest.approx(clipped.mean(), abs=1e-6)
    if level == "position":
        assert 0 < stats.clip_fraction < 1  # the oracle exercised both branches


def test_map_reaches_the_gradient_at_position_level_only():
    """Two maps of equal mean: different gradients at `position`, equal ones at `sample` (the released FLUX code)."""
    new, old, advantages = draw(0, scale=0.0)
    first, second = (pixel_advantages(advantages, maps_of_mean_one(seed)) for seed in (1, 2))
    a, b = (gradient(new, old, spread, level="position")[0] for spread in (first, second))
    assert (a - b).norm() > 0.3 * a.norm()
    a, b = (gradient(new, old, spread, level="sample")[0] for spread in (first, second))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ones_at_position_level_is_scalar_grpo_on_policy(reduction):
    new, old, advantages = draw(0, scale=0.0)
    ones = pixel_advantages(advantages, torch.ones(SHAPE[0], *SHAPE[2:]))
    position, *_ = gradient(new, old, ones, level="position", channel_reduction=reduction)
    sample, *_ = gradient(new, old, ones, level="sample", channel_reduction=reduction)
    torch.testing.assert_close(position, sample, rtol=1e-6, atol=1e-9)
    # and scalar GRPO is the plain policy gradient: A_i / (N C P) on every element, times C if channels are summed
    share = 1 / np.prod(SHAPE) * (SHAPE[1] if reduction == "sum" else 1)
    expected = -advantages[:, None, None, None, None].expand(SHAPE) * share
    torch.testing.assert_close(sample, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("level", ["position", "sample"])
def test_before_any_update_the_ratio_is_one_and_nothing_is_clipped(level):
    _, old, advantages = draw(0)
    spread = pixel_advantages(advantages, maps_of_mean_one(1))
    _, loss, stats = gradient(old, old, spread, level=level, clip_range=1e-6)
    assert stats.clip_fraction == 0
    assert stats.ratio_mean == stats.ratio_max == 1
    assert stats.approx_kl == 0
    torch.testing.assert_close(loss, -advantages.mean())


def test_clipped_positions_have_no_gradient():
    old = torch.zeros(1, 1, 1, 1, 4)
    new = torch.tensor([0.5, 0.5, -0.5, -0.5]).view(old.shape)  # ratios 1.65 and 0.61
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 1, 4)
    grad, _, stats = gradient(new, old, advantages)
    assert (grad.flatten() != 0).tolist() == [False, True, True, False]
    assert stats.clip_fraction == 0.5


def test_clip_range_may_be_asymmetric():
    old = torch.zeros(1, 1, 1, 1, 2)
    new = torch.full_like(old, 0.1)
    advantages = torch.ones(1, 1, 1, 2)
    assert gradient(new, old, advantages, clip_range=(0.05, 0.2))[2].clip_fraction == 0
    assert gradient(new, old, advantages, clip_range=(0.2, 0.05))[2].clip_fraction == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_range": 0.0}, "clip_range: expected 0 < low < 1"),
        ({"clip_range": (0.1, -1.0)}, "clip_range"),
        ({"level": "pixel"}, "level: expected position or sample"),
        ({"channel_reduction": "max"}, "channel_reduction: expected mean or sum"),
    ],
)
def test_unknown_options_are_refused(change, message):
    new, old, advantages = draw(0)
    with pytest.raises(ValueError, match=message):
        policy_loss(new, old, pixel_advantages(advantages, maps_of_mean_one(0)), **{"clip_range": 0.1, **change})


def test_latents_that_disagree_with_the_map_are_refused():
    new, old, advantages = draw(0)
    wrong = pixel_advantages(advantages, torch.ones(4, 2, 6, 5))
    with pytest.raises(ValueError, match=r"must share T, H, W.*H = 5, got \(4, 2, 6, 5\)"):
        policy_loss(new, old, wrong, clip_range=0.1)


def test_reference_kl_is_the_gaussian_kl():
    mean, reference = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.5, 2.0], requires_grad=True)
    kl = reference_kl(mean, reference, 0.5)
    a = torch.distributions.Normal(mean.detach(), 0.5)
    b = torch.distributions.Normal(reference.detach(), 0.5)
    torch.testing.assert_close(kl.detach(), torch.distributions.kl_divergence(a, b))
    kl.sum().backward()
    assert reference.grad is None
    assert mean.grad[0] < 0
