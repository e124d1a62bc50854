"""vipo.psm.allocation against scikit-learn, SciPy and NumPy in float64, identities, and edge cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from torch import Tensor

from vipo.psm.allocation import (
    CONTROLS,
    ORIENTATIONS,
    SOLVERS,
    PrincipalComponents,
    aggregate,
    blur_matrix,
    control_maps,
    map_statistics,
    normalise,
    orient,
    principal_components,
    smooth,
)

GRID = (2, 6, 7)
POSITIONS = 2 * 6 * 7


def clear_spectrum(seed: int, batch: int = 3, positions: int = POSITIONS, channels: int = 24) -> Tensor:
    """Features (B, P, D) in float64 whose singular values are 1, 1/2, 1/4, ... plus a mean and a little noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(draw(batch, positions, 6)).Q, torch.linalg.qr(draw(batch, channels, 6)).Q
    scales = 30 * 0.5 ** torch.arange(6, dtype=torch.float64)
    return (left * scales) @ right.mT + draw(batch, 1, channels) + 1e-3 * draw(batch, positions, channels)


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


# ---------------------------------------------------------------------------------------------- principal components


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("positions", "channels"), [(84, 24), (20, 50)])
@pytest.mark.parametrize("seed", [0, 1])
def test_pca_equals_scikit_learn(solver: str, positions: int, channels: int, seed: int) -> None:
    features = clear_spectrum(seed, positions=positions, channels=channels)
    got = principal_components(features, 3, solver)
    for sample, single in enumerate(features.numpy()):
        oracle = PCA(3, svd_solver="full")
        projections = oracle.fit_transform(single)
        signs = np.sign((projections * got.projections[sample].numpy()).sum(0))
        # The subspace solver stops at (sigma_9 / sigma_3)^16 of its first error; noise 1e-3 leaves that far below 1e-6.
        np.testing.assert_allclose(got.projections[sample], projections * signs, atol=1e-6)
        np.testing.assert_allclose(got.loadings[sample], oracle.components_ * signs[:, None], atol=1e-6)
        np.testing.assert_allclose(got.explained_variance_ratio[sample], oracle.explained_variance_ratio_, rtol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("positions", "channels"), [(84, 24), (20, 50)])
