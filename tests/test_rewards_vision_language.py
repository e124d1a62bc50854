"""HPSv3 and VideoAlign on a tiny Qwen2-VL, against transformers' own forward and image processor."""

import hashlib
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from test_trainer import make
from tiny_pipelines import qwen_tokenizer
from tiny_rewards import pixels, qwen_folder, rewards_of, save
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from vipo import comparison
from vipo.psm.families import FAMILIES
from vipo.rewards import load_reward, load_rewards, redness, sharing, vision_language
from vipo.rewards.mixture import RewardMixture
from vipo.rewards.vision_language import merged_lora, patch_size_of, patchify, sampled_frames

EXACT = dict(rtol=1e-5, atol=1e-5)
PROMPTS = ["a red cat", "a dog on a hill", "x"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    base = tmp_path_factory.mktemp("qwen")
    return str(base), qwen_folder(base)


def old_layout(model):
    """The model's weights under the names of transformers before 4.52, as both checkpoints have them."""
    own = model.state_dict()
    return {
        name if name.startswith("visual.") else name.replace("language_model.", "model."): own[name] for name in own
    }


def ask(model, instruction, prompt, token, cells, pad):
    """Ids of one prompt, written out, and the place of the reward's token."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": token}, replace_extra_special_tokens=False)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + pad * cells
        + f"<|vision_end|>{instruction.format(text_prompt=prompt)}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    return ids, [int((ids[0] == tokenizer.convert_tokens_to_ids(t)).nonzero()) for t in token]


def instruction(name):
    return (Path(vision_language.__file__).parent / "instructions" / f"{name}.txt").read_text()


@pytest.fixture(scope="module")
def hpsv3(qwen, tmp_path_factory):
    base, model = qwen
    torch.manual_seed(2)
    head = torch.nn.Sequential(
        torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(8, 4), torch.nn.ReLU(),
        torch.nn.Linear(4, 2),
    ).eval()  # fmt: skip
    with torch.no_grad():
        head[0].bias += 2  # so that its ReLUs let something through
        head[3].bias += 2
    weights = old_layout(model) | {f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    folder = tmp_path_factory.mktemp("hpsv3")
    save(weights | {"lm_head.weight": torch.zeros(2, 16)}, folder / "HPSv3.safetensors")
    return folder, model, head, {"base": base, "dtype": "float32"}


def test_hpsv3_is_the_head_at_the_reward_token(hpsv3):
    """Its pictures through Qwen2-VL's own image processor, at a size that needs no rounding."""
    folder, model, head, options = hpsv3
    picture = (pixels(3, 448, 448) * 255).round().to(torch.uint8)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 256 * 784, "longest_edge": 256 * 784})
    seen = processor(images=Image.fromarray(np.asarray(picture.permute(1, 2, 0))), return_tensors="pt")
    cells = int(seen.image_grid_thw.prod()) // 4
    ids, (at,) = ask(model, instruction("hpsv3"), PROMPTS[0], ["<|Reward|>"], cells, "<|image_pad|>")
    with torch.no_grad():
        states = model(
            input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1), **seen
        ).last_hidden_state
        expected = head(states[0, at])[0]
    reward = load_reward("hpsv3", path=folder, options=options)
    both = rewards_of(reward, torch.stack([picture / 255, picture.flip(1) / 255])[:, None], PROMPTS[:1] * 2)
    torch.testing.assert_close(both[0], expected, **EXACT)
    assert (both[1] - expected).abs() > 1e-3, "nothing to tell pictures apart by"


def test_hpsv3_order_batch_and_frames(hpsv3):
    folder, _, _, options = hpsv3
    reward = load_reward("hpsv3", path=folder, options={**options, "chunk": 3})
    frames = pixels(3, 2, 3, 60, 60)
    scores = rewards_of(reward, frames, PROMPTS)
    assert scores.std() > 1e-4 and not scores.requires_grad
    torch.testing.assert_close(rewards_of(reward, frames.flip(0), PROMPTS[::-1]), scores.flip(0), **EXACT)
    torch.testing.assert_close(rewards_of(reward, frames[1:2], PROMPTS[1:2]), scores[1:2], **EXACT)
    apart = [rewards_of(reward, frames[:, i : i + 1], PROMPTS) for i in range(2)]
    torch.testing.assert_close(scores, torch.stack(apart).mean(0), **EXACT)
    with pytest.raises(ValueError, match="contains one of the model's special tokens"):
        reward(frames[:1], ["give it 10 <|Reward|>"])


