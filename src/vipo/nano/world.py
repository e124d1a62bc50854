"""The nano world: procedural 64x64 pictures of one named subject, with their words and their ground truth.

A scene is a row of seven attribute indices (see ATTRIBUTES). `describe` turns scenes into prompts, `parse` turns
prompts back, `render` draws them, and `measure` compares any picture with what its prompt asks for. Because the
world knows where the subject is and what it should look like, held-out metrics are exact: no learned judge.

The pictures are hard on purpose: textured, split, noisy and graded backgrounds, clutter, a second unnamed shape,
close-ups. Local defects (DEFECTS) can be drawn in; a generator trained on such pictures learns to make them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import check_shape

SIZE = 64
"""Pixel rows and columns of every picture."""

COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.15, 0.25, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.15, 0.75),
    "orange": (0.98, 0.50, 0.05),
    "white": (0.96, 0.96, 0.96),
}
GROUNDS = {
    "black": (0.06, 0.06, 0.08),
    "gray": (0.50, 0.50, 0.52),
    "navy": (0.08, 0.12, 0.32),
    "brown": (0.36, 0.22, 0.12),
    "teal": (0.08, 0.38, 0.40),
    "pink": (0.93, 0.70, 0.74),
}
SIZES = {"small": 8.0, "large": 14.0, "huge": 24.0}
"""Size word -> radius in pixels; a huge subject is a close-up (about 40 % of the picture)."""
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
PLACES = {"center": (0, 0), "left": (-13, 0), "right": (13, 0), "top": (0, -13), "bottom": (0, 13)}
PATTERNS = ("plain", "striped", "speckled", "gradient", "split", "noisy")
SURROUNDINGS = {"alone": "", "clutter": " with clutter", "another": " beside another shape"}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "place": tuple(PLACES),
    "pattern": PATTERNS,
    "ground": tuple(GROUNDS),
    "surroundings": tuple(SURROUNDINGS),
}
COLUMN = {name: column for column, name in enumerate(ATTRIBUTES)}
DEFECTS = ("none", "blur", "noise", "wrong_colour", "jagged", "bite", "blotch")
"""Local defects: five on the subject, one (`blotch`) on the background."""

_COLOUR = torch.tensor(list(COLOURS.values()))
_GROUND = torch.tensor(list(GROUNDS.values()))
_RADIUS = torch.tensor(list(SIZES.values()))
_OFFSET = torch.tensor(list(PLACES.values())).float()
_CLOSE_UP = torch.tensor([1.0, 0.85, 0.4])  # a larger subject is moved less, so that it stays in the picture
_CENTRE = (SIZE - 1) / 2


class Drawing(NamedTuple):
    """What `render` returns: images (n, 3, 64, 64) in [0, 1] and subject masks (n, 64, 64) in [0, 1]."""

    images: Tensor
    masks: Tensor


def sample_scenes(count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` scenes uniformly: (count, 7) int64."""
    columns = [torch.randint(0, len(words), (count,), generator=generator) for words in ATTRIBUTES.values()]
    return torch.stack(columns, dim=1)


def describe(scenes: Tensor) -> list[str]:
    """Put scenes (n, 7) into words; `parse` is the inverse."""
    check_shape("scenes", scenes, f"n {len(ATTRIBUTES)}")
    prompts = []
    for row in scenes.tolist():
        word = {name: words[index] for (name, words), index in zip(ATTRIBUTES.items(), row, strict=True)}
        prompts.append(
            f"a {word['size']} {word['colour']} {word['shape']} at the {word['place']} "
            f"on a {word['pattern']} {word['ground']} background{SURROUNDINGS[word['surroundings']]}"
        )
    return prompts


def parse(prompts: list[str]) -> Tensor:
    """Read prompts written by `describe` back into scenes (n, 7).

    Raises:
        ValueError: a prompt that `describe` could not have written.
    """
    rows = []
    for prompt in prompts:
        words = prompt.split()
        named = [words[i] for i in (1, 2, 3, 6, 9, 10)] if len(words) >= 12 else []
        tail = {suffix.strip(): name for name, suffix in SURROUNDINGS.items()}.get(" ".join(words[12:]))
        values = [*named, tail]
        try:
            row = [options.index(str(value)) for options, value in zip(ATTRIBUTES.values(), values, strict=True)]
            rows.append(row)
            written = describe(torch.tensor([row]))[0]
        except ValueError:
            written = None
        if written != " ".join(words):
            raise ValueError(f"not a prompt of the nano world: {prompt!r}; expected one like {_EXAMPLE!r}")
    return torch.tensor(rows, dtype=torch.long).reshape(-1, len(ATTRIBUTES))


