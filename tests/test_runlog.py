"""vipo.runlog: what a run shows of its samples; what it records is tested with the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vipo.media import read_fps, read_frames
from vipo.pictures import overlay, sheet
from vipo.runlog import CLIP_FPS, RunLog


def files(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for folder in ("samples", "maps") for path in (run / folder).iterdir())


def test_stills_are_contact_sheets(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    frames, maps = torch.rand(10, 1, 3, 8, 8, generator=generator), torch.rand(10, 1, 4, 4, generator=generator)
    with RunLog(tmp_path / "run", "", tensorboard=False) as log:
        log.pictures(3, frames, maps)
    assert files(tmp_path / "run") == ["maps/iteration_000003.png", "samples/iteration_000003.png"]
    for folder, shown in (("samples", frames[:, 0]), ("maps", overlay(frames[:, 0], maps[:, 0]))):
        with Image.open(tmp_path / "run" / folder / "iteration_000003.png") as image:
            assert np.array_equal(np.asarray(image), np.asarray(sheet(shown)))


def test_clips_are_film_strips_and_animations(tmp_path: Path) -> None:
    """Frame f of every clip has the grey f / 10; the map of latent frame 1 is nothing and of frame 2 the most."""
    frames = (torch.arange(9) / 10).view(1, 9, 1, 1, 1).expand(10, 9, 3, 16, 16)
    maps = torch.tensor([1.0, 0.0, 2.0]).view(1, 3, 1, 1).expand(10, 3, 4, 4)
    with RunLog(tmp_path / "run", "") as log:
        log.pictures(1, frames, maps)
    names = [f"{folder}/iteration_000001.{kind}" for folder in ("maps", "samples") for kind in ("png", "webp")]
    assert files(tmp_path / "run") == names
    strip, laid = (read_frames(tmp_path / "run" / names[n])[0] for n in (2, 0))
    assert strip.shape == laid.shape == (3, 8 * 18, 9 * 18)  # eight clips of nine frames
    torch.testing.assert_close(strip[0, 8::18, 8::18], frames[:8, :, 0, 8, 8], rtol=0, atol=1 / 255)
    by_latent_frame = torch.tensor([1.0] + 4 * [0.0] + 4 * [2.0]).view(9, 1, 1).expand(9, 4, 4)
    expected = overlay(frames[0], by_latent_frame, peak=2.0)[:, :, 8, 8]
    for row in range(8):
        torch.testing.assert_close(laid[:, 8 + 18 * row, 8::18].T, expected, rtol=0, atol=1 / 255)
    moving, moving_maps = (read_frames(tmp_path / "run" / names[n]) for n in (3, 1))
    assert moving.shape == moving_maps.shape == (9, 3, 2 * 18, 4 * 18)
    torch.testing.assert_close(moving[:, 0, 26, 62], frames[0, :, 0, 0, 0], rtol=0, atol=1 / 255)  # the eighth
    torch.testing.assert_close(moving_maps[:, :, 26, 62], expected, rtol=0, atol=1 / 255)
    assert read_fps(tmp_path / "run" / names[3]) == CLIP_FPS
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    (image,) = events.Images("samples")
    assert (image.height, image.width) == (8 * 18, 9 * 18)
