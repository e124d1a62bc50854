"""The Perceptual Structuring Module: decoded frames -> allocation maps M on the latent grid (ViPO Eq. 2).

backbones.py extracts patch features, pca.py and allocation.py turn them into one map per frame, latent_grid.py carries
the maps to the latent grid, motion.py adds what moves. `PerceptualStructuring` runs them in that order; controls.py
makes the maps it must beat, agreement.py compares a map with the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vipo.psm.allocation import (
    COMBINATIONS,
    NORMALISATIONS,
    ORIENTATIONS,
    WEIGHTINGS,
    aggregate,
    combine,
    flicker,
    map_statistics,
    normalise,
    orient,
    smooth,
)
from vipo.psm.backbones import Backbone, BackboneError, FrozenBackbone, NonFiniteFeatures, first_line
from vipo.psm.controls import CONTROLS, control_maps
from vipo.psm.latent_grid import check_frames, pool_time, resize_space
from vipo.psm.motion import MOTIONS, NEGLIGIBLE, motion_maps
from vipo.psm.pca import SOLVERS, canonical_projections, principal_components
from vipo.types import check_choice, check_shape

__all__ = [
    "COMBINATIONS",
    "CONTROLS",
    "MOTIONS",
    "NORMALISATIONS",
    "ORIENTATIONS",
    "PCA_SCOPES",
    "SOLVERS",
    "WEIGHTINGS",
    "Backbone",
    "BackboneError",
    "FrozenBackbone",
    "LatentAllocation",
    "PerceptualStructuring",
    "canonical_projections",
    "control_maps",
    "flicker",
    "map_statistics",
    "principal_components",
]

PCA_SCOPES = ("sample", "frame")
_LARGEST_FEATURE = 1e12  # float32 sums of squares of larger ones overflow
_PIXEL_TOLERANCE = 1e-3  # decoders in bfloat16 overshoot [0, 1] by less


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentAllocation:
    """The tail that every source of maps shares: maps per frame -> allocation maps M on the latent grid.

        M = normalise(combine(pool_time(resize(S)), pool_time(motion)))

    Attributes:
        motion: "none", "difference" or "flow": a second map of what moves, see `motion.motion_maps`.
        combine: how it joins the first: "product", "mean", "max" or "power", see `allocation.combine`.
        motion_weight: its weight for "mean" and "power", in [0, 1].
        normalisation: "mean" (mean 1 per sample) or "minmax" (the released code's).
        temperature: sharpness, > 0: below 1 sharper, above 1 flatter; with "mean" only.
        floor: least weight of any position, in [0, 1), with "mean" only.
    """

    motion: str = "none"
    combine: str = "product"
    motion_weight: float = 0.5
    normalisation: str = "mean"
    temperature: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Check every option now rather than after the first rollout."""
        check_choice("motion", self.motion, MOTIONS)
        one = torch.ones(1, 1, 1, 1)  # the functions check their own options; one position is enough to ask them
        combine(one, one, self.combine, self.motion_weight)
        normalise(one, self.normalisation, temperature=self.temperature, floor=self.floor)

    @torch.no_grad()
    def place(
        self,
        maps: Tensor,
        latent_shape: tuple[int, int, int],
        temporal_compression: int = 1,
        *,
        first_frame_alone: bool = True,
        frames: Tensor | None = None,
    ) -> Tensor:
        """Carry maps per frame to the latent grid and give them their final scale.

        Args:
            maps: (N, F, h, w), >= 0, on any grid that covers the frame.
            latent_shape: (T, H, W).
            temporal_compression: c, pixel frames per latent frame.
            first_frame_alone: whether frame 0 has a latent frame to itself: F = 1 + (T - 1) c, else F = T c.
            frames: (N, F, 3, Y, X), in [0, 1]; needed with motion only.

        Returns:
            M, (N, T, H, W), float32, >= 0, on the device of `maps`.

        Raises:
            ValueError: shapes that do not agree, or no frames where motion needs them.
        """
        latent_frames, height, width = latent_shape
        maps = maps.float()

        def on_latent_grid(values: Tensor) -> Tensor:
            resized = resize_space(values, (height, width))
            return pool_time(resized, latent_frames, temporal_compression, first_frame_alone=first_frame_alone)

        placed = on_latent_grid(maps)
        if self.motion != "none":
            if frames is None:
                raise ValueError(f'motion "{self.motion}" is measured on the frames: pass them, got None')
            negligible = NEGLIGIBLE[self.motion]
            moved = on_latent_grid(motion_maps(frames, self.motion, (height, width))).to(placed)
            still = moved.amax((1, 2, 3), keepdim=True) <= negligible  # nothing to add: the first map stays
            both = combine(placed, moved + negligible, self.combine, self.motion_weight)
            placed = torch.where(still, normalise(placed), both)
        return normalise(placed, self.normalisation, temperature=self.temperature, floor=self.floor).float()


@dataclass(frozen=True, eq=False)
class PerceptualStructuring(LatentAllocation):
    """Frames -> allocation maps, with any frozen backbone.

        S = sum_j lambda_j S_j(PCA_K(Phi(frames))),   M = normalise(pool_time(resize(smooth(S))))       (ViPO Eq. 2)

    Attributes:
        backbone: frames (N, F, 3, Y, X) in [0, 1] -> features (N, F, h, w, D); any callable, any `torch.nn.Module`.
        components: K principal components, 1..min(P, D); the paper's 3.
        orientation: how a component's arbitrary sign is settled, see `allocation.orient`.
        weighting: how components are weighed, "variance" (the paper's), "mean" or "first".
        smoothing: standard deviation of the Gaussian, in patches, >= 0; the paper's 1.
        pca_scope: "sample" = one basis for all frames of a sample; "frame" = one per frame (the released code's).
        solver: "subspace" or "exact", see `pca.principal_components`.
        motion, combine, motion_weight, normalisation, temperature, floor: see `LatentAllocation`.
    """

    backbone: Backbone
    components: int = 3
    orientation: str = "border_energy"
    weighting: str = "variance"
    smoothing: float = 1.0
    pca_scope: str = "sample"
    solver: str = "subspace"

    def __post_init__(self) -> None:
        """Check every option now rather than after the first rollout."""
        super().__post_init__()
        if self.components < 1:
            raise ValueError(f"components: expected at least 1, got {self.components}")
        check_choice("orientation", self.orientation, ORIENTATIONS)
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("pca_scope", self.pca_scope, PCA_SCOPES)
        check_choice("solver", self.solver, SOLVERS)
        smooth(torch.ones(1, 1, 1, 1), self.smoothing)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        layer: int = -1,
        image_size: int | None = None,
        chunk: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        allow_pickle: bool = False,
        **options: Any,
    ) -> Self:
        """Load the backbone and make the module.

        Args:
            name_or_path: see `FrozenBackbone.from_pretrained`, as for the next six.
            layer: which hidden state.
            image_size: pixels of the shorter side that the backbone sees.
            chunk: frames per forward pass.
            device: where the backbone goes.
            dtype: its autocast.
            allow_pickle: of its weights.
            options: the other attributes of the class, by name; an unknown one is a TypeError.
        """
        backbone = FrozenBackbone.from_pretrained(
            name_or_path,
            layer=layer,
            image_size=image_size,
            chunk=chunk,
            device=device,
            dtype=dtype,
            allow_pickle=allow_pickle,
        )
        return cls(backbone, **options)

    def __call__(
        self,
        frames: Tensor,
        latent_shape: tuple[int, int, int],
        temporal_compression: int = 1,
        *,
        first_frame_alone: bool = True,
        features: Tensor | None = None,
    ) -> Tensor:
        """Make the allocation maps of N decoded samples.

        Args:
            frames: (N, F, 3, Y, X), in [0, 1]; on any device, the backbone takes them chunk by chunk.
            latent_shape: (T, H, W).
            temporal_compression: c, pixel frames per latent frame.
            first_frame_alone: whether frame 0 has a latent frame to itself: F = 1 + (T - 1) c, else F = T c.
            features: what `features` returns for the frames, where it is known already.

        Returns:
            M, (N, T, H, W), float32, >= 0, without gradient, on the frames' device; with normalisation "mean" of mean
            1 per sample.

        Raises:
            ValueError: frames of the wrong shape, dtype, range or number; features of the wrong shape.
            BackboneError: the backbone failed, or its features are not finite. There is no fallback map.
        """
        sizes = check_shape("frames", frames, "N F 3 Y X")
        if len(latent_shape) != 3 or min(latent_shape) < 1:
            raise ValueError(f"latent_shape: expected (T, H, W) of at least 1 each, got {latent_shape}")
        check_frames(sizes["F"], latent_shape[0], temporal_compression, first_frame_alone)
        return self.allocate(
            self.features(frames) if features is None else features,
            latent_shape,
            temporal_compression,
            first_frame_alone=first_frame_alone,
            frames=frames if self.motion != "none" else None,
        ).to(frames.device)

    @torch.no_grad()
    def allocate(
        self,
        features: Tensor,
        latent_shape: tuple[int, int, int],
        temporal_compression: int = 1,
        *,
        first_frame_alone: bool = True,
        frames: Tensor | None = None,
    ) -> Tensor:
        """Make allocation maps of features already extracted: everything beyond the backbone.

        Args:
            features: (N, F, h, w, D), finite, as `features` returns them.
            latent_shape: see `__call__`, as for the next two.
            temporal_compression: see `__call__`.
            first_frame_alone: see `__call__`.
            frames: (N, F, 3, Y, X), in [0, 1]; needed with motion only.

        Returns:
            M, (N, T, H, W), as `__call__`, on the features' device.
        """
        with torch.autocast(features.device.type, enabled=False):  # the caller's autocast would round the PCA
            return self.place(
                self.frame_maps(features),
                latent_shape,
                temporal_compression,
                first_frame_alone=first_frame_alone,
                frames=frames,
            )

    @torch.no_grad()
    def features(self, frames: Tensor) -> Tensor:
        """Run the backbone and check what goes in and comes out: frames (N, F, 3, Y, X) -> (N, F, h, w, D).

        A sample of one single colour has features 0, so that its map is ones: it has no place to prefer.

        Raises:
            ValueError: frames of the wrong shape, dtype or range; features of the wrong shape.
            BackboneError: the backbone failed, or its features are not finite.
        """
        sizes = check_shape("frames", frames, "N F 3 Y X")
        if not frames.is_floating_point() or frames.numel() == 0:
            raise ValueError(
                f"frames: expected at least one pixel, floating point in [0, 1], got {frames.dtype} of shape "
                f"{tuple(frames.shape)}; divide uint8 frames by 255"
            )
        frames = frames.float()
        try:
            features = self.backbone(frames)
        except RuntimeError as error:
            raise BackboneError(
                f"the map's backbone failed on frames of shape {tuple(frames.shape)}: {first_line(error)}"
            ) from error
        if not isinstance(features, Tensor):
            raise ValueError(f"the backbone's features: expected a tensor, got {type(features).__name__}")
        check_shape("the backbone's features", features, "N F h w D", {"N": sizes["N"], "F": sizes["F"]})
        if features.numel() == 0:
            raise ValueError(f"the backbone's features: expected at least one value, got shape {tuple(features.shape)}")
        darkest, brightest = frames.amin((1, 3, 4)), frames.amax((1, 3, 4))  # (N, 3)
        blank = (brightest - darkest).amax(1) <= _PIXEL_TOLERANCE
        low, high, blanks = torch.stack([darkest.amin(), brightest.amax(), blank.sum()]).tolist()  # one host sync
        if not (low >= -_PIXEL_TOLERANCE and high <= 1 + _PIXEL_TOLERANCE):  # also NaN, which aminmax propagates
            raise ValueError(f"frames: expected finite values in [0, 1], got min {low:.4g} and max {high:.4g}")
        features_low, features_high = torch.stack(features.aminmax()).tolist()
        if not (features_low > -_LARGEST_FEATURE and features_high < _LARGEST_FEATURE):  # also NaN
            raise NonFiniteFeatures(
                f"the backbone's features are not finite, or beyond {_LARGEST_FEATURE:.0e} in size "
                f"(min {features_low}, max {features_high}) for frames in "
                f"[{low:.4g}, {high:.4g}]: check its weights, or compute in float32 (dtype=None)",
                "features of the map's backbone",
                features,
            )
        if blanks:  # position embeddings give structure to what has none; one feature everywhere gives a map of ones
            features = torch.where(blank.to(features.device).view(-1, 1, 1, 1, 1), 0, features)
        return features

    @torch.no_grad()
    def frame_maps(self, features: Tensor) -> Tensor:
        """PCA, orientation, aggregation, smoothing: features (N, F, h, w, D) -> S (N, F, h, w), >= 0."""
        samples, frames, rows, columns, _ = features.shape
        grid = (frames if self.pca_scope == "sample" else 1, rows, columns)
        feature_sets = features.reshape(-1, grid[0] * rows * columns, features.shape[-1])
        components = principal_components(feature_sets, self.components, self.solver)
        component_maps = orient(components, grid, self.orientation)
        maps = aggregate(component_maps, components.explained_variance_ratio, self.weighting)
        return smooth(maps.view(samples, frames, rows, columns), self.smoothing)
