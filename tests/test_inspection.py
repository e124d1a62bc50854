"""vipo.inspection: the files and numbers of `vipo maps` against the same steps by hand, and every input that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from PIL import Image
from torch import Tensor

from vipo.config import MapConfig
from vipo.inspection import InspectOptions, inspect_maps
from vipo.inspection.record import MAPS
from vipo.media import read_frames, write_image, write_video
from vipo.nano import assets_path
from vipo.nano.world import parse, render
from vipo.psm import CONTROLS, ORIENTATIONS, PerceptualStructuring, control_maps, flicker, map_statistics
from vipo.psm.agreement import agreement

ONE_RULE = {"orientations": ("border_energy",)}


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two pictures (2, 3, 64, 64) and their masks (2, 64, 64)."""
    prompts = [
        "a large red circle at the left on a plain gray background",
        "a large blue star at the top on a noisy brown background",
    ]
    drawing = render(parse(prompts), torch.Generator().manual_seed(seed))
    return drawing.images, drawing.masks


def clip(frames: int) -> tuple[Tensor, Tensor]:
    """The circle moving to the right, (F, 3, 64, 64), and its mask (F, 64, 64)."""
    pictures, masks = draw()
    shifts = range(0, 2 * frames, 2)
    return (
        torch.stack([pictures[0].roll(shift, 2) for shift in shifts]),
        torch.stack([masks[0].roll(shift, 1) for shift in shifts]),
    )


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two pictures in in/, one of them in a folder below, and their masks in gt/."""
    pictures, masks = draw()
    for name, picture, mask in (("circle", pictures[0], masks[0]), ("more/star", pictures[1], masks[1])):
        write_image(tmp_path / "in" / f"{name}.png", picture)
        write_image(tmp_path / "gt" / f"{name}.png", mask.expand(3, -1, -1))
    return tmp_path


def saved(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / MAPS).read_text())
    return content


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def expected_agreement(maps: Tensor, mask: Tensor) -> dict[str, float]:
    """Agreement of (F, H, W) at the mask's size, by hand."""
    large = functional.interpolate(maps[:, None], mask.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    return {name: float(value[0]) for name, value in agreement(large[None], mask[None]).items()}


def test_pictures_against_the_same_steps_by_hand(world: Path) -> None:
    config = MapConfig(orientation="skewness", smoothing=0.5)
    told: list[tuple[str, int, int, str]] = []
    outcome = inspect_maps(
        [world / "in"],
        world / "out",
        config,
        InspectOptions(ground_truth=world / "gt", spatial_compression=4),
        progress=lambda *progress: told.append(progress),
    )
    files = {"map.npy", "overlay.png", "components.png", "sheet.png"}
    assert names(world / "out") == {f"{name}/{file}" for name in ("circle", "more/star") for file in files} | {MAPS}
    assert told == [("maps", 0, 2, "circle.png"), ("maps", 1, 2, "star.png"), ("maps", 2, 2, "")]
    assert outcome.failures == [] and [entry["folder"] for entry in outcome.results] == ["circle", "more/star"]
    psm = PerceptualStructuring.from_pretrained("nano", orientation="skewness", smoothing=0.5)
    for number, entry in enumerate(outcome.results):
        frames = read_frames(world / "in" / f"{entry['folder']}.png")
        mask = read_frames(world / "gt" / f"{entry['folder']}.png").mean(1)
        maps = psm(frames[None], (1, 16, 16))
        stored = np.load(world / "out" / entry["folder"] / "map.npy")
        assert stored.dtype == np.float32 and stored.shape == (1, 16, 16)
        np.testing.assert_array_equal(stored, maps[0])
        assert Image.open(world / "out" / entry["folder"] / "overlay.png").size == (64, 64)
        assert Image.open(world / "out" / entry["folder"] / "components.png").size == (64, 64)
        statistics = {name: float(value) for name, value in map_statistics(maps).items()}
        assert entry["statistics"] == {**statistics, "flicker": 0.0}
        assert (entry["height"], entry["width"], entry["frames"], entry["latent_shape"]) == (64, 64, 1, [1, 16, 16])
        assert entry["constant"] is False and entry["notes"] == [] and entry["fps"] is None
        measured = entry["agreement"]
        assert measured["map"] == expected_agreement(maps[0], mask)
        assert measured["map"]["AUC"] > 0.9
        assert measured["rules"]["nano"]["skewness"] == measured["map"]
        assert set(measured["rules"]["nano"]) == set(ORIENTATIONS) and set(measured["controls"]) == set(CONTROLS)
        other = PerceptualStructuring.from_pretrained("nano", orientation="energy", smoothing=0.5)
        energy = expected_agreement(other(frames[None], (1, 16, 16))[0], mask)
        assert measured["rules"]["nano"]["energy"] == pytest.approx(energy)
        generator = torch.Generator().manual_seed(number)
        for kind in CONTROLS:
            assert measured["controls"][kind] == expected_agreement(control_maps(maps, kind, generator)[0], mask), kind
        assert measured["controls"]["ones"]["AUC"] == 0.5
    content = saved(world / "out")
    assert content["inputs"] == outcome.results and content["overall"] == outcome.overall
    assert content["kind"] == "maps" and content["failures"] == [] and content["map"]["orientation"] == "skewness"
    assert content["options"]["spatial_compression"] == 4 and content["options"]["ground_truth"] == str(world / "gt")
    mean = np.mean([entry["agreement"]["map"]["NSS"] for entry in outcome.results])
    assert outcome.overall["map"]["NSS"]["mean"] == pytest.approx(mean) and outcome.overall["measured"] == 2
    assert outcome.overall["map_minus_control"]["centre"]["AUC"]["mean"] == pytest.approx(
        outcome.overall["map"]["AUC"]["mean"] - outcome.overall["controls"]["centre"]["AUC"]["mean"]
    )


@pytest.mark.parametrize(("suffix", "alone", "used"), [(".mp4", True, 9), (".gif", True, 9), (".mp4", False, 8)])
def test_a_clip_is_cut_to_whole_latent_frames(tmp_path: Path, suffix: str, alone: bool, used: int) -> None:
    pictures, masks = clip(11)
    if suffix == ".mp4":
        write_video(tmp_path / "clip.mp4", pictures, 12)
    else:
        stills = [Image.fromarray((p.movedim(0, -1) * 255).byte().numpy()) for p in pictures]
        stills[0].save(tmp_path / "clip.gif", save_all=True, append_images=stills[1:], duration=80)
    np.save(tmp_path / "mask.npy", masks)
    outcome = inspect_maps(
        [tmp_path / f"clip{suffix}"],
        tmp_path / "out",
        None,
        InspectOptions(temporal_compression=4, first_frame_alone=alone, ground_truth=tmp_path / "mask.npy", **ONE_RULE),
    )
    assert outcome.failures == []
    entry = outcome.results[0]
    latent_frames = 3 if alone else 2
    assert entry["latent_shape"] == [latent_frames, 8, 8] and (entry["frames"], entry["frames_read"]) == (used, 11)
    assert entry["notes"] == [f"the last {11 - used} of 11 frames fill no latent frame and are left out"]
    assert entry["fps"] == pytest.approx(12 if suffix == ".mp4" else 12.5)
    frames = read_frames(tmp_path / f"clip{suffix}")[:used]
    psm = PerceptualStructuring.from_pretrained("nano")
    maps = psm(frames[None], (latent_frames, 8, 8), 4, first_frame_alone=alone)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "clip" / "map.npy"), maps[0])
    assert entry["statistics"]["flicker"] == float(flicker(maps)[0]) > 0
    groups = [0, 1, 1, 1, 1, 2, 2, 2, 2] if alone else [0, 0, 0, 0, 1, 1, 1, 1]
    assert entry["agreement"]["map"] == expected_agreement(maps[0][groups], masks[:used])
    assert names(tmp_path / "out" / "clip") == {"map.npy", "overlay.mp4", "components.mp4", "sheet.png"}
    for name in ("overlay", "components"):
        assert read_frames(tmp_path / "out" / "clip" / f"{name}.mp4").shape == (used, 3, 64, 64)


