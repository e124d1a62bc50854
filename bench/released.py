"""The released code's way from frames to maps, written from its description alone, for `bench/psm.py`.

Frame by frame: uint8 PIL image, resize, batch-1 forward, features to the CPU, scikit-learn's PCA with every component
mapped by (max - x) / (max - min) and weighed by its explained-variance ratio, scipy's Gaussian, min-max, bilinear
resize to the latent grid; clips are then resized trilinearly in time and brought to [0, 1] once more.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from torch import Tensor

MEAN, STD = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))  # ImageNet's


@torch.no_grad()
def released_features(model: torch.nn.Module, frame: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> np.ndarray:
    """Encode one frame (3, Y, X) through PIL and batch 1: (h, w, D) on the CPU, with `grid` = (h, w)."""
    patch = int(cast(Any, model.config).patch_size)
    pixels = (frame * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels).resize((grid[1] * patch, grid[0] * patch), Image.Resampling.BICUBIC)
    values = (np.asarray(picture, dtype=np.float32) / 255 - MEAN) / STD
    batch = torch.from_numpy(values).permute(2, 0, 1)[None].to(frame.device)
    with torch.autocast(frame.device.type, dtype=dtype, enabled=dtype != torch.float32):
        tokens = model(batch).last_hidden_state
    return tokens[0, 1:].float().cpu().numpy().reshape(*grid, -1)


def released_frame_map(features: np.ndarray, solver: str = "auto", seed: int | None = None) -> np.ndarray:
    """Make the map of one frame on the patch grid: (h, w, D) -> (h, w) in [0, 1]."""
    pca = PCA(3, svd_solver=solver, random_state=seed)
    projections = pca.fit_transform(features.reshape(-1, features.shape[-1]))
    high, low = projections.max(0), projections.min(0)
    weighed = ((high - projections) / (high - low)) @ pca.explained_variance_ratio_
    blurred = gaussian_filter(weighed.reshape(features.shape[:2]), sigma=1)
    return (blurred - blurred.min()) / (blurred.max() - blurred.min())


def released_maps(
    model: torch.nn.Module,
    frames: Tensor,
    latent_shape: tuple[int, int, int],
    grid: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    solver: str = "auto",
) -> Tensor:
    """Make the maps of (N, F, 3, Y, X): (N, T, H, W) in [0, 1].

    Args:
        model: a DINOv2.
        frames: in [0, 1].
        latent_shape: (T, H, W).
        grid: (h, w), patches of a frame.
        dtype: of the autocast inside the network; float32 = none.
        solver: scikit-learn's `svd_solver`; "auto", as released, is its unseeded randomised one at these sizes.
    """
    samples = []
    for sample in frames:
        maps = [released_frame_map(released_features(model, frame, grid, dtype), solver) for frame in sample]
        stacked = torch.from_numpy(np.stack(maps))[:, None].to(frames.device)
        resized = functional.interpolate(stacked, size=latent_shape[1:], mode="bilinear")[:, 0]
        if latent_shape[0] > 1:
            resized = functional.interpolate(resized[None, None], size=latent_shape, mode="trilinear")[0, 0]
            resized = (resized - resized.min()) / (resized.max() - resized.min())
        samples.append(resized)
    return torch.stack(samples)
