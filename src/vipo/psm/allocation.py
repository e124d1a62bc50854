"""The Visual Preference Allocator: patch features -> one non-negative map per frame (ViPO Eq. 2), pure batched torch.

    F -> principal_components -> orient -> aggregate -> smooth -> (latent_grid: resize, pool) -> normalise -> M

B is a batch of feature sets that each get their own basis: B = N with P = F*h*w for one basis per sample, B = N*F
with P = h*w for one basis per frame. Nothing here loops over samples or frames, and nothing has a gradient.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from vipo.types import check_shape

SOLVERS = ("subspace", "exact")
WEIGHTINGS = ("variance", "mean", "first")
NORMALISATIONS = ("mean", "minmax")
CONTROLS = ("ones", "shuffled", "inverted", "random")

# In units of the dtype's eps: deviations this small against the features' norm, or a variance this small against the
# first component's, are rounding noise, which a division by its own size would blow up into a map.
_NOISE_EPS = 16
_OVERSAMPLING = 5
_SUBSPACE_ITERATIONS = 8


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise ValueError, with the nearest allowed value, if `value` is not one of `allowed`."""
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}{hint}")


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
    noise = _NOISE_EPS * torch.finfo(features.dtype).eps
    energy = centred.square().sum((1, 2))
    varies = energy > noise**2 * features.square().sum((1, 2))
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
        basis = _orthonormal_columns(centred.mT @ _orthonormal_columns(centred @ basis))
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


def _border(grid: Tensor) -> Tensor:
    """Return the mean of (B, F, h, w, K) over the one-patch ring of each frame, (B, F, 1, 1, K); no host sync."""
    height, width = grid.shape[2:4]
    interior = grid[:, :, 1:-1, 1:-1].sum((2, 3), keepdim=True)
    count = height * width - max(height - 2, 0) * max(width - 2, 0)
    return (grid.sum((2, 3), keepdim=True) - interior) / count


def _span(grid: Tensor) -> Tensor:
    """Map each component of (B, F, h, w, K) to [0, 1]: (x - min) / (max - min) over F, h, w; a constant one to 0."""
    low = grid.amin((1, 2, 3), keepdim=True)
    spread = grid.amax((1, 2, 3), keepdim=True) - low
    return (grid - low) / torch.where(spread > 0, spread, 1)


def _centre_prior(grid: Tensor) -> Tensor:
    """Return exp(-(x^2 + y^2) / (2 * 0.5^2)) on the patch grid, x and y in [-1, 1], shaped (h, w, 1)."""
    rows, columns = (
        torch.linspace(-1, 1, size, device=grid.device, dtype=grid.dtype) if size > 1 else grid.new_zeros(1)
        for size in grid.shape[2:4]
    )
    return torch.exp(-2 * (rows[:, None] ** 2 + columns**2))[..., None]


def _signed(grid: Tensor, evidence: Tensor) -> Tensor:
    """Flip the components of (B, F, h, w, K) whose mean evidence (of the same shape) is negative; map to [0, 1]."""
    return _span(torch.where(evidence.mean((1, 2, 3), keepdim=True) < 0, -grid, grid))


# z (B, F, h, w, K), mean 0 and variance 1 over F, h, w, canonical sign -> S_j >= 0 of the same shape.
_ORIENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "border_energy": lambda z: (z - _border(z)).square(),
    "border": lambda z: _signed(z, -_border(z)),
    "skewness": lambda z: _signed(z, z**3),
    "energy": lambda z: z.square(),
    "library": lambda z: _span(-z),
    "centre": lambda z: _signed(z, z * _centre_prior(z)),
}
ORIENTATIONS = tuple(_ORIENTATIONS)


