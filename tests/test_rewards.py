"""Rewards: names, paths and options, redness, users' functions, what comes back wrong."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vipo.rewards import REWARDS, load_reward, redness, score
from vipo.rewards.mixture import RewardMixture


def rewards_of(reward, frames, prompts):
    return score(reward, frames, prompts).rewards


def test_redness_literal_numbers():
    frames = torch.zeros(3, 1, 3, 2, 2)
    frames[0, :, 0] = 1
    frames[1, :, 1:] = 1
    frames[2] = 0.4
    torch.testing.assert_close(redness(frames, [""] * 3), torch.tensor([1.0, -1.0, 0.0]))


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
        (
            "rednes",
            "unknown reward 'rednes'; did you mean 'redness'\\? expected nano, .*redness.* or package.module:function",
        ),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("math:tangens", "module 'math' has no 'tangens'"),
        ("math:pi", "is not callable"),
    ],
)
def test_unknown_rewards(name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("hpsv21", {}, "did you mean 'hpsv2.1'"),
        ("pickscore", {"options": {"dtipe": "bfloat16"}}, "load_clip has no option 'dtipe'; did you mean 'dtype'"),
        ("hpsv2.1", {"options": {"fit": "crop"}}, "has no option 'fit'; expected one of dtype, chunk"),
        ("redness", {"path": "x"}, "redness takes no path, got 'x'"),
        ("redness", {"options": {"x": 1}}, "redness has no option 'x'; expected one of none"),
        ("ocr", {"path": "x"}, "takes no path, got 'x'"),
        ("nano_colour", {"path": "x"}, "takes no path, got 'x'"),
        ("math:sin", {"path": "x"}, "'math:sin' is a function and takes no path and no options"),
    ],
)
def test_wrong_names_paths_and_options_are_one_clear_line(name, keywords, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name, **keywords)


def test_every_named_reward_has_its_function_and_its_row_in_the_docs():
    docs = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    for name, entry in REWARDS.items():
        module = importlib.import_module(f"vipo.rewards.{entry.module}")
        known = inspect.signature(getattr(module, entry.function)).parameters
        assert set(entry.options) <= set(known), name
        assert f"`{name}`" in docs and (entry.path or "") in docs, name


def test_heavy_modules_are_imported_when_asked_for():
    tree = ast.parse((Path(__file__).parents[1] / "src" / "vipo" / "rewards" / "__init__.py").read_text())
    own = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
    assert own == {"preference", "rules", "remote", "judge"}, "the others are for Named to import"


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


def test_servers_are_named_like_any_reward_and_need_an_address():
    remote = load_reward("remote", path="http://127.0.0.1:9/score", options={"timeout": 1.5, "batch": 2})
    assert (remote.url, remote.timeout, remote.batch) == ("http://127.0.0.1:9/score", 1.5, 2)
    judge = load_reward("judge", path="http://127.0.0.1:9/v1", options={"model": "m"})
    assert judge.model == "m"
    with pytest.raises(ValueError, match="RemoteReward needs an address: set reward.paths"):
        load_reward("remote")
    with pytest.raises(ValueError, match="RemoteReward has no option 'timeot'; did you mean 'timeout'?"):
        load_reward("remote", path="http://127.0.0.1:9/score", options={"timeot": 1})


def test_frames_go_to_the_rewards_device_and_scores_come_back():
    seen = []

    def elsewhere(frames, prompts):
        seen.append((frames.device.type, tuple(frames.shape)))
        return torch.arange(len(prompts)), torch.ones(len(prompts), 1, 2, 2)

    frames = torch.rand(3, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = RewardMixture({"one": elsewhere}, device="meta")(frames, ["a"] * 3)
    assert seen == [("meta", (3, 1, 3, 4, 4))]
    assert found.rewards.device.type == found.credit.device.type == "cpu" and found.rewards.tolist() == [[0, 1, 2]]
