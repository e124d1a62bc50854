"""The embedded models for clips: they load offline through the usual classes, and are what their cards say."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanPipeline

from vipo import DiffusersPolicy, PerceptualStructuring
from vipo.nano import ASSETS, video_world
from vipo.nano.pretrain_t2v import CALL, write_prompts
from vipo.prompts import read_prompts
from vipo.psm.agreement import agreement
from vipo.psm.latent_grid import pool_time
from vipo.rewards import load_reward, score


@functools.cache
def clips(count, defect="none"):
    scenes = video_world.sample_scenes(count, torch.Generator().manual_seed(5))
    defects = torch.full((count,), video_world.DEFECTS.index(defect))
    return scenes, video_world.render(scenes, torch.Generator().manual_seed(6), defects)


def share_preferred(reward, better, worse, prompts, worse_prompts=None):
    won = score(reward, better, prompts).rewards > score(reward, worse, worse_prompts or prompts).rewards
    return won.float().mean().item()


def test_assets_are_small_safe_and_documented():
    parts = ("t2v", "scorer_vq", "scorer_mq")
    files = [path for part in parts for path in (ASSETS / part).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    for part in (*parts, "t2v/vae"):
        facts = json.loads((ASSETS / part / "training.json").read_text())
        assert {"data", "steps", "seconds", "parameters"} <= set(facts)
        assert (ASSETS / part / "README.md").read_text().startswith("# ")


def test_shipped_prompts_are_what_the_code_writes(tmp_path):
    write_prompts(tmp_path)
    for name in ("prompts_video_train.txt", "prompts_video_held_out.txt"):
        assert (tmp_path / name).read_text() == (ASSETS / name).read_text()
    assert len(video_world.parse([prompt.text for prompt in read_prompts("nano_video")])) == 600


def test_pipeline_shows_the_named_motion_and_colour():
    policy = DiffusersPolicy("nano_video", kernel="dance_grpo", eta=0.5)
    prompts = video_world.describe(clips(42)[0])
    frames = policy.generate(prompts, seeds=list(range(42)), num_inference_steps=8, guidance_scale=1.0)
    assert frames.shape == (42, video_world.FRAMES, 3, 64, 64)
    ours = video_world.measure(frames, prompts)
    shuffled = video_world.measure(frames, prompts[1:] + prompts[:1])
    assert ours["motion_accuracy"].mean() > 0.75  # chance is 1/7; the card says .94 of 128 with 16 steps
    assert ours["colour_error"].mean() < 0.6 * shuffled["colour_error"].mean()


def test_plain_diffusers_shows_the_same_clip():
    """As the pipeline's model card says: float16 files, float32 when loaded."""
    plain = WanPipeline.from_pretrained(ASSETS / "t2v", dtype=torch.float32)
    prompt = "a large red circle moving left on a navy background"
    call = {"num_inference_steps": 4, "guidance_scale": 2.0}
    policy = DiffusersPolicy("nano_video", kernel="flow_grpo")
    ours = policy.generate([prompt], seeds=[3], **call)
    plain.scheduler = policy.pipeline.scheduler  # UniPC is of second order: ours takes Euler steps at its sigmas
    theirs = plain(prompt, generator=torch.Generator().manual_seed(3), output_type="pt", **CALL, **call).frames
    assert (ours.cpu() - theirs).abs().mean() < 0.02


def test_replay_equals_rollout_and_maps_find_the_moving_subject():
    policy = DiffusersPolicy("nano_video", kernel="dance_grpo", eta=0.5)
    traj = policy.rollout(["a small red star growing on a gray background"] * 2, seeds=[1, 2], num_inference_steps=4)
    drift = []
    policy.replay(traj, on_step=lambda k, new, old: drift.append((new - old).abs().max().item()))
    assert drift == [0.0, 0.0, 0.0]
    assert traj.latent_shape == (16, 3, 8, 8)
    scenes, drawn = clips(48)
    maps = PerceptualStructuring.from_pretrained("nano")(drawn.videos, (3, 8, 8), 4)
    masks = F.adaptive_avg_pool2d(pool_time(drawn.masks, 3, 4), 8).flatten(0, 1)
    masks = masks / masks.amax((1, 2), keepdim=True)  # a small subject fills no cell of 8x8 pixels
    assert agreement(maps.flatten(0, 1), masks)["AUC"].mean() > 0.9


@pytest.mark.parametrize(
    ("name", "defect", "least"),
    [
        ("nano_vq", "blur", 0.8),
        ("nano_vq", "noise", 0.8),
        ("nano_vq", "wrong_colour", 0.85),
        ("nano_mq", "jitter", 0.75),
        ("nano_mq", "freeze", 0.9),
        ("nano_mq", "flicker", 0.65),
    ],
)
def test_scorers_prefer_the_clean_clip(name, defect, least):
    scenes, clean = clips(96)
    moving = scenes[:, video_world.COLUMN["motion"]] != list(video_world.MOTIONS).index("still")  # else nothing freezes
    prompts = [prompt for prompt, kept in zip(video_world.describe(scenes), moving, strict=True) if kept]
    worse = clips(96, defect)[1].videos[moving]
    assert share_preferred(load_reward(name), clean.videos[moving], worse, prompts) > least


@pytest.mark.parametrize(("name", "word", "least"), [("nano_vq", "colour", 0.8), ("nano_mq", "motion", 0.9)])
def test_scorers_read_the_prompt(name, word, least):
    scenes, clean = clips(96)
    wrong = scenes.clone()
    column = video_world.COLUMN[word]
    wrong[:, column] = (wrong[:, column] + 1) % len(video_world.ATTRIBUTES[word])
    prompts, others = video_world.describe(scenes), video_world.describe(wrong)
    assert share_preferred(load_reward(name), clean.videos, clean.videos, prompts, others) > least


def test_the_motion_scorer_wants_nine_frames():
    with pytest.raises(ValueError, match="this model reads clips of 9 frames, got 5"):
        load_reward("nano_mq")(torch.zeros(1, 5, 3, 64, 64), ["a"])
