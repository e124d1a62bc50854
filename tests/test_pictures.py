"""vipo.pictures: colours that mean one thing in a whole clip, and cells where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vipo.pictures import (
    CELL,
    MOST_CLIPS,
    Block,
    cell_size,
    clip_grid,
    component_pictures,
    draw_sheet,
    film_strip,
    overlay,
    overlay_clips,
    sheet,
    small_clips,
)
from vipo.psm import canonical_projections, principal_components


def test_a_clip_has_one_colour_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    frames, maps = torch.rand(3, 3, 16, 24, generator=generator), torch.rand(3, 4, 6, generator=generator)
    maps[1] = 2 * maps[1] / maps[1].amax()
    maps[1, 0, 0] = 2  # at the corner, whose value resizing keeps
    laid = overlay(frames, maps, peak=float(maps.amax()))
    torch.testing.assert_close(laid[1], overlay(frames[1:2], maps[1:2])[0])  # it holds the maximum itself
    same = overlay(frames, torch.stack([maps[0], 2 * maps[0], maps[1]]), peak=2.0)
    assert not torch.allclose(same[0] - 0.45 * frames[0], same[1] - 0.45 * frames[1], atol=0.05)
    assert not torch.allclose(overlay(frames[:1], maps[:1]), laid[:1], atol=0.05)  # by its own maximum
    assert laid.shape == frames.shape and laid.min() >= 0 and laid.max() <= 1
    assert torch.isfinite(overlay(frames, torch.zeros_like(maps))).all()
    with pytest.raises(ValueError, match="maps: expected shape"):
        overlay(frames, maps[:2])


def test_components_become_colours() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1])
    features = torch.randn(1, 2, 7, 9, 5, generator=generator) * scale
    pictures = component_pictures(features, "exact")
    z = canonical_projections(principal_components(features.reshape(1, -1, 5), 3, "exact"))[0].numpy()
    low, high = np.quantile(z, 0.01, axis=0), np.quantile(z, 0.99, axis=0)
    expected = ((z - low) / (high - low)).clip(0, 1).reshape(2, 7, 9, 3).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(pictures, expected, atol=1e-5)


def test_components_that_are_not_there_are_grey() -> None:
    assert component_pictures(torch.ones(1, 1, 4, 4, 8)).unique().tolist() == [0.5]
    two = component_pictures(torch.randn(1, 1, 4, 4, 2, generator=torch.Generator().manual_seed(0)))
    assert two[:, 2].unique().tolist() == [0.5] and len(two[:, 1].unique()) > 2
    assert component_pictures(torch.ones(1, 1, 1, 1, 8)).shape == (1, 3, 1, 1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (208, 208)), ((100, 400), (52, 208)), ((900, 3), (208, 1)), ((4000, 3000), (208, 156))],
)
def test_cells_keep_the_aspect(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert cell_size(*size) == expected and CELL == 208


def test_every_cell_is_where_it_belongs() -> None:
    """Each picture has a colour of its own: find it again, in rows and columns."""
    colours = ((30 + 18 * torch.arange(12)) / 255).view(2, 3, 2)  # blocks, columns, rows

    def block(number: int) -> Block:
        red = [colours[number, c].view(2, 1, 1, 1).expand(-1, 1, 40, 60) for c in range(3)]
        columns = [torch.cat([level, torch.zeros(2, 2, 40, 60)], 1) for level in red]
        return Block(f"backbone {number}", columns, ["", "AUC 1", "AUC 2"], 2 if number == 0 else None)

    sheet = draw_sheet("a title", ["input", "one", "two"], ["frame 0", "frame 9"], [block(0), block(1)])
    pixels = np.asarray(sheet)
    places = {}
    for number in range(2):
        for column in range(3):
            for row in range(2):
                level = round(float(colours[number, column, row]) * 255)
                rows, columns = np.nonzero((pixels == (level, 0, 0)).all(-1))
                upper, left = int(rows.min()), int(columns.min())
                assert len(rows) == 40 * 60 and (rows.max(), columns.max()) == (upper + 39, left + 59)
                places[number, column, row] = upper, left
    for (number, column, row), (upper, left) in places.items():
        assert left == places[0, column, 0][1] and upper == places[number, 0, row][0]
        assert upper >= places[0, 0, 0][0] + 48 * row and left + 60 <= sheet.width and upper + 40 <= sheet.height
    assert places[0, 1, 0][1] - places[0, 0, 0][1] >= 68 and places[1, 0, 0][0] > places[0, 0, 1][0] + 40
    accent = (pixels == (0xC2, 0x18, 0x5B)).all(-1)
    upper, left = places[0, 2, 0]
    assert accent[upper - 2, left : left + 60].all()  # the frame of the chosen column
    assert not accent[:, : left - 10].any()


def test_long_texts_fit() -> None:
    cell = torch.zeros(1, 3, 208, 10)
    sheet = draw_sheet(
        "t" * 90, ["a long header", "b"], [], [Block("backbone " + "n" * 120, [cell, cell], ["", ""], None)]
    )
    pixels = np.asarray(sheet.convert("L"))
    assert sheet.width > 900 and (pixels[:, -10:] == 255).all()  # the margin is free


def test_a_grid_of_pictures() -> None:
    pictures = torch.stack([torch.full((3, 4, 6), value) for value in (0.0, 0.5, 1.0)])
    grid = np.asarray(sheet(pictures, columns=2))
    assert grid.shape == (12, 16, 3)
    assert (grid[:4, :6] == 0).all() and (grid[:4, 8:14] == 128).all() and (grid[6:10, :6] == 255).all()
    assert (grid[4:6] == 255).all()  # the gap is white
    assert np.asarray(sheet(pictures, columns=2, limit=2)).shape == (6, 16, 3)


def levels(clips: int, frames: int) -> torch.Tensor:
    """Clips of one grey level per clip and frame, 10 (frame + 1) + clip of 255: (clips, frames, 3, 4, 6)."""
    grey = 10.0 * (torch.arange(frames) + 1) + torch.arange(clips)[:, None]
    return (grey / 255)[..., None, None, None].expand(-1, -1, 3, 4, 6)


@pytest.mark.parametrize(
    ("frames", "shown"),
    [(2, [0, 1]), (9, list(range(9))), (13, [0, 2, 3, 4, 6, 8, 9, 10, 12]), (17, list(range(0, 17, 2)))],
)
def test_a_film_strip_has_a_clip_per_row_and_its_frames_in_order(frames: int, shown: list[int]) -> None:
    strip = np.asarray(film_strip(levels(3, frames)))
    assert strip.shape == (3 * 6, len(shown) * 8, 3)
    expected = [[10 * (frame + 1) + clip for frame in shown] for clip in range(3)]
    assert strip[2::6, 3::8, 0].tolist() == expected
    assert (strip[4::6] == 255).all() and (strip[:, 6::8] == 255).all()  # the gaps are white


def test_a_grid_of_clips_plays_together() -> None:
    grid = clip_grid(levels(6, 3))
    assert grid.shape == (3, 3, 2 * 6, 4 * 8)
    rows = [[10, 11, 12, 13], [14, 15, 255, 255]]
    for frame in range(3):
        later = [[level + 10 * frame if level < 255 else 255 for level in row] for row in rows]
        assert (grid[frame, 0, 2::6, 3::8] * 255).round().tolist() == later
    assert clip_grid(levels(2, 3)).shape == (3, 3, 6, 2 * 8)


def test_clips_are_few_and_small() -> None:
    clips = levels(MOST_CLIPS + 2, 2)
    assert torch.equal(small_clips(clips), clips[:MOST_CLIPS])
    halves = torch.zeros(1, 2, 3, 300, 600)
    halves[..., 300:] = 1
    halves[0, 1] /= 2
    small = small_clips(halves)
    assert small.shape == (1, 2, 3, 104, CELL)
    assert small[..., :102].amax() < 1e-5 and (small[0, 0, ..., 106:] - 1).abs().amax() < 1e-5
    assert (small[0, 1, ..., 106:] - 0.5).abs().amax() < 1e-5


def test_every_clip_has_a_colour_scale_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    clips, maps = torch.rand(2, 3, 3, 8, 8, generator=generator), torch.rand(2, 3, 4, 4, generator=generator)
    laid = overlay_clips(clips, maps * torch.tensor([1.0, 50.0]).view(2, 1, 1, 1))
    for clip, its_maps, shown in zip(clips, maps, laid, strict=True):
        torch.testing.assert_close(shown, overlay(clip, its_maps, peak=float(its_maps.amax())), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="maps: expected shape"):
        overlay_clips(clips, maps[:, :2])
