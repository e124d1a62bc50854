"""Control maps: what a claim about ViPO must beat. Pure batched torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vipo.psm.allocation import blur_matrix, centre_prior, normalise
from vipo.types import check_choice, check_shape

CONTROLS = ("ones", "centre", "shuffled", "inverted", "random")


def control_maps(maps: Tensor, kind: str, generator: torch.Generator | None = None) -> Tensor:
    """Make the maps that a claim about ViPO must beat: same strength, other places.

    All but ones, which is scalar GRPO exactly, have the mean of `maps` per sample (1 with normalisation "mean").

        ones      1 everywhere: scalar GRPO
        centre    a Gaussian blob at the centre of the frame, std a quarter of each axis: where subjects tend to be
        shuffled  blocks of 2 x 2 positions permuted within each sample (single positions where H or W is odd or the map
                  is one block): the same values, elsewhere
        inverted  max - M, scaled: pressure where perception does not look
        random    a smooth random field whose sorted values are M's: a plausible map of nothing

    Args:
        maps: (N, T, H, W), >= 0.
        kind: one of CONTROLS.
        generator: for "shuffled" and "random", on any device.

    Returns:
        (N, T, H, W), >= 0.

    Raises:
        ValueError: wrong rank, unknown kind, or no generator where one is needed.
    """
    check_shape("maps", maps, "N T H W")
    check_choice("control", kind, CONTROLS)
    if kind == "ones":
        return torch.ones_like(maps)
    mean = maps.mean((1, 2, 3), keepdim=True)
    if kind == "centre":
        return mean * normalise(centre_prior(maps.shape[2], maps.shape[3], maps).expand_as(maps))
    if kind == "inverted":
        return mean * normalise(maps.amax((1, 2, 3), keepdim=True) - maps)
    if generator is None:
        raise ValueError(f'control "{kind}" draws random numbers: pass a torch.Generator, got None')
    return _shuffle_blocks(maps, generator) if kind == "shuffled" else _random_field(maps, generator)


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
