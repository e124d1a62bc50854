"""Maps and samples as pictures: overlays, grids, film strips, principal components as colours, a labelled sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .media import to_image
from .psm import canonical_projections, principal_components
from .types import check_shape

CELL = 208
"""Pixels of the longer side of a picture in the sheet."""
MOST_CLIPS, MOST_FRAMES = 8, 9
"""Clips of a film strip or of a grid of clips, and frames of a strip."""
_GAP, _MARGIN, _LINE = 8, 16, 24
_INK, _FAINT, _ACCENT, _PAPER = "#1a1a1a", "#6b6b6b", "#c2185b", "white"
_LEGEND = "Colours: dark blue is 0, dark red is the largest value of the map itself (of all frames of a clip)."
_CHOSEN = "Framed: the map that these options choose."
_TURBO = torch.tensor(
    [[0.19, 0.07, 0.23], [0.16, 0.74, 0.92], [0.64, 0.99, 0.24], [0.98, 0.53, 0.13], [0.48, 0.02, 0.01]]
)


class Block(NamedTuple):
    """One backbone's part of the sheet.

    Attributes:
        title: its first line.
        columns: per column the pictures of the shown frames, (n, 3, y, x) in [0, 1], of one size.
        captions: per column one line, or "".
        chosen: the column to frame, or None.
    """

    title: str
    columns: Sequence[Tensor]
    captions: Sequence[str]
    chosen: int | None


def overlay(images: Tensor, maps: Tensor, *, peak: float | None = None, strength: float = 0.55) -> Tensor:
    """Lay maps over pictures: dark blue is little, dark red the peak.

    Args:
        images: (n, 3, Y, X), in [0, 1].
        maps: (n, H, W), >= 0.
        peak: the value shown in the darkest red, one scale for all; None = each map's own maximum.
        strength: share of the colours, in [0, 1].

    Returns:
        (n, 3, Y, X), in [0, 1], on the CPU.
    """
    sizes = check_shape("images", images, "n 3 Y X")
    check_shape("maps", maps, "n H W", sizes)
    large = F.interpolate(maps[:, None].float().cpu(), images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    most = large.amax((1, 2), keepdim=True) if peak is None else torch.tensor(peak)
    place = (large / most.clamp_min(1e-12)).clamp(0, 1) * (len(_TURBO) - 1)
    low = place.floor().long().clamp(max=len(_TURBO) - 2)
    share = (place - low)[..., None]
    colours = (1 - share) * _TURBO[low] + share * _TURBO[low + 1]
    return (1 - strength) * images.float().cpu() + strength * colours.movedim(-1, 1)


def sheet(images: Tensor, columns: int = 8, limit: int = 32) -> Image.Image:
    """Arrange up to `limit` images (n, 3, Y, X) in rows, two pixels apart."""
    return to_image(_tile(images[:limit], columns))


def small_clips(clips: Tensor) -> Tensor:
    """Take the first MOST_CLIPS of (n, F, 3, Y, X) and shrink them to sides of CELL pixels at most, on the CPU."""
    sizes = check_shape("clips", clips, "n F 3 Y X")
    clips = clips[:MOST_CLIPS].float().cpu()
    if max(sizes["Y"], sizes["X"]) <= CELL:
        return clips
    small: Tensor = F.interpolate(
        clips.flatten(0, 1), cell_size(sizes["Y"], sizes["X"]), mode="bilinear", antialias=True
    )
    return torch.unflatten(small.clamp(0, 1), 0, clips.shape[:2])


def overlay_clips(clips: Tensor, maps: Tensor) -> Tensor:
    """Lay maps (n, F, H, W), >= 0, over clips (n, F, 3, Y, X): dark red is the largest value of that clip's maps."""
    sizes = check_shape("clips", clips, "n F 3 Y X")
    check_shape("maps", maps, "n F H W", sizes)
    return torch.stack([overlay(clip, m, peak=float(m.amax())) for clip, m in zip(clips, maps, strict=True)])


def film_strip(clips: Tensor) -> Image.Image:
    """Arrange clips (n, F, 3, Y, X) one per row, of each up to MOST_FRAMES frames, evenly spaced from first to last."""
    count = min(clips.shape[1], MOST_FRAMES)
    chosen = torch.linspace(0, clips.shape[1] - 1, count).round().long()
    return to_image(_tile(clips[:, chosen].flatten(0, 1), count))


def clip_grid(clips: Tensor, columns: int = 4) -> Tensor:
    """Arrange clips (n, F, 3, Y, X) in rows that play together: (F, 3, y, x)."""
    return torch.stack([_tile(frames, min(columns, len(clips))) for frames in clips.unbind(1)])


