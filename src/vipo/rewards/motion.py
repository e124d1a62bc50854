"""How much a clip moves, and how smoothly: from optical flow, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..psm.motion import optical_flow
from ..types import check_shape
from .pixels import resized

_SHORTER = 256  # pixels, the side to which VBench's threshold of motion refers
_TOP = 0.05  # share of the pixels that counts for the dynamic degree, as VBench


@torch.no_grad()
def dynamic_degree(frames: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of the largest 5 % flow magnitudes, mean over neighbours (VBench, arXiv 2311.17982, dynamic degree).

        s = mean_f mean_{top 5 % of p} |flow_f(p)| * 256 / min(Y, X)

    The flow is Lucas-Kanade's, where VBench takes RAFT's; VBench goes on to call a clip dynamic if enough pairs exceed
    6, which is no use as a reward. A picture does not move: 0. The prompts are not read.

    Args:
        frames: (N, F, 3, Y, X) in [0, 1]; larger ones are resized to 256 pixels on the shorter side.
        prompts: N.

    Returns:
        (N,) float32, >= 0, in pixels per frame at 256 pixels on the shorter side.
    """
    check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
    if frames.shape[1] == 1:
        return torch.zeros(len(prompts), device=frames.device)
    return torch.stack([_degree(_small(clip)) for clip in frames])


def _degree(clip: Tensor) -> Tensor:
    grey = clip.mean(1)
    magnitude = optical_flow(grey[:-1], grey[1:]).norm(dim=1).flatten(1)
    top = magnitude.topk(max(round(_TOP * magnitude.shape[1]), 1), dim=1).values
    degree: Tensor = top.mean() * _SHORTER / min(grey.shape[1:])
    return degree


@torch.no_grad()
def motion_smoothness(frames: Tensor, prompts: Sequence[str]) -> Tensor:
    """How well frames are predicted by their neighbours (VBench, arXiv 2311.17982, motion smoothness).

        s = 1 - mean_f mean_p |x_f - x^_f|,   x^_f(p) = (x_{f-1}(p - d/2) + x_{f+1}(p + d/2)) / 2,   d = flow f-1 -> f+1

    The flow is Lucas-Kanade's, where VBench interpolates with AMT. A clip that stands still has 1: reward it together
    with `dynamic_degree`. The prompts are not read.

    Args:
        frames: (N, F, 3, Y, X) in [0, 1], F >= 3; larger ones are resized to 256 pixels on the shorter side.
        prompts: N.

    Returns:
        (N,) float32, in [0, 1].

    Raises:
        ValueError: fewer than three frames.
    """
    sizes = check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
    if sizes["F"] < 3:
        raise ValueError(f"motion_smoothness: expected clips of at least 3 frames, got {sizes['F']}")
    return torch.stack([_smoothness(_small(clip)) for clip in frames])


def _smoothness(clip: Tensor) -> Tensor:
    before, middle, after = clip[:-2], clip[1:-1], clip[2:]
    half = optical_flow(before.mean(1), after.mean(1)) / 2
    return 1 - ((_moved(before, -half) + _moved(after, half)) / 2 - middle).abs().mean()


def _moved(pictures: Tensor, flow: Tensor) -> Tensor:
    """Read pictures (M, 3, Y, X) at p + flow(p), flow (M, 2, Y, X) in pixels."""
    height, width = pictures.shape[2:]
    x = (torch.arange(width, device=flow.device) + flow[:, 0] + 0.5) * (2 / width) - 1
    y = (torch.arange(height, device=flow.device)[:, None] + flow[:, 1] + 0.5) * (2 / height) - 1
    return functional.grid_sample(pictures, torch.stack([x, y], -1), padding_mode="border", align_corners=False)


def _small(clip: Tensor) -> Tensor:
    """Resize a clip (F, 3, Y, X) to at most 256 pixels on the shorter side."""
    shrink = min(1.0, _SHORTER / min(clip.shape[2:]))
    return resized(clip.float(), (round(clip.shape[2] * shrink), round(clip.shape[3] * shrink)), "bilinear")
