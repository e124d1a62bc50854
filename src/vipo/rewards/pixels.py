"""What image processors do, on tensors: resize with antialiasing, fit into a model's square, sample frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..types import check_shape

Fit = Literal["crop", "pad", "stretch"]


def resized(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resize images (n, 3, Y, X) in [0, 1] with antialiasing, as Pillow and torchvision do, and keep them in [0, 1].

    Pillow rounds to 8 bits after each of its two passes; this does not, so that the two differ by up to 1/255 or so.
    """
    if tuple(images.shape[2:]) == size:
        return images
    return functional.interpolate(images, size, mode=mode, align_corners=False, antialias=True).clamp(0, 1)


def fitted(images: Tensor, side: int, fit: Fit) -> Tensor:
    """Bring images (n, 3, Y, X) in [0, 1] to (n, 3, side, side).

    crop: the shorter side becomes `side`, the centre is cut out (CLIP's own image processor).
    pad: the longer side becomes `side`, black bars fill the rest (HPSv2's evaluation).
    stretch: both sides become `side`.
    """
    height, width = images.shape[2:]
    if fit == "stretch":
        return resized(images, (side, side))
    if fit == "crop":
        shorter = min(height, width)
        rows, columns = int(side * height / shorter), int(side * width / shorter)
        top, left = (rows - side) // 2, (columns - side) // 2
        return resized(images, (rows, columns))[:, :, top : top + side, left : left + side]
    scale = side / max(height, width)
    rows, columns = max(round(height * scale), 1), max(round(width * scale), 1)
    down, right = side - rows, side - columns
    bars = (right // 2, right - right // 2, down // 2, down - down // 2)
    return functional.pad(resized(images, (rows, columns)), bars)


def statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and std per channel as tensors (3, 1, 1)."""
    return torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]


def per_frame(
    score: Callable[[Tensor, list[str]], Tensor], frames: Tensor, prompts: Sequence[str], chunk: int
) -> Tensor:
    """Score every frame of N clips with a function of pictures (n, 3, Y, X) and n prompts, n <= chunk: (N,), the mean.

    Args:
        score: gives (n,).
        frames: (N, F, 3, Y, X) in [0, 1].
        prompts: N, each for all frames of its clip.
        chunk: pictures per call of `score`.

    Returns:
        (N,) float32.
    """
    sizes = check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
    pictures = frames.flatten(0, 1)
    words = [prompt for prompt in prompts for _ in range(sizes["F"])]
    starts = range(0, len(pictures), chunk)
    parts = [score(pictures[i : i + chunk].float(), words[i : i + chunk]).float() for i in starts]
    return torch.cat(parts).view(sizes["N"], sizes["F"]).mean(1)


def spread(count: int, total: int) -> list[int]:
    """Return `count` indices spread evenly over 0 ... total - 1, both included; all of them if count >= total."""
    return torch.linspace(0, total - 1, min(count, total)).round().long().tolist()
