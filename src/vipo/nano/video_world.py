"""The nano world in motion: procedural clips of one named subject that moves, grows, shrinks or stands still.

A scene is a row of five attribute indices (see ATTRIBUTES). As in the world of pictures, `describe` turns scenes
into prompts, `parse` turns prompts back, `render` draws them, and `measure` compares any clip with its prompt.
Clips (n, F, 3, Y, X) have 9 frames of 64x64 pixels: three latent frames of a causal VAE that compresses time by 4.
Defects (DEFECTS) are local, in space or in time: three of the picture, three of the motion.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import check_shape
from . import world
from .world import COLOURS, GROUNDS, SHAPES, SIZE, coverage, signed_distance

FRAMES = 9
"""Pixel frames of every clip."""
SIZES = {"small": 9.0, "large": 14.0}
"""Size word -> radius in pixels in the middle of the clip."""
MOTIONS = {
    "left": ("moving left", (-1.0, 0.0, 0.0)),
    "right": ("moving right", (1.0, 0.0, 0.0)),
    "up": ("moving up", (0.0, -1.0, 0.0)),
    "down": ("moving down", (0.0, 1.0, 0.0)),
    "growing": ("growing", (0.0, 0.0, 1.0)),
    "shrinking": ("shrinking", (0.0, 0.0, -1.0)),
    "still": ("standing still", (0.0, 0.0, 0.0)),
}
"""Motion -> its words, and its travel in x and y in units of TRAVEL and growth in units of GROWTH."""
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": tuple(MOTIONS),
    "ground": tuple(GROUNDS),
}
COLUMN = {name: column for column, name in enumerate(ATTRIBUTES)}
DEFECTS = ("none", "blur", "noise", "wrong_colour", "jitter", "freeze", "flicker")
VISUAL_DEFECTS, MOTION_DEFECTS = DEFECTS[1:4], DEFECTS[4:]
TRAVEL = 24.0
"""Pixels from the first frame to the last."""
GROWTH = 0.9
"""Natural logarithm of the last radius over the first."""

_COLOUR = torch.tensor(list(COLOURS.values()))
_GROUND = torch.tensor(list(GROUNDS.values()))
_RADIUS = torch.tensor(list(SIZES.values()))
_MOTION = torch.tensor([course for _, course in MOTIONS.values()])
_CENTRE = (SIZE - 1) / 2
_EXAMPLE = "a large red circle moving left on a navy background"


class Clips(NamedTuple):
    """What `render` returns: videos (n, F, 3, Y, X) in [0, 1] and subject masks (n, F, Y, X) in [0, 1]."""

    videos: Tensor
    masks: Tensor


class Track(NamedTuple):
    """Where the subject of each frame is: centre (n, F, 2) x, y in pixels, area (n, F), drawn (n, F, Y, X)."""

    centre: Tensor
    area: Tensor
    drawn: Tensor


def sample_scenes(count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` scenes uniformly: (count, 5) int64."""
    columns = [torch.randint(0, len(words), (count,), generator=generator) for words in ATTRIBUTES.values()]
    return torch.stack(columns, dim=1)


def describe(scenes: Tensor) -> list[str]:
    """Put scenes (n, 5) into words; `parse` is the inverse."""
    check_shape("scenes", scenes, f"n {len(ATTRIBUTES)}")
    prompts = []
    for row in scenes.tolist():
        word = {name: words[index] for (name, words), index in zip(ATTRIBUTES.items(), row, strict=True)}
        motion = MOTIONS[word["motion"]][0]
        prompts.append(f"a {word['size']} {word['colour']} {word['shape']} {motion} on a {word['ground']} background")
    return prompts


def parse(prompts: list[str]) -> Tensor:
    """Read prompts written by `describe` back into scenes (n, 5).

    Raises:
        ValueError: a prompt that `describe` could not have written.
    """
    names = {words: name for name, (words, _) in MOTIONS.items()}
    rows = []
    for prompt in prompts:
        words = prompt.split()
        values = [*words[1:4], names.get(" ".join(words[4:-4])), *words[-2:-1]]
        try:
            row = [options.index(str(value)) for options, value in zip(ATTRIBUTES.values(), values, strict=True)]
            written = describe(torch.tensor([row]))[0]
        except ValueError:
            written = None
        if written != " ".join(words):
            raise ValueError(f"not a prompt of the nano video world: {prompt!r}; expected one like {_EXAMPLE!r}")
        rows.append(row)
    return torch.tensor(rows, dtype=torch.long).reshape(-1, len(ATTRIBUTES))


