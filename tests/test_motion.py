"""vipo.psm.motion: known displacements, scikit-image's flow, and clips that do not move."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from skimage.registration import optical_flow_ilk
from torch import Tensor

from vipo.psm.allocation import smooth
from vipo.psm.motion import motion_maps, optical_flow


def texture(seed: int, size: int = 112) -> Tensor:
    """A smooth random picture (size, size) in [0, 1]."""
    noise = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(seed))
    blurred = smooth(noise, 2.0)[0, 0]
    return (blurred - blurred.min()) / (blurred.max() - blurred.min())


def crop(picture: Tensor, x: float, y: float, size: int = 80) -> Tensor:
    """The middle of a picture that has moved by (x, y) pixels, (size, size)."""
    large = len(picture)
    start = (large - size) / 2
    columns = (torch.arange(size) + start - x + 0.5) * 2 / large - 1
    rows = (torch.arange(size) + start - y + 0.5) * 2 / large - 1
    grid = torch.stack(torch.broadcast_tensors(columns[None], rows[:, None]), -1)
    return functional.grid_sample(picture[None, None], grid[None], mode="bicubic", align_corners=False)[0, 0]


@pytest.mark.parametrize("displacement", [(0.4, 0.0), (1.5, -2.0), (-6.0, 3.0)])
def test_flow_finds_a_known_displacement(displacement: tuple[float, float]) -> None:
    pictures = torch.stack([texture(0), texture(1)])
    before = torch.stack([crop(picture, 0, 0) for picture in pictures])
    after = torch.stack([crop(picture, *displacement) for picture in pictures])
    flow = optical_flow(before, after)
    assert flow.shape == (2, 2, 80, 80)
    inner = flow[:, :, 10:-10, 10:-10]
    error = (inner - torch.tensor(displacement).view(2, 1, 1)).norm(dim=1)
    assert error.mean() < 0.05 and error.max() < 0.5  # pixels


def test_flow_agrees_with_scikit_image() -> None:
    """A picture that grows about its centre: the flow differs from place to place."""
    picture = texture(2)
    before = crop(picture, 0, 0)
    columns = (torch.arange(80) - 39.5) / 1.04 + 55.5
    place = (columns + 0.5) * 2 / 112 - 1
    grid = torch.stack(torch.broadcast_tensors(place[None], place[:, None]), -1)
    after = functional.grid_sample(picture[None, None], grid[None], mode="bicubic", align_corners=False)[0, 0]
    ours = optical_flow(before[None], after[None])[0, :, 10:-10, 10:-10].numpy()
    rows, cols = optical_flow_ilk(before.numpy(), after.numpy(), radius=5)
    theirs = np.stack([cols, rows])[:, 10:-10, 10:-10]
    assert np.abs(ours - theirs).mean() < 0.1  # pixels, of up to 1.6


def test_noise_in_flat_places_does_not_flow() -> None:
    """Half texture, half flat with faint noise, and nothing moves: the noise must not be read as motion."""
    generator = torch.Generator().manual_seed(7)
    before, after = crop(texture(7), 0, 0), crop(texture(7), 0, 0)
    noise = 0.002 * torch.randn(2, 80, 40, generator=generator)
    before[:, 40:], after[:, 40:] = 0.5 + noise[0], 0.5 + noise[1]
    assert optical_flow(before[None], after[None])[0].norm(dim=0).max() < 0.2  # pixels; 7 without the ridge


def test_a_step_is_bounded() -> None:
    """Unlike pictures have no flow; what is found stays within the pyramid's reach instead of running away."""
    generator = torch.Generator().manual_seed(8)
    first, second = torch.rand(2, 1, 64, 64, generator=generator)
    assert optical_flow(first, second).abs().max() < 4 * (1 + 2 + 4)


@pytest.mark.parametrize("kind", ["difference", "flow"])
def test_what_does_not_move_has_no_motion(kind: str) -> None:
    still = torch.rand(2, 1, 3, 40, 56, generator=torch.Generator().manual_seed(3))
    maps = motion_maps(still.expand(2, 5, 3, 40, 56), kind, (10, 14))
    assert maps.shape == (2, 5, 10, 14) and maps.max() < 1e-5  # flow: the warp's rounding
    assert torch.equal(motion_maps(still, kind, (10, 14)), torch.zeros(2, 1, 10, 14))


@pytest.mark.parametrize("kind", ["difference", "flow"])
def test_motion_is_where_the_moving_square_is(kind: str) -> None:
    frames = 0.3 + 0.1 * texture(4, 64).expand(1, 4, 3, 64, 64).clone()
    patch = texture(5, 64)[:20, :20]
    for f in range(4):
        frames[0, f, :, 20:40, 10 + 3 * f : 30 + 3 * f] = patch
    maps = motion_maps(frames, kind, (16, 16))
    assert maps.shape == (1, 4, 16, 16) and maps.min() >= 0 and maps.dtype == torch.float32
    assert torch.equal(maps[:, 0], maps[:, 1])  # frame 0 has no predecessor
    for f in range(1, 4):
        inside = maps[0, f, 6:9, (10 + 3 * f) // 4 + 1 : (30 + 3 * f) // 4 - 1]
        assert inside.mean() > 5 * maps[0, f, 12:].mean()


def test_difference_literal() -> None:
    frames = torch.zeros(1, 3, 3, 4, 4)
    frames[0, 1, 0, :2, :2] = 0.9  # one channel of three: .3 per pixel
    maps = motion_maps(frames, "difference", (2, 2))
    expected = torch.tensor([[0.3, 0.0], [0.0, 0.0]])
    # Antialiased halving reaches into the neighbour: the corner keeps most.
    assert torch.allclose(maps[0, 1], maps[0, 2]) and maps[0, 1].argmax() == 0
    full = motion_maps(frames, "difference", (4, 4))[0, 1]
    torch.testing.assert_close(full, expected.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_flow_is_in_cells_of_the_grid() -> None:
    picture = texture(6)
    clip = torch.stack([crop(picture, 2.0 * f, 0.0) for f in range(3)])[None, :, None].expand(1, 3, 3, 80, 80)
    fine, coarse = motion_maps(clip, "flow", (40, 40)), motion_maps(clip, "flow", (20, 20))
    assert fine[..., 8:-8, 8:-8].mean() == pytest.approx(1.0, abs=0.05)  # 2 pixels are 1 cell of 2 pixels
    assert coarse[..., 4:-4, 4:-4].mean() == pytest.approx(0.5, abs=0.05)


def test_errors() -> None:
    with pytest.raises(ValueError, match="did you mean 'flow'"):
        motion_maps(torch.rand(1, 2, 3, 8, 8), "flo", (4, 4))
    with pytest.raises(ValueError, match="wrong number of dimensions"):
        motion_maps(torch.rand(2, 3, 8, 8), "flow", (4, 4))
    with pytest.raises(ValueError, match="second"):
        optical_flow(torch.rand(1, 8, 8), torch.rand(1, 8, 9))