@torch.no_grad()
def orient(components: PrincipalComponents, grid: tuple[int, int, int], rule: str = "border_energy") -> Tensor:
    """Turn principal components into non-negative maps S_j that do not depend on PCA's arbitrary signs (ViPO Eq. 2).

        z_j = Z_j / std_P(Z_j)      unit variance; 0 for a component without variance

        border_energy   (z_j - border mean of z_j)^2, the border being each frame's own outer ring, one patch wide
        energy          z_j^2
        border          +-z_j, whichever has its border (of all frames) below its mean, so below the interior
        skewness        +-z_j, whichever has a positive third moment: the minority is high
        centre          +-z_j, whichever correlates with a Gaussian at the centre of the frame
        library         -z_j after scikit-learn >= 1.5's sign: the largest |loading| is positive (the released code's)

    The last four are mapped to [0, 1] over F, h, w. With unit z_j, lambda_j z_j^2 is the energy of component j
    itself, so the two energy rules weighted by "variance" are squared distances in the leading subspace: they do
    not change when components of nearly equal variance rotate into each other. All rules start from the library's
    sign, which also settles ties.

    Args:
        components: of B feature sets with P = F*h*w, position p = (f*h + y)*w + x.
        grid: (F, h, w); (1, h, w) for one basis per frame.
        rule: one of ORIENTATIONS.

    Returns:
        (B, F, h, w, K), >= 0, without gradient.

    Raises:
        ValueError: unknown rule, or F*h*w differs from P.
    """
    check_choice("orientation", rule, ORIENTATIONS)
    frames, height, width = grid
    sizes = check_shape("projections", components.projections, f"B {frames * height * width} K")
    check_shape("loadings", components.loadings, "B K D", sizes)
    strongest = components.loadings.abs().argmax(-1, keepdim=True)
    negative = components.loadings.gather(-1, strongest).mT < 0
    projections = torch.where(negative, -components.projections, components.projections)
    std = projections.square().mean(1, keepdim=True).sqrt()
    z = projections / torch.where(std > 0, std, 1)
    return _ORIENTATIONS[rule](torch.unflatten(z, 1, grid))


def aggregate(component_maps: Tensor, explained_variance_ratio: Tensor, weighting: str = "variance") -> Tensor:
    """Weigh the component maps into one: S = sum_j w_j S_j (ViPO Eq. 2).

    Args:
        component_maps: S_j, (B, F, h, w, K), >= 0.
        explained_variance_ratio: lambda_j, (B, K), in [0, 1].
        weighting: "variance" w_j = lambda_j (the paper's); "mean" w_j = 1/K (its ablation); "first" S = S_1.

    Returns:
        S, (B, F, h, w), >= 0.

    Raises:
        ValueError: shapes that do not agree, or an unknown weighting.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    sizes = check_shape("component_maps", component_maps, "B F h w K")
    check_shape("explained_variance_ratio", explained_variance_ratio, "B K", sizes)
    if weighting == "first":
        return component_maps[..., 0]
    if weighting == "mean":
        return component_maps.mean(-1)
    return torch.einsum("bfhwk,bk->bfhw", component_maps, explained_variance_ratio)


def blur_matrix(size: int, sigma: float, like: Tensor) -> Tensor:
    """Return the (size, size) matrix, of `like`'s dtype and device, that blurs an axis by `sigma` positions.

    g(k) ~ exp(-k^2 / (2 sigma^2)) for |k| <= floor(4 sigma + 1/2); beyond the edge the axis repeats mirrored
    (d c b a | a b c d | d c b a), as often as the kernel needs: scipy.ndimage's mode "reflect".
    """
    radius = int(4 * sigma + 0.5)
    positions = torch.arange(size, device=like.device)
    offsets = torch.arange(-radius, radius + 1, device=like.device)
    kernel = torch.softmax(-0.5 * (offsets.to(like.dtype) / sigma) ** 2, 0)
    source = (positions[:, None] + offsets) % (2 * size)
    source = torch.minimum(source, 2 * size - 1 - source)
    return ((source[..., None] == positions) * kernel[:, None]).sum(1)


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Blur each frame with a Gaussian; equals scipy.ndimage.gaussian_filter(mode="reflect", truncate=4) over h, w.

    Args:
        maps: (B, F, h, w).
        sigma: standard deviation in patches, >= 0; 0 returns the maps as they are.

    Returns:
        (B, F, h, w); each frame keeps its mean.

    Raises:
        ValueError: wrong rank, or sigma negative or not finite.
    """
    sizes = check_shape("maps", maps, "B F h w")
    if not 0 <= sigma < math.inf:
        raise ValueError(f"smoothing: expected a finite sigma >= 0 in patches, got {sigma}")
    if sigma == 0:
        return maps
    return blur_matrix(sizes["h"], sigma, maps) @ maps @ blur_matrix(sizes["w"], sigma, maps).mT


def normalise(maps: Tensor, method: str = "mean", floor: float = 0.0) -> Tensor:
    """Scale each sample's map over all of its positions; a constant map, zeros too, becomes ones (scalar GRPO).

        mean:    M <- M / mean(M), then M <- floor + (1 - floor) M: the advantage is redistributed, its total is kept
        minmax:  M <- (M - min) / (max - min), the released code's: the mean is left free, about .3 to .5

    Args:
        maps: (N, T, H, W), >= 0.
        method: one of NORMALISATIONS.
        floor: in [0, 1), least weight that any position keeps; with "mean" only.

    Returns:
        (N, T, H, W), >= 0; with "mean" of mean 1 per sample, up to rounding.

    Raises:
        ValueError: wrong rank, unknown method, floor outside [0, 1), or floor > 0 with "minmax".
    """
    check_shape("maps", maps, "N T H W")
    check_choice("normalisation", method, NORMALISATIONS)
    if not 0 <= floor < 1:
        raise ValueError(f"floor: expected 0 <= floor < 1, got {floor}")
    if floor > 0 and method != "mean":
        raise ValueError(f'floor: {floor} needs normalisation "mean", got "{method}"; set floor to 0')
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    constant = high - low <= _NOISE_EPS * torch.finfo(maps.dtype).eps * high.abs()
    if method == "mean":
        mean = maps.mean((1, 2, 3), keepdim=True)
        scaled = floor + (1 - floor) * maps / torch.where(constant, 1, mean)
    else:
        scaled = (maps - low) / torch.where(constant, 1, high - low)
    return torch.where(constant, 1, scaled)


