"""vipo.psm.allocation against SciPy and NumPy in float64, identities, and edge cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from feature_sets import GRID, POSITIONS, clear_spectrum
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from torch import Tensor

from vipo.psm.allocation import (
    COMBINATIONS,
    ORIENTATIONS,
    aggregate,
    blur_matrix,
    combine,
    flicker,
    map_statistics,
    normalise,
    orient,
    smooth,
)
from vipo.psm.pca import PrincipalComponents, principal_components


def blob_features(seed: int, side: int = 12) -> tuple[Tensor, Tensor]:
    """Features (4, side^2, 16) of a subject on a plain ground, and the subject's mask (4, 1, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(4, side, side, dtype=torch.bool)
    for sample, (row, column) in enumerate([(3, 3), (4, 5), (5, 4), (4, 4)]):
        mask[sample, row : row + 4, column : column + 4] = True
    ground, subject = torch.randn(2, 4, 1, 16, generator=generator)
    inside = mask.flatten(1)[..., None]
    noise = torch.randn(4, side * side, 16, generator=generator)
    return torch.where(inside, subject, ground) + 0.05 * noise, mask[:, None]


def flipped(components: PrincipalComponents, signs: tuple[int, ...]) -> PrincipalComponents:
    flips = torch.tensor(signs, dtype=components.projections.dtype)
    return components._replace(
        projections=components.projections * flips, loadings=components.loadings * flips[None, :, None]
    )


# ------------------------------------------------------------------------------------------------------- orientation


def oracle_orientation(rule: str, projections: np.ndarray, loadings: np.ndarray) -> np.ndarray:
    """One sample in NumPy: projections (F, h, w, K), loadings (K, D) -> S_j (F, h, w, K)."""
    frames, height, width, count = projections.shape
    maps = np.empty_like(projections)
    rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    ring = np.ones((height, width), bool)
    ring[1:-1, 1:-1] = False
    for j in range(count):
        z = projections[..., j] / projections[..., j].std()
        z = z * np.sign(loadings[j][np.abs(loadings[j]).argmax()])
        if rule == "energy":
            maps[..., j] = z**2
            continue
        if rule == "border_energy":
            for f in range(frames):
                maps[f, ..., j] = (z[f] - z[f][ring].mean()) ** 2
            continue
        sign = {
            "border": z[:, ~ring].mean() - z[:, ring].mean(),
            "skewness": (z**3).mean(),
            "centre": (z * np.exp(-(rows**2 + columns**2) / (2 * 0.5**2))).mean(),
            "library": -1.0,
        }[rule]
        z = z * np.sign(sign)
        maps[..., j] = (z - z.min()) / (z.max() - z.min())
    return maps


