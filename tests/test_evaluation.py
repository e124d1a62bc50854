"""Bootstrap intervals and paired differences."""

import numpy as np
import pytest

from vipo.evaluation import bootstrap_mean, paired_difference


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