def control_maps(maps: Tensor, kind: str, generator: torch.Generator | None = None) -> Tensor:
    """Make the maps that a claim about ViPO must beat: same strength, other places.

        ones      1 everywhere: scalar GRPO
        shuffled  blocks of 2 x 2 positions permuted within each sample (single positions where H or W is odd or the map
                  is one block): the same values, elsewhere
        inverted  max - M, divided by its mean: pressure where perception does not look
        random    a smooth random field whose sorted values are M's, divided by its mean: a plausible map of nothing

    Args:
        maps: (N, T, H, W), >= 0.
        kind: one of CONTROLS.
        generator: for "shuffled" and "random", on any device.

    Returns:
        (N, T, H, W), >= 0; mean 1 per sample, except that "shuffled" keeps the mean of `maps`.

    Raises:
        ValueError: wrong rank, unknown kind, or no generator where one is needed.
    """
    check_shape("maps", maps, "N T H W")
    check_choice("control", kind, CONTROLS)
    if kind == "ones":
        return torch.ones_like(maps)
    if kind == "inverted":
        return normalise(maps.amax((1, 2, 3), keepdim=True) - maps)
    if generator is None:
        raise ValueError(f'control "{kind}" draws random numbers: pass a torch.Generator, got None')
    return _shuffle_blocks(maps, generator) if kind == "shuffled" else normalise(_random_field(maps, generator))


def _shuffle_blocks(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Permute the 2 x 2 blocks (or the positions) of each sample of (N, T, H, W)."""
    samples, frames, height, width = maps.shape
    side = 2 if height % 2 == 0 and width % 2 == 0 and maps[0].numel() > 4 else 1
    blocks = maps.reshape(samples, frames, height // side, side, width // side, side).transpose(3, 4)
    rows = blocks.reshape(samples, -1, side * side)
    order = torch.rand(rows.shape[:2], generator=generator, device=generator.device).argsort(1).to(maps.device)
    rows = rows.gather(1, order[..., None].expand_as(rows))
    return rows.view(blocks.shape).transpose(3, 4).reshape_as(maps)


def _random_field(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Lay each sample's values out by the ranks of white noise blurred over an eighth of each axis."""
    noise = torch.randn(maps.shape, generator=generator, device=generator.device).to(maps.device)
    for axis in (1, 2, 3):
        size = noise.shape[axis]
        noise = torch.tensordot(noise, blur_matrix(size, size / 8, noise), ([axis], [1])).movedim(-1, axis)
    ranks = noise.flatten(1).argsort(1).argsort(1)
    return maps.flatten(1).sort(1).values.gather(1, ranks).view_as(maps)


def map_statistics(maps: Tensor) -> dict[str, Tensor]:
    """Summarise allocation maps for the log; every number is a 0-dim tensor, without a host sync.

        entropy           mean over samples of -sum_p q log q / log P with q = M / sum(M); 1 = uniform, 0 = one position
        border_to_centre  mean over the frames' outer ring, divided by the mean over their central half (both axes)
        mean, max         over everything

    Args:
        maps: (N, T, H, W), >= 0.

    Raises:
        ValueError: wrong rank.
    """
    sizes = check_shape("maps", maps, "N T H W")
    maps = maps.detach().float()
    height, width, tiny = sizes["H"], sizes["W"], torch.finfo(torch.float32).tiny
    share = maps.flatten(1) / maps.sum((1, 2, 3)).clamp_min(tiny)[:, None]
    log_positions = math.log(share.shape[1])
    entropy = torch.special.entr(share).sum(1).mean() / log_positions if log_positions else maps.new_ones(())
    centre = maps[:, :, height // 4 : height - height // 4, width // 4 : width - width // 4]
    return {
        "entropy": entropy,
        "border_to_centre": _border(maps[..., None]).mean() / centre.mean().clamp_min(tiny),
        "mean": maps.mean(),
        "max": maps.amax(),
    }