@pytest.mark.parametrize("rule", ORIENTATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_orientation_equals_the_oracle(rule: str, seed: int) -> None:
    components = principal_components(clear_spectrum(seed))
    maps = orient(components, GRID, rule)
    assert maps.min() >= 0 and maps.shape == (3, *GRID, 3)
    for sample in range(3):
        projections = components.projections[sample].view(*GRID, 3).numpy()
        expected = oracle_orientation(rule, projections, components.loadings[sample].numpy())
        np.testing.assert_allclose(maps[sample], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", ORIENTATIONS)
def test_the_signs_of_the_solver_change_no_map(rule: str) -> None:
    components = principal_components(clear_spectrum(7))
    # A component symmetric in its sign, so that every rule's evidence ties at 0.
    tie = torch.ones(POSITIONS, dtype=torch.float64)
    tie[::2] = -1
    components.projections[0, :, 2] = tie
    expected = orient(components, GRID, rule)
    for signs in itertools.product([1, -1], repeat=3):
        assert torch.equal(orient(flipped(components, signs), GRID, rule), expected), signs


def test_library_rule_is_the_released_codes_on_scikit_learn() -> None:
    features = clear_spectrum(8)
    maps = orient(principal_components(features), GRID, "library")
    for sample, single in enumerate(features.numpy()):
        scores = PCA(3, svd_solver="full").fit_transform(single)
        expected = (scores.max(0) - scores) / (scores.max(0) - scores.min(0))
        np.testing.assert_allclose(maps[sample].flatten(0, 2), expected, atol=1e-6)


def test_border_and_border_energy_literals() -> None:
    z = torch.tensor([[0.0, 0, 0], [0, 9, 0], [0, 0, 0]]) - 1  # mean 0, variance 8, border mean -1
    components = PrincipalComponents(z.reshape(1, 9, 1), torch.ones(1, 1), torch.tensor([[[1.0, 0]]]))
    centre = torch.zeros(1, 1, 3, 3, 1)
    centre[0, 0, 1, 1] = 1
    torch.testing.assert_close(orient(components, (1, 3, 3), "border"), centre)
    torch.testing.assert_close(orient(components, (1, 3, 3), "skewness"), centre)
    torch.testing.assert_close(orient(components, (1, 3, 3), "border_energy"), centre * 81 / 8)
    torch.testing.assert_close(orient(components, (1, 3, 3), "library"), 1 - centre)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("rule", [rule for rule in ORIENTATIONS if rule != "library"])
def test_a_central_subject_outweighs_its_background(rule: str, seed: int) -> None:
    features, mask = blob_features(seed)
    components = principal_components(features)
    maps = aggregate(orient(components, (1, 12, 12), rule), components.explained_variance_ratio)
    for sample in range(4):
        inside, outside = maps[sample][mask[sample]], maps[sample][~mask[sample]]
        assert inside.mean() > 3 * outside.mean(), (seed, sample)


def test_the_library_rule_puts_some_backgrounds_above_the_subject() -> None:
    """Why the other rules exist (PAPER section 4): this one follows the loadings, not the picture."""
    wrong = 0
    for seed in range(4):
        features, mask = blob_features(seed)
        components = principal_components(features)
        maps = aggregate(orient(components, (1, 12, 12), "library"), components.explained_variance_ratio)
        wrong += sum(int(maps[i][mask[i]].mean() < maps[i][~mask[i]].mean()) for i in range(4))
    assert 0 < wrong < 16


@pytest.mark.parametrize("rule", ["energy", "border_energy"])
def test_energy_maps_survive_a_rotation_of_the_components(rule: str) -> None:
    """With lambda_j weights they are squared distances in the subspace, so equal eigenvalues may mix."""
    generator = torch.Generator().manual_seed(9)
    basis = torch.linalg.qr(torch.randn(POSITIONS, 4, generator=generator, dtype=torch.float64)).Q
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    projections = (basis - basis.mean(0))[None, :, :3]
    maps = []
    for scores in (projections, projections @ rotation):
        variance = scores.square().sum(1)
        components = PrincipalComponents(scores, variance / 10, torch.eye(3, dtype=torch.float64)[None])
        maps.append(aggregate(orient(components, GRID, rule), components.explained_variance_ratio))
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ORIENTATIONS)
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 2, 2), (3, 1, 4)])
def test_orientation_of_grids_without_an_interior(rule: str, grid: tuple[int, int, int]) -> None:
    positions = grid[0] * grid[1] * grid[2]
    scores = torch.arange(positions, dtype=torch.float32).view(1, positions, 1)
    components = PrincipalComponents(scores - scores.mean(), torch.ones(1, 1), torch.ones(1, 1, 2))
    maps = orient(components, grid, rule)
    assert torch.isfinite(maps).all() and maps.min() >= 0


def test_orientation_errors() -> None:
    components = principal_components(clear_spectrum(0))
    with pytest.raises(ValueError, match="did you mean 'border_energy'"):
        orient(components, GRID, "border_enrgy")
    with pytest.raises(ValueError, match="projections"):
        orient(components, (2, 6, 6))


# ------------------------------------------------------------------------------------------- aggregation and smoothing


def test_aggregation_literals() -> None:
    component_maps = torch.tensor([1.0, 2.0, 4.0]).expand(2, 1, 1, 1, 3)
    ratio = torch.tensor([[0.5, 0.25, 0.125], [0.9, 0.0, 0.0]])
    for weighting, expected in {"variance": [1.5, 0.9], "mean": [7 / 3, 7 / 3], "first": [1.0, 1.0]}.items():
        got = aggregate(component_maps, ratio, weighting)
        torch.testing.assert_close(got, torch.tensor(expected).view(2, 1, 1, 1))
    with pytest.raises(ValueError, match="did you mean 'variance'"):
        aggregate(component_maps, ratio, "varianc")
    with pytest.raises(ValueError, match="K = 3"):
        aggregate(component_maps, ratio[:, :2])


