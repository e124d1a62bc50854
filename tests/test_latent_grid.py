"""vipo.psm.latent_grid: a NumPy oracle for the resampling, literal frame groups for the pooling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vipo.psm.latent_grid import check_frames, frame_groups, pool_time, resize_space, spread_time


def resampling_matrix(source: int, target: int) -> np.ndarray:
    """Antialiased linear resampling of one axis: a triangle as wide as the coarser of the two grids."""
    scale = source / target
    reach = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(source) - centres[:, None]) / reach)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("source", "target"), [((8, 6), (4, 3)), ((5, 7), (10, 14)), ((37, 37), (64, 16)), ((1, 3), (2, 2))]
)
def test_resizing_equals_the_oracle(source: tuple[int, int], target: tuple[int, int]) -> None:
    maps = torch.rand(2, 3, *source, generator=torch.Generator().manual_seed(0))
    rows, columns = (resampling_matrix(*pair) for pair in zip(source, target, strict=True))
    expected = rows @ maps.double().numpy() @ columns.T
    got = resize_space(maps, target)
    assert got.min() >= 0
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_resizing_to_the_same_grid_is_the_identity_and_keeps_constants() -> None:
    maps = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(resize_space(maps, (5, 6)), maps)
    torch.testing.assert_close(resize_space(torch.full((1, 1, 5, 6), 0.7), (9, 4)), torch.full((1, 1, 9, 4), 0.7))


def test_resizing_does_not_shift() -> None:
    """A ramp over the image stays that ramp: value = centre of the position, in units of the image."""
    ramp = ((torch.arange(37) + 0.5) / 37).expand(1, 1, 37, 37)
    inner = resize_space(ramp, (64, 64))[..., 2:-2]
    torch.testing.assert_close(inner[0, 0, 5], ((torch.arange(64) + 0.5) / 64)[2:-2], rtol=1e-5, atol=1e-6)


def test_resizing_errors() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        resize_space(torch.ones(1, 1, 2, 2), (0, 2))
    with pytest.raises(ValueError, match="wrong number of dimensions"):
        resize_space(torch.ones(1, 2, 2), (2, 2))


def literal(frames: list[float]) -> torch.Tensor:
    return torch.tensor(frames).view(1, -1, 1, 1)


def test_causal_groups_literals() -> None:
    maps = literal([9.0, 1.0, 2.0, 3.0, 6.0, 10.0, 20.0, 30.0, 40.0])
    assert torch.equal(pool_time(maps, 3, 4), literal([9.0, 3.0, 25.0]))
    assert torch.equal(pool_time(maps[:, 1:], 2, 4, first_frame_alone=False), literal([3.0, 25.0]))
    assert torch.equal(pool_time(maps[:, :1], 1, 4), literal([9.0]))


def test_spreading_literals() -> None:
    maps = literal([9.0, 3.0, 25.0])
    assert torch.equal(spread_time(maps, 4), literal([9.0, *[3.0] * 4, *[25.0] * 4]))
    assert torch.equal(spread_time(maps, 2, first_frame_alone=False), literal([9.0, 9.0, 3.0, 3.0, 25.0, 25.0]))
    assert torch.equal(spread_time(maps), maps)
    with pytest.raises(ValueError, match="temporal_compression >= 1, got 0"):
        spread_time(maps, 0)


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (9, 3), (8, 2), (53, 14), (7, 7)])
def test_pooling_undoes_spreading(frames: int, latent_frames: int) -> None:
    maps = torch.rand(2, latent_frames, 3, 5, generator=torch.Generator().manual_seed(3))
    compression, alone = frame_groups(frames, latent_frames)
    spread = spread_time(maps, compression, first_frame_alone=alone)
    assert spread.shape == (2, frames, 3, 5)
    torch.testing.assert_close(pool_time(spread, latent_frames, compression, first_frame_alone=alone), maps)


def test_no_compression_is_the_identity() -> None:
    maps = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(2))
    for alone in (True, False):
        assert torch.equal(pool_time(maps, 5, first_frame_alone=alone), maps)
    assert torch.equal(pool_time(maps[:, :1], 1), maps[:, :1])


@pytest.mark.parametrize(("latent_frames", "compression"), [(1, 4), (2, 8), (14, 4)])
def test_every_frame_is_read_once(latent_frames: int, compression: int) -> None:
    frames = 1 + (latent_frames - 1) * compression
    maps = torch.eye(frames).view(frames, frames, 1, 1)  # sample f is 1 on frame f only
    weights = pool_time(maps, latent_frames, compression).view(frames, latent_frames)
    assert torch.equal((weights > 0).sum(1), torch.ones(frames, dtype=torch.long))
    torch.testing.assert_close(weights.sum(0), torch.ones(latent_frames))


@pytest.mark.parametrize(
    ("frames", "latent_frames", "compression", "alone", "expected"),
    [(8, 3, 4, True, "= 9"), (9, 3, 4, False, "= 12"), (2, 1, 1, True, "= 1"), (1, 2, 1, True, "= 2")],
)
def test_frames_that_do_not_fit(frames: int, latent_frames: int, compression: int, alone: bool, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{frames} pixel frames.*{expected}; pass"):
        pool_time(torch.ones(1, frames, 2, 2), latent_frames, compression, first_frame_alone=alone)


def test_nonsense_counts() -> None:
    for latent_frames, compression in [(0, 1), (1, 0), (-1, 4)]:
        with pytest.raises(ValueError, match=">= 1"):
            check_frames(1, latent_frames, compression)


@pytest.mark.parametrize(
    ("frames", "latent_frames", "expected"),
    [(1, 1, (1, True)), (5, 2, (4, True)), (9, 2, (8, True)), (53, 14, (4, True)), (8, 2, (4, False)),
     (16, 2, (8, False)), (81, 21, (4, True)), (88, 22, (4, False)),
     (12, 3, (4, False)), (7, 7, (1, True)), (25, 5, (6, True)), (4, 2, (2, False))],
)  # fmt: skip
def test_the_grouping_of_frames_is_read_off_their_number(frames, latent_frames, expected):
    assert frame_groups(frames, latent_frames) == expected


def test_an_unknown_grouping_is_refused():
    for frames, latent_frames in ((10, 4), (6, 4), (9, 4)):
        with pytest.raises(ValueError, match="grouping of frames is not known"):
            frame_groups(frames, latent_frames)
