"""How much moves where: per-pixel motion of a clip, as a second map to combine with the perceptual one. Pure torch."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from vipo.psm.allocation import smooth
from vipo.types import check_choice, check_shape

MOTIONS = ("none", "difference", "flow")

NEGLIGIBLE = {"difference": 1 / 255, "flow": 0.02}
"""Motion that nobody sees, in the units of `motion_maps`: added before a motion map is scaled to mean 1, so that the
noise of a clip that does not move is nearly even, and not a map."""

_WINDOW = 2.0  # pixels, std of the Lucas-Kanade window at every pyramid level
_ITERATIONS = 4
_SMALLEST = 16  # pixels, least side of the coarsest pyramid level
# Relative to the mean squared gradient: where the texture is weaker than this the flow stays near 0, not at noise.
_RIDGE = 3e-2


@torch.no_grad()
def motion_maps(frames: Tensor, kind: str, size: tuple[int, int]) -> Tensor:
    """Measure how fast each place of each frame moves, on a grid of `size`.

        difference   |x_f - x_(f-1)|, mean over the channels
        flow         length of the optical flow from frame f-1 to frame f (Lucas-Kanade), in cells of the grid

    Frame 0 has no predecessor and takes frame 1's motion. A single frame has none: 0; so has a clip that stands still,
    up to rounding.

    Args:
        frames: (N, F, 3, Y, X), in [0, 1].
        kind: "difference" or "flow".
        size: (H, W) of the latent grid. The flow is computed at four pixels per cell, or the frames' own size if less.

    Returns:
        (N, F, H, W), float32, >= 0, without gradient, on the frames' device.

    Raises:
        ValueError: wrong rank, or an unknown kind.
    """
    sizes = check_shape("frames", frames, "N F 3 Y X")
    check_choice("motion", kind, MOTIONS[1:])
    samples, count = sizes["N"], sizes["F"]
    if count == 1:
        return torch.zeros(samples, 1, *size, device=frames.device)
    if kind == "difference":
        moved = frames.float().diff(dim=1).abs().mean(2)
    else:
        shape = (min(sizes["Y"], 4 * size[0]), min(sizes["X"], 4 * size[1]))
        grey = _resize(frames.float().mean(2), shape).flatten(0, 1).unflatten(0, (samples, count))
        flow = optical_flow(grey[:, :-1].flatten(0, 1), grey[:, 1:].flatten(0, 1))
        cells = flow * flow.new_tensor([size[1] / shape[1], size[0] / shape[0]]).view(2, 1, 1)
        moved = cells.norm(dim=1).unflatten(0, (samples, count - 1))
    moved = _resize(moved, size)
    return torch.cat([moved[:, :1], moved], 1)


@torch.no_grad()
def optical_flow(first: Tensor, second: Tensor) -> Tensor:
    """Find the displacement of every pixel by iterative, pyramidal Lucas-Kanade, dense and batched.

        minimise over d, at each pixel:  sum_window g (second(p + d) - first(p))^2 + ridge |step|^2

    Lucas and Kanade 1981; coarse-to-fine as Bouguet 2001. Each level halves the picture, each iteration warps the
    second picture by the flow so far and solves a 2 x 2 system per pixel; a step is at most one pixel of its level.

    Args:
        first: (M, Y, X), float32 grey values.
        second: the same shape, the next picture.

    Returns:
        (M, 2, Y, X): what moved by (d_x, d_y), in pixels; exactly 0 where the two pictures are equal.
    """
    check_shape("second", second, "M Y X", check_shape("first", first, "M Y X"))
    levels = [(first, second)]
    while min(levels[-1][0].shape[1:]) >= 2 * _SMALLEST:
        levels.append((_halve(levels[-1][0]), _halve(levels[-1][1])))
    flow = first.new_zeros(len(first), 2, *levels[-1][0].shape[1:])
    for start, end in reversed(levels):
        height, width = start.shape[1:]
        scale = flow.new_tensor([width / flow.shape[3], height / flow.shape[2]]).view(2, 1, 1)
        flow = functional.interpolate(flow, (height, width), mode="bilinear", align_corners=False) * scale
        flow = smooth(_refine(start, end, flow), _WINDOW)  # lone wrong matches do not reach the next level
    return flow


def _refine(first: Tensor, second: Tensor, flow: Tensor) -> Tensor:
    """Lucas-Kanade iterations at one level: (M, Y, X) twice, (M, 2, Y, X) -> (M, 2, Y, X)."""
    height, width = first.shape[1:]
    rows = torch.arange(height, device=first.device, dtype=first.dtype)
    columns = torch.arange(width, device=first.device, dtype=first.dtype)
    by_row, by_column = torch.gradient(first, dim=(1, 2))
    xx, xy, yy = smooth(torch.stack([by_column**2, by_column * by_row, by_row**2], 1), _WINDOW).unbind(1)
    tiny = torch.finfo(first.dtype).tiny
    ridge = _RIDGE * (xx + yy).mean((1, 2), keepdim=True) + tiny
    xx, yy = xx + ridge, yy + ridge
    determinant = xx * yy - xy**2
    for _ in range(_ITERATIONS):
        x = (columns + flow[:, 0] + 0.5) * (2 / width) - 1
        y = (rows[:, None] + flow[:, 1] + 0.5) * (2 / height) - 1
        warped = functional.grid_sample(
            second[:, None], torch.stack([x, y], -1), padding_mode="border", align_corners=False
        )[:, 0]
        inside = (x.abs() <= 1) & (y.abs() <= 1)
        change = torch.where(inside, warped - first, 0)  # what left the picture says nothing
        bx, by = smooth(torch.stack([by_column * change, by_row * change], 1), _WINDOW).unbind(1)
        step = torch.stack([xy * by - yy * bx, xy * bx - xx * by], 1) / determinant[:, None]
        flow = flow + step.clamp(-1, 1)
    return flow


def _halve(pictures: Tensor) -> Tensor:
    return _resize(pictures[None], (pictures.shape[1] // 2, pictures.shape[2] // 2))[0]


def _resize(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(pictures, size, mode="bilinear", align_corners=False, antialias=True)
