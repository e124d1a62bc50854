"""`vipo maps`: the allocation maps of anybody's pictures and clips, as pictures and as numbers, before any training.

    input -> frames -> features (once per backbone) -> maps (one per orientation) -> pictures, statistics, agreement

Every input gets a folder with map.npy, overlay, components and sheet.png; maps.json holds the numbers of all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vipo import __version__
from vipo.config import MapConfig
from vipo.files import write_atomically
from vipo.inspection.record import FILES, MAPS, check_output, remove_earlier, summarise
from vipo.maps import make_psm, read_mask
from vipo.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    name_media,
    read_fps,
    read_frames,
    write_image,
    write_video,
)
from vipo.pictures import Block, cell_size, component_pictures, draw_sheet, overlay
from vipo.psm import CONTROLS, ORIENTATIONS, BackboneError, PerceptualStructuring, control_maps, map_statistics
from vipo.psm.agreement import agreement
from vipo.psm.latent_grid import spread_time
from vipo.types import check_choice, find_device

FPS = 8.0
"""Of a clip whose file states no rate."""
Progress = Callable[[str, int, int, str], None]
"""(stage, done, total, remark)"""


@dataclass(frozen=True)
class InspectOptions:
    """How inputs are inspected; the map itself is `MapConfig`'s.

    Attributes:
        backbones: shown in the sheet and measured beside `MapConfig.backbone`.
        orientations: rules shown and measured beside `MapConfig.orientation`.
        spatial_compression: pixels per latent row and column.
        temporal_compression: c, pixel frames per latent frame of clips; Wan 4, LTX 8.
        first_frame_alone: whether a clip's frame 0 has a latent frame to itself, as in causal video VAEs.
        ground_truth: a mask file for a single input, or a folder of masks named as the inputs; white = subject.
        max_frames: read no more of a clip; None reads all.
        fps: of the written clips; None = the input's own.
        device: torch device of the backbones; None = cuda where there is one, else cpu.
        seed: of the random controls.
    """

    backbones: Sequence[str] = ()
    orientations: Sequence[str] = ORIENTATIONS
    spatial_compression: int = 8
    temporal_compression: int = 1
    first_frame_alone: bool = True
    ground_truth: Path | None = None
    max_frames: int | None = None
    fps: float | None = None
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every option before anything is read."""
        for rule in self.orientations:
            check_choice("orientations", rule, ORIENTATIONS)
        least = {"spatial_compression": 1, "temporal_compression": 1, "max_frames": 1, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}: expected at least {bound}, got {value}")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps: expected a positive number, got {self.fps}")
        if self.ground_truth is not None and not self.ground_truth.exists():
            raise ValueError(f"ground_truth: no such file or folder: {self.ground_truth}")


@dataclass
class Inspection:
    """What `inspect_maps` found.

    Attributes:
        results: one entry per input whose maps were made, as in maps.json.
        failures: (path, reason) of every input without maps or without its mask; not empty = exit code 1.
        overall: means over the inputs with 95 % intervals, as in maps.json.
    """

    results: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    overall: dict[str, Any] = field(default_factory=dict)


@dataclass
class Clip:
    """One input, read and cut to whole latent frames.

    Attributes:
        frames: (F, 3, Y, X), in [0, 1]; F = 1 for a picture.
        mask: (F, Y, X), in [0, 1], or None.
        temporal_compression: c; 1 for a picture.
        latent_shape: (T, H, W).
        fps: frames per second.
        first_frame_alone: see `InspectOptions`.
        frames_read: F before the cut.
        notes: remarks for the user.
    """

    frames: Tensor
    mask: Tensor | None
    temporal_compression: int
    latent_shape: tuple[int, int, int]
    fps: float
    first_frame_alone: bool
    frames_read: int
    notes: list[str]

    def per_frame(self, maps: Tensor) -> Tensor:
        """Give every pixel frame the map of its latent frame: (T, H, W) -> (F, H, W)."""
        return spread_time(maps[None], self.temporal_compression, first_frame_alone=self.first_frame_alone)[0]

    def measure(self, maps: Tensor) -> dict[str, float]:
        """Agreement of maps (T, H, W) with the mask over all pixels of all frames; the maps are resized to them."""
        assert self.mask is not None
        large = F.interpolate(self.per_frame(maps)[:, None], self.frames.shape[2:], mode="bilinear")[:, 0]
        return {name: float(value) for name, value in agreement(large[None], self.mask[None]).items()}


