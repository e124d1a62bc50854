"""The Perceptual Structuring Module: decoded frames -> allocation maps M on the latent grid (ViPO Eq. 2).

backbones.py extracts patch features, allocation.py turns them into one map per frame, latent_grid.py carries the maps
to the latent grid. `PerceptualStructuring` runs the three in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from vipo.psm.allocation import (
    CONTROLS,
    NORMALISATIONS,
    ORIENTATIONS,
    SOLVERS,
    WEIGHTINGS,
    aggregate,
    check_choice,
    control_maps,
    map_statistics,
    normalise,
    orient,
    principal_components,
    smooth,
)
from vipo.psm.backbones import Backbone, BackboneError, FrozenBackbone, first_line
from vipo.psm.latent_grid import check_frames, pool_time, resize_space
from vipo.types import check_shape

__all__ = [
    "CONTROLS",
    "NORMALISATIONS",
    "ORIENTATIONS",
    "PCA_SCOPES",
    "SOLVERS",
    "WEIGHTINGS",
    "Backbone",
    "BackboneError",
    "FrozenBackbone",
    "PerceptualStructuring",
    "control_maps",
    "map_statistics",
]

PCA_SCOPES = ("sample", "frame")
_PIXEL_TOLERANCE = 1e-3  # decoders in bfloat16 overshoot [0, 1] by less


@dataclass(frozen=True, eq=False)
class PerceptualStructuring:
    """Frames -> allocation maps, with any frozen backbone.

        S = sum_j lambda_j S_j(PCA_K(Phi(frames))),   M = normalise(pool_time(resize(smooth(S))))       (ViPO Eq. 2)

    Attributes:
        backbone: frames (M, 3, Y, X) in [0, 1] -> features (M, h, w, D).
        components: K principal components, 1..min(P, D); the paper's 3.
        orientation: how a component's arbitrary sign is settled, see `allocation.orient`.
        weighting: how components are weighed, "variance" (the paper's), "mean" or "first".
        smoothing: standard deviation of the Gaussian, in patches, >= 0; the paper's 1.
        normalisation: "mean" (mean 1 per sample) or "minmax" (the released code's).
        floor: least weight of any position, in [0, 1), with "mean" only.
        pca_scope: "sample" = one basis for all frames of a sample; "frame" = one per frame (the released code's).
        solver: "subspace" or "exact", see `allocation.principal_components`.
    """

    backbone: Backbone
    components: int = 3
    orientation: str = "border_energy"
    weighting: str = "variance"
    smoothing: float = 1.0
    normalisation: str = "mean"
    floor: float = 0.0
    pca_scope: str = "sample"
    solver: str = "subspace"

    def __post_init__(self) -> None:
        """Check every option now rather than after the first rollout."""
        if self.components < 1:
            raise ValueError(f"components: expected at least 1, got {self.components}")
        check_choice("orientation", self.orientation, ORIENTATIONS)
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("pca_scope", self.pca_scope, PCA_SCOPES)
        check_choice("solver", self.solver, SOLVERS)
        # These two check smoothing, normalisation and floor themselves; one position is enough to ask them.
        normalise(smooth(torch.ones(1, 1, 1, 1), self.smoothing), self.normalisation, self.floor)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        components: int = 3,
        orientation: str = "border_energy",
        weighting: str = "variance",
        smoothing: float = 1.0,
        normalisation: str = "mean",
        floor: float = 0.0,
        pca_scope: str = "sample",
        solver: str = "subspace",
        image_size: int | None = None,
        chunk: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load the backbone and make the module; see the class and `FrozenBackbone.from_pretrained` for the options."""
        backbone = FrozenBackbone.from_pretrained(
            name_or_path, image_size=image_size, chunk=chunk, device=device, dtype=dtype
        )
        return cls(
            backbone,
            components=components,
            orientation=orientation,
            weighting=weighting,
            smoothing=smoothing,
            normalisation=normalisation,
            floor=floor,
            pca_scope=pca_scope,
            solver=solver,
        )

    @torch.no_grad()
    def __call__(self, frames: Tensor, latent_shape: tuple[int, int, int], temporal_compression: int = 1) -> Tensor:
        """Make the allocation maps of N decoded samples.

        Args:
            frames: (N, F, 3, Y, X), in [0, 1], on the backbone's device.
            latent_shape: (T, H, W).
            temporal_compression: c, pixel frames per latent frame; F = 1 + (T - 1) * c.

        Returns:
            M, (N, T, H, W), float32, >= 0, without gradient; with normalisation "mean" of mean 1 per sample.

        Raises:
            ValueError: frames of the wrong shape, dtype, range or number; features of the wrong shape.
            BackboneError: the backbone failed, or its features are not finite. There is no fallback map.
        """
        sizes = check_shape("frames", frames, "N F 3 Y X")
        if not frames.is_floating_point() or frames.numel() == 0:
            raise ValueError(
                f"frames: expected at least one pixel, floating point in [0, 1], got {frames.dtype} of shape "
                f"{tuple(frames.shape)}; divide uint8 frames by 255"
            )
        if len(latent_shape) != 3 or min(latent_shape) < 1:
            raise ValueError(f"latent_shape: expected (T, H, W) of at least 1 each, got {latent_shape}")
        latent_frames, height, width = latent_shape
        check_frames(sizes["F"], latent_frames, temporal_compression)
        features = self._features(frames)
        with torch.autocast(frames.device.type, enabled=False):  # the caller's autocast would round the PCA
            maps = smooth(self._frame_maps(features), self.smoothing)
            maps = pool_time(resize_space(maps, (height, width)), latent_frames, temporal_compression)
            return normalise(maps, self.normalisation, self.floor).float()

    def _features(self, frames: Tensor) -> Tensor:
        """Run the backbone on every frame and check what goes in and comes out with one host sync, (N, F, h, w, D)."""
        flat = frames.flatten(0, 1).float()
        try:
            features = self.backbone(flat)
        except RuntimeError as error:
            raise BackboneError(
                f"the map's backbone failed on {len(flat)} frames of shape {tuple(flat.shape[1:])}: {first_line(error)}"
            ) from error
        if not isinstance(features, Tensor):
            raise ValueError(f"the backbone's features: expected a tensor, got {type(features).__name__}")
        check_shape("the backbone's features", features, "M h w D", {"M": len(flat)})
        if features.numel() == 0 or features.device != frames.device:
            raise ValueError(
                f"the backbone's features: expected at least one value on {frames.device}, got shape "
                f"{tuple(features.shape)} on {features.device}"
            )
        bounds = torch.stack([bound.float() for bound in (*flat.aminmax(), *features.aminmax())])
        low, high, features_low, features_high = bounds.tolist()
        if not (low >= -_PIXEL_TOLERANCE and high <= 1 + _PIXEL_TOLERANCE):  # also NaN, which aminmax propagates
            raise ValueError(f"frames: expected finite values in [0, 1], got min {low:.4g} and max {high:.4g}")
        if not (features_low > -torch.inf and features_high < torch.inf):
            raise BackboneError(
                f"the backbone's features are not finite (min {features_low}, max {features_high}) for frames in "
                f"[{low:.4g}, {high:.4g}]: check its weights, or compute in float32 (dtype=None)"
            )
        return torch.unflatten(features, 0, frames.shape[:2])

    def _frame_maps(self, features: Tensor) -> Tensor:
        """PCA, orientation and aggregation: features (N, F, h, w, D) -> S (N, F, h, w)."""
        samples, frames, rows, columns, _ = features.shape
        grid = (frames if self.pca_scope == "sample" else 1, rows, columns)
        feature_sets = features.reshape(-1, grid[0] * rows * columns, features.shape[-1])
        components = principal_components(feature_sets, self.components, self.solver)
        component_maps = orient(components, grid, self.orientation)
        maps = aggregate(component_maps, components.explained_variance_ratio, self.weighting)
        return maps.view(samples, frames, rows, columns)
