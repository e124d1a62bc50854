"""Batched principal component analysis of patch features (the PCA_K of ViPO Eq. 2), pure torch.

B is a batch of feature sets that each get their own basis: B = N with P = F*h*w for one basis per sample, B = N*F
with P = h*w for one basis per frame. Nothing here loops over samples or frames, and nothing has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vipo.types import check_choice, check_shape

SOLVERS = ("subspace", "exact")

# In units of the dtype's eps: deviations this small against the features' norm, or a variance this small against the
# first component's, are rounding noise, which a division by its own size would blow up into a map.
NOISE_EPS = 16
_OVERSAMPLING = 5
_SUBSPACE_ITERATIONS = 8


class PrincipalComponents(NamedTuple):
    """The leading principal components of B feature sets. The sign of a component is arbitrary.

    Attributes:
        projections: (B, P, K) centred features times loadings; mean 0 over P; zeros for a component without variance.
        explained_variance_ratio: (B, K) lambda_j, variance of component j over the total variance, in [0, 1].
        loadings: (B, K, D) unit directions in feature space; without meaning where the ratio is 0.
    """

    projections: Tensor
    explained_variance_ratio: Tensor
    loadings: Tensor


@torch.no_grad()
def principal_components(features: Tensor, components: int = 3, solver: str = "subspace") -> PrincipalComponents:
    """Fit PCA per feature set: Z = PCA_K(F) (ViPO Eq. 2).

        X = F - mean_P(F),   X V_j = s_j U_j,   Z_j = X V_j,   lambda_j = |Z_j|^2 / |X|^2

    Args:
        features: (B, P, D), finite, any floating dtype; float64 is kept, everything else is computed in float32.
        components: K, 1 <= K <= min(P, D).
        solver: "subspace" iterates on K + 5 vectors from a fixed start; "exact" takes the eigenvectors of the
            smaller of X^T X and X X^T. They agree where the spectrum is clear (|cos| > .9999 on ViT-like spectra).

    Returns:
        PrincipalComponents without gradient. Constant features have ratios and projections 0.

    Raises:
        ValueError: wrong rank, unknown solver, or K outside [1, min(P, D)].
    """
    sizes = check_shape("features", features, "B P D")
    check_choice("solver", solver, SOLVERS)
    rank_limit = min(sizes["P"], sizes["D"])
    if not 1 <= components <= rank_limit:
        raise ValueError(
            f"components: expected 1 to min(P, D) = {rank_limit} for features of shape {tuple(features.shape)}, "
            f"got {components}; ask for fewer components or give a finer patch grid"
        )
    features = features if features.dtype == torch.float64 else features.float()
    centred = features - features.mean(1, keepdim=True)
    noise = NOISE_EPS * torch.finfo(features.dtype).eps
    energy = _sum_of_squares(centred)
    varies = energy > noise**2 * _sum_of_squares(features)
    if solver == "exact" and sizes["P"] < sizes["D"]:
        left = _top_eigenvectors(centred @ centred.mT, components)
        scaled_loadings = left.mT @ centred
        lengths = scaled_loadings.norm(dim=2)
        projections = left * lengths[:, None]
        loadings = scaled_loadings / torch.where(lengths > 0, lengths, 1)[..., None]
    else:
        if solver == "exact":
            directions = _top_eigenvectors(centred.mT @ centred, components)
        else:
            directions = _leading_directions(centred, components)
        projections = centred @ directions
        lengths = projections.norm(dim=1)
        loadings = directions.mT
    variances = lengths.square()
    keep = varies[:, None] & (variances > noise * variances[:, :1])
    ratio = variances / torch.where(energy > 0, energy, 1)[:, None]
    zero = projections.new_zeros(())
    return PrincipalComponents(torch.where(keep[:, None], projections, zero), torch.where(keep, ratio, zero), loadings)


def _sum_of_squares(features: Tensor) -> Tensor:
    """Return sum_PD F^2, (B,), without a squared copy; row by row, since one float32 sum over P*D is off by 2e-5."""
    norms: Tensor = torch.linalg.vector_norm(features, dim=2)
    return norms.square().sum(1)


def _top_eigenvectors(gram: Tensor, components: int) -> Tensor:
    """Return the K leading eigenvectors of symmetric matrices (B, R, R), largest first, (B, R, K)."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(-1)[..., :components]


def _leading_directions(centred: Tensor, components: int) -> Tensor:
    """Return the leading right singular vectors of X (B, P, D) by subspace iteration with Rayleigh-Ritz, (B, D, K).

    Halko, Martinsson and Tropp 2011, algorithm 4.4, from one fixed start for every feature set, so that a sample's
    map depends neither on chance nor on its batch.
    """
    batch, positions, channels = centred.shape
    width = min(components + _OVERSAMPLING, positions, channels)
    start = torch.randn(channels, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    basis: Tensor = start.to(centred.device, centred.dtype, non_blocking=True).expand(batch, -1, -1)
    for _ in range(_SUBSPACE_ITERATIONS):
        # X^T Y is written (Y^T X)^T: for thin Y, MKL's kernel for the first takes 2 to 11 times as long.
        basis = _orthonormal_columns((_orthonormal_columns(centred @ basis).mT @ centred).mT)
    # Once more: where singular values span 1:100, one Gram pass in float32 left ratios wrong by 2e-3, two by 1e-6.
    basis = _orthonormal_columns(basis)
    projections = centred @ basis
    return basis @ _top_eigenvectors(projections.mT @ projections, components)


def _orthonormal_columns(columns: Tensor) -> Tensor:
    """Orthonormalise tall thin matrices (B, R, q): Y V L^(-1/2) with Y^T Y = V L V^T; null directions become zeros.

    Not torch.linalg.qr: on CUDA that loops over the batch (pytorch issue 143281), while eigh of q x q matrices does
    not. Directions of less than about q * eps of the largest variance are lost (1e-6 in float32).
    """
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(columns.mT @ columns)
    floor = values[:, -1:] * (columns.shape[-1] * torch.finfo(columns.dtype).eps)
    scale = torch.where(values > floor, values, torch.inf).rsqrt()
    return (columns @ vectors) * scale[:, None]


def canonical_projections(components: PrincipalComponents) -> Tensor:
    """Return the projections (B, P, K) with the sign that makes each loading of largest magnitude positive.

    This is scikit-learn's sign since version 1.5: it makes a fit repeatable, and says nothing about the subject.
    """
    strongest = components.loadings.abs().argmax(-1, keepdim=True)
    negative = components.loadings.gather(-1, strongest).mT < 0
    return torch.where(negative, -components.projections, components.projections)