def inspect_maps(
    inputs: Sequence[Path],
    output: Path,
    map_config: MapConfig | None = None,
    options: InspectOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total, remark: None,
) -> Inspection:
    """Make and write the maps of pictures and clips, and measure them where masks are given.

    An input that is missing or cannot be read, or whose mask cannot, is named in `failures`; the others are done all
    the same. maps.json is written again after every input, so that an interrupted run keeps what it has.

    Args:
        inputs: files, or folders that are walked.
        output: folder; must be new or empty unless `overwrite`.
        map_config: the map; None for the default.
        options: None for the defaults.
        overwrite: replace an earlier inspection in the same folder; nothing else in it is touched.
        progress: told how far it is.

    Raises:
        ValueError: a wrong option, no input at all, or an output that holds something else.
    """
    config, options = map_config or MapConfig(), options or InspectOptions()
    if config.source != "psm" or config.control is not None:
        raise ValueError(
            f"map: expected source psm without a control, got {config.label}; the controls are measured beside the map"
        )
    check_output(output, overwrite=overwrite)
    apart = [output, *([options.ground_truth] if options.ground_truth else [])]
    present = [path for path in inputs if path.exists()]
    if not present:
        raise ValueError(f"no such file or folder: {', '.join(map(str, inputs))}")
    found = name_media(present, skipped=apart, reserved=[MAPS, *FILES])
    if options.ground_truth is not None and options.ground_truth.is_file() and len(found) > 1:
        raise ValueError(f"ground_truth: one file for {len(found)} inputs; give a folder of masks named as the inputs")
    inspector = Inspector(config, options)
    if overwrite:
        remove_earlier(output)
    output.mkdir(parents=True, exist_ok=True)
    outcome = Inspection(failures=[(str(path), "no such file or folder") for path in inputs if path not in present])

    def record() -> None:
        write_atomically(output / MAPS, _as_json(config, options, list(found), outcome))

    record()  # before the first map, so that an interrupted run can be told from something else
    for number, (folder, (path, relative)) in enumerate(found.items()):
        progress("maps", number, len(found), path.name)
        try:
            clip = inspector.read(path)
            if options.ground_truth is not None:
                try:
                    inspector.attach_mask(clip, find_mask(options.ground_truth, relative))
                except ValueError as error:
                    outcome.failures.append((str(path), str(error)))
            entry = inspector.inspect(clip, output / folder, path.name, options.seed + number)
            outcome.results.append({"path": str(path), "folder": folder, **entry})
        except (ValueError, BackboneError) as error:
            outcome.failures.append((str(path), str(error).removeprefix(f"{path}: ")))
        record()
    outcome.overall = summarise(outcome.results)
    record()
    progress("maps", len(found), len(found), "")
    return outcome


