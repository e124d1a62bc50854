"""The nano video world: words and scenes are inverse, clips are seeded, exact metrics see the defects they should."""

import pytest
import torch

from vipo.nano import video_world
from vipo.nano.video_world import COLUMN, DEFECTS, MOTIONS


def scenes(count=42, seed=0):
    rows = video_world.sample_scenes(count, torch.Generator().manual_seed(seed))
    rows[:, COLUMN["motion"]] = torch.arange(count) % len(MOTIONS)
    return rows


def rendered(rows, defect="none", seed=1):
    defects = torch.full((len(rows),), DEFECTS.index(defect))
    return video_world.render(rows, torch.Generator().manual_seed(seed), defects)


@pytest.fixture(scope="module")
def clean():
    rows = scenes()
    clips = rendered(rows)
    return rows, clips, video_world.measure(clips.videos, video_world.describe(rows))


def test_describe_and_parse_are_inverse():
    rows = scenes(200)
    assert torch.equal(video_world.parse(video_world.describe(rows)), rows)
    assert video_world.describe(torch.tensor([[1, 0, 0, 0, 2]])) == [
        "a large red circle moving left on a navy background"
    ]
    assert video_world.describe(torch.tensor([[0, 1, 3, 6, 0]])) == [
        "a small green star standing still on a black background"
    ]
    assert video_world.parse([]).shape == (0, 5)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat",
        "a large red circle moving on a navy background",
        "a large mauve circle moving left on a navy background",
        "a large red circle moving left on a navy background today",
    ],
)
def test_parse_refuses_other_prompts(prompt):
    with pytest.raises(ValueError, match="not a prompt of the nano video world"):
        video_world.parse([prompt])


def test_rendering_is_seeded_and_in_range(clean):
    rows, clips, _ = clean
    assert clips.videos.shape == (42, 9, 3, 64, 64) and clips.masks.shape == (42, 9, 64, 64)
    assert clips.videos.min() >= 0 and clips.videos.max() <= 1
    assert torch.equal(clips.videos, rendered(rows).videos)
    assert not torch.equal(clips.videos, rendered(rows, seed=2).videos)


def test_clean_clips_measure_clean_and_the_subject_is_found(clean):
    _, clips, metrics = clean
    assert metrics["motion_accuracy"].min() == 1
    assert metrics["shape_accuracy"].mean() > 0.97
    assert metrics["motion_error"].max() < 0.3
    assert metrics["jitter"].max() < 0.5
    assert metrics["colour_error"].max() < 0.12
    assert metrics["flicker"].max() == 0
    mask = metrics["subject_mask"]
    overlap = torch.minimum(mask, clips.masks).sum() / torch.maximum(mask, clips.masks).sum()
    assert overlap > 0.88


@pytest.mark.parametrize(
    ("defect", "metric", "change"),
    [
        ("blur", "colour_error", 0.05),
        ("blur", "shape_iou", -0.02),
        ("noise", "colour_error", 0.15),
        ("wrong_colour", "colour_error", 0.3),
        ("jitter", "jitter", 2.0),
        ("freeze", "motion_error", 0.4),
        ("freeze", "motion_accuracy", -0.5),
        ("flicker", "flicker", 0.01),
    ],
)
def test_each_metric_sees_its_defect(clean, defect, metric, change):
    rows, _, before = clean
    after = video_world.measure(rendered(rows, defect).videos, video_world.describe(rows))
    difference = (after[metric] - before[metric]).mean().item()
    assert difference / change > 1


def test_defects_keep_pose_unless_they_are_of_the_motion(clean):
    rows, clips, _ = clean
    for name in DEFECTS[1:]:
        masks = rendered(rows, name).masks
        assert torch.equal(masks, clips.masks) == (name not in ("jitter", "freeze")), name


def test_every_other_motion_word_is_wrong(clean):
    rows, clips, _ = clean
    for shift in range(1, len(MOTIONS)):
        other = rows.clone()
        other[:, COLUMN["motion"]] = (rows[:, COLUMN["motion"]] + shift) % len(MOTIONS)
        assert video_world.measure(clips.videos, video_world.describe(other))["motion_accuracy"].max() == 0


def test_a_literal_clip_of_a_square_moving_right():
    """A red square of 16x16 on pure black ground, 3 pixels a frame: one whole travel of 24 pixels, no jitter."""
    ground = torch.tensor(video_world.GROUNDS["black"])[:, None, None]
    video = ground.expand(9, 3, 64, 64).clone()
    for k in range(9):
        video[k, :, 24:40, 8 + 3 * k : 24 + 3 * k] = torch.tensor(video_world.COLOURS["red"])[:, None, None]
    metrics = video_world.measure(video[None], ["a small red square moving right on a black background"])
    assert metrics["motion_accuracy"].item() == 1 and metrics["shape_accuracy"].item() == 1
    assert metrics["motion_error"].item() == pytest.approx(0, abs=1e-4)
    assert metrics["jitter"].item() == pytest.approx(0, abs=1e-3)
    assert metrics["colour_error"].item() == pytest.approx(0, abs=1e-5)
    assert metrics["flicker"].item() == 0
    backwards = video_world.measure(video.flip(0)[None], ["a small red square moving right on a black background"])
    assert backwards["motion_accuracy"].item() == 0
    assert backwards["motion_error"].item() == pytest.approx(2, abs=1e-4)


def test_a_clip_without_a_subject_measures_badly_but_finitely():
    video = torch.tensor(video_world.GROUNDS["teal"])[:, None, None].expand(1, 9, 3, 64, 64)
    metrics = video_world.measure(video, ["a small red ring growing on a teal background"])
    assert metrics["motion_accuracy"].item() == 0 and metrics["shape_iou"].item() < 0.1
    assert all(torch.isfinite(value).all() for value in metrics.values())
