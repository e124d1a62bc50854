"""Rewards without a model of their own: rules, motion, text rendering, and rewards made of other rewards."""

import io
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tiny_rewards import pixels, rewards_of

from vipo.nano.world import COLUMN, describe, render, sample_scenes
from vipo.rewards import REWARDS, load_reward
from vipo.rewards.ocr import OcrAccuracy, accuracy, edit_distance, quoted_text
from vipo.rewards.wrappers import PerFrame


def test_brightness_literal_numbers():
    frames = torch.zeros(3, 1, 3, 2, 2)
    frames[0, :, 0], frames[1, :, 1], frames[2] = 1, 1, 0.5
    found = rewards_of(load_reward("brightness"), frames, [""] * 3)
    torch.testing.assert_close(found, torch.tensor([0.299, 0.587, 0.5]))


def test_compressibility_is_minus_the_jpegs_kilobytes():
    frames = torch.stack([pixels(2, 3, 32, 48), torch.full((2, 3, 32, 48), 0.5)])
    sizes = []
    for picture in frames[0]:
        buffer = io.BytesIO()
        values = (picture * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(np.asarray(values)).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()))
    scores = rewards_of(load_reward("compressibility"), frames, ["", ""])
    assert scores[0].item() == pytest.approx(-sum(sizes) / 2000) and scores[1] > scores[0]
    torch.testing.assert_close(rewards_of(load_reward("incompressibility"), frames, ["", ""]), -scores)


def test_nano_metrics_prefer_the_right_picture():
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(6, generator)
    scenes[:, COLUMN["size"]] = 1
    wrong = scenes.clone()
    wrong[:, COLUMN["shape"]] = (scenes[:, COLUMN["shape"]] + 1) % 6
    wrong[:, COLUMN["colour"]] = (scenes[:, COLUMN["colour"]] + 1) % 7
    right, off = (render(s, torch.Generator().manual_seed(1)).images[:, None] for s in (scenes, wrong))
    for name in ("nano_shape_iou", "nano_colour"):
        good, bad = (rewards_of(load_reward(name), frames, describe(scenes)) for frames in (right, off))
        assert (good > bad).all(), name
    assert rewards_of(load_reward("nano_shape"), right, describe(scenes)).mean() > 0.8
    clip = torch.cat([right, off], 1)
    torch.testing.assert_close(rewards_of(load_reward("nano_colour"), clip, describe(scenes)), (good + bad) / 2)
    with pytest.raises(ValueError, match="not a prompt of the nano world: 'a cat'"):
        load_reward("nano_shape_iou")(right[:1], ["a cat"])