def test_motion_sees_the_frames(tmp_path: Path) -> None:
    pictures, _ = clip(5)
    write_video(tmp_path / "clip.mp4", pictures, 8)
    config = MapConfig(motion="difference", combine="mean", motion_weight=0.7)
    options = InspectOptions(temporal_compression=4, max_frames=5, fps=3, **ONE_RULE)
    outcome = inspect_maps([tmp_path / "clip.mp4"], tmp_path / "out", config, options)
    psm = PerceptualStructuring.from_pretrained("nano", motion="difference", combine="mean", motion_weight=0.7)
    expected = psm(read_frames(tmp_path / "clip.mp4")[None], (2, 8, 8), 4)[0]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "clip" / "map.npy"), expected)
    assert outcome.results[0]["fps"] == 3 and outcome.results[0]["agreement"] is None


def test_what_fails_is_named_and_the_rest_is_done(world: Path) -> None:
    (world / "in" / "broken.png").write_bytes((world / "in" / "circle.png").read_bytes()[:200])
    (world / "in" / "empty.mp4").touch()
    write_image(world / "in" / "dot.png", torch.rand(3, 4, 4))  # one patch, which has no three components
    write_image(world / "in" / "unmasked.png", torch.rand(3, 64, 64))
    outcome = inspect_maps([world / "in"], world / "out", None, InspectOptions(ground_truth=world / "gt", **ONE_RULE))
    reasons = {Path(path).name: reason for path, reason in outcome.failures}
    assert set(reasons) == {"broken.png", "empty.mp4", "dot.png", "unmasked.png"} and len(outcome.failures) == 5
    assert "truncated" in reasons["broken.png"] and reasons["empty.mp4"] == "the file is empty (0 bytes)"
    assert reasons["dot.png"].startswith("components: expected 1 to min(P, D) = 1")
    assert reasons["unmasked.png"] == f"no mask: expected {world / 'gt' / 'unmasked'}.png, .npy or a video"
    assert [entry["folder"] for entry in outcome.results] == ["circle", "more/star", "unmasked"]
    unmasked = outcome.results[2]
    assert unmasked["agreement"] is None and (world / "out" / "unmasked" / "sheet.png").is_file()
    assert outcome.overall["inputs"] == 3 and outcome.overall["measured"] == 2
    content = saved(world / "out")
    assert [(f["path"], f["reason"]) for f in content["failures"]] == outcome.failures
    assert not (world / "out" / "broken").exists()