_EXAMPLE = "a large red circle at the left on a striped navy background with clutter"


def signed_distance(shape: Tensor, centre: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Signed distance in pixels to the outline of each shape, negative inside: (n, 64, 64).

    Args:
        shape: (n,) indices into SHAPES.
        centre: (n, 2) x, y in pixels.
        radius: (n,) pixels.
        angle: (n,) radians.
    """
    axis = torch.arange(SIZE, dtype=torch.float32)
    dx = axis[None, None, :] - centre[:, 0, None, None]
    dy = axis[None, :, None] - centre[:, 1, None, None]
    cos, sin, r = (value[:, None, None] for value in (torch.cos(angle), torch.sin(angle), radius))
    x, y = cos * dx + sin * dy, -sin * dx + cos * dy
    rho = (x * x + y * y).sqrt()
    flat = r * 0.58
    triangle = torch.maximum(torch.maximum(y - flat, -0.5 * y + 0.866 * x - flat), -0.5 * y - 0.866 * x - flat)
    arm = torch.minimum(torch.maximum(x.abs() - r, y.abs() - 0.36 * r), torch.maximum(y.abs() - r, x.abs() - 0.36 * r))
    options = [
        rho - r,
        torch.maximum(x.abs(), y.abs()) - 0.86 * r,
        triangle,
        _star_distance(x, y, rho, r),
        (rho - 0.78 * r).abs() - 0.25 * r,
        arm,
    ]
    return torch.stack(options, dim=1).gather(1, shape.view(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE))[:, 0]


def _star_distance(x: Tensor, y: Tensor, rho: Tensor, radius: Tensor) -> Tensor:
    """Distance to a five-pointed star: fold to one half-point, then the distance to its edge's line."""
    sector = 2 * math.pi / 5
    fold = (torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2).abs()
    u, v = rho * torch.cos(fold), rho * torch.sin(fold)
    outer, inner = 1.12 * radius, 0.47 * radius
    edge_x, edge_y = inner * math.cos(sector / 2) - outer, inner * math.sin(sector / 2)
    return ((u - outer) * edge_y - v * edge_x) / (edge_x**2 + edge_y**2).sqrt()


def coverage(distance: Tensor) -> Tensor:
    """Signed distance -> antialiased coverage in [0, 1]."""
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Tensor, generator: torch.Generator, defects: Tensor | None = None) -> Drawing:
    """Draw scenes (n, 7), with random pose, texture and unnamed things; `defects` (n,) indexes DEFECTS."""
    check_shape("scenes", scenes, f"n {len(ATTRIBUTES)}")
    count = len(scenes)
    defects = torch.zeros(count, dtype=torch.long) if defects is None else defects

    def uniform(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    size, colour_index, shape = scenes[:, 0], scenes[:, 1], scenes[:, 2]
    centre = subject_centre(scenes) + 2.0 * uniform(2)
    radius = _RADIUS[size] * (1 + 0.06 * uniform())
    mask = coverage(signed_distance(shape, centre, radius, 0.15 * uniform()))
    colour = _COLOUR[colour_index] + 0.04 * uniform(3)
    picture = _surround(_background(scenes, generator), scenes, generator)

    def draw(name: str) -> Tensor:
        return (defects == DEFECTS.index(name)).float()

    other = _COLOUR[(colour_index + torch.randint(1, len(COLOURS), (count,), generator=generator)) % len(COLOURS)]
    share = uniform(1, low=0.45, high=0.95) * draw("wrong_colour")[:, None]
    colour = share * other + (1 - share) * colour
    # a blotch of foreign paint on the background
    spot = _disc(uniform(2, low=0, high=SIZE), uniform(low=4, high=9)) * 0.85 * draw("blotch")[:, None, None]
    paint = _COLOUR[torch.randint(0, len(COLOURS), (count,), generator=generator)]
    picture = _over(picture, paint, spot)
    # jagged outline: the mask at a sixth of the resolution; bite: a disc missing at the rim
    coarse = F.interpolate((F.avg_pool2d(mask[:, None], 6, 6, ceil_mode=True) > 0.5).float(), scale_factor=6.0)
    outline = torch.where(draw("jagged")[:, None, None] > 0, coarse[:, 0, :SIZE, :SIZE], mask)
    turn = uniform(low=0, high=2 * math.pi)
    rim = centre + torch.stack([turn.cos(), turn.sin()], 1) * (0.75 * radius)[:, None]
    outline = outline * (1 - _disc(rim, 0.55 * radius) * draw("bite")[:, None, None])
    grain = 0.2 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    grain = (grain + 1.5 * F.avg_pool2d(grain, 3, 1, 1)) * draw("noise")[:, None, None, None]
    subject = colour[:, :, None, None] + grain
    picture = picture * (1 - outline[:, None]) + subject * outline[:, None]
    near = F.max_pool2d(outline[:, None], 9, 1, 4) * draw("blur")[:, None, None, None]
    picture = blur(picture) * near + picture * (1 - near)
    return Drawing(picture.clamp(0, 1), mask)


def subject_centre(scenes: Tensor) -> Tensor:
    """Where the prompt puts the subject: (n, 2) x, y in pixels."""
    return _CENTRE + _OFFSET[scenes[:, 3]] * _CLOSE_UP[scenes[:, 0]][:, None]


def blur(images: Tensor, passes: int = 3) -> Tensor:
    """Blur images (n, 3, Y, X) with a 5x5 binomial kernel, `passes` times."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (row[:, None] * row[None]).expand(images.shape[1], 1, 5, 5)
    for _ in range(passes):
        images = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel, groups=images.shape[1])
    return images


def _disc(centre: Tensor, radius: Tensor) -> Tensor:
    circle = torch.zeros(len(centre), dtype=torch.long)
    return coverage(signed_distance(circle, centre, radius, torch.zeros(len(centre))))


def _over(picture: Tensor, colour: Tensor, alpha: Tensor) -> Tensor:
    return picture * (1 - alpha[:, None]) + colour[:, :, None, None] * alpha[:, None]


def _background(scenes: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the six background patterns for all scenes and pick each scene's own: (n, 3, 64, 64)."""
    count = len(scenes)
    ground = _GROUND[scenes[:, 5]]
    axis = torch.linspace(-1, 1, SIZE)
    turn = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
    along = turn.cos() * axis[None, None, :] + turn.sin() * axis[None, :, None]
    phase = torch.rand(count, 1, 1, generator=generator)
    stripes = 0.09 * torch.sign(torch.sin(2 * math.pi * (along * 4 + phase)))
    speckles = 0.22 * (
        F.avg_pool2d((torch.rand(count, 1, SIZE, SIZE, generator=generator) < 0.05).float(), 3, 1, 1) * 4
    )
    clouds = F.interpolate(torch.randn(count, 3, 9, 9, generator=generator), SIZE, mode="bicubic", align_corners=True)
    other = _GROUND[(scenes[:, 5] + torch.randint(1, len(GROUNDS), (count,), generator=generator)) % len(GROUNDS)]
    side = coverage(along * SIZE / 2 + 16 * (phase - 0.5))
    base = ground[:, :, None, None].expand(count, 3, SIZE, SIZE)
    patterns = torch.stack(
        [
            base,
            base + stripes[:, None],
            base + speckles.clamp(max=0.22),
            base * (1 + 0.4 * along[:, None]),
            _over(base, other, side),
            base + 0.07 * clouds,
        ],
        dim=1,
    )
    return patterns[torch.arange(count), scenes[:, 4]]


def _surround(picture: Tensor, scenes: Tensor, generator: torch.Generator) -> Tensor:
    """Add what the prompt does not name: clutter, or another shape opposite the subject."""
    count = len(scenes)
    kind = scenes[:, 6]
    for _ in range(6):
        spot = torch.rand(count, 2, generator=generator) * SIZE
        dab = _disc(spot, 1.5 + 2.5 * torch.rand(count, generator=generator)) * (kind == 1).float()[:, None, None]
        paint = 0.5 * _COLOUR[torch.randint(0, len(COLOURS), (count,), generator=generator)] + 0.2
        picture = _over(picture, paint, dab)
    shape = torch.randint(0, len(SHAPES), (count,), generator=generator)
    turn = 2 * math.pi * torch.rand(count, generator=generator)
    away = -_OFFSET[scenes[:, 3]] * 1.5
    away = torch.where(scenes[:, 3, None] == 0, 23.0 * torch.stack([turn.cos(), turn.sin()], 1), away)
    radius = 6 + 3 * torch.rand(count, generator=generator)
    colour = _COLOUR[(scenes[:, 1] + torch.randint(1, len(COLOURS), (count,), generator=generator)) % len(COLOURS)]
    alpha = coverage(signed_distance(shape, _CENTRE + away, radius, turn)) * (kind == 2).float()[:, None, None]
    return _over(picture, 0.8 * colour, alpha)


def ground_distance(images: Tensor, scenes: Tensor) -> Tensor:
    """RGB distance of every pixel to the nearest colour that the prompt's background may have: (n, 64, 64)."""
    ground = _GROUND[scenes[:, 5]]
    along = torch.einsum("nc,ncyx->nyx", ground, images) / ground.square().sum(1)[:, None, None]
    graded = (scenes[:, 4] == PATTERNS.index("gradient"))[:, None, None]
    along = torch.where(graded, along.clamp(0.5, 1.5), torch.ones_like(along))
    own = (images - ground[:, :, None, None] * along[:, None]).square().sum(1).sqrt()
    palette = (images[:, None] - _GROUND[None, :, :, None, None]).square().sum(2).sqrt().amin(1)
    return torch.where((scenes[:, 4] == PATTERNS.index("split"))[:, None, None], palette, own)


def measure(images: Tensor, prompts: list[str], reach: int = 7) -> dict[str, Tensor]:
    """Exact metrics of images (n, 3, 64, 64) in [0, 1] against their prompts, each (n,) float32.

    The subject is searched within `reach` pixels of where the prompt puts it.

    Returns:
        shape_iou: IoU of the drawn subject with the named shape at the best shift, in [0, 1].
        shape_accuracy: 1 where no other shape of the world has a higher IoU.
        colour_error: mean RGB distance to the named colour inside the subject (lower is better).
        background_dirt: mean excess RGB distance to the named background outside the subject (lower is better);
            NaN where the prompt has clutter or another shape, whose colours are free.
        subject_mask: (n, 64, 64), the named shape at its best shift.
    """
    check_shape("images", images, f"n 3 {SIZE} {SIZE}", {"n": len(prompts)})
    scenes = parse(prompts)
    count, kinds = len(scenes), len(SHAPES)
    centre, radius = subject_centre(scenes), _RADIUS[scenes[:, 0]]
    to_colour = (images - _COLOUR[scenes[:, 1]][:, :, None, None]).square().sum(1).sqrt()
    to_ground = ground_distance(images, scenes)
    drawn = torch.sigmoid(20 * (to_ground - to_colour)) * _disc(centre, 1.25 * radius + reach)
    every = torch.arange(kinds).repeat(count)
    templates = coverage(
        signed_distance(
            every, centre.repeat_interleave(kinds, 0), radius.repeat_interleave(kinds), torch.zeros(len(every))
        )
    )
    # cross-correlation gives the overlap of every shape at every shift: (n, kinds, 2 reach + 1, 2 reach + 1)
    overlap = F.conv2d(F.pad(drawn[None], (reach,) * 4), templates[:, None], groups=count)[0]
    overlap = overlap.view(count, kinds, 2 * reach + 1, 2 * reach + 1)
    areas = templates.view(count, kinds, -1).sum(2)[:, :, None, None] + drawn.sum((1, 2))[:, None, None, None]
    iou = (overlap / (areas - overlap)).flatten(2)
    best, shift = iou.max(2)
    named = scenes[:, 2]
    rows = torch.arange(count)
    shift = shift[rows, named]
    moved = torch.stack([shift % (2 * reach + 1), shift // (2 * reach + 1)], 1) - reach
    mask = coverage(signed_distance(named, centre + moved, radius, torch.zeros(count)))
    inside, outside = (mask > 0.9).float(), (F.max_pool2d(mask[:, None], 7, 1, 3)[:, 0] < 0.05).float()
    rough = (scenes[:, 4] == PATTERNS.index("speckled")) | (scenes[:, 4] == PATTERNS.index("noisy"))
    excess = (to_ground - torch.where(rough, 0.35, 0.2)[:, None, None]).clamp_min(0)
    dirt = (excess * outside).sum((1, 2)) / outside.sum((1, 2)).clamp_min(1)
    return {
        "shape_iou": best[rows, named],
        "shape_accuracy": (best.argmax(1) == named).float(),
        "colour_error": (to_colour * inside).sum((1, 2)) / inside.sum((1, 2)).clamp_min(1),
        "background_dirt": torch.where(scenes[:, 6] == 0, dirt, torch.nan),
        "subject_mask": mask,
    }
