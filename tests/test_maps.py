"""vipo.maps: every source of maps through the one tail, mask files, and what must be refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vipo.config import MapConfig
from vipo.maps import MapSource, MaskFile, read_mask
from vipo.psm import PerceptualStructuring, control_maps

FRAMES = torch.rand(2, 5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
GRID = (2, 4, 6)  # T = 2 at c = 4


def pixels(frames):
    """A backbone without weights: 4 x 4 patches as they are."""
    patches = torch.nn.functional.pixel_unshuffle(frames.flatten(0, 1), 4)
    return patches.unflatten(0, frames.shape[:2]).movedim(2, -1)


def halves(frames, prompts):
    """A user's map: left for prompts that say so, else right."""
    maps = torch.zeros(len(frames), frames.shape[1], 1, 2)
    for i, prompt in enumerate(prompts):
        maps[i, :, :, 0 if "left" in prompt else 1] = 1
    return maps


def enormous(frames, prompts):
    return 3e38 * halves(frames, prompts)


def array(frames, prompts):
    return halves(frames, prompts).numpy()


def wrong(frames, prompts):
    return -halves(frames, prompts)


def lines(path, *entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    return path


def test_the_psm_is_the_default():
    psm = PerceptualStructuring(pixels)
    maps = MapSource(MapConfig(), psm=psm)(FRAMES, ["", ""], GRID, 4)
    assert torch.equal(maps, psm(FRAMES, GRID, 4))


def test_every_setting_reaches_the_psm():
    changed = dict(
        components=2, orientation="border", weighting="mean", smoothing=0.5, pca_scope="frame", solver="exact",
        motion="flow", combine="mean", motion_weight=0.25, normalisation="mean", temperature=2.0, floor=0.1,
    )  # fmt: skip
    source = MapSource(MapConfig(**changed, layer=2, chunk=3, image_size=32, autocast="bfloat16"))
    assert {name: getattr(source.psm, name) for name in changed} == changed
    backbone = source.psm.backbone
    assert (backbone.layer, backbone.chunk, backbone.image_size, backbone.dtype) == (2, 3, 32, torch.bfloat16)
    default = MapConfig()
    assert all(getattr(default, name) != value for name, value in changed.items() if name != "normalisation")


def test_a_users_function_goes_through_the_same_tail():
    source = MapSource(MapConfig(source="test_maps:halves", floor=0.2))
    maps = source(FRAMES, ["left", "right"], GRID, 4)
    assert maps.shape == (2, *GRID) and maps.dtype == torch.float32
    torch.testing.assert_close(maps.mean((1, 2, 3)), torch.ones(2))
    assert maps[0, ..., :2].min() > 1.5 and maps[0, ..., -1].max() < 0.5
    torch.testing.assert_close(maps[1], maps[0].flip(-1))
    assert maps.min() >= 0.2


def test_the_rewards_credit():
    credit = torch.rand(2, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    maps = MapSource(MapConfig(source="reward"))(FRAMES, ["", ""], GRID, 4, credit=credit)
    expected = torch.stack([credit[:, 0], credit[:, 1:].mean(1)], 1)
    torch.testing.assert_close(maps, expected / expected.mean((1, 2, 3), keepdim=True))
    with pytest.raises(ValueError, match="the reward returned scores only"):
        MapSource(MapConfig(source="reward"))(FRAMES, ["", ""], GRID, 4)


def test_controls_of_any_source():
    generator = torch.Generator().manual_seed(2)
    plain = MapSource(MapConfig(source="test_maps:halves"))(FRAMES, ["left", "right"], GRID, 4)
    for control in ("shuffled", "inverted", "random"):
        source = MapSource(MapConfig(source="test_maps:halves", control=control))
        maps = source(FRAMES, ["left", "right"], GRID, 4, generator=generator.manual_seed(2))
        assert torch.equal(maps, control_maps(plain, control, generator.manual_seed(2)))


@pytest.mark.parametrize("control", ["ones", "centre"])
def test_controls_without_content_load_nothing(control):
    source = MapSource(MapConfig(backbone="no such folder", control=control))
    maps = source(FRAMES, ["", ""], GRID, 4)
    assert torch.equal(maps, control_maps(torch.ones(2, *GRID), control))


def test_boxes_and_masks_by_prompt(tmp_path):
    picture = np.zeros((8, 12), np.uint8)
    picture[:4, :6] = 255  # upper left quarter
    Image.fromarray(picture).save(tmp_path / "corner.png")
    path = lines(
        tmp_path / "masks.jsonl",
        {"prompt": "a corner", "mask": "corner.png"},
        {"prompt": "a box", "boxes": [[0.5, 0.0, 1.0, 0.5], [0.0, 0.75, 0.25, 1.0]]},
    )
    masks = MaskFile(path)
    masks.check(["a corner", "a box", "a corner"])
    values = masks(FRAMES, ["a box", "a corner"])
    assert values.shape == (2, 5, 16, 24)
    box = torch.zeros(16, 24)
    box[:8, 12:] = 1
    box[12:, :6] = 1
    torch.testing.assert_close(values[0], box.expand(5, 16, 24))
    corner = values[1, 0]
    assert corner[:7, :11].min() == 1 and corner[9:].max() == 0 and corner[:, 13:].max() == 0
    source = MapSource(MapConfig(source="masks", path=path))
    maps = source(FRAMES, ["a corner", "a box"], GRID, 4)
    assert maps[0].argmax() < 3 and maps[0, :, 3:].max() == 0
    torch.testing.assert_close(maps.mean((1, 2, 3)), torch.ones(2))


def test_a_mask_per_frame(tmp_path):
    array = np.zeros((5, 4, 6), np.float32)
    for f in range(5):
        array[f, :, f] = 1
    np.save(tmp_path / "moving.npy", array)
    path = lines(tmp_path / "m.jsonl", {"prompt": "p", "mask": "moving.npy"})
    values = MaskFile(path)(FRAMES[:1], ["p"])
    assert values[0, :, 0].argmax(-1).div(4, rounding_mode="floor").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="has 5 frames, expected 1 or 3"):
        MaskFile(path)(FRAMES[:1, :3], ["p"])


def test_masks_are_missed_at_once(tmp_path):
    path = lines(tmp_path / "m.jsonl", {"prompt": "p", "boxes": [[0, 0, 0.5, 1]]}, {"prompt": "q", "mask": "gone.png"})
    source = MapSource(MapConfig(source="masks", path=path))
    source.check(["p"])
    with pytest.raises(ValueError, match="no entry for 1 prompts, first 'other'"):
        source.check(["p", "other"])
    with pytest.raises(ValueError, match="gone.png"):
        source.check(["q"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2 is not JSON"),
        ('{"prompt": "p"}', "line 2: expected"),
        ('{"prompt": "p", "mask": "a.png", "boxes": []}', "line 2: expected"),
        ('{"mask": "a.png"}', "line 2: expected"),
        ("[1, 2]", "line 2: expected"),
        ('{"prompt": "p", "boxes": []}', "expected boxes"),
        ('{"prompt": "p", "boxes": [[0, 0, 1]]}', "expected boxes"),
        ('{"prompt": "p", "boxes": [[0, 0, 64, 64]]}', "fractions of the frame"),
        ('{"prompt": "p", "boxes": [[0.5, 0, 0.5, 1]]}', "left < right"),
        ('{"prompt": "p", "boxes": [["a", 0, 1, 1]]}', "expected boxes"),
        ('{"prompt": "p", "mask": 3}', "line 2: expected"),
    ],
)
def test_wrong_mask_files(tmp_path, line, message):
    path = tmp_path / "m.jsonl"
    path.write_text('{"prompt": "fine", "boxes": [[0, 0, 1, 1]]}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        MaskFile(path)
    with pytest.raises(ValueError, match="map.path: cannot read"):
        MaskFile(tmp_path / "none.jsonl")


def test_wrong_arrays(tmp_path):
    for array in (np.full((2, 2), 2.0), np.zeros(3), np.full((2, 2), np.nan)):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ValueError, match=r"expected \(h, w\) or \(F, h, w\) in \[0, 1\]"):
            read_mask(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"not a readable \.npy"):
        read_mask(tmp_path / "b.npy")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "psn"}, "expected psm, masks, reward or package.module:function"),
        ({"source": "ones"}, "map.control=ones"),
        ({"source": "masks"}, "map.path: expected a .jsonl file"),
        ({"path": "m.jsonl"}, "only there"),
        ({"normalisation": "minmax", "temperature": 2.0}, "need map.normalisation=mean"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MapConfig(**settings)


def test_wrong_functions():
    with pytest.raises(ValueError, match="map.source: cannot import 'no_such_module'"):
        MapSource(MapConfig(source="no_such_module:f"))
    with pytest.raises(ValueError, match="map.source: module 'test_maps' has no 'f'"):
        MapSource(MapConfig(source="test_maps:f"))
    source = MapSource(MapConfig(source="test_maps:wrong"))
    with pytest.raises(ValueError, match="map of test_maps:wrong: expected values in .* got min -1"):
        source(FRAMES, ["", ""], GRID, 4)


def test_a_box_covers_its_share_of_each_pixel(tmp_path):
    """A box narrower than a pixel counts by its area, and one between two pixels falls on both."""
    path = lines(
        tmp_path / "m.jsonl",
        {"prompt": "thin", "boxes": [[10.25 / 24, 0, 10.5 / 24, 1]]},
        {"prompt": "between", "boxes": [[4.5 / 24, 3.0 / 16, 5.5 / 24, 4.0 / 16]]},
    )
    thin, between = MaskFile(path)(FRAMES, ["thin", "between"])[:, 0]
    torch.testing.assert_close(thin.sum(0), 16 * torch.eye(24)[10] * 0.25, rtol=0, atol=1e-4)
    expected = torch.zeros(16, 24)
    expected[3, 4:6] = 0.5
    torch.testing.assert_close(between, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [0, 255])
def test_a_mask_that_says_nothing_is_refused(tmp_path, value):
    Image.new("L", (8, 8), value).save(tmp_path / "m.png")
    path = lines(tmp_path / "m.jsonl", {"prompt": "p", "mask": "m.png"}, {"prompt": "all", "boxes": [[0, 0, 1, 1]]})
    for prompt in ("p", "all"):
        with pytest.raises(ValueError, match=f"the mask of '{prompt}' is . everywhere: it says nothing"):
            MaskFile(path).check([prompt])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04junk", b"\x93NUMPY\x01\x00v\x00{"])
def test_damaged_arrays_are_one_line(tmp_path, content):
    (tmp_path / "m.NPY").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.NPY: not a readable \.npy array"):
        read_mask(tmp_path / "m.NPY")


def test_a_huge_map_is_refused_and_an_array_is_taken():
    with pytest.raises(ValueError, match=r"expected values in \[0, 1e\+30\), got min 0 and max 3e\+38"):
        MapSource(MapConfig(source="test_maps:enormous"))(FRAMES, ["left", "right"], GRID, 4)
    expected = MapSource(MapConfig(source="test_maps:halves"))(FRAMES, ["left", "right"], GRID, 4)
    as_array = MapSource(MapConfig(source="test_maps:array"))(FRAMES, ["left", "right"], GRID, 4)
    torch.testing.assert_close(as_array, expected)
