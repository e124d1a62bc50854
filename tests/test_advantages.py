"""Group and pixel advantages: literal numbers, float64 oracle, identities, edge cases."""

import numpy as np
import pytest
import torch

from vipo.advantages import constant_groups, group_advantages, pixel_advantages, weighted_advantages


def test_literal_numbers():
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0])
    expected = torch.tensor([-1 / 1.0001, 1 / 1.0001, 0, 0])
    torch.testing.assert_close(group_advantages(rewards, 2), expected)


@pytest.mark.parametrize("std", ["population", "sample"])
@pytest.mark.parametrize("seed", range(3))
def test_matches_the_float64_oracle(std, seed):
    rewards = np.random.default_rng(seed).normal(size=(5, 6))
    spread = rewards.std(1, ddof=0 if std == "population" else 1, keepdims=True)
    expected = (rewards - rewards.mean(1, keepdims=True)) / (spread + 1e-4)
    ours = group_advantages(torch.tensor(rewards.ravel()), 6, std=std, clip=None)
    np.testing.assert_allclose(ours.numpy(), expected.ravel(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.view(5, 6).sum(1), torch.zeros(5), atol=1e-5, rtol=0)


def test_clip_bounds_an_outlier():
    rewards = torch.zeros(64)
    rewards[0] = 100.0
    assert group_advantages(rewards, 64, clip=None)[0] > 7
    assert group_advantages(rewards, 64, clip=5.0)[0] == 5.0


def test_constant_groups_are_zero_and_counted():
    rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 3.0, 7.0, 7.0, 7.0])
    assert group_advantages(rewards, 3)[[0, 1, 2, 6, 7, 8]].abs().max() == 0
    assert constant_groups(rewards, 3) == 2


def test_advantages_do_not_change_with_scale_or_shift_of_the_reward():
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    base = group_advantages(rewards, 4, eps=0.0)
    torch.testing.assert_close(group_advantages(rewards * 7 + 3, 4, eps=0.0), base, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rewards", "size", "message"),
    [
        (torch.zeros(4), 1, "group_size: expected >= 2, got 1"),
        (torch.zeros(5), 2, "multiple of group_size = 2 samples, got 5"),
        (torch.zeros(0), 2, "got 0"),
        (torch.zeros(2, 2), 2, "wrong number of dimensions"),
    ],
)
def test_bad_shapes_are_refused(rewards, size, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, size)


def test_nan_reward_is_refused_by_index():
    with pytest.raises(FloatingPointError, match=r"rewards is not finite: first bad element at index \[2\]"):
        group_advantages(torch.tensor([0.0, 1.0, float("nan"), 2.0]), 2)


def test_unknown_std_is_refused():
    with pytest.raises(ValueError, match="std: expected population or sample"):
        group_advantages(torch.zeros(2), 2, std="biased")


def test_pixel_advantages_spread_and_keep_the_total():
    maps = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    maps = maps / maps.mean((1, 2, 3), keepdim=True)
    advantages = torch.tensor([-2.0, 0.0, 1.5])
    spread = pixel_advantages(advantages, maps)
    torch.testing.assert_close(spread, torch.einsum("n,nthw->nthw", advantages, maps))
    torch.testing.assert_close(spread.mean((1, 2, 3)), advantages)


def test_pixel_advantages_refuse_bad_maps():
    with pytest.raises(ValueError, match="expected values >= 0"):
        pixel_advantages(torch.zeros(1), -torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="N = 2"):
        pixel_advantages(torch.zeros(2), torch.ones(1, 1, 2, 2))
    with pytest.raises(FloatingPointError, match="maps is not finite"):
        pixel_advantages(torch.zeros(1), torch.full((1, 1, 2, 2), float("inf")))


def test_several_rewards_are_normalised_apart_or_summed():
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([100.0, 0.0, 0.0, 100.0])
    rewards, weights = torch.stack([first, second]), torch.tensor([1.0, 0.5])
    apart = weighted_advantages(rewards, weights, 2)
    expected = group_advantages(first, 2) + 0.5 * group_advantages(second, 2)
    torch.testing.assert_close(apart, expected, rtol=0, atol=1e-6)
    assert apart.tolist() == pytest.approx([-0.5, 0.5, -1.5, 1.5], abs=1e-3)  # each reward has a say of its weight
    summed = weighted_advantages(rewards, weights, 2, combine="rewards")
    assert summed.tolist() == pytest.approx(
        [1, -1, -1, 1], abs=1e-3
    )  # the one with the larger numbers drowns the other
    with pytest.raises(ValueError, match="combine: expected advantages or rewards, got 'both'"):
        weighted_advantages(rewards, weights, 2, combine="both")
    with pytest.raises(ValueError, match=r"rewards: expected shape \(R, N\) with R = 1"):
        weighted_advantages(rewards, weights[:1], 2)