class Inspector:
    """The loaded backbones, and what is done with one input.

    Args:
        config: the map section.
        options: see `InspectOptions`.
    """

    def __init__(self, config: MapConfig, options: InspectOptions) -> None:
        self.config, self.options = config, options
        device = find_device(options.device)
        names = dict.fromkeys([config.backbone, *options.backbones])
        self.psms = {name: make_psm(config.model_copy(update={"backbone": name}), device) for name in names}
        self.rules = list(dict.fromkeys([config.orientation, *options.orientations]))

    def read(self, path: Path) -> Clip:
        """Read an input and cut a clip to whole latent frames; ValueError says what is wrong with the file."""
        options, notes = self.options, []
        frames = read_frames(path, options.max_frames)
        count, height, width = len(frames), frames.shape[2], frames.shape[3]
        compression = options.temporal_compression if count > 1 else 1
        alone = int(options.first_frame_alone)
        latent_frames = alone + (count - alone) // compression
        used = alone + (latent_frames - alone) * compression
        if used == 0:
            raise ValueError(f"{count} frames are less than one latent frame of {compression}")
        if used < count:
            notes.append(f"the last {count - used} of {count} frames fill no latent frame and are left out")
        grid = (max(1, height // options.spatial_compression), max(1, width // options.spatial_compression))
        fps = options.fps or (read_fps(path) if count > 1 else None) or FPS
        shape = (latent_frames, *grid)
        return Clip(frames[:used], None, compression, shape, fps, options.first_frame_alone, count, notes)

    def attach_mask(self, clip: Clip, path: Path) -> None:
        """Read the clip's mask; one of another size is resized by nearest neighbour, and that is noted.

        Raises:
            ValueError: not readable, another number of frames, or no subject or no background in it.
        """
        mask, count, size = read_mask(path), len(clip.frames), clip.frames.shape[2:]
        whole = len(mask) > clip.frames_read and self.options.max_frames  # the clip was read in part, its mask was not
        if len(mask) not in (1, count, clip.frames_read) and not whole:
            raise ValueError(f"mask {path}: has {len(mask)} frames, expected 1 or the clip's {clip.frames_read}")
        if mask.shape[1:] != size:
            clip.notes.append(f"mask resized from {mask.shape[2]}x{mask.shape[1]} to {size[1]}x{size[0]}")
            mask = F.interpolate(mask[:, None], size, mode="nearest")[:, 0]
        mask = mask[:count].expand(count, -1, -1)
        try:
            agreement(mask[None], mask[None])
        except ValueError as error:  # all subject, or none
            raise ValueError(f"mask {path}: {str(error).split('mask: ')[-1]}") from error
        clip.mask = mask

    def inspect(self, clip: Clip, folder: Path, title: str, seed: int) -> dict[str, Any]:
        """Make the maps of a clip, write its files into `folder`, and return its entry of maps.json."""
        maps: dict[str, dict[str, Tensor]] = {}
        components: dict[str, Tensor] = {}
        for name, psm in self.psms.items():
            features = psm.features(clip.frames[None])
            components[name] = component_pictures(features, psm.solver)
            maps[name] = {rule: self._allocate(replace(psm, orientation=rule), features, clip) for rule in self.rules}
        chosen = maps[self.config.backbone][self.config.orientation]
        measured = None
        if clip.mask is not None:
            generator = torch.Generator().manual_seed(seed)
            controls = {kind: control_maps(chosen[None], kind, generator)[0] for kind in CONTROLS}
            measured = {
                "map": clip.measure(chosen),
                "controls": {kind: clip.measure(control) for kind, control in controls.items()},
                "rules": {name: {rule: clip.measure(m) for rule, m in rules.items()} for name, rules in maps.items()},
            }
        entry = describe(clip, chosen, measured)
        write_maps(folder, clip, chosen, components[self.config.backbone])
        write_image(folder / "sheet.png", self._sheet(clip, title, maps, components, measured))
        return entry

    def _allocate(self, psm: PerceptualStructuring, features: Tensor, clip: Clip) -> Tensor:
        maps = psm.allocate(
            features,
            clip.latent_shape,
            clip.temporal_compression,
            first_frame_alone=clip.first_frame_alone,
            frames=clip.frames[None] if psm.motion != "none" else None,
        )
        return maps[0].cpu()

    def _sheet(
        self,
        clip: Clip,
        title: str,
        maps: dict[str, dict[str, Tensor]],
        components: dict[str, Tensor],
        measured: dict[str, Any] | None,
    ) -> Image.Image:
        """Rows: backbones, and the first, middle and last frame of a clip; columns: input, mask, components, rules."""
        count, _, height, width = clip.frames.shape
        shown, size = sorted({0, count // 2, count - 1}), cell_size(height, width)
        frames = F.interpolate(clip.frames[shown], size, mode="bicubic", antialias=True).clamp(0, 1)
        grey = frames.mean(1, keepdim=True).expand_as(frames)  # its colours would change the map's
        given = [frames] if clip.mask is None else [frames, _cells(clip.mask[shown, None].expand(-1, 3, -1, -1), size)]
        headers = ["input", "mask"][: len(given)] + ["components 1-3", *self.rules]
        blocks = []
        for name, rules in maps.items():
            columns = [*given, _cells(components[name][shown], size)]
            captions = [""] * len(columns)
            for rule, found in rules.items():
                columns.append(overlay(grey, clip.per_frame(found)[shown], peak=float(found.amax())))
                area = measured["rules"][name][rule]["AUC"] if measured else None
                entropy = float(map_statistics(found[None])["entropy"])
                captions.append(f"entropy {entropy:.3f}" if area is None else f"AUC {area:.3f}")
            chosen = headers.index(self.config.orientation) if name == self.config.backbone else None
            blocks.append(Block(f"backbone {name}", columns, captions, chosen))
        frames_text = f", {count} frames" if count > 1 else ""
        title = f"{title}   {width} x {height}{frames_text}, latent grid {' x '.join(map(str, clip.latent_shape))}"
        return draw_sheet(title, headers, [f"frame {i}" for i in shown] if count > 1 else [], blocks)


def _cells(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (n, 3, y, x) to a sheet's cells without inventing values between its own."""
    return F.interpolate(pictures, size, mode="nearest")


def describe(clip: Clip, chosen: Tensor, measured: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of maps.json of one input and its map (T, H, W)."""
    constant = bool(chosen.amin() == chosen.amax())
    if constant:
        clip.notes.append("the map is constant: training with it is scalar GRPO")
    statistics = {name: float(value) for name, value in map_statistics(chosen[None]).items()}
    count, _, height, width = clip.frames.shape
    return {
        "frames": count,
        "frames_read": clip.frames_read,
        "height": height,
        "width": width,
        "fps": clip.fps if count > 1 else None,
        "latent_shape": list(clip.latent_shape),
        "temporal_compression": clip.temporal_compression,
        "constant": constant,
        "statistics": statistics,
        "agreement": measured,
        "notes": clip.notes,
    }


def write_maps(folder: Path, clip: Clip, chosen: Tensor, components: Tensor) -> None:
    """Write map.npy, overlay and components: map (T, H, W), components (F, 3, h, w)."""

    def save(partial: Path) -> None:
        with partial.open("wb") as stream:
            np.save(stream, chosen.numpy())

    write_atomically(folder / "map.npy", save)
    pictures = {
        "overlay": overlay(clip.frames, clip.per_frame(chosen), peak=float(chosen.amax())),
        "components": _cells(components, (clip.frames.shape[2], clip.frames.shape[3])),
    }
    for name, frames in pictures.items():
        if len(frames) > 1:
            write_video(folder / f"{name}.mp4", frames, clip.fps)
        else:
            write_image(folder / f"{name}.png", frames[0])


def find_mask(ground_truth: Path, relative: Path) -> Path:
    """The mask of an input: the file itself, or the one of the same relative path and stem in the folder.

    Raises:
        ValueError: there is none, or more than one.
    """
    if ground_truth.is_file():
        return ground_truth
    place = ground_truth / relative
    suffixes = (".npy", *IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    beside = sorted(place.parent.iterdir()) if place.parent.is_dir() else []
    masks = [path for path in beside if path.stem == place.name and path.suffix.lower() in suffixes]
    if len(masks) != 1:
        names = ", ".join(path.name for path in masks)
        raise ValueError(
            f"{len(masks)} masks fit: {names}" if masks else f"no mask: expected {place}.png, .npy or a video"
        )
    return masks[0]


def _as_json(config: MapConfig, options: InspectOptions, folders: list[str], outcome: Inspection) -> str:
    content = {
        "kind": "maps",
        "vipo": __version__,
        "map": config.model_dump(mode="json"),
        "options": asdict(options),
        "folders": folders,
        "inputs": outcome.results,
        "failures": [{"path": path, "reason": reason} for path, reason in outcome.failures],
        "overall": outcome.overall,
    }
    return json.dumps(content, indent=1, default=str, allow_nan=False) + "\n"