def videoalign_folder(model, folder, lora):
    """Save a reward model as VideoReward's: LoRA beside its base weights, under PEFT's names; return the head too."""
    torch.manual_seed(3)
    head = torch.nn.Linear(16, 1, bias=False)
    weights = {"base_model.model." + name: tensor for name, tensor in old_layout(model).items()}
    weights["base_model.model.rm_head.weight"] = head.weight.data
    changed = "base_model.model.model.layers.1.mlp.up_proj"
    if lora:
        down, up = torch.randn(2, 16), torch.randn(16, 2)
        full = weights.pop(f"{changed}.weight")
        weights |= {f"{changed}.lora_A.default.weight": down, f"{changed}.lora_B.default.weight": up}
        weights[f"{changed}.base_layer.weight"] = full - 3.0 * up @ down
    save(weights, folder / "checkpoint-1" / "model.safetensors")
    norm = {"VQ_mean": 1.0, "VQ_std": 2.0, "MQ_mean": -0.5, "MQ_std": 4.0, "TA_mean": 0.25, "TA_std": 0.5}
    settings = {"peft_lora_config": {"lora_alpha": 6, "lora_r": 2}, "inference_config": norm}
    (folder / "model_config.json").write_text(json.dumps(settings))
    return head


def test_videoalign_is_the_head_at_three_tokens_normalised(qwen, tmp_path):
    """16 frames at 8 per second are 4 at 2 per second: the 1st, 6th, 11th and 16th; two make one tube."""
    base, model = qwen
    head = videoalign_folder(model, tmp_path, lora=True)
    frames = pixels(1, 16, 3, 280, 392)  # within the limits: no resize
    mean, std = (torch.tensor(values)[:, None, None] for values in FAMILIES["clip_vision_model"].statistics)
    patches, grid = patchify(((frames[:, [0, 5, 10, 15]]) - mean) / std, 14, 2, 2)
    assert grid == (2, 20, 28)
    tokens = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
    ids, at = ask(model, instruction("videoalign"), PROMPTS[0], tokens, 280, "<|video_pad|>")
    with torch.no_grad():
        states = model(
            input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
            pixel_values_videos=patches, video_grid_thw=torch.tensor([grid]),
        ).last_hidden_state  # fmt: skip
        raw = head(states[0, at])[:, 0]
    expected = (raw - torch.tensor([1.0, -0.5, 0.25])) / torch.tensor([2.0, 4.0, 0.5])
    options = {"base": base, "dtype": "float32", "fps": 8.0}
    for name, row in (("videoalign", expected.sum()), *zip(("_vq", "_mq", "_ta"), expected, strict=True)):
        name = name if name.startswith("v") else f"videoalign{name}"
        reward = load_reward(name, path=tmp_path, options=options)
        torch.testing.assert_close(rewards_of(reward, frames, PROMPTS[:1])[0], row, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reward.scores(frames, PROMPTS[:1])[0], expected, rtol=1e-4, atol=1e-4)


def test_videoalign_order_and_batch(qwen, tmp_path):
    videoalign_folder(qwen[1], tmp_path, lora=False)
    (tmp_path / "model_config.json").unlink()
    reward = load_reward("videoalign", path=tmp_path, options={"base": qwen[0], "dtype": "float32", "chunk": 2})
    torch.testing.assert_close(reward.mean, torch.tensor([3.6757, 1.1646, 2.8105]))
    frames = pixels(3, 5, 3, 40, 40)
    scores = rewards_of(reward, frames, PROMPTS)
    torch.testing.assert_close(rewards_of(reward, frames.flip(0), PROMPTS[::-1]), scores.flip(0), **EXACT)
    torch.testing.assert_close(rewards_of(reward, frames[1:2], PROMPTS[1:2]), scores[1:2], **EXACT)
    with pytest.raises(ValueError, match="scores clips of at least 2 frames, got 1"):
        reward(frames[:, :1], PROMPTS)


def test_lora_is_merged_by_its_formula():
    base, down, up = torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    named = {
        "a.base_layer.weight": base, "a.base_layer.bias": base[:, 0], "a.lora_A.default.weight": down,
        "a.lora_B.default.weight": up, "b.weight": base,
    }  # fmt: skip
    merged = merged_lora(named, 2.0)
    assert set(merged) == {"a.weight", "a.bias", "b.weight"}
    torch.testing.assert_close(merged["a.weight"], base + 2.0 * up @ down)
    assert merged["a.bias"].equal(base[:, 0])


@pytest.mark.parametrize("size", [(512, 512), (480, 832), (100, 900), (64, 64), (30, 20), (700, 701)])
@pytest.mark.parametrize("limits", [(200704, 200704), (100352, 200704), (3136, 1003520)])
def test_sides_are_rounded_as_qwen_rounds_them(size, limits):
    assert patch_size_of(*size, 28, *limits) == smart_resize(*size, 28, *limits)


def test_patches_are_in_qwens_order():
    picture = (pixels(3, 56, 84) * 255).round().to(torch.uint8)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 1, "longest_edge": 10**6}, do_normalize=False)
    theirs = processor(images=Image.fromarray(np.asarray(picture.permute(1, 2, 0))), return_tensors="pt")
    ours, grid = patchify(picture[None, None] / 255, 14, 2, 2)
    assert grid == tuple(theirs.image_grid_thw[0].tolist())
    torch.testing.assert_close(ours, theirs.pixel_values, rtol=0, atol=1e-6)
    clip = pixels(2, 4, 3, 28, 28)  # time runs slowest, within a clip
    torch.testing.assert_close(patchify(clip, 14, 2, 2)[0][12:], patchify(clip[1:, 2:], 14, 2, 2)[0])


