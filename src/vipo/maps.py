"""Where the allocation maps of a run come from: the PSM, masks or boxes, the reward's own credit, or a user function.

Every source gives non-negative maps per frame on any grid; `LatentAllocation.place` carries all of them to the latent
grid in the same way, and a control may then replace them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from .config import MapConfig
from .files import path_below
from .media import read_frames
from .named import calling, import_function
from .psm import LatentAllocation, PerceptualStructuring, control_maps, map_statistics
from .types import check_shape, require_finite

# Controls that do not depend on the map they stand for: no source is loaded or run for them.
CONTENT_FREE = ("ones", "centre")
BACKBONE = ("source", "backbone", "layer", "image_size", "chunk", "autocast")
"""Keys of the map section that decide which backbone is loaded: sources equal in them share it."""
LARGEST = 1e30
"""Bound of a user's map values: float32 sums of larger ones overflow to a map of zeros."""


class FrameMaps(Protocol):
    """A user's map: frames (N, F, 3, Y, X) in [0, 1] and N prompts -> (N, F, h, w), >= 0, on any grid."""

    def __call__(self, frames: Tensor, prompts: Sequence[str], /) -> Tensor:
        """Return how much each place of each frame matters."""
        ...


class MapSource:
    """The maps that `config.map` names: (frames, prompts) -> allocation maps on the latent grid.

    Args:
        config: the map section.
        device: where the backbone goes.
        psm: instead of the one that the config describes.
        allow_pickle: of the backbone's weights, see `FrozenBackbone.from_pretrained`.

    Raises:
        ValueError: a backbone, a mask file or a function that is not there.
    """

    def __init__(
        self,
        config: MapConfig,
        device: torch.device | str = "cpu",
        *,
        psm: PerceptualStructuring | None = None,
        allow_pickle: bool = False,
    ) -> None:
        self.control, self.source, self.allow_pickle = config.control, config.source, allow_pickle
        self.psm: PerceptualStructuring | None = None
        self.frame_maps: FrameMaps | None = None
        self.allocation = LatentAllocation(
            motion=config.motion,
            combine=config.combine,
            motion_weight=config.motion_weight,
            normalisation=config.normalisation,
            temperature=config.temperature,
            floor=config.floor,
        )
        if self.content_free:
            return
        if self.source == "psm":
            self.psm = self.allocation = psm or make_psm(config, device, allow_pickle=allow_pickle)
        elif self.source == "masks":
            self.frame_maps = MaskFile(Path(config.path or ""))
        elif self.source != "reward":
            self.frame_maps = import_function("map.source", self.source, "(frames, prompts) -> (N, F, h, w)")

    @property
    def content_free(self) -> bool:
        """Whether the maps are the same for every sample, so that nothing has to be looked at."""
        return self.control in CONTENT_FREE

    @property
    def backbone(self) -> Any:
        """The PSM's backbone, or None."""
        return self.psm.backbone if self.psm else None

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError now for a prompt that the source will not know."""
        if isinstance(self.frame_maps, MaskFile):
            self.frame_maps.check(prompts)

    def __call__(
        self,
        frames: Tensor,
        prompts: Sequence[str],
        latent_shape: tuple[int, int, int],
        temporal_compression: int = 1,
        *,
        first_frame_alone: bool = True,
        credit: Tensor | None = None,
        generator: torch.Generator | None = None,
        features: Tensor | None = None,
        of: int | None = None,
        first: int = 0,
    ) -> Tensor:
        """Make the maps of N samples.

        Args:
            frames: (N, F, 3, Y, X), in [0, 1].
            prompts: N prompts.
            latent_shape: (T, H, W).
            temporal_compression: c, pixel frames per latent frame.
            first_frame_alone: whether frame 0 has a latent frame to itself: F = 1 + (T - 1) c, else F = T c.
            credit: (N, F, h, w), >= 0, what the reward returned beside its scores; for source "reward".
            generator: for the controls that draw random numbers.
            features: of the frames, by the backbone, where they are known already.
            of: how many samples all ranks have; they draw the numbers of all, so that a sample's do not depend on
                how many ranks there are. Default: N.
            first: position of the first of these samples among them.

        Returns:
            (N, T, H, W), float32, >= 0, on the frames' device.

        Raises:
            ValueError: no credit where the source is the reward, or maps that are not (N, F, h, w) and >= 0.
            NonFiniteError: a map with NaN or infinite values.
        """
        if self.content_free:
            blank = torch.ones(len(frames), *latent_shape, device=frames.device)
            return control_maps(blank, self.control or "ones")
        if self.psm is not None:
            maps = self.psm(
                frames, latent_shape, temporal_compression, first_frame_alone=first_frame_alone, features=features
            )
        else:
            values = self._values(frames, prompts, credit).to(frames.device, torch.float32)
            maps = self.allocation.place(
                values, latent_shape, temporal_compression, first_frame_alone=first_frame_alone, frames=frames
            )
        if self.control is None:
            return maps
        every = maps.new_zeros(of or len(maps), *maps.shape[1:])
        own = slice(first, first + len(maps))
        every[own] = maps
        return control_maps(every, self.control, generator)[own]

    def _values(self, frames: Tensor, prompts: Sequence[str], credit: Tensor | None) -> Tensor:
        """The maps per frame of a source other than the PSM, checked."""
        if self.frame_maps is not None:
            with calling(f"map.source {self.source!r}") if ":" in self.source else contextlib.nullcontext():
                credit = self.frame_maps(frames, prompts)
        elif credit is None:
            raise ValueError(
                "map.source=reward: the reward returned scores only; return (scores (N,), credit (N, F, h, w)) or set "
                "another map.source"
            )
        credit = torch.as_tensor(credit)
        check_shape(f"map of {self.source}", credit, "N F h w", {"N": len(frames), "F": frames.shape[1]})
        require_finite(f"map of {self.source}", credit, prompts)
        low, high = (float(bound) for bound in credit.aminmax())
        if not (low >= 0 and high < LARGEST):
            raise ValueError(
                f"map of {self.source}: expected values in [0, {LARGEST:.0e}), got min {low:.4g} and max {high:.4g}"
            )
        return credit


def shared_sources(
    own: MapConfig, source: MapSource, others: Iterable[MapConfig], device: torch.device | str
) -> dict[MapConfig, MapSource]:
    """Make the sources of map sections, each backbone loaded once.

    Args:
        own: a section.
        source: its source, which is there already.
        others: further sections, each made once.
        device: where further backbones go.
    """
    sources = {own: source}
    for config in others:
        if config in sources:
            continue
        alike = (
            made.psm
            for given, made in sources.items()
            if made.psm is not None and all(getattr(given, key) == getattr(config, key) for key in BACKBONE)
        )
        psm = next(alike, None)
        if psm is not None:
            options = {f.name: getattr(config, f.name) for f in fields(psm) if f.name != "backbone"}
            psm = replace(psm, **options)
        sources[config] = MapSource(config, device, psm=psm, allow_pickle=source.allow_pickle)
    return sources


def make_psm(
    config: MapConfig, device: torch.device | str = "cpu", *, allow_pickle: bool = False
) -> PerceptualStructuring:
    """Build the Perceptual Structuring Module of a config."""
    return PerceptualStructuring.from_pretrained(
        config.backbone,
        layer=config.layer,
        image_size=config.image_size,
        chunk=config.chunk,
        dtype=getattr(torch, config.autocast) if config.autocast else None,
        device=device,
        allow_pickle=allow_pickle,
        components=config.components,
        orientation=config.orientation,
        weighting=config.weighting,
        smoothing=config.smoothing,
        pca_scope=config.pca_scope,
        solver=config.solver,
        motion=config.motion,
        combine=config.combine,
        motion_weight=config.motion_weight,
        normalisation=config.normalisation,
        temperature=config.temperature,
        floor=config.floor,
    )


class MaskFile:
    """Masks or boxes per prompt, from a JSON-lines file.

    One line per prompt: `{"prompt": "...", "mask": "cat.png"}`, a picture (white = subject), a .npy array (h, w) or
    (F, h, w), or a video of F frames, below the file's folder, with its path relative to it; or `{"prompt": "...",
    "boxes": [[left, top, right, bottom], ...]}` in fractions of the frame.

    Raises:
        ValueError: no such file, or a line that is neither.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"map.path: cannot read {path}: {error}; expected a .jsonl file of masks or boxes"
            ) from None
        self.entries: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                entry = self._parse(line, number)
                self.entries[entry["prompt"]] = entry

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            entry: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"map.path: {self.path} line {number} is not JSON: {error}") from None
        named = isinstance(entry, dict) and isinstance(entry.get("prompt"), str)
        if not named or isinstance(entry.get("mask"), str) == isinstance(entry.get("boxes"), list):
            raise ValueError(
                f'map.path: {self.path} line {number}: expected {{"prompt": ..., "mask": FILE}} or '
                f'{{"prompt": ..., "boxes": [[left, top, right, bottom], ...]}}, got {line[:80]}'
            )
        if "boxes" in entry:
            boxes = np.asarray(entry["boxes"], dtype=object)
            valid = boxes.ndim == 2 and boxes.shape[1] == 4 and all(isinstance(v, (int, float)) for v in boxes.flat)
            if not valid or not all(0 <= a < c <= 1 and 0 <= b < d <= 1 for a, b, c, d in boxes.tolist()):
                raise ValueError(
                    f"map.path: {self.path} line {number}: expected boxes [left, top, right, bottom] in fractions of "
                    f"the frame, 0 <= left < right <= 1 and 0 <= top < bottom <= 1, got {entry['boxes']}"
                )
        return dict(entry)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError naming the first prompt without an entry, or a mask that cannot be read."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.entries]
        if missing:
            raise ValueError(f"map.path: {self.path} has no entry for {len(missing)} prompts, first {missing[0]!r}")
        for prompt in dict.fromkeys(prompts):
            entry = self.entries[prompt]
            mask = _coverage(entry["boxes"], (64, 64)) if "boxes" in entry else self._read(entry["mask"])
            if mask.amin() == mask.amax():
                raise ValueError(
                    f"map.path: {self.path}: the mask of {prompt!r} is {float(mask.amax()):.3g} everywhere: it says "
                    "nothing; white is the subject, black the rest, and transparency counts as white"
                )

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return (N, F, Y, X) in [0, 1] for frames (N, F, 3, Y, X)."""
        count, size = frames.shape[1], (frames.shape[3], frames.shape[4])
        masks = {prompt: self._mask(prompt, count, size) for prompt in dict.fromkeys(prompts)}
        return torch.stack([masks[prompt] for prompt in prompts])

    def _read(self, name: str) -> Tensor:
        try:
            return read_mask(path_below(self.path.parent, name))
        except ValueError as error:
            raise ValueError(f"map.path: {self.path}: {error}") from None

    def _mask(self, prompt: str, count: int, size: tuple[int, int]) -> Tensor:
        """One prompt's mask, (F, Y, X)."""
        entry = self.entries[prompt]
        if "boxes" in entry:
            return _coverage(entry["boxes"], size).expand(count, *size)
        mask = self._read(entry["mask"])
        if len(mask) not in (1, count):
            raise ValueError(
                f"map.path: {self.path}: the mask of {prompt!r} has {len(mask)} frames, expected 1 or {count}"
            )
        resized = functional.interpolate(mask[:, None], size, mode="bilinear", align_corners=False, antialias=True)
        return resized[:, 0].expand(count, *size)


def _coverage(boxes: list[list[float]], size: tuple[int, int]) -> Tensor:
    """Share of each pixel of (Y, X) that boxes in fractions of the frame cover; the most of any box."""
    left, top, right, bottom = torch.tensor(boxes, dtype=torch.float32)[:, None].unbind(2)

    def overlap(low: Tensor, high: Tensor, length: int) -> Tensor:
        edges = torch.arange(length + 1) / length
        return (torch.minimum(high, edges[1:]) - torch.maximum(low, edges[:-1])).clamp_min(0) * length

    return (overlap(top, bottom, size[0])[:, :, None] * overlap(left, right, size[1])[:, None]).amax(0)


def read_mask(path: Path) -> Tensor:
    """Read a mask, (F, h, w) in [0, 1]: a picture or a video (white = subject), or a .npy array (h, w) or (F, h, w).

    Raises:
        ValueError: not readable, another number of dimensions, or values outside [0, 1].
    """
    if path.suffix.lower() != ".npy":
        return read_frames(path).mean(1)
    try:
        with path.open("rb") as stream:
            mask = torch.from_numpy(np.lib.format.read_array(stream).astype(np.float32))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise ValueError(f"{path}: not a readable .npy array of numbers: {error}") from None
    if mask.ndim not in (2, 3) or mask.numel() == 0 or not (mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(f"{path}: expected (h, w) or (F, h, w) in [0, 1], got shape {tuple(mask.shape)}")
    return mask if mask.ndim == 3 else mask[None]


def mean_statistics(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Statistics of maps of one or several shapes, weighted by the number of samples; counts are summed."""
    if len(maps) == 1:
        return map_statistics(maps[0])
    found = [map_statistics(part) for part in maps]
    weights = torch.tensor([float(len(part)) for part in maps], device=maps[0].device)
    weights = weights / weights.sum()
    mean = {name: (torch.stack([f[name].float() for f in found]) * weights).sum() for name in found[0]}
    return {
        **mean,
        "constant": torch.stack([f["constant"] for f in found]).sum(),
        "max": torch.stack([f["max"] for f in found]).amax(),
    }