def _tile(images: Tensor, columns: int) -> Tensor:
    """Arrange images (n, 3, Y, X) in rows, two white pixels after each: (3, y, x)."""
    rows = -(-len(images) // columns)
    canvas = torch.ones(rows * columns, 3, images.shape[2] + 2, images.shape[3] + 2)
    canvas[: len(images), :, :-2, :-2] = images.float().cpu()
    return torch.unflatten(canvas, 0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def component_pictures(features: Tensor, solver: str = "subspace") -> Tensor:
    """Principal components 1 to 3 as red, green and blue, one basis for all frames.

    Each component is stretched so that its 1st and 99th percentile become 0 and 1; its sign is scikit-learn's and
    means nothing. Where there are fewer than three, or one has no variance, the colour is one half.

    Args:
        features: (1, F, h, w, D).
        solver: see `vipo.psm.principal_components`.

    Returns:
        (F, 3, h, w), in [0, 1].
    """
    sizes = check_shape("features", features, "1 F h w D")
    flat = features.reshape(1, -1, sizes["D"])
    count = min(3, flat.shape[1], sizes["D"])
    projections = canonical_projections(principal_components(flat, count, solver))[0].float().cpu()
    low, high = (projections.quantile(q, dim=0) for q in (0.01, 0.99))
    stretched = ((projections - low) / torch.where(high > low, high - low, 1)).clamp(0, 1)
    colours = torch.full((len(projections), 3), 0.5)
    colours[:, :count] = torch.where(high > low, stretched, 0.5)
    return colours.view(sizes["F"], sizes["h"], sizes["w"], 3).permute(0, 3, 1, 2)


def cell_size(height: int, width: int) -> tuple[int, int]:
    """The (y, x) of a sheet's cell for pictures of this size: the longer side is CELL."""
    scale = CELL / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def draw_sheet(title: str, headers: Sequence[str], frame_labels: Sequence[str], blocks: Sequence[Block]) -> Image.Image:
    """Arrange blocks of pictures below each other, with their names written beside them.

    Args:
        title: the first line.
        headers: one per column.
        frame_labels: one per row of a block; empty for a picture, whose blocks have one row.
        blocks: at least one; all with the same columns and rows.

    Returns:
        The sheet.
    """
    large, normal, small = (ImageFont.load_default(size) for size in (20, 15, 13))
    cell_height, cell_width = blocks[0].columns[0].shape[2:]
    pitch = max(cell_width, *(round(normal.getlength(text)) for text in headers)) + _GAP
    left = _MARGIN + (max(round(small.getlength(text)) for text in frame_labels) + _GAP if frame_labels else 0)
    rows = len(blocks[0].columns[0])
    block_height = _LINE + rows * (cell_height + _GAP) + _LINE
    top = _MARGIN + 2 * _LINE + _GAP
    notes = [_LEGEND, *([_CHOSEN] if any(block.chosen is not None for block in blocks) else [])]
    written = [large.getlength(title), *(small.getlength(note) for note in notes)]
    written += [normal.getlength(block.title) for block in blocks]
    width = max(left + len(headers) * pitch - _GAP, *(_MARGIN + round(length) for length in written)) + _MARGIN
    height = top + len(blocks) * block_height + len(notes) * _LINE + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, _INK, large)
    for column, text in enumerate(headers):
        marked = any(block.chosen == column for block in blocks)
        draw.text((left + column * pitch, _MARGIN + _LINE + _GAP), text, _ACCENT if marked else _INK, normal)
    for number, block in enumerate(blocks):
        upper = top + number * block_height
        draw.text((_MARGIN, upper), block.title, _INK, normal)
        for row, text in enumerate(frame_labels):
            middle = upper + _LINE + row * (cell_height + _GAP) + cell_height // 2
            draw.text((_MARGIN, middle), text, _FAINT, small, anchor="lm")
        for column, pictures in enumerate(block.columns):
            x, y = left + column * pitch, upper + _LINE
            for picture in pictures:
                sheet.paste(to_image(picture), (x, y))
                y += cell_height + _GAP
            draw.text((x, y - _GAP + 4), block.captions[column], _FAINT, small)
            if block.chosen == column:
                draw.rectangle((x - 3, upper + _LINE - 3, x + cell_width + 2, y - _GAP + 2), None, _ACCENT, 3)
    for number, note in enumerate(notes):
        draw.text((_MARGIN, top + len(blocks) * block_height + number * _LINE), note, _FAINT, small)
    return sheet
