"""The Visual Preference Allocator: principal components -> one non-negative map per frame (ViPO Eq. 2), pure torch.

    F -> pca -> orient -> aggregate -> smooth -> (latent_grid: resize, pool) -> combine -> normalise -> M

Everything is batched; nothing here loops over samples or frames, and nothing has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vipo.psm.pca import NOISE_EPS, PrincipalComponents, canonical_projections
from vipo.types import check_choice, check_shape

WEIGHTINGS = ("variance", "mean", "first")
NORMALISATIONS = ("mean", "minmax")
COMBINATIONS = ("product", "mean", "max", "power")


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


def centre_prior(height: int, width: int, like: Tensor) -> Tensor:
    """Return exp(-(x^2 + y^2) / (2 * 0.5^2)), (h, w), x and y in [-1, 1], of `like`'s dtype and device."""
    rows, columns = (
        torch.linspace(-1, 1, size, device=like.device, dtype=like.dtype) if size > 1 else like.new_zeros(1)
        for size in (height, width)
    )
    return torch.exp(-2 * (rows[:, None] ** 2 + columns**2))


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
    "centre": lambda z: _signed(z, z * centre_prior(z.shape[2], z.shape[3], z)[..., None]),
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
    projections = canonical_projections(components)
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


def combine(first: Tensor, second: Tensor, method: str = "product", weight: float = 0.5) -> Tensor:
    """Combine two maps of the same samples, each brought to mean 1 per sample first (a constant one to ones).

        product  S V        mean  (1 - w) S + w V        max  max(S, V)        power  S^(1 - w) V^w

    With a constant second map, product gives the first map, and so do mean and power up to their weight.

    Args:
        first: S, (N, T, H, W), >= 0.
        second: V, of the same shape, >= 0.
        method: one of COMBINATIONS.
        weight: w of the second map, in [0, 1], for mean and power.

    Returns:
        (N, T, H, W), >= 0, of any mean; zeros where the two exclude each other everywhere.

    Raises:
        ValueError: shapes that differ, an unknown method, or a weight outside [0, 1].
    """
    check_choice("combine", method, COMBINATIONS)
    if not 0 <= weight <= 1:
        raise ValueError(f"motion_weight: expected 0 <= weight <= 1, got {weight}")
    check_shape("second map", second, "N T H W", check_shape("first map", first, "N T H W"))
    first, second = normalise(first), normalise(second)
    if method == "product":
        return first * second
    if method == "max":
        return torch.maximum(first, second)
    if method == "mean":
        return torch.lerp(first, second, weight)
    return first ** (1 - weight) * second**weight


def normalise(maps: Tensor, method: str = "mean", *, temperature: float = 1.0, floor: float = 0.0) -> Tensor:
    """Scale each sample's map over all of its positions; a constant map, zeros too, becomes ones (scalar GRPO).

        mean:    M <- M^(1/temperature), M <- M / mean(M), M <- floor + (1 - floor) M: the advantage is redistributed,
                 its total is kept
        minmax:  M <- (M - min) / (max - min), the released code's: the mean is left free, about .3 to .5

    M^(1/temperature) over its sum is the softmax of log(M) / temperature: towards 0 the largest position takes all,
    towards infinity every position that is not 0 gets the same.

    Args:
        maps: (N, T, H, W), >= 0.
        method: one of NORMALISATIONS.
        temperature: > 0; with "mean" only.
        floor: in [0, 1), least weight that any position keeps; with "mean" only.

    Returns:
        (N, T, H, W), >= 0; with "mean" of mean 1 per sample, up to rounding.

    Raises:
        ValueError: wrong rank, unknown method, an option out of range, or one that "minmax" does not have.
    """
    check_shape("maps", maps, "N T H W")
    check_choice("normalisation", method, NORMALISATIONS)
    if not 0 <= floor < 1 or not 0 < temperature < math.inf:
        raise ValueError(
            f"expected 0 <= floor < 1 and a finite temperature > 0, got floor {floor} and temperature {temperature}"
        )
    if method != "mean" and (floor > 0 or temperature != 1):
        raise ValueError(
            f'floor {floor} and temperature {temperature} need normalisation "mean", got "{method}"; '
            "set floor to 0 and temperature to 1"
        )
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    constant = high - low <= NOISE_EPS * torch.finfo(maps.dtype).eps * high.abs()
    if method == "mean":
        if temperature != 1:
            maps = (maps / torch.where(constant, 1, high)) ** (1 / temperature)  # the largest is 1: no overflow
        mean = maps.mean((1, 2, 3), keepdim=True)
        scaled = floor + (1 - floor) * maps / torch.where(constant, 1, mean)
    else:
        scaled = (maps - low) / torch.where(constant, 1, high - low)
    return torch.where(constant, 1, scaled)


def map_statistics(maps: Tensor) -> dict[str, Tensor]:
    """Summarise allocation maps for the log; every number is a 0-dim tensor, without a host sync.

        entropy           mean over samples of -sum_p q log q / log P with q = M / sum(M); 1 = uniform, 0 = one position
        border_to_centre  mean over the frames' outer ring, divided by the mean over their central half (both axes)
        flicker           mean |M_t - M_(t-1)| over neighbouring latent frames; 0 for images and for static clips
        constant          number of samples whose map says nothing: all positions equal
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
        "flicker": flicker(maps).mean(),
        "constant": (maps.amax((1, 2, 3)) == maps.amin((1, 2, 3))).sum(),
        "mean": maps.mean(),
        "max": maps.amax(),
    }


def flicker(maps: Tensor) -> Tensor:
    """Return the mean |M_t - M_(t-1)| over neighbouring latent frames and positions, (N,); 0 where T = 1.

    Args:
        maps: (N, T, H, W).
    """
    check_shape("maps", maps, "N T H W")
    if maps.shape[1] == 1:
        return maps.new_zeros(len(maps))
    return maps.diff(dim=1).abs().mean((1, 2, 3))