@pytest.mark.parametrize("sigma", [0.5, 1, 2, 8])
@pytest.mark.parametrize(("height", "width"), [(1, 5), (4, 7), (16, 16)])
def test_smoothing_equals_scipy(sigma: float, height: int, width: int) -> None:
    maps = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(10))
    expected = gaussian_filter(maps.double().numpy(), sigma, mode="reflect", truncate=4.0, axes=(2, 3))
    np.testing.assert_allclose(smooth(maps, sigma), expected, rtol=1e-5)
    np.testing.assert_allclose(smooth(maps.double(), sigma), expected, rtol=1e-12)


def test_smoothing_identities() -> None:
    maps = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    assert torch.equal(smooth(maps, 0), maps)
    torch.testing.assert_close(smooth(maps, 1.5).mean((2, 3)), maps.mean((2, 3)), rtol=1e-9, atol=0)
    torch.testing.assert_close(blur_matrix(1, 3.0, maps), torch.ones(1, 1, dtype=torch.float64))


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf")])
def test_smoothing_rejects_impossible_widths(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma >= 0"):
        smooth(torch.ones(1, 1, 2, 2), sigma)


# ----------------------------------------------------------------------------------------------------- normalisation


def test_normalisation_literals() -> None:
    maps = torch.tensor([[0.0, 2.0, 6.0, 0.0], [1.0, 1.0, 3.0, 3.0]]).view(2, 2, 1, 2)  # T = 2: one mean per sample
    mean = torch.tensor([[0.0, 1.0, 3.0, 0.0], [0.5, 0.5, 1.5, 1.5]]).view(2, 2, 1, 2)
    minmax = torch.tensor([[0.0, 1 / 3, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).view(2, 2, 1, 2)
    torch.testing.assert_close(normalise(maps), mean)
    torch.testing.assert_close(normalise(maps, floor=0.2), 0.2 + 0.8 * mean)
    torch.testing.assert_close(normalise(maps, "minmax"), minmax)


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_mean_normalisation_has_mean_one_per_sample(scale: float, floor: float) -> None:
    maps = scale * torch.rand(5, 3, 8, 9, generator=torch.Generator().manual_seed(12)) ** 4
    got = normalise(maps, floor=floor)
    # Two float32 roundings of a mean over 216 values.
    torch.testing.assert_close(got.double().mean((1, 2, 3)), torch.ones(5, dtype=torch.float64), rtol=2e-7, atol=0)
    assert got.min() >= floor


@pytest.mark.parametrize("method", ["mean", "minmax"])
@pytest.mark.parametrize("value", [0.0, 0.1, 3e7])
def test_a_constant_map_is_all_ones(method: str, value: float) -> None:
    maps = torch.full((2, 3, 4, 5), value)
    assert torch.equal(normalise(maps, method), torch.ones_like(maps))
    jitter = maps * (1 + 1e-7 * torch.arange(5))  # rounding noise is no map either
    assert torch.equal(normalise(jitter, method), torch.ones_like(maps))


def test_a_constant_sample_beside_a_varying_one() -> None:
    maps = torch.tensor([[5.0, 5.0], [0.0, 4.0]]).view(2, 1, 1, 2)
    for method, second in {"mean": [0.0, 2.0], "minmax": [0.0, 1.0]}.items():
        torch.testing.assert_close(normalise(maps, method).view(2, 2), torch.tensor([[1.0, 1.0], second]))


def test_normalisation_errors() -> None:
    maps = torch.rand(1, 1, 2, 2)
    for floor in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="0 <= floor < 1"):
            normalise(maps, floor=floor)
    with pytest.raises(ValueError, match='need normalisation "mean"'):
        normalise(maps, "minmax", floor=0.1)
    with pytest.raises(ValueError, match="did you mean 'minmax'"):
        normalise(maps, "min_max")


def test_temperature_literals_and_limits() -> None:
    maps = torch.tensor([1.0, 4.0, 9.0, 16.0]).view(1, 1, 2, 2)
    torch.testing.assert_close(normalise(maps, temperature=2.0).flatten(), torch.tensor([0.4, 0.8, 1.2, 1.6]))
    share = torch.softmax(maps.flatten().log() / 0.5, 0)  # what the docstring says it is
    torch.testing.assert_close(normalise(maps, temperature=0.5).flatten() / 4, share)
    torch.testing.assert_close(normalise(maps, temperature=1e4), torch.ones_like(maps), rtol=0, atol=1e-3)
    assert normalise(1e30 * maps, temperature=1e-3).flatten().tolist() == [0, 0, 0, 4]
    floored = normalise(maps, temperature=2.0, floor=0.5).flatten()
    torch.testing.assert_close(floored, torch.tensor([0.7, 0.9, 1.1, 1.3]))
    for temperature in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature > 0"):
            normalise(maps, temperature=temperature)
    with pytest.raises(ValueError, match='temperature 2.0 need normalisation "mean"'):
        normalise(maps, "minmax", temperature=2.0)


# ------------------------------------------------------------------------------------------------------- combination


def test_combination_literals() -> None:
    first = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)  # mean one: .5, 1.5
    second = torch.tensor([6.0, 2.0]).view(1, 1, 1, 2)  # mean one: 1.5, .5
    expected = {
        "product": [0.75, 0.75],
        "max": [1.5, 1.5],
        "mean": [0.75, 1.25],  # weight .25
        "power": [0.5**0.75 * 1.5**0.25, 1.5**0.75 * 0.5**0.25],
    }
    assert set(expected) == set(COMBINATIONS)
    for method, values in expected.items():
        got = combine(first, second, method, 0.25)
        torch.testing.assert_close(got.flatten(), torch.tensor(values))


def test_a_second_map_that_says_nothing_changes_nothing() -> None:
    first = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(15))
    for nothing in (torch.zeros_like(first), torch.full_like(first, 7.0)):
        torch.testing.assert_close(normalise(combine(first, nothing, "product")), normalise(first))
        for method in ("mean", "power"):
            torch.testing.assert_close(combine(first, nothing, method, 0.0), normalise(first))
            torch.testing.assert_close(combine(first, nothing, method, 1.0), torch.ones_like(first))