def render(scenes: Tensor, generator: torch.Generator, defects: Tensor | None = None) -> Clips:
    """Draw scenes (n, 5), with random pose, pace and light; `defects` (n,) indexes DEFECTS."""
    check_shape("scenes", scenes, f"n {len(ATTRIBUTES)}")
    count = len(scenes)
    defects = torch.zeros(count, dtype=torch.long) if defects is None else defects

    def uniform(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    def draw(name: str, axes: int) -> Tensor:
        return (defects == DEFECTS.index(name)).float().view(count, *[1] * axes)

    course = _MOTION[scenes[:, 3]] * (1 + 0.15 * uniform(1))
    pace = torch.linspace(-0.5, 0.5, FRAMES).expand(count, FRAMES)
    stop = pace.gather(1, torch.randint(1, 4, (count, 1), generator=generator))  # freeze: nothing moves from here on
    pace = torch.where(draw("freeze", 1) > 0, torch.minimum(pace, stop), pace)
    centre = _CENTRE + 3 * uniform(1, 2) + TRAVEL * course[:, None, :2] * pace[:, :, None]
    centre = centre + 2.5 * normal(FRAMES, 2) * draw("jitter", 2)
    radius = _RADIUS[scenes[:, 0], None] * (1 + 0.06 * uniform(1)) * torch.exp(GROWTH * course[:, 2:] * pace)
    masks = _shapes(scenes[:, 2], centre, radius, 0.15 * uniform())[:, :, None]

    along = _light(uniform(low=0, high=2 * math.pi), uniform(low=0, high=0.25))
    ground = _GROUND[scenes[:, 4]][:, :, None, None] * (1 + along[:, None])
    shift = torch.randint(1, len(COLOURS), (count,), generator=generator)
    other = _COLOUR[(scenes[:, 1] + shift) % len(COLOURS)]
    share = uniform(1, low=0.45, high=0.95) * draw("wrong_colour", 1)
    colour = share * other + (1 - share) * (_COLOUR[scenes[:, 1]] + 0.04 * uniform(3))
    grain = 0.25 * normal(FRAMES, 3, SIZE, SIZE) * draw("noise", 4)
    videos = ground[:, None] * (1 - masks) + (colour[:, None, :, None, None] + grain) * masks
    videos = _blur_subject(videos, masks, draw("blur", 4))
    spot = torch.exp(-(((_grid() - uniform(1, 1, 2, low=10, high=SIZE - 10)) / uniform(1, 1, 1, low=8, high=14)) ** 2))
    light = 0.25 * normal(FRAMES) * draw("flicker", 1)
    videos = videos + (light[:, :, None, None] * spot.prod(3)[:, None])[:, :, None]
    return Clips(videos.clamp(0, 1), masks[:, :, 0])


def _grid() -> Tensor:
    """Pixel coordinates x, y: (1, Y, X, 2)."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)[None]


def _light(turn: Tensor, strength: Tensor) -> Tensor:
    """A linear change of brightness towards `turn` radians, of at most `strength`: (n, Y, X)."""
    unit = (_grid() - _CENTRE) / (_CENTRE * math.sqrt(2))
    return strength[:, None, None] * (unit * torch.stack([turn.cos(), turn.sin()], 1)[:, None, None]).sum(3)


def _shapes(shape: Tensor, centre: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Coverage of one shape (n,) per clip at its place (n, F, 2) and radius (n, F) in every frame: (n, F, Y, X)."""
    count, frames = radius.shape
    distance = signed_distance(
        shape.repeat_interleave(frames), centre.flatten(0, 1), radius.flatten(), angle.repeat_interleave(frames)
    )
    return coverage(distance).view(count, frames, SIZE, SIZE)


def _blur_subject(videos: Tensor, masks: Tensor, strength: Tensor) -> Tensor:
    """Blur the subject and its outline by `strength` (n, 1, 1, 1, 1)."""
    near = F.max_pool2d(masks.flatten(0, 1), 9, 1, 4).view_as(masks) * strength
    return world.blur(videos.flatten(0, 1)).view_as(videos) * near + videos * (1 - near)


def track(videos: Tensor, scenes: Tensor) -> Track:
    """Find the subject in every frame: what has the named colour, or is far from the named ground."""
    frames = videos.flatten(0, 1)
    rows = scenes.repeat_interleave(videos.shape[1], 0)
    still = torch.zeros(len(rows), len(world.ATTRIBUTES), dtype=torch.long)
    still[:, world.COLUMN["ground"]] = rows[:, 4]
    still[:, world.COLUMN["pattern"]] = world.PATTERNS.index("gradient")
    to_ground = world.ground_distance(frames, still)
    to_colour = (frames - _COLOUR[rows[:, 1]][:, :, None, None]).square().sum(1).sqrt()
    drawn = torch.maximum(torch.sigmoid(20 * (to_ground - to_colour)), torch.sigmoid(30 * (to_ground - 0.35)))
    drawn = torch.where(drawn > 0.5, drawn, 0.0).view(*videos.shape[:2], SIZE, SIZE)
    area = drawn.sum((2, 3))
    middle = torch.full_like(area, _CENTRE)
    x = torch.where(area > 0, (drawn * _grid()[..., 0]).sum((2, 3)) / area.clamp_min(1e-6), middle)
    y = torch.where(area > 0, (drawn * _grid()[..., 1]).sum((2, 3)) / area.clamp_min(1e-6), middle)
    return Track(torch.stack([x, y], 2), area, drawn)


def unit_areas() -> Tensor:
    """Area of every shape over its squared radius: (6,)."""
    kinds = len(SHAPES)
    centre, radius = torch.full((kinds, 1, 2), _CENTRE), torch.full((kinds, 1), 20.0)
    return _shapes(torch.arange(kinds), centre, radius, torch.zeros(kinds)).sum((1, 2, 3)) / 20.0**2


def measure(videos: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Exact metrics of clips (n, F, 3, 64, 64) in [0, 1] against their prompts, each (n,) float32.

    Returns:
        motion_accuracy: 1 where the subject's course (least-squares travel and growth) is nearest to the named one.
        motion_error: distance of that course to the named one; 1 is a whole travel or growth (lower is better).
        jitter: RMS distance in pixels of the subject's centre from constant speed (lower is better).
        shape_iou: IoU of what is drawn with the named shape of the same area and centre, mean over frames.
        shape_accuracy: 1 where no other shape of the world has a higher IoU.
        colour_error: mean RGB distance to the named colour inside the subject (lower is better).
        flicker: mean absolute change from frame to frame away from the subject (lower is better).
        subject_mask: (n, F, 64, 64), the named shape at its place in every frame.
    """
    check_shape("videos", videos, f"n F 3 {SIZE} {SIZE}", {"n": len(prompts)})
    scenes = parse(prompts)
    count, frames = videos.shape[:2]
    found = track(videos, scenes)
    radii = (found.area[:, None].clamp_min(1) / unit_areas()[:, None]).sqrt()  # (n, shapes, F)

    time = torch.linspace(-0.5, 0.5, frames)
    state = torch.cat([found.centre / TRAVEL, radii[:, 0, :, None].log() / GROWTH], 2)
    state = state - state.mean(1, keepdim=True)
    course = (state * time[:, None]).sum(1) / time.square().sum()
    distances = torch.cdist(course, _MOTION)
    off = (state - course[:, None] * time[:, None])[..., :2] * TRAVEL

    overlaps = []
    for kind in range(len(SHAPES)):
        shape = _shapes(torch.full((count,), kind), found.centre, radii[:, kind], torch.zeros(count))
        union = torch.maximum(shape, found.drawn).sum((2, 3)).clamp_min(1)
        overlaps.append((torch.minimum(shape, found.drawn).sum((2, 3)) / union).mean(1))
    iou = torch.stack(overlaps, 1)
    rows, named = torch.arange(count), scenes[:, 2]
    mask = _shapes(named, found.centre, radii[rows, named], torch.zeros(count))

    to_colour = (videos - _COLOUR[scenes[:, 1]][:, None, :, None, None]).square().sum(2).sqrt()
    inside = (mask > 0.9).float()
    away = (F.max_pool2d(mask, 9, 1, 4) < 0.05).float()
    away = away[:, 1:] * away[:, :-1]
    change = videos.diff(dim=1).abs().mean(2)
    return {
        "motion_accuracy": (distances.argmin(1) == scenes[:, 3]).float(),
        "motion_error": distances[rows, scenes[:, 3]],
        "jitter": off.square().sum(2).mean(1).sqrt(),
        "shape_iou": iou[rows, named],
        "shape_accuracy": (iou.argmax(1) == named).float(),
        "colour_error": (to_colour * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp_min(1),
        "flicker": (change * away).sum((1, 2, 3)) / away.sum((1, 2, 3)).clamp_min(1),
        "subject_mask": mask,
    }
