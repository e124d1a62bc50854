"""vipo.psm.controls: literal numbers, what each control keeps and what it must destroy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vipo.psm.allocation import normalise
from vipo.psm.controls import CONTROLS, control_maps


@pytest.fixture
def maps() -> Tensor:
    return normalise(torch.rand(3, 2, 6, 8, generator=torch.Generator().manual_seed(13)) ** 3)


@pytest.mark.parametrize("kind", CONTROLS)
def test_controls_are_maps(maps: Tensor, kind: str) -> None:
    control = control_maps(maps, kind, torch.Generator().manual_seed(0))
    assert control.shape == maps.shape and control.dtype == maps.dtype and control.min() >= 0
    torch.testing.assert_close(control.mean((1, 2, 3)), torch.ones(3), rtol=1e-6, atol=0)
    again = control_maps(maps, kind, torch.Generator().manual_seed(0))
    assert torch.equal(control, again)


def test_inverted_literal() -> None:
    maps = torch.tensor([[3.0, 1.0], [2.0, 2.0]]).view(2, 1, 1, 2)
    expected = torch.tensor([[0.0, 4.0], [2.0, 2.0]]).view(2, 1, 1, 2)  # the mean of each map stays 2
    assert torch.equal(control_maps(maps, "inverted"), expected)


@pytest.mark.parametrize(("height", "width", "side"), [(6, 8, 2), (5, 8, 1), (2, 2, 1)])
def test_shuffling_keeps_blocks_and_values_and_moves_them(height: int, width: int, side: int) -> None:
    frames = 1 if (height, width) == (2, 2) else 3
    maps = torch.arange(4 * frames * height * width, dtype=torch.float32).view(4, frames, height, width)
    shuffled = control_maps(maps, "shuffled", torch.Generator().manual_seed(1))
    assert torch.equal(shuffled.flatten(1).sort(1).values, maps.flatten(1).sort(1).values)
    assert not torch.equal(shuffled, maps)

    def blocks(sample: Tensor) -> set[tuple[float, ...]]:
        windows = sample.unfold(1, side, side).unfold(2, side, side).reshape(-1, side * side)
        return {tuple(window) for window in windows.tolist()}

    orders = set()
    for sample in range(4):
        assert blocks(shuffled[sample]) == blocks(maps[sample])
        orders.add(tuple((shuffled[sample] - maps[sample].min()).flatten().tolist()))
    assert len(orders) > 1, "every sample got the same permutation"


def test_random_field_has_the_values_of_the_map_but_is_smooth_and_elsewhere() -> None:
    maps = normalise(torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(14)))
    control = control_maps(maps, "random", torch.Generator().manual_seed(2))
    torch.testing.assert_close(control.flatten(1).sort(1).values, maps.flatten(1).sort(1).values)

    def roughness(field: Tensor, axis: int) -> Tensor:
        return field.diff(dim=axis).square().mean() / field.var()

    for axis in (2, 3):
        assert roughness(control, axis) < 0.2 * roughness(maps, axis)
    assert torch.corrcoef(torch.stack([control.flatten(), maps.flatten()]))[0, 1].abs() < 0.1


def test_control_errors(maps: Tensor) -> None:
    with pytest.raises(ValueError, match="did you mean 'shuffled'"):
        control_maps(maps, "shuffle")
    for kind in ("shuffled", "random"):
        with pytest.raises(ValueError, match=r"pass a torch\.Generator"):
            control_maps(maps, kind)


def test_centre_blob_literal() -> None:
    blob = control_maps(torch.full((2, 3, 5, 9), 0.5), "centre")
    rows, columns = torch.linspace(-1, 1, 5)[:, None], torch.linspace(-1, 1, 9)
    expected = torch.exp(-(rows**2 + columns**2) / (2 * 0.5**2))
    torch.testing.assert_close(blob, (0.5 * expected / expected.mean()).expand(2, 3, 5, 9))


def test_controls_are_as_strong_as_the_map() -> None:
    maps = normalise(torch.rand(3, 2, 6, 8, generator=torch.Generator().manual_seed(15)), "minmax")
    for kind in CONTROLS:
        control = control_maps(maps, kind, torch.Generator().manual_seed(0))
        expected = torch.ones(3) if kind == "ones" else maps.mean((1, 2, 3))
        torch.testing.assert_close(control.mean((1, 2, 3)), expected, rtol=1e-5, atol=0)