def test_combination_errors() -> None:
    maps = torch.rand(1, 1, 2, 2)
    with pytest.raises(ValueError, match="did you mean 'product'"):
        combine(maps, maps, "prodct")
    with pytest.raises(ValueError, match="0 <= weight <= 1"):
        combine(maps, maps, "mean", 1.5)
    with pytest.raises(ValueError, match="second map"):
        combine(maps, torch.rand(1, 1, 2, 3))


# -------------------------------------------------------------------------------------------------------- statistics


def test_statistics_equal_numpy() -> None:
    maps = normalise(torch.rand(3, 2, 6, 8, generator=torch.Generator().manual_seed(13)) ** 3)
    got = map_statistics(maps)
    assert {name: value.shape for name, value in got.items()} == dict.fromkeys(got, torch.Size([]))
    reference = maps.double().numpy()
    share = reference.reshape(3, -1) / reference.reshape(3, -1).sum(1, keepdims=True)
    entropy = -(share * np.log(share)).sum(1).mean() / np.log(share.shape[1])
    ring = np.ones((6, 8), bool)
    ring[1:-1, 1:-1] = False
    ratio = reference[..., ring].mean() / reference[..., 1:5, 2:6].mean()
    expected = {
        "entropy": entropy,
        "border_to_centre": ratio,
        "flicker": np.abs(reference[:, 1] - reference[:, 0]).mean(),
        "constant": 0,
        "mean": reference.mean(),
        "max": reference.max(),
    }
    assert {name: value.item() for name, value in got.items()} == pytest.approx(expected, rel=1e-5)


def test_statistics_of_extreme_maps() -> None:
    uniform = map_statistics(torch.ones(2, 3, 4, 5))
    expected = {**dict.fromkeys(uniform, 1.0), "flicker": 0.0, "constant": 2}
    assert {name: value.item() for name, value in uniform.items()} == pytest.approx(expected)
    peak = torch.zeros(1, 1, 5, 5)
    peak[0, 0, 2, 2] = 25
    got = map_statistics(peak)
    assert got["entropy"] == 0 and got["border_to_centre"] == 0 and got["max"] == 25 and got["mean"] == 1
    assert map_statistics(torch.ones(2, 1, 1, 1))["entropy"] == 1
    assert all(torch.isfinite(value) for value in map_statistics(torch.zeros(1, 1, 4, 4)).values())
    assert map_statistics(torch.cat([torch.ones(2, 1, 5, 5), peak]))["constant"] == 2


def test_flicker_literals() -> None:
    maps = torch.tensor([[0.0, 1.0], [2.0, 1.0], [2.0, 2.0]]).view(1, 3, 1, 2)
    torch.testing.assert_close(flicker(maps), torch.tensor([(2 + 0 + 0 + 1) / 4]))
    assert torch.equal(flicker(maps[:, :1]), torch.zeros(1))
    assert torch.equal(flicker(maps[:, :1].expand(1, 5, 1, 2)), torch.zeros(1))
