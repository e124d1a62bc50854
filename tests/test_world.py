"""The nano world: words and scenes are inverse, pictures are seeded, exact metrics see the defects they should."""

import pytest
import torch

from vipo.nano import world


def scenes(count=96, seed=0):
    return world.sample_scenes(count, torch.Generator().manual_seed(seed))


def measured(rows, defect=0, seed=1):
    defects = torch.full((len(rows),), defect)
    drawing = world.render(rows, torch.Generator().manual_seed(seed), defects)
    return drawing, world.measure(drawing.images, world.describe(rows))


def test_describe_and_parse_are_inverse():
    rows = scenes()
    prompts = world.describe(rows)
    assert torch.equal(world.parse(prompts), rows)
    assert prompts[0].startswith("a ") and " background" in prompts[0]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat",
        "a large red circle at the left on a striped navy background with",
        "a large mauve circle at the left on a striped navy background",
    ],
)
def test_parse_refuses_other_prompts(prompt):
    with pytest.raises(ValueError, match="not a prompt of the nano world"):
        world.parse([prompt])


def test_rendering_is_seeded_and_in_range():
    rows = scenes(24)
    a, b = (world.render(rows, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.images, b.images)
    assert a.images.shape == (24, 3, 64, 64) and a.images.min() >= 0 and a.images.max() <= 1
    assert not torch.equal(a.images, world.render(rows, torch.Generator().manual_seed(4)).images)


def test_defects_change_only_what_they_should():
    """The same seed gives the same pose: a defect changes the subject's neighbourhood, or with `blotch` the ground."""
    rows = scenes(48)
    clean = world.render(rows, torch.Generator().manual_seed(3))
    for index, name in enumerate(world.DEFECTS[1:], start=1):
        faulty = world.render(rows, torch.Generator().manual_seed(3), torch.full((48,), index))
        changed = (faulty.images - clean.images).abs().amax(1)
        near = torch.nn.functional.max_pool2d(clean.masks[:, None], 17, 1, 8)[:, 0] > 0
        assert torch.equal(faulty.masks, clean.masks)
        assert changed.amax() > 0.1, name
        inside, outside = changed[near].sum(), changed[~near].sum()
        assert (inside < outside) if name == "blotch" else (outside < 0.01 * inside), name


def test_clean_pictures_measure_clean_and_the_subject_is_found():
    drawing, metrics = measured(scenes(192))
    assert metrics["shape_accuracy"].mean() > 0.98
    assert metrics["shape_iou"].mean() > 0.8
    assert metrics["colour_error"].mean() < 0.12
    assert metrics["background_dirt"].nanmean() < 2e-3
    mask = metrics["subject_mask"]
    overlap = torch.minimum(mask, drawing.masks).sum() / torch.maximum(mask, drawing.masks).sum()
    assert overlap > 0.8


@pytest.mark.parametrize(
    ("defect", "metric", "worse"),
    [
        ("wrong_colour", "colour_error", 1),
        ("noise", "colour_error", 1),
        ("jagged", "shape_iou", -1),
        ("bite", "shape_iou", -1),
        ("blotch", "background_dirt", 1),
    ],
)
def test_each_metric_sees_its_defect(defect, metric, worse):
    rows = scenes(128)
    _, clean = measured(rows)
    _, faulty = measured(rows, world.DEFECTS.index(defect))
    change = (faulty[metric] - clean[metric])[~torch.isnan(clean[metric])].mean()
    assert change * worse > 0.005


def test_dirt_is_not_measured_where_the_surroundings_are_free():
    rows = scenes(64)
    _, metrics = measured(rows)
    assert torch.equal(torch.isnan(metrics["background_dirt"]), rows[:, world.COLUMN["surroundings"]] != 0)


def test_a_wrong_shape_is_recognised():
    rows = scenes(64)
    rows[:, world.COLUMN["shape"]] = world.SHAPES.index("square")
    drawing = world.render(rows, torch.Generator().manual_seed(0))
    rows[:, world.COLUMN["shape"]] = world.SHAPES.index("star")
    assert world.measure(drawing.images, world.describe(rows))["shape_accuracy"].mean() < 0.05
