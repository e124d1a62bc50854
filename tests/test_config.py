"""The config: one strict parser for YAML and overrides; errors name the key, what was expected, the nearest key."""

from pathlib import Path

import pytest
import yaml

import vipo
from vipo.config import Config, fields


def from_text(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return Config.from_yaml(path, overrides)


def test_yaml_round_trip(tmp_path):
    config = Config.from_mapping({"loss": {"clip_range": [0.1, 0.2]}, "prompts": {"group_size": 3}})
    assert from_text(tmp_path, config.to_yaml()) == config
    assert config.loss.clip_range == (0.1, 0.2)
    assert config.num_samples == 12


def test_overrides_go_through_the_same_parser(tmp_path):
    config = from_text(
        tmp_path,
        "loss: {level: sample}\n",
        "--loss.clip_range=1e-3",  # YAML reads 1e-3 as text; the type makes it a number
        "--sampling.call.max_sequence_length=8",
        "--model.lora_targets=[to_q, to_v]",
        "--sampling.guidance_scale=null",
    )
    assert config.loss.level == "sample"
    assert config.loss.clip_range == 0.001
    assert config.sampling.call == {"max_sequence_length": 8}
    assert config.model.lora_targets == ["to_q", "to_v"]
    assert config.sampling.guidance_scale is None


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"modle": {}}, "modle: unknown key; did you mean model?"),
        ({"prompts": {"groupsize": 4}}, "prompts.groupsize: unknown key; did you mean prompts.group_size?"),
        ({"group_size": 4}, "group_size: unknown key; did you mean prompts.group_size?"),
        ({"model": {"group_size": 4}}, "model.group_size: unknown key; did you mean prompts.group_size?"),
        ({"prompts": {"group_size": 1}}, "prompts.group_size: expected greater than or equal to 2, got 1"),
        ({"prompts": {"group_size": "eight"}}, "prompts.group_size: expected a valid integer"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate: expected greater than 0, got -1"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate"),
        ({"loss": {"clip_range": 2}}, "loss.clip_range: expected 0 < low < 1 and high > 0, got 2"),
        ({"loss": {"level": "pixel"}}, "loss.level: expected 'position' or 'sample', got 'pixel'"),
        ({"map": {"orientation": "up"}}, "map.orientation: expected 'border_energy'"),
        ({"model": "nano"}, "model: expected"),
        (
            {"optimizer": {"updates_per_rollout": 9}},
            "optimizer.updates_per_rollout: 9 updates need as many trained steps",
        ),
        ({"model": {"train": "full", "dtype": "bfloat16"}}, "needs model.autocast=bfloat16"),
        ({"sampling": {"kernel": "ddim", "eta": 1.5}}, "sampling.eta: expected at most 1 for ddim, got 1.5"),
    ],
)
def test_wrong_values_name_the_key_and_the_fix(mapping, message):
    with pytest.raises(ValueError) as caught:
        Config.from_mapping(mapping)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected sections"),
        ("model: {path: [}\n", "is not YAML"),
        ("plain words", "expected sections"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        from_text(tmp_path, text)


def test_missing_folder_and_binary_files(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Config.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        Config.from_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: {path: \xff\xfe}")
    with pytest.raises(ValueError, match="is not UTF-8"):
        Config.from_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize("override", ["--seed=1", "loss.level=sample", "--loss.level", "--loss.level.x=1"])
def test_malformed_overrides(tmp_path, override):
    with pytest.raises(ValueError):
        from_text(tmp_path, "loss: {level: sample}", override)


def test_empty_file_is_the_default(tmp_path):
    assert from_text(tmp_path, "") == Config()
    assert from_text(tmp_path, "model:\n") == Config()


def test_every_key_is_documented_and_frozen():
    listed = list(fields())
    assert len(listed) > 40
    for key, default, text in listed:
        assert text not in ("", "None"), key
        yaml.safe_load(default)
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 3


@pytest.mark.parametrize("path", sorted((Path(vipo.__file__).parent / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_a_valid_config(path):
    config = Config.from_yaml(path)
    assert config.run.output != Config().run.output


def test_the_nano_recipes_differ_in_map_and_level_only():
    recipes = Path(vipo.__file__).parent / "recipes"
    grpo, vipo_ = (Config.from_yaml(recipes / f"nano_{name}.yaml").model_dump() for name in ("grpo", "vipo"))
    differing = {(s, k) for s in grpo for k in grpo[s] if grpo[s][k] != vipo_[s][k]}
    assert differing == {("map", "control"), ("loss", "level"), ("loss", "clip_range"), ("run", "output")}


def test_what_has_a_device_of_its_own_is_not_offloaded():
    assert (Config().reward_offload, Config().map_offload) == ("none", "none")
    idle = Config.from_mapping({"model": {"offload": "idle"}, "reward": {"device": "cuda:1"}})
    assert (idle.reward_offload, idle.map_offload) == ("none", "idle")
