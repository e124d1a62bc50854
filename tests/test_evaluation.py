"""Bootstrap intervals and paired differences."""

import numpy as np
import pytest
from scipy.stats import binomtest

from vipo.evaluation import bootstrap_mean, compare_groups, paired_difference, sign_test


def test_interval_covers_the_mean_at_its_nominal_rate():
    rng = np.random.default_rng(0)
    hits = [
        entry["low"] <= 1.0 <= entry["high"] for entry in (bootstrap_mean(rng.normal(1, 2, 60)) for _ in range(200))
    ]
    assert 0.90 <= np.mean(hits) <= 0.985


def test_interval_shrinks_and_nan_does_not_count():
    rng = np.random.default_rng(1)
    small, large = bootstrap_mean(rng.normal(size=50)), bootstrap_mean(rng.normal(size=5000))
    assert large["high"] - large["low"] < 0.2 * (small["high"] - small["low"])
    assert bootstrap_mean(np.array([1.0, np.nan, 3.0]))["mean"] == 2.0
    assert bootstrap_mean(np.array([np.nan])) == {"mean": None, "low": None, "high": None}


@pytest.mark.parametrize(("higher", "rate"), [(True, 0.625), (False, 0.375)])
def test_win_rate_counts_ties_half_and_knows_the_direction(higher, rate):
    new, old = np.array([1.0, 2.0, 3.0, 4.0, np.nan]), np.array([0.0, 2.0, 5.0, 1.0, 0.0])
    entry = paired_difference(new, old, higher_is_better=higher)
    assert entry["win_rate"] == rate
    assert entry["mean"] == pytest.approx(0.5)


def test_pairing_removes_the_spread_between_prompts():
    base = np.random.default_rng(2).normal(0, 10, 80)
    entry = paired_difference(base + 0.1, base)
    assert entry["low"] == pytest.approx(0.1) and entry["high"] == pytest.approx(0.1)


@pytest.mark.parametrize(("better", "worse", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (8, 2, 0.109375)])
def test_sign_test_by_hand(better, worse, p):
    assert sign_test(better, worse) == sign_test(worse, better) == p


@pytest.mark.parametrize("n", [1, 2, 7, 30, 101, 1632])
def test_sign_test_against_scipy(n):
    for better in {0, n // 3, n // 2, (n + 1) // 2, n}:
        assert sign_test(better, n - better) == pytest.approx(binomtest(better, n).pvalue, rel=1e-9)


def test_prompts_are_resampled_and_not_their_samples():
    rng = np.random.default_rng(3)
    base, lift = rng.normal(size=(40, 1)), rng.normal(0.2, 1, (40, 1))
    one = compare_groups(base + lift, base)
    four = compare_groups(np.repeat(base + lift, 4, 1), np.repeat(base, 4, 1))  # copies say nothing more
    assert four["difference"] == pytest.approx(one["difference"])
    assert one["difference"]["mean"] == pytest.approx(lift.mean())
    assert one["base"]["mean"] == pytest.approx(base.mean())
    assert one["trained"]["mean"] == pytest.approx((base + lift).mean())
    assert one["sign_test"]["better"] == (lift > 0).sum()


def test_groups_by_hand():
    base = np.array([[1.0, 3.0], [2.0, np.nan], [np.nan, 1.0], [4.0, 4.0]])
    trained = np.array([[2.0, 4.0], [1.0, 9.0], [1.0, np.inf], [5.0, 3.0]])
    found = compare_groups(trained, base)
    np.testing.assert_array_equal(found["per_prompt"]["difference"], [1.0, -1.0, np.nan, 0.0])
    np.testing.assert_array_equal(found["per_prompt"]["base"], [2.0, 2.0, np.nan, 4.0])
    assert found["sign_test"] == {"better": 1, "worse": 1, "equal": 1, "p": 1.0}
    assert (found["failed"], found["difference"]["mean"], found["difference"]["win_rate"]) == (3, 0.0, 0.5)
