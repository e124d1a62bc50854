"""Rewards without a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..types import check_shape


def redness(frames: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean over pixels of R - (G + B) / 2, in [-1, 1]: the ViPO paper's diagnostic reward. The prompts are not read.

    Args:
        frames: (N, F, 3, Y, X) in [0, 1].
        prompts: N.

    Returns:
        (N,) float32.
    """
    check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
    red, green, blue = frames.float().unbind(2)
    return (red - 0.5 * (green + blue)).mean((1, 2, 3))