@pytest.mark.parametrize(("total", "fps", "count"), [(16, 8, 4), (53, 16, 6), (81, 16, 10), (3, 16, 2), (4, 1, 4)])
def test_frames_are_sampled_in_pairs(total, fps, count):
    chosen = sampled_frames(total, fps, 2.0)
    assert len(chosen) == count and chosen[0] == 0 and chosen[-1] == total - 1


def test_instructions_are_the_published_ones_to_the_letter():
    """Trailing blanks included: the models were trained on just these."""
    digests = {name: hashlib.sha256(instruction(name).encode()).hexdigest()[:16] for name in ("hpsv3", "videoalign")}
    assert digests == {"hpsv3": "f6ee57479d4e9eee", "videoalign": "fdb6309bac618dd0"}


def test_other_weights_are_refused(qwen, hpsv3, tmp_path):
    save({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no language_model\.embed_tokens\.weight in"):
        load_reward("hpsv3", path=tmp_path, options={"base": qwen[0]})
    with pytest.raises(ValueError, match=r"rm_head of .* does not fit"):
        load_reward("videoalign", path=hpsv3[0], options={"base": qwen[0], "dtype": "float32"})
    with pytest.raises(ValueError, match="no readable config in"):
        load_reward("hpsv3", path=hpsv3[0], options={"base": str(tmp_path)})
    with pytest.raises(ValueError, match="has no option 'dimensions'"):
        load_reward("videoalign_vq", path=tmp_path, options={"dimensions": ["MQ"]})


def test_lora_has_the_names_that_peft_gives_it():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["up"], init_lora_weights=False)
    plain = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 3), "down": torch.nn.Linear(3, 4)})
    wrapped = peft.get_peft_model(plain, config)
    merged = merged_lora({name: tensor.clone() for name, tensor in wrapped.state_dict().items()}, 6 / 2)
    expected = wrapped.merge_and_unload().state_dict()
    assert {name.removeprefix("base_model.model.") for name in merged} == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[f"base_model.model.{name}"], tensor)


def test_a_held_out_reward_of_a_model_that_is_trained_on_is_not_loaded_again(qwen, tmp_path):
    videoalign_folder(qwen[1], tmp_path, lora=False)
    names = ["videoalign_vq", "videoalign_mq"]
    options = {"base": qwen[0], "dtype": "float32", "chunk": 2}
    rewards = {"paths": dict.fromkeys(names, str(tmp_path)), "options": dict.fromkeys(names, options)}
    watch = {"every": 2, "rewards": names[1:], "path": "nano_held_out", "prompts": 8}
    trainer = make(tmp_path, reward=None, name=names[0], rewards=rewards, watch=watch)
    assert sharing(trainer.watch.held_out.rewards) == [names]


def test_rewards_of_one_model_load_it_once_and_run_it_once_per_batch(qwen, tmp_path):
    videoalign_folder(qwen[1], tmp_path, lora=False)
    names = ["videoalign_vq", "videoalign_mq"]
    options = {"base": qwen[0], "dtype": "float32", "chunk": 2}
    paths, both = dict.fromkeys(names, str(tmp_path)), dict.fromkeys(names, options)
    rewards = load_rewards(names, "cpu", paths, both)
    assert sharing(rewards) == [names] and sharing({**rewards, "x": redness}) == [names, ["x"]]
    assert sharing(load_rewards(names, "cpu", paths, {names[0]: options, names[1]: {**options, "fps": 8}})) == [
        [name] for name in names
    ]
    apart = load_reward(names[0], path=tmp_path, options=options)
    mixture, forwards = RewardMixture(rewards), []
    rewards[names[0]].scores.model.model.register_forward_hook(lambda *_: forwards.append(None))

    def check(frames, prompt, runs):
        before = len(forwards)
        found = mixture(frames, [prompt]).rewards
        assert torch.equal(found, apart.scores(frames, [prompt]).T[:2])  # VQ and MQ
        assert len(forwards) - before == runs

    first, second = pixels(2, 2, 3, 40, 40).split(1)
    check(first, "x", 1)
    check(first, "x", 0)
    check(first, "a dog", 1)
    check(second, "a dog", 1)
    second[0] = 0.5
    check(second, "a dog", 1)
    alive = weakref.ref(second)
    del second
    assert alive() is None, "the scores kept the frames"
    places = []
    for level in (0.2, 0.4, 0.6):
        frames = torch.full((1, 2, 3, 40, 40), level)
        places.append(id(frames))
        check(frames, "a dog", 1)
        del frames
    assert len(set(places)) < len(places), "no address came twice: nothing was shown"
    with torch.inference_mode():
        check(pixels(1, 2, 3, 40, 40), "a dog", 2)  # such tensors do not say when they change
    side = SimpleNamespace
    store = side(batches=[[0]], entries=[side(text="x")], read=lambda *_: first + 0, seeds=1)
    contest = side(base=side(name="base"), trained=side(name="trained"))
    before = len(forwards)
    comparison._scores(store, contest, rewards, torch.device("cpu"), lambda done: None)
    assert len(forwards) - before == 2, "vipo eval runs the model once per batch and side"
