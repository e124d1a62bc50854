"""vipo.psm.agreement: float64 NumPy and scikit-learn, identities, ties and edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from vipo.psm.agreement import METRICS, agreement


def drawn(samples: int = 5, shape: tuple[int, ...] = (9, 7), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random maps and soft random masks."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(samples, *shape, generator=generator) ** 2
    return maps, (3 * torch.rand(samples, *shape, generator=generator) - 1).clamp(0, 1)


def oracle(values: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """One sample in float64, written as the paper has it."""
    values, mask = values.astype(np.float64).ravel(), mask.astype(np.float64).ravel()
    subject, p, q = mask > 0.5, values / values.sum(), mask / mask.sum()
    eps = np.finfo(np.float64).eps
    return {
        "AUC": roc_auc_score(subject, values),
        "NSS": ((values - values.mean()) / values.std())[subject].mean(),
        "CC": np.corrcoef(values, mask)[0, 1],
        "KL": (q * np.log(eps + q / (eps + p))).sum(),
        "SIM": np.minimum(p, q).sum(),
    }


@pytest.mark.parametrize("shape", [(9, 7), (4, 6, 5), (31,)])
@pytest.mark.parametrize("levels", [None, 4])
def test_equals_scikit_learn_and_numpy(shape: tuple[int, ...], levels: int | None) -> None:
    maps, masks = drawn(shape=shape)
    if levels:  # many ties, and zeros on the subject
        maps = (maps * levels).floor() / levels
    found = agreement(maps, masks)
    assert tuple(found) == METRICS
    for sample in range(len(maps)):
        for name, expected in oracle(maps[sample].numpy(), masks[sample].numpy()).items():
            assert found[name].shape == (5,) and found[name].dtype == torch.float64
            np.testing.assert_allclose(found[name][sample], expected, rtol=1e-10, atol=1e-12, err_msg=name)


def test_the_mask_itself_agrees_perfectly() -> None:
    _, masks = drawn()
    hard = (masks > 0.5).float()
    found = agreement(hard, hard)
    for name, expected in (("AUC", 1.0), ("CC", 1.0), ("KL", 0.0), ("SIM", 1.0)):
        np.testing.assert_allclose(found[name], expected, atol=1e-12)
    share = hard.double().mean((1, 2))
    np.testing.assert_allclose(found["NSS"], ((1 - share) / share).sqrt())  # of a two-valued map
    soft = agreement(masks, masks)
    np.testing.assert_allclose(soft["KL"], 0, atol=1e-12)
    np.testing.assert_allclose(soft["SIM"], 1)
    np.testing.assert_allclose(soft["CC"], 1)


def test_turning_the_map_over_turns_the_metrics_over() -> None:
    maps, masks = drawn()
    found, turned = agreement(maps, masks), agreement(maps.amax((1, 2), keepdim=True) - maps, masks)
    np.testing.assert_allclose(turned["AUC"], 1 - found["AUC"], atol=1e-12)
    # max - M is rounded in float32
    np.testing.assert_allclose(turned["NSS"], -found["NSS"], atol=1e-6)
    np.testing.assert_allclose(turned["CC"], -found["CC"], atol=1e-6)


def test_scale_does_not_matter_and_neither_does_the_batch() -> None:
    maps, masks = drawn()
    found, scaled = agreement(maps, masks), agreement(maps * 8, masks)
    for name in METRICS:
        torch.testing.assert_close(scaled[name], found[name])
        alone = [agreement(maps[i : i + 1], masks[i : i + 1])[name] for i in range(len(maps))]
        torch.testing.assert_close(torch.cat(alone), found[name])


def test_ties_count_half() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    for values, expected in (
        ([2.0, 1, 1, 0], (1 + 1 + 0.5 + 1) / 4),
        ([1.0, 1, 1, 0], (0.5 + 1 + 0.5 + 1) / 4),
        ([0.0, 0, 1, 1], 0.0),
        ([1.0, 1, 0, 0], 1.0),
    ):
        assert agreement(torch.tensor([values]), mask)["AUC"].tolist() == [expected]


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_a_constant_map_finds_nothing(value: float) -> None:
    masks = torch.zeros(1, 8, 8)
    masks[:, :2, :4] = 1  # an eighth
    found = agreement(torch.full((1, 8, 8), value), masks)
    assert {name: numbers.tolist() for name, numbers in found.items()} == {
        "AUC": [0.5],
        "NSS": [0.0],
        "CC": [0.0],
        "KL": [pytest.approx(np.log(8))],
        "SIM": [pytest.approx(1 / 8)],
    }


def test_rounding_noise_on_a_constant_map_is_no_map() -> None:
    masks = torch.zeros(1, 8, 8)
    masks[:, :4] = 1
    noisy = torch.ones(1, 8, 8)
    noisy[:, 2:] -= 2 * torch.finfo(torch.float32).eps
    assert agreement(noisy, masks)["AUC"].tolist() == [0.5]
    assert agreement(noisy.double(), masks)["AUC"].tolist() != [0.5]  # in float64 the same step is no rounding


def test_a_map_of_zeros_on_the_subject_costs_a_finite_kl() -> None:
    masks = torch.tensor([[1.0, 0.0, 0.0]])
    found = agreement(torch.tensor([[0.0, 1.0, 1.0]]), masks)
    assert found["KL"].tolist() == [pytest.approx(52 * np.log(2))] and found["SIM"].tolist() == [0.0]


def test_many_positions_keep_their_ranks() -> None:
    """In float32, a sum of ranks beyond 2^24 would be rounded."""
    maps, masks = drawn(1, (60_000,))
    area = roc_auc_score(masks[0] > 0.5, maps[0])
    assert agreement(maps, masks)["AUC"].tolist() == [pytest.approx(area, rel=0, abs=1e-13)]


@pytest.mark.parametrize(
    ("sample", "map_value", "mask_value", "message"),
    [
        (0, 1.0, 0.0, "sample 0: mask: empty"),
        (1, 1.0, 0.5, "sample 1: mask: empty: no position is above 1/2"),
        (3, 1.0, 0.6, "sample 3: mask: full: every position is above 1/2"),
        (2, 1.0, 1.5, r"sample 2: mask: expected values in \[0, 1\]"),
        (2, 1.0, float("nan"), r"sample 2: mask: expected values in \[0, 1\]"),
        (1, -0.1, None, "sample 1: map: expected finite values >= 0"),
        (4, float("nan"), None, "sample 4: map: expected finite"),
        (4, float("inf"), None, "sample 4: map: expected finite"),
    ],
)
def test_unusable_samples_are_named(sample: int, map_value: float, mask_value: float | None, message: str) -> None:
    maps, masks = drawn()
    maps[sample] = map_value
    masks[sample] = masks[sample] if mask_value is None else mask_value
    with pytest.raises(ValueError, match=message):
        agreement(maps, masks)


def test_the_first_unusable_sample_is_named() -> None:
    maps, masks = drawn()
    maps[3, 0, 0], masks[1] = -1, 0
    with pytest.raises(ValueError, match="sample 1: mask: empty"):
        agreement(maps, masks)


def test_wrong_shapes_are_refused() -> None:
    for maps, masks in (((2, 3, 4), (2, 3, 5)), ((3,), (3,)), ((2, 0), (2, 0)), ((2, 3, 4), (2, 12))):
        with pytest.raises(ValueError, match="expected one shape"):
            agreement(torch.ones(maps), torch.ones(masks))