def moving(step, count=6, size=64):
    """A smooth random texture that moves by `step` pixels per frame to the right: (1, count, 3, size, size)."""
    wide = F.interpolate(pixels(1, 3, size // 8, size // 4), (size, 2 * size), mode="bicubic").clamp(0, 1)
    starts = [round(size / 2 - step * i) for i in range(count)]
    return torch.stack([wide[0, :, :, start : start + size] for start in starts])[None]


def test_dynamic_degree_is_the_speed_at_256_pixels():
    reward = load_reward("dynamic_degree")
    frames = torch.cat([moving(0), moving(1), moving(2)])
    still, slow, fast = rewards_of(reward, frames, [""] * 3).tolist()
    assert still == 0
    assert slow == pytest.approx(4, rel=0.15) and fast == pytest.approx(8, rel=0.15)
    assert rewards_of(reward, frames[:, :1], [""] * 3).tolist() == [0, 0, 0]
    torch.testing.assert_close(rewards_of(reward, frames[1:2], [""])[0], torch.tensor(slow))


def test_motion_smoothness_falls_with_jerks():
    reward = load_reward("motion_smoothness")
    smooth = moving(1)
    jerky = smooth[:, [0, 3, 1, 4, 2, 5]]
    flicker = smooth * torch.tensor([1.0, 0.6] * 3).view(1, 6, 1, 1, 1)
    scores = rewards_of(reward, torch.cat([smooth, jerky, flicker, moving(0)]), [""] * 4)
    assert scores[0] > 0.98 and scores[3] > 0.9999
    assert scores[1] < scores[0] - 0.01 and scores[2] < scores[0] - 0.05
    still = (smooth[:, :-2] + smooth[:, 2:]) / 2  # plain averaging blurs: following the motion must do better
    assert scores[0] > 1 - (still - smooth[:, 1:-1]).abs().mean()
    with pytest.raises(ValueError, match="expected clips of at least 3 frames, got 2"):
        reward(smooth[:, :2], [""])


def test_text_accuracy_literal_numbers():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3 and edit_distance("a", "a") == 0
    assert accuracy("hello", "hello") == 1 and accuracy("xxhelloxx", "hello") == 1
    assert accuracy("hallo", "hello") == pytest.approx(0.8) and accuracy("", "hello") == 0
    assert accuracy("a much longer text", "hello") == 0
    assert quoted_text('a sign that says "Hello World" in "red"') == "Hello World"
    assert quoted_text("a sign that says \u201cHi\u201d") == "Hi"
    with pytest.raises(ValueError, match="the prompt 'a sign' has no text in double quotes"):
        quoted_text("a sign")


def test_text_rewards_average_frames_and_ignore_blanks_and_case():
    frames = torch.zeros(2, 2, 3, 4, 4)
    frames[0, 0], frames[1, 1] = 1, 0.5
    texts = {255: "he LLo", 0: "hallo", 128: "HELP"}
    reward = OcrAccuracy(lambda picture: texts[int(picture[0, 0, 0])])
    scores = rewards_of(reward, frames, ['says "Hello"', 'says "help"'])
    torch.testing.assert_close(scores, torch.tensor([(1 + 0.8) / 2, (0.25 + 1) / 2]))


def test_rapidocr_reads_a_picture():
    """The real thing, where it is installed (the extra `ocr`)."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    image = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(image).text((20, 24), "HELLO WORLD", fill="black", font_size=40)
    frames = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, None] / 255
    frames = torch.cat([frames, torch.ones_like(frames)])
    scores = rewards_of(load_reward("ocr"), frames, ['a sign that says "hello world"'] * 2)
    assert scores[0] > 0.9 and scores[1] == 0


def test_a_missing_ocr_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ValueError, match=r'pip install "vipo\[ocr\]"'):
        load_reward("ocr")


def test_per_frame_scores_evenly_spread_frames():
    frames = pixels(2, 9, 3, 4, 4)
    seen = []

    def reward(pictures, prompts):
        seen.append((tuple(pictures.shape), prompts))
        return pictures.mean((1, 2, 3, 4))

    scores = rewards_of(PerFrame(reward, 3), frames, ["a", "b"])
    torch.testing.assert_close(scores, frames[:, [0, 4, 8]].mean((1, 2, 3, 4)))
    assert seen == [((6, 1, 3, 4, 4), ["a", "a", "a", "b", "b", "b"])]
    with pytest.raises(ValueError, match="expected 6 numbers for as many pictures, got"):
        PerFrame(lambda pictures, prompts: torch.zeros(2), 3)(frames, ["a", "b"])
    with pytest.raises(ValueError, match="count >= 1"):
        PerFrame(reward, 0)


def test_imscore_adapter_with_a_stand_in(monkeypatch):
    """imscore itself needs torchvision, which is not installed here: its interface, score(pixels, prompts)."""

    class Stand(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, path):
            cls.path = path
            return cls()

        def score(self, pictures, prompts):
            return pictures.mean((1, 2, 3))[:, None] + torch.tensor([[float(len(p))] for p in prompts])

    module = types.ModuleType("imscore.mps.model")
    module.MPS = Stand
    monkeypatch.setitem(sys.modules, "imscore", types.ModuleType("imscore"))
    monkeypatch.setitem(sys.modules, "imscore.mps", types.ModuleType("imscore.mps"))
    monkeypatch.setitem(sys.modules, "imscore.mps.model", module)
    frames = pixels(2, 3, 3, 4, 4)
    reward = load_reward("imscore", options={"scorer": "mps", "chunk": 4})
    expected = frames.mean((1, 2, 3, 4)) + torch.tensor([1.0, 2.0])
    torch.testing.assert_close(rewards_of(reward, frames, ["a", "bb"]), expected)
    assert Stand.path == "RE-N-Y/mpsv1"
    with pytest.raises(ValueError, match="scorer"):
        load_reward("imscore", options={"scorer": "mpss"})
    monkeypatch.setitem(sys.modules, "imscore.mps.model", None)
    with pytest.raises(ValueError, match=r'pip install "vipo\[imscore\]"'):
        load_reward("imscore")


@pytest.mark.parametrize("name", [name for name, entry in REWARDS.items() if entry.kind == "ready"])
def test_rules_have_no_order_and_check_their_frames(name):
    reward = load_reward(name)
    frames = pixels(3, 3, 3, 20, 24)
    scores = rewards_of(reward, frames, ["a", "b", "c"])
    assert scores.dtype == torch.float32 and scores.std() > 0
    torch.testing.assert_close(rewards_of(reward, frames.flip(0), ["a", "b", "c"]), scores.flip(0))
    torch.testing.assert_close(rewards_of(reward, frames[1:2], ["b"]), scores[1:2])
    for wrong in (frames[0], frames[:2]):
        with pytest.raises(ValueError, match="frames: expected shape"):
            reward(wrong, ["a", "b", "c"])
