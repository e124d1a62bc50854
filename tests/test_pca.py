"""vipo.psm.pca against scikit-learn in float64, identities, and edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_sets import clear_spectrum
from sklearn.decomposition import PCA

from vipo.psm.pca import SOLVERS, PrincipalComponents, canonical_projections, principal_components


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


def test_enough_iterations_for_a_slow_spectrum() -> None:
    """Singular values 1, .9, .81, ...: the third component is found as far as eight iterations reach."""
    generator = torch.Generator().manual_seed(6)
    left, right = (torch.linalg.qr(torch.randn(2, size, 40, generator=generator).double()).Q for size in (300, 64))
    features = 50 * (left * 0.9 ** torch.arange(40)) @ right.mT
    exact, fast = principal_components(features, 3, "exact"), principal_components(features, 3)
    cosine = torch.nn.functional.cosine_similarity(exact.projections, fast.projections, dim=1).abs()
    assert cosine.min() > 0.999


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


def test_the_canonical_sign_is_scikit_learns() -> None:
    features = clear_spectrum(11)
    got = canonical_projections(principal_components(features))
    for sample, single in enumerate(features.numpy()):
        np.testing.assert_allclose(got[sample], PCA(3, svd_solver="full").fit_transform(single), atol=1e-6)


def test_any_number_of_components() -> None:
    features = clear_spectrum(12, channels=10)
    for components in (1, 4, 6, 10):
        for solver in SOLVERS:
            got = principal_components(features, components, solver)
            for sample, single in enumerate(features.numpy()):
                oracle = PCA(components, svd_solver="full").fit(single)
                np.testing.assert_allclose(
                    got.explained_variance_ratio[sample], oracle.explained_variance_ratio_, rtol=1e-9, atol=1e-12
                )
