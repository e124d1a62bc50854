"""Rewards: redness, a CLIP-class scorer against its own formula, users' functions, what comes back wrong."""

import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_pipelines import clip_tokenizer
from transformers import CLIPConfig, CLIPModel

from vipo.rewards import ClipPreference, load_reward, redness, score


def rewards_of(reward, frames, prompts):
    return score(reward, frames, prompts).rewards


def test_redness_literal_numbers():
    frames = torch.zeros(3, 1, 3, 2, 2)
    frames[0, :, 0] = 1
    frames[1, :, 1:] = 1
    frames[2] = 0.4
    torch.testing.assert_close(redness(frames, [""] * 3), torch.tensor([1.0, -1.0, 0.0]))


@pytest.fixture
def scorer_folder(tmp_path):
    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    mean_std = '{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}'
    (tmp_path / "preprocessor_config.json").write_text(mean_std)
    return tmp_path


def test_clip_preference_is_the_pickscore_formula(scorer_folder):
    """Against transformers' own forward: logits_per_image of the matching prompt."""
    scorer = ClipPreference.from_pretrained(scorer_folder)
    frames = torch.rand(3, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a red cat", "a dog", "x"]
    model = CLIPModel.from_pretrained(scorer_folder).eval()
    tokens = clip_tokenizer()(prompts, padding="max_length", return_tensors="pt")
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    with torch.no_grad():
        expected = model(pixel_values=(frames[:, 0] - mean) / std, **tokens).logits_per_image.diag()
    torch.testing.assert_close(rewards_of(scorer, frames, prompts), expected, rtol=1e-4, atol=1e-5)


def test_clip_preference_averages_frames_resizes_and_is_batch_independent(scorer_folder):
    scorer = ClipPreference.from_pretrained(scorer_folder)
    frames = torch.rand(2, 4, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    prompts = ["a red cat", "a dog"]
    scores = rewards_of(scorer, frames, prompts)
    apart = torch.stack([rewards_of(scorer, frames[:, i : i + 1], prompts) for i in range(4)]).mean(0)
    torch.testing.assert_close(scores, apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores[1:], rewards_of(scorer, frames[1:], prompts[1:]), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in scorer.parameters())


def test_a_users_function_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def green(frames, prompts):\n    return frames[:, :, 1].mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    frames = torch.rand(2, 1, 3, 4, 4)
    rewards = rewards_of(load_reward("my_rewards:green"), frames, ["", ""])
    torch.testing.assert_close(rewards, frames[:, 0, 1].mean((1, 2)))
    sys.modules.pop("my_rewards")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rednes", "unknown reward 'rednes'; expected nano, redness or package.module:function"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("math:tangens", "module 'math' has no 'tangens'"),
        ("math:pi", "is not callable"),
    ],
)
def test_unknown_rewards(name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def test_a_missing_scorer_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="reward: cannot load a CLIP model from"):
        ClipPreference.from_pretrained(tmp_path)


def test_score_checks_the_shape():
    with pytest.raises(ValueError, match=r"expected one number per sample, shape \(2,\), got \(2, 1\)"):
        rewards_of(lambda frames, prompts: torch.zeros(2, 1), torch.zeros(2, 1, 3, 4, 4), ["", ""])
    with pytest.raises(ValueError, match="frames: expected shape"):
        rewards_of(redness, torch.zeros(2, 3, 4, 4), ["", ""])


def test_rewards_may_be_lists_or_half_precision():
    frames = torch.zeros(2, 1, 3, 4, 4)
    assert rewards_of(lambda f, p: [1, 2], frames, ["", ""]).dtype == torch.float32
    assert F.mse_loss(rewards_of(lambda f, p: torch.ones(2).half(), frames, ["", ""]), torch.ones(2)) == 0


def test_a_reward_may_return_its_credit_map():
    frames = torch.rand(2, 3, 3, 8, 8)

    def painted(frames, prompts):
        return frames.mean((1, 2, 3, 4)), frames[:, :, 0].double()

    found = score(painted, frames, ["", ""])
    assert found.credit.dtype == torch.float32
    torch.testing.assert_close(found.credit, frames[:, :, 0])
    assert score(redness, frames, ["", ""]).credit is None
    with pytest.raises(ValueError, match=r"reward's credit map: expected shape \(N, F, h, w\) with F = 3"):
        score(lambda f, p: (f.mean((1, 2, 3, 4)), f[:, :1, 0]), frames, ["", ""])
