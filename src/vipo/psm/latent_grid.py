"""From the patch grid to the latent grid: patches to latent rows and columns, pixel frames to latent frames."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from vipo.types import check_shape


def resize_space(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample maps to another grid over the same image: antialiased bilinear, corners not aligned.

    Args:
        maps: (N, F, h, w), one value per patch; the patches cover the whole image.
        size: (H, W) of the latent grid, which covers the same image.

    Returns:
        (N, F, H, W); non-negative maps stay non-negative, a constant map stays constant.

    Raises:
        ValueError: wrong rank, or a size below 1.
    """
    check_shape("maps", maps, "N F h w")
    if min(size) < 1:
        raise ValueError(f"size: expected (H, W) of at least 1 each, got {size}")
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=True)


def check_frames(frames: int, latent_frames: int, temporal_compression: int, first_frame_alone: bool = True) -> None:
    """Check that F pixel frames are what T latent frames decode to.

        F = 1 + (T - 1) * c  with the first frame alone (causal VAEs),   F = T * c  without

    Raises:
        ValueError: T or c below 1, or another F.
    """
    if latent_frames < 1 or temporal_compression < 1:
        raise ValueError(
            f"expected latent_frames >= 1 and temporal_compression >= 1, got {latent_frames} and {temporal_compression}"
        )
    alone = int(first_frame_alone)
    expected = alone + (latent_frames - alone) * temporal_compression
    if frames != expected:
        formula = "1 + (T - 1) * c" if first_frame_alone else "T * c"
        raise ValueError(
            f"{frames} pixel frames do not decode from T = {latent_frames} latent frames at temporal compression "
            f"c = {temporal_compression}: expected F = {formula} = {expected}; pass all decoded frames, and the "
            "temporal compression of the pipeline's VAE (Wan 4, LTX 8, images 1)"
        )


def frame_groups(frames: int, latent_frames: int) -> tuple[int, bool]:
    """Read off F and T how a VAE groups pixel frames: (c, whether the first frame has a latent frame to itself).

    F = 1 + (T - 1) c with the first frame alone, F = T c without. Known VAEs have c = 1 or an even c, so that an odd F
    is the one and an even F the other.

    Raises:
        ValueError: no c gives F frames from T latent frames.
    """
    if frames == latent_frames:
        return 1, True
    alone = frames % 2 == 1 and latent_frames > 1
    groups, grouped = (latent_frames - 1, frames - 1) if alone else (latent_frames, frames)
    if grouped % groups:
        raise ValueError(
            f"{frames} frames of {latent_frames} latent frames: neither F = 1 + (T - 1) c nor F = T c with an even c; "
            "this VAE's grouping of frames is not known"
        )
    return grouped // groups, alone


def pool_time(
    maps: Tensor, latent_frames: int, temporal_compression: int = 1, *, first_frame_alone: bool = True
) -> Tensor:
    """Average the maps of the pixel frames that belong to each latent frame of a (causal) video VAE.

        M[0] = m[0],   M[j] = mean(m[1 + (j-1) c .. j c])  for j >= 1      first frame alone
        M[j] = mean(m[j c .. (j+1) c - 1])                                 otherwise

    Every pixel frame is read exactly once. c = 1 is the identity.

    Args:
        maps: (N, F, H, W).
        latent_frames: T.
        temporal_compression: c, pixel frames per latent frame.
        first_frame_alone: whether the first pixel frame has a latent frame to itself, as in causal video VAEs.

    Returns:
        (N, T, H, W).

    Raises:
        ValueError: wrong rank, or F is not what T and c give.
    """
    sizes = check_shape("maps", maps, "N F H W")
    check_frames(sizes["F"], latent_frames, temporal_compression, first_frame_alone)
    alone = int(first_frame_alone)
    groups = torch.unflatten(maps[:, alone:], 1, (latent_frames - alone, temporal_compression)).mean(2)
    return torch.cat([maps[:, :alone], groups], dim=1)


def spread_time(maps: Tensor, temporal_compression: int = 1, *, first_frame_alone: bool = True) -> Tensor:
    """Give every pixel frame the map of the latent frame that it belongs to; `pool_time` undoes it.

        m[0] = M[0],   m[f] = M[1 + (f - 1) // c]  for f >= 1      first frame alone
        m[f] = M[f // c]                                           otherwise

    Args:
        maps: (N, T, H, W).
        temporal_compression: c, pixel frames per latent frame.
        first_frame_alone: see `pool_time`.

    Returns:
        (N, F, H, W).

    Raises:
        ValueError: wrong rank, or c below 1.
    """
    sizes = check_shape("maps", maps, "N T H W")
    if temporal_compression < 1:
        raise ValueError(f"expected temporal_compression >= 1, got {temporal_compression}")
    counts = torch.full((sizes["T"],), temporal_compression, device=maps.device)
    counts[:1] = 1 if first_frame_alone else temporal_compression
    return maps.repeat_interleave(counts, dim=1)