def test_an_interrupted_run_keeps_what_it_has(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = PerceptualStructuring.features
    calls = 0

    def interrupted(self: PerceptualStructuring, frames: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return features(self, frames)

    monkeypatch.setattr(PerceptualStructuring, "features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inspect_maps([world / "in"], world / "out", None, InspectOptions(**ONE_RULE))
    assert [entry["folder"] for entry in saved(world / "out")["inputs"]] == ["circle"]


def test_the_backbone_runs_once_per_input(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, seen = PerceptualStructuring.features, []

    def counted(self: PerceptualStructuring, frames: Tensor) -> Tensor:
        seen.append(frames.shape)
        return features(self, frames)

    monkeypatch.setattr(PerceptualStructuring, "features", counted)
    second = str(assets_path("backbone"))  # the same weights under another name
    options = InspectOptions(backbones=[second, "nano"], ground_truth=world / "gt" / "circle.png")
    outcome = inspect_maps([world / "in" / "circle.png"], world / "out", None, options)
    assert seen == [(1, 1, 3, 64, 64)] * 2
    rules = outcome.results[0]["agreement"]["rules"]
    assert list(rules) == ["nano", second] and rules["nano"] == rules[second]
    assert list(rules["nano"]) == list(ORIENTATIONS)
    alone = inspect_maps([world / "in" / "circle.png"], world / "alone", None, InspectOptions(**ONE_RULE))
    assert alone.results[0]["statistics"] == outcome.results[0]["statistics"]
    two, one = (Image.open(world / folder / "circle" / "sheet.png").size for folder in ("out", "alone"))
    assert two[0] > 2 * one[0] > 0 and two[1] > one[1] + 208  # six rules and a mask, and a second row


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (np.zeros((64, 64)), "mask {path}: empty: no position is above 1/2"),
        (np.ones((64, 64)), "mask {path}: full: every position is above 1/2"),
        (np.full((64, 64), 2.0), "{path}: expected (h, w) or (F, h, w) in [0, 1]"),
        (np.eye(64)[None].repeat(3, 0), "mask {path}: has 3 frames, expected 1 or the clip's 6"),
        (np.eye(64)[None].repeat(8, 0), "mask {path}: has 8 frames, expected 1 or the clip's 6"),
    ],
)
def test_bad_masks_are_named(tmp_path: Path, mask: np.ndarray, expected: str) -> None:
    write_video(tmp_path / "clip.mp4", clip(6)[0], 8)
    path = tmp_path / "mask.npy"
    np.save(path, mask)
    outcome = inspect_maps(
        [tmp_path / "clip.mp4"], tmp_path / "out", None, InspectOptions(ground_truth=path, **ONE_RULE)
    )
    assert [failure[0] for failure in outcome.failures] == [str(tmp_path / "clip.mp4")]
    assert outcome.failures[0][1].startswith(expected.format(path=path))
    assert outcome.results[0]["agreement"] is None and (tmp_path / "out" / "clip" / "map.npy").is_file()


def test_masks_of_other_sizes_and_lengths(tmp_path: Path) -> None:
    pictures, masks = clip(6)
    write_video(tmp_path / "clip.mp4", pictures, 8)
    found = {}
    for name, mask in (("still", masks[:1]), ("small", masks[:, ::2, ::2]), ("whole", masks), ("part", masks)):
        np.save(tmp_path / f"{name}.npy", mask)
        options = InspectOptions(
            ground_truth=tmp_path / f"{name}.npy", max_frames=4 if name == "part" else None, **ONE_RULE
        )
        outcome = inspect_maps([tmp_path / "clip.mp4"], tmp_path / f"out_{name}", None, options)
        assert outcome.failures == [], name
        found[name] = outcome.results[0]
    maps = torch.from_numpy(np.load(tmp_path / "out_whole" / "clip" / "map.npy"))
    assert found["whole"]["agreement"]["map"] == expected_agreement(maps, masks)
    assert found["still"]["agreement"]["map"] == expected_agreement(maps, masks[:1].expand(6, -1, -1))
    nearest = masks[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert found["small"]["agreement"]["map"] == expected_agreement(maps, nearest)
    assert found["small"]["notes"] == ["mask resized from 32x32 to 64x64"]
    cut = torch.from_numpy(np.load(tmp_path / "out_part" / "clip" / "map.npy"))
    assert found["part"]["agreement"]["map"] == expected_agreement(cut, masks[:4])


def test_a_mask_is_found_by_its_stem(world: Path) -> None:
    _, masks = draw()
    np.save(world / "gt" / "more" / "star.npy", masks[1])
    options = InspectOptions(ground_truth=world / "gt", **ONE_RULE)
    outcome = inspect_maps([world / "in"], world / "two", None, options)
    assert outcome.failures == [(str(world / "in" / "more" / "star.png"), "2 masks fit: star.npy, star.png")]
    (world / "gt" / "more" / "star.png").unlink()
    assert inspect_maps([world / "in"], world / "one", None, options).overall["measured"] == 2
    with pytest.raises(ValueError, match="ground_truth: one file for 2 inputs; give a folder"):
        options = InspectOptions(ground_truth=world / "gt" / "circle.png")
        inspect_maps([world / "in"], world / "none", None, options)
    assert not (world / "none").exists()


def test_masks_and_outputs_below_the_inputs_are_no_inputs(world: Path) -> None:
    options = InspectOptions(ground_truth=world / "gt", **ONE_RULE)
    (world / "gt" / "in").mkdir()
    for path in [*(world / "gt").glob("*.png"), world / "gt" / "more"]:
        path.rename(world / "gt" / "in" / path.name)
    for overwrite in (False, True):  # the second time over the first one's output
        outcome = inspect_maps([world], world / "out", None, options, overwrite=overwrite)
        assert [entry["folder"] for entry in outcome.results] == ["in/circle", "in/more/star"]
        assert outcome.failures == []


def test_overwriting_leaves_nothing_of_the_earlier_inputs(world: Path) -> None:
    inspect_maps([world / "in"], world / "out", None, InspectOptions(**ONE_RULE))
    (world / "out" / "notes.txt").touch()
    with pytest.raises(ValueError, match="already holds maps; give --overwrite"):
        inspect_maps([world / "in" / "circle.png"], world / "out", None, InspectOptions(**ONE_RULE))
    assert (world / "out" / "more" / "star" / "map.npy").is_file()
    inspect_maps([world / "in" / "circle.png"], world / "out", None, InspectOptions(**ONE_RULE), overwrite=True)
    assert sorted(path.name for path in (world / "out").iterdir()) == ["circle", MAPS, "notes.txt"]


def test_a_constant_map_is_said(tmp_path: Path) -> None:
    write_image(tmp_path / "small.png", torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    outcome = inspect_maps([tmp_path / "small.png"], tmp_path / "out", None, InspectOptions(**ONE_RULE))
    entry = outcome.results[0]
    assert entry["latent_shape"] == [1, 1, 1] and entry["constant"] is True and outcome.failures == []
    assert entry["notes"] == ["the map is constant: training with it is scalar GRPO"]


def test_a_clip_shorter_than_a_latent_frame_is_named(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", clip(3)[0], 8)
    options = InspectOptions(temporal_compression=4, first_frame_alone=False)
    outcome = inspect_maps([tmp_path / "clip.mp4"], tmp_path / "out", None, options)
    assert outcome.failures == [(str(tmp_path / "clip.mp4"), "3 frames are less than one latent frame of 4")]
    assert outcome.results == [] and outcome.overall == {"inputs": 0, "measured": 0}
    assert saved(tmp_path / "out")["failures"][0]["reason"].startswith("3 frames")


def test_wrong_options_are_refused_before_anything_is_written(world: Path) -> None:
    for wrong, message in (
        ({"orientations": ["skewnes"]}, "did you mean 'skewness'"),
        ({"spatial_compression": 0}, "spatial_compression: expected at least 1, got 0"),
        ({"temporal_compression": 0}, "temporal_compression: expected at least 1"),
        ({"max_frames": 0}, "max_frames: expected at least 1"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"fps": 0.0}, "fps: expected a positive number"),
        ({"ground_truth": world / "absent"}, "ground_truth: no such file or folder"),
    ):
        with pytest.raises(ValueError, match=message):
            InspectOptions(**wrong)
    for config in (MapConfig(control="ones"), MapConfig(source="reward")):
        with pytest.raises(ValueError, match=f"expected source psm without a control, got {config.label}"):
            inspect_maps([world / "in"], world / "out", config)
    with pytest.raises(ValueError, match="no such file or folder"):
        inspect_maps([world / "absent"], world / "out")
    with pytest.raises(ValueError, match="backbone 'absent/one'"):
        inspect_maps([world / "in"], world / "out", None, InspectOptions(backbones=["absent/one"]))
    assert not (world / "out").exists()
