"""Rewards without a model."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..media import to_image
from ..nano.world import measure
from ..types import check_choice, check_shape

NANO_METRICS = {"shape_iou": 1.0, "shape_accuracy": 1.0, "colour_error": -1.0}
"""Exact metrics of the nano world that are defined for all its prompts, and the sign that makes them rewards."""


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


def brightness(frames: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean over pixels of the luma 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), in [0, 1]. The prompts are not read.

    Args:
        frames: (N, F, 3, Y, X) in [0, 1].
        prompts: N.

    Returns:
        (N,) float32.
    """
    check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
    luma = frames.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32)
    return torch.einsum("nfcyx,c->nfyx", frames.float(), luma).mean((1, 2, 3))


@torch.no_grad()
def compressibility(frames: Tensor, prompts: Sequence[str]) -> Tensor:
    """Minus the size of a picture as a JPEG of quality 95, in kilobytes of 1000 (DDPO, arXiv 2305.13301).

    A clip's score is the mean of its frames' scores. The prompts are not read.

    Args:
        frames: (N, F, 3, Y, X) in [0, 1].
        prompts: N.

    Returns:
        (N,) float32, < 0.
    """
    check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
    sizes = torch.tensor([[_jpeg_bytes(picture) for picture in clip] for clip in frames], dtype=torch.float32)
    return -sizes.mean(1) / 1000


def incompressibility(frames: Tensor, prompts: Sequence[str]) -> Tensor:
    """The size of a picture as a JPEG of quality 95, in kilobytes (DDPO's incompressibility); see `compressibility`."""
    return -compressibility(frames, prompts)


def _jpeg_bytes(picture: Tensor) -> int:
    buffer = io.BytesIO()
    to_image(picture).save(buffer, format="JPEG", quality=95)
    return buffer.tell()


def nano_metric(path: str | None, device: torch.device | str, *, metric: str) -> Callable[..., Tensor]:
    """Return an exact metric of the nano world (vipo.nano.world.measure) as a reward: no learned judge.

    Args:
        path: None.
        device: not used; the metric is computed on the CPU.
        metric: one of NANO_METRICS, negated where lower is better.

    Raises:
        ValueError: an unknown metric, or a path.
    """
    check_choice("metric", metric, NANO_METRICS)
    if path is not None:
        raise ValueError(f"nano_{metric}: takes no path, got {path!r}")

    @torch.no_grad()
    def reward(frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Frames (N, F, 3, 64, 64) in [0, 1] and N prompts of the nano world -> (N,), the mean over frames."""
        sizes = check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
        words = [prompt for prompt in prompts for _ in range(sizes["F"])]
        found = measure(frames.flatten(0, 1).float().cpu(), words)[metric]
        return NANO_METRICS[metric] * found.view(sizes["N"], sizes["F"]).mean(1)

    return reward