def test_pca_in_float32_is_close_to_float64(solver: str, positions: int, channels: int) -> None:
    features = clear_spectrum(2, positions=positions, channels=channels)
    exact, single = principal_components(features), principal_components(features.float(), 3, solver)
    torch.testing.assert_close(
        single.explained_variance_ratio.double(), exact.explained_variance_ratio, rtol=1e-5, atol=0
    )
    # Directions turn by eps / spectral gap, so 1e-5 of the largest projection (about 10), not of each.
    signs = (exact.projections * single.projections).sum(1, keepdim=True).sign()
    torch.testing.assert_close(single.projections.double() * signs, exact.projections, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pca_in_float32_of_a_steep_spectrum(seed: int) -> None:
    """Singular values 1, .1, .01: the third component has a ten-thousandth of the variance."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(2, size, 20, generator=generator).double()).Q for size in (300, 64))
    scales = torch.cat([torch.tensor([1.0, 0.1, 0.01]), 0.005 * torch.logspace(0, -2, 17)]).double()
    features = 50 * (left * scales) @ right.mT
    exact, single = principal_components(features, 3, "exact"), principal_components(features.float())
    cosine = torch.nn.functional.cosine_similarity(exact.projections, single.projections.double(), dim=1).abs()
    assert cosine.min() > 1 - 1e-6
    torch.testing.assert_close(
        single.explained_variance_ratio.double(), exact.explained_variance_ratio, rtol=1e-5, atol=0
    )


def test_ratio_is_of_the_total_variance_not_of_the_kept_components() -> None:
    features = torch.tensor([[[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]])
    got = principal_components(features, components=1)
    torch.testing.assert_close(got.explained_variance_ratio, torch.tensor([[0.9]]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_is_its_samples(solver: str) -> None:
    features = clear_spectrum(3, batch=5)
    together = principal_components(features, 3, solver)
    for sample in range(5):
        alone = principal_components(features[sample : sample + 1], 3, solver)
        for name in PrincipalComponents._fields:
            torch.testing.assert_close(getattr(together, name)[sample], getattr(alone, name)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1234.5])
@pytest.mark.parametrize(("positions", "channels"), [(30, 8), (8, 30)])
def test_constant_features_have_no_components(solver: str, value: float, positions: int, channels: int) -> None:
    got = principal_components(torch.full((2, positions, channels), value), 3, solver)
    assert torch.equal(got.projections, torch.zeros(2, positions, 3))
    assert torch.equal(got.explained_variance_ratio, torch.zeros(2, 3))
    assert torch.isfinite(got.loadings).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("positions", "channels"), [(30, 8), (8, 30)])
def test_rank_one_features_have_one_component(solver: str, positions: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(2, positions, 1, generator=generator)
    features = scores * torch.randn(2, 1, channels, generator=generator) + 5
    got = principal_components(features, 3, solver)
    torch.testing.assert_close(got.explained_variance_ratio, torch.tensor([[1.0, 0, 0]] * 2))
    assert torch.equal(got.projections[..., 1:], torch.zeros(2, positions, 2))
    assert torch.isfinite(got.loadings).all()


def test_constant_sample_beside_a_varying_one_changes_nothing() -> None:
    features = clear_spectrum(5, batch=2)
    features[1] = 7.0
    got = principal_components(features)
    alone = principal_components(features[:1])
    torch.testing.assert_close(got.projections[0], alone.projections[0], rtol=1e-9, atol=1e-9)
    assert got.projections[1].abs().max() == 0


def test_pca_has_no_gradient_and_computes_bfloat16_in_float32() -> None:
    features = clear_spectrum(6).to(torch.bfloat16).requires_grad_()
    got = principal_components(features)
    reference = principal_components(features.detach().float())
    for tensor, expected in zip(got, reference, strict=True):
        assert tensor.dtype == torch.float32 and not tensor.requires_grad
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("components", [0, 5])
def test_impossible_number_of_components(components: int) -> None:
    with pytest.raises(ValueError, match=r"min\(P, D\) = 4.*got"):
        principal_components(torch.randn(1, 9, 4), components)


def test_unknown_solver_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'exact'"):
        principal_components(torch.randn(1, 9, 4), 2, "exakt")
    with pytest.raises(ValueError, match="wrong number of dimensions"):
        principal_components(torch.randn(9, 4), 2)


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
    with pytest.raises(ValueError, match='needs normalisation "mean"'):
        normalise(maps, "minmax", 0.1)
    with pytest.raises(ValueError, match="did you mean 'minmax'"):
        normalise(maps, "min_max")


# ----------------------------------------------------------------------------------------------- controls, statistics


@pytest.fixture
def maps() -> Tensor:
    return normalise(torch.rand(3, 2, 6, 8, generator=torch.Generator().manual_seed(13)) ** 3)


@pytest.mark.parametrize("kind", CONTROLS)
def test_controls_are_maps(maps: Tensor, kind: str) -> None:
    control = control_maps(maps, kind, torch.Generator().manual_seed(0))
    assert control.shape == maps.shape and control.dtype == maps.dtype and control.min() >= 0
    torch.testing.assert_close(control.mean((1, 2, 3)), torch.ones(3), rtol=1e-6, atol=0)
    again = control_maps(maps, kind, torch.Generator().manual_seed(0))
    assert torch.equal(control, again)


def test_inverted_literal() -> None:
    maps = torch.tensor([[3.0, 1.0], [2.0, 2.0]]).view(2, 1, 1, 2)
    expected = torch.tensor([[0.0, 2.0], [1.0, 1.0]]).view(2, 1, 1, 2)
    assert torch.equal(control_maps(maps, "inverted"), expected)


@pytest.mark.parametrize(("height", "width", "side"), [(6, 8, 2), (5, 8, 1), (2, 2, 1)])
def test_shuffling_keeps_blocks_and_values_and_moves_them(height: int, width: int, side: int) -> None:
    frames = 1 if (height, width) == (2, 2) else 3
    maps = torch.arange(4 * frames * height * width, dtype=torch.float32).view(4, frames, height, width)
    shuffled = control_maps(maps, "shuffled", torch.Generator().manual_seed(1))
    assert torch.equal(shuffled.flatten(1).sort(1).values, maps.flatten(1).sort(1).values)
    assert not torch.equal(shuffled, maps)

    def blocks(sample: Tensor) -> set[tuple[float, ...]]:
        windows = sample.unfold(1, side, side).unfold(2, side, side).reshape(-1, side * side)
        return {tuple(window) for window in windows.tolist()}

    orders = set()
    for sample in range(4):
        assert blocks(shuffled[sample]) == blocks(maps[sample])
        orders.add(tuple((shuffled[sample] - maps[sample].min()).flatten().tolist()))
    assert len(orders) > 1, "every sample got the same permutation"


def test_random_field_has_the_values_of_the_map_but_is_smooth_and_elsewhere() -> None:
    maps = normalise(torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(14)))
    control = control_maps(maps, "random", torch.Generator().manual_seed(2))
    torch.testing.assert_close(control.flatten(1).sort(1).values, maps.flatten(1).sort(1).values)

    def roughness(field: Tensor, axis: int) -> Tensor:
        return field.diff(dim=axis).square().mean() / field.var()

    for axis in (2, 3):
        assert roughness(control, axis) < 0.2 * roughness(maps, axis)
    assert torch.corrcoef(torch.stack([control.flatten(), maps.flatten()]))[0, 1].abs() < 0.1


def test_control_errors(maps: Tensor) -> None:
    with pytest.raises(ValueError, match="did you mean 'shuffled'"):
        control_maps(maps, "shuffle")
    for kind in ("shuffled", "random"):
        with pytest.raises(ValueError, match=r"pass a torch\.Generator"):
            control_maps(maps, kind)


def test_statistics_equal_numpy(maps: Tensor) -> None:
    got = map_statistics(maps)
    assert {name: value.shape for name, value in got.items()} == dict.fromkeys(got, torch.Size([]))
    reference = maps.double().numpy()
    share = reference.reshape(3, -1) / reference.reshape(3, -1).sum(1, keepdims=True)
    entropy = -(share * np.log(share)).sum(1).mean() / np.log(share.shape[1])
    ring = np.ones((6, 8), bool)
    ring[1:-1, 1:-1] = False
    ratio = reference[..., ring].mean() / reference[..., 1:5, 2:6].mean()
    expected = {"entropy": entropy, "border_to_centre": ratio, "mean": reference.mean(), "max": reference.max()}
    assert {name: value.item() for name, value in got.items()} == pytest.approx(expected, rel=1e-5)


def test_statistics_of_extreme_maps() -> None:
    uniform = map_statistics(torch.ones(2, 3, 4, 5))
    assert {name: value.item() for name, value in uniform.items()} == pytest.approx(dict.fromkeys(uniform, 1.0))
    peak = torch.zeros(1, 1, 5, 5)
    peak[0, 0, 2, 2] = 25
    got = map_statistics(peak)
    assert got["entropy"] == 0 and got["border_to_centre"] == 0 and got["max"] == 25 and got["mean"] == 1
    assert map_statistics(torch.ones(2, 1, 1, 1))["entropy"] == 1
    assert all(torch.isfinite(value) for value in map_statistics(torch.zeros(1, 1, 4, 4)).values())
