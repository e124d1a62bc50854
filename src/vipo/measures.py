"""Pure: how alike the samples of one prompt are, and where training changed them."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from .psm.latent_grid import resize_space
from .types import check_shape

_EVEN = 1e-6
"""A map whose complement is below this share of the whole has no outside."""


def mean_pairwise_distance(features: Tensor) -> Tensor:
    """Mean cosine distance between the samples of each prompt: within-prompt diversity.

        d = 2 / (S (S - 1)) sum_{a < b} (1 - cos(f_a, f_b))

    Args:
        features: (P, S, D), one vector per sample.

    Returns:
        (P,), float64, in [0, 2]; NaN where S is 1.
    """
    sizes = check_shape("features", features, "P S D")
    if sizes["S"] < 2:
        return torch.full((sizes["P"],), torch.nan, dtype=torch.float64)
    unit = functional.normalize(features.double(), dim=-1)
    a, b = torch.triu_indices(sizes["S"], sizes["S"], 1).unbind()
    return (1 - (unit[:, a] * unit[:, b]).sum(-1)).clamp_min(0).mean(1)


def drift(base: Tensor, trained: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """Mean absolute pixel change where the map looks and where it does not.

        c = mean over RGB of |trained - base|,   m = M / max M
        inside = sum(m c) / sum(m),   outside = sum((1 - m) c) / sum(1 - m),   whole = mean(c)

    Args:
        base: (N, F, 3, Y, X), in [0, 1].
        trained: the same shape.
        maps: M of the base samples, (N, F, h, w), >= 0, on any grid that covers the frame.

    Returns:
        inside, outside, whole: (N,) each, in [0, 1]; inside and outside NaN where the map is even.
    """
    sizes = check_shape("base", base, "N F 3 Y X")
    check_shape("trained", trained, "N F 3 Y X", sizes)
    check_shape("maps", maps, "N F h w", {"N": sizes["N"], "F": sizes["F"]})
    change = (trained - base).abs().mean(2).flatten(1).double()
    weight = resize_space(maps, (sizes["Y"], sizes["X"])).flatten(1).double()
    weight = weight / weight.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    rest = 1 - weight
    structured = (rest.mean(1) > _EVEN) & (weight.mean(1) > 0)
    inside, outside = ((w * change).sum(1) / w.sum(1) for w in (weight, rest))
    return {
        "inside": torch.where(structured, inside, torch.nan),
        "outside": torch.where(structured, outside, torch.nan),
        "whole": change.mean(1),
    }
