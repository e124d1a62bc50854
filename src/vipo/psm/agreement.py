"""How well a map finds a subject: the saliency metrics of Bylinskii et al. (arXiv 1604.03605), pure batched torch.

P is the set of a sample's positions, all dimensions after the first, so that images (N, Y, X) and clips (N, F, Y, X)
go through the same lines. Everything is computed and returned in float64, without gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("AUC", "NSS", "CC", "KL", "SIM")
"""What `agreement` returns; KL is better low, the others high."""
EPSILON = 2.0**-52
"""Keeps KL finite where the map is 0 on the subject: such a position costs q log(q / EPSILON)."""
# A map flatter than this many units of its dtype's rounding is constant: resizing a map of ones leaves about one.
_NOISE_EPS = 16


@torch.no_grad()
def agreement(maps: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Compare each map with the mask of the subject (arXiv 1604.03605, section 4).

        AUC = P(M on the subject > M on the background) + P(equal) / 2    area under the ROC curve, by ranks
        NSS = mean over the subject of (M - mean_P M) / std_P M
        CC  = cov_P(M, mask) / (std_P M std_P mask)                       Pearson's correlation
        KL  = sum_P q log(EPSILON + q / (EPSILON + p))                    nats
        SIM = sum_P min(p, q)
        with the subject {mask > 1/2}, p = M / sum_P M, q = mask / sum_P mask

    A constant map, zeros too, counts as ones: AUC 1/2, NSS 0, CC 0.

    Args:
        maps: (N, *S), finite, >= 0.
        masks: (N, *S), in [0, 1]; between 0 and 1 on soft outlines.

    Returns:
        By name in METRICS, (N,), float64.

    Raises:
        ValueError: shapes that differ, values out of range, or a sample whose subject is nothing or everything.
    """
    if maps.shape != masks.shape or maps.ndim < 2 or maps.numel() == 0:
        raise ValueError(
            f"maps and masks: expected one shape (N, *S) with at least one position, got {tuple(maps.shape)} and "
            f"{tuple(masks.shape)}; resize one of them"
        )
    eps = _NOISE_EPS * (torch.finfo(maps.dtype).eps if maps.is_floating_point() else 0)
    values, mask = maps.flatten(1).double(), masks.flatten(1).double()
    _check_values(values, mask)
    low, high = values.aminmax(dim=1, keepdim=True)
    constant = high - low <= eps * high
    values = torch.where(constant, 1.0, values)
    subject = mask > 0.5
    inside = subject.sum(1)
    centred = values - values.mean(1, keepdim=True)
    z = centred / torch.where(constant, 1.0, centred.square().mean(1, keepdim=True).sqrt())
    mask_centred = mask - mask.mean(1, keepdim=True)
    p, q = values / values.sum(1, keepdim=True), mask / mask.sum(1, keepdim=True)
    return {
        "AUC": _area_under_curve(values, subject),
        "NSS": (z * subject).sum(1) / inside,
        "CC": (z * mask_centred).mean(1) / mask_centred.square().mean(1).sqrt(),
        "KL": (q * torch.log(EPSILON + q / (EPSILON + p))).sum(1),
        "SIM": torch.minimum(p, q).sum(1),
    }


def _check_values(values: Tensor, mask: Tensor) -> None:
    """Raise ValueError naming the first sample (of (N, P)) whose map, mask or subject is not usable; syncs once."""
    subject = mask > 0.5
    problems = {
        "map: expected finite values >= 0": ~(torch.isfinite(values) & (values >= 0)).all(1),
        "mask: expected values in [0, 1]": ~((mask >= 0) & (mask <= 1)).all(1),
        "mask: empty: no position is above 1/2, so there is no subject to find": ~subject.any(1),
        "mask: full: every position is above 1/2, so there is no background": subject.all(1),
    }
    found = torch.stack(list(problems.values())).nonzero().tolist()
    if found:
        problem, sample = min(found, key=lambda place: (place[1], place[0]))
        raise ValueError(f"sample {sample}: {list(problems)[problem]}")


def _area_under_curve(values: Tensor, subject: Tensor) -> Tensor:
    """Mann-Whitney's U over its maximum, ties at mid-ranks: values and subject (N, P) -> (N,)."""
    ordered = values.sort(1).values
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    mid_rank = (below + up_to + 1).double() / 2  # float32 would round ranks of more than 2^24 positions
    inside, positions = subject.sum(1).double(), values.shape[1]
    surplus = (mid_rank * subject).sum(1) - inside * (inside + 1) / 2
    return surplus / (inside * (positions - inside))
