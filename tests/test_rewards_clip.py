"""CLIP-class rewards on tiny models of the same classes, against transformers' own forward and image processor."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_rewards import MEAN, STD, clip_folder, clip_logits, open_clip_weights, pixels, rewards_of, save
from transformers import CLIPImageProcessorPil

from vipo.psm.families import FAMILIES
from vipo.rewards import load_reward
from vipo.rewards.pixels import fitted, per_frame, spread
from vipo.rewards.preference import ClipPreference
from vipo.rewards.weights import linear_stack, read_weights

PROMPTS = ["a red cat", "a dog", "x"]
EXACT = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, clip_folder(folder)


def test_pickscore_and_clipscore_are_their_formulas(clip):
    folder, model = clip
    frames = pixels(3, 1, 3, 32, 32)
    logits = clip_logits(model, frames[:, 0], PROMPTS).diag()
    torch.testing.assert_close(rewards_of(load_reward("pickscore", path=folder), frames, PROMPTS), logits, **EXACT)
    cosine = logits / model.logit_scale.exp()
    assert (cosine > 0).any() and (cosine < 0).any(), "the clamp is not tried"
    found = rewards_of(load_reward("clipscore", path=folder), frames, PROMPTS)
    torch.testing.assert_close(found, 2.5 * cosine.clamp_min(0).detach(), **EXACT)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_hpsv21_from_open_clip_weights_scores_as_the_clip_model(tmp_path, prefix):
    model = clip_folder(tmp_path / "clip", width=160, text=64, heads=(2, 1))
    weights = {prefix + name: tensor for name, tensor in open_clip_weights(model).items()}
    save(weights, tmp_path / "hps" / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hps" / name).write_bytes((tmp_path / "clip" / name).read_bytes())
    frames = pixels(3, 1, 3, 32, 32)
    found = rewards_of(load_reward("hpsv2.1", path=tmp_path / "hps"), frames, PROMPTS)
    mean, std = FAMILIES["clip_vision_model"].statistics
    cosine = clip_logits(model, frames[:, 0], PROMPTS, mean, std).diag() / model.logit_scale.exp().detach()
    torch.testing.assert_close(found, cosine, **EXACT)


def test_a_state_dict_with_a_weight_too_few_or_too_many_is_refused(tmp_path):
    model = clip_folder(tmp_path / "clip", width=160, text=64, heads=(2, 1))
    weights = open_clip_weights(model)
    save({**weights, "visual.extra": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"do not fit a CLIPModel: 1 unexpected, first visual\.extra"):
        load_reward("hpsv2.1", path=tmp_path / "more.safetensors")
    weights.pop("ln_final.bias")
    save(weights, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"1 missing, first text_model\.final_layer_norm\.bias"):
        load_reward("hpsv2.1", path=tmp_path / "less.safetensors")


def test_aesthetic_is_the_heads_layers_on_unit_vectors(clip, tmp_path):
    folder, model = clip
    torch.manual_seed(1)
    layers = {index: torch.nn.Linear(a, b) for index, a, b in ((0, 16, 8), (2, 8, 4), (4, 4, 1))}
    named = {f"{i}.{kind}": getattr(layer, kind).data for i, layer in layers.items() for kind in ("weight", "bias")}
    frames = pixels(2, 3, 3, 32, 32)
    normal = (frames.flatten(0, 1) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        vectors = F.normalize(model.get_image_features(pixel_values=normal).pooler_output, dim=-1)
        expected = layers[4](layers[2](layers[0](vectors)))[:, 0].view(2, 3).mean(1)
        linear = layers[4](vectors[:, :4])
    for prefix, extra in (("layers.", {}), ("mlp.layers.", {"clip.vision_model.x": torch.zeros(1)})):
        save({**{prefix + name: tensor for name, tensor in named.items()}, **extra}, tmp_path / "head.safetensors")
        reward = load_reward("aesthetic", path=tmp_path / "head.safetensors", options={"clip": str(folder)})
        torch.testing.assert_close(rewards_of(reward, frames, ["", ""]), expected, **EXACT)
    one = linear_stack({"weight": layers[4].weight.data, "bias": layers[4].bias.data}, 4, "v1")
    torch.testing.assert_close(one(vectors[:, :4]), linear, **EXACT)
    with pytest.raises(ValueError, match="expected linear layers from 9 channels to 1 in here, got"):
        linear_stack(named, 9, "here")
    with pytest.raises(ValueError, match="to 1 in here"):
        linear_stack({name: named[name] for name in ("0.weight", "0.bias")}, 16, "here")


def test_clip_iqa_is_the_softmax_of_good_and_bad(clip):
    folder, model = clip
    frames = pixels(3, 1, 3, 32, 32)
    expected = clip_logits(model, frames[:, 0], ["Good photo.", "Bad photo."]).softmax(1)[:, 0]
    torch.testing.assert_close(rewards_of(load_reward("clip_iqa", path=folder), frames, PROMPTS), expected, **EXACT)


@pytest.mark.parametrize("name", ["pickscore", "clip_iqa"])
def test_order_batch_and_one_clip(clip, name):
    reward = load_reward(name, path=clip[0], options={} if name == "clip_iqa" else {"chunk": 2})
    frames = pixels(3, 2, 3, 40, 48)
    scores = rewards_of(reward, frames, PROMPTS)
    torch.testing.assert_close(rewards_of(reward, frames.flip(0), PROMPTS[::-1]), scores.flip(0), **EXACT)
    torch.testing.assert_close(rewards_of(reward, frames[1:2], PROMPTS[1:2]), scores[1:2], **EXACT)
    apart = [rewards_of(reward, frames[:, i : i + 1], PROMPTS) for i in range(2)]
    torch.testing.assert_close(scores, torch.stack(apart).mean(0), **EXACT)
    assert not reward(frames, PROMPTS).requires_grad


def test_half_precision_is_near(clip):
    frames = pixels(3, 1, 3, 32, 32)
    whole = rewards_of(load_reward("pickscore", path=clip[0]), frames, PROMPTS)
    half = load_reward("pickscore", path=clip[0], options={"dtype": "bfloat16"})
    assert next(half.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(rewards_of(half, frames, PROMPTS), whole, rtol=0.1, atol=0.5)


@pytest.mark.parametrize("size", [(48, 80), (100, 60), (33, 32), (20, 31)])
def test_crop_is_what_clips_image_processor_does(size):
    """Against Pillow, which rounds and clips to 8 bits between its passes: 1.5/255 on a smooth picture."""
    noise = (pixels(3, *size) * 255).round().to(torch.uint8)
    smooth = F.interpolate(noise[None, :, ::8, ::8].float(), size, mode="bicubic").clamp(0, 255).round()[0].byte()
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD
    )
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for picture, most in ((noise, 16 / 255), (smooth, 1.5 / 255)):
        image = Image.fromarray(np.asarray(picture.permute(1, 2, 0)))
        theirs = processor(images=image, return_tensors="pt").pixel_values[0] * std + mean
        apart = (fitted(picture[None] / 255, 32, "crop")[0] - theirs).abs()
        assert apart.max() < most and apart.mean() < 0.6 / 255


def test_pad_keeps_the_aspect_and_fills_with_black():
    found = fitted(torch.ones(1, 3, 16, 32), 32, "pad")
    assert found.shape == (1, 3, 32, 32)
    torch.testing.assert_close(found[0, 0].mean(1), torch.tensor([0.0] * 8 + [1.0] * 16 + [0.0] * 8))
    row = fitted(torch.ones(1, 3, 32, 15), 32, "pad")[0, 0, 0]
    torch.testing.assert_close(row, torch.tensor([0.0] * 8 + [1.0] * 15 + [0.0] * 9))
    assert fitted(torch.ones(1, 3, 16, 40), 32, "stretch").min() > 0.999


def test_spread_and_per_frame():
    assert spread(3, 9) == [0, 4, 8] and spread(5, 3) == [0, 1, 2] and spread(1, 4) == [0]
    frames = pixels(2, 3, 3, 4, 4)
    seen = []

    def score(pictures, prompts):
        seen.append(prompts)
        return pictures.mean((1, 2, 3))

    torch.testing.assert_close(per_frame(score, frames, ["a", "b"], 4), frames.mean((1, 2, 3, 4)))
    assert seen == [["a", "a", "a", "b"], ["b", "b"]]


def test_nothing_is_read_from_a_format_that_can_run_code(tmp_path):
    torch.save({"visual.class_embedding": torch.zeros(1)}, tmp_path / "HPS_v2.1_compressed.pt")
    message = r"HPS_v2\.1_compressed\.pt, which could run code when loaded; convert .* `python tools/to_safetensors\.py"
    for path in (tmp_path, tmp_path / "HPS_v2.1_compressed.pt"):
        with pytest.raises(ValueError, match=message):
            read_weights(path)


def test_missing_models_and_tokenizers_are_one_clear_line(tmp_path, clip):
    with pytest.raises(ValueError, match="'no/such' is no folder or file here, and not loadable from the hub"):
        load_reward("pickscore", path="no/such")
    with pytest.raises(ValueError, match=r"expected \.safetensors weights in .*, got none"):
        load_reward("pickscore", path=tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"a\.safetensors is not readable"):
        read_weights(tmp_path)
    clip[1].save_pretrained(tmp_path / "bare")  # transformers would make an empty tokenizer of this
    with pytest.raises(ValueError, match="no tokenizer in .*bare, and none loadable from openai/clip-vit"):
        load_reward("pickscore", path=tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(ValueError, match=r"the tokenizer of .*bare is empty \(2 tokens\)"):
        load_reward("pickscore", path=tmp_path / "bare")
    with pytest.raises(ValueError, match="dtype"):
        load_reward("pickscore", path=clip[0], options={"dtype": "bf16"})
    with pytest.raises(ValueError, match="scale"):
        ClipPreference.from_pretrained(clip[0], scale="log")
    save({"a": torch.zeros(1)}, tmp_path / "two" / "1.safetensors")
    save({"a": torch.zeros(1)}, tmp_path / "two" / "2.safetensors")
    with pytest.raises(ValueError, match="several models"):
        read_weights(tmp_path / "two")
