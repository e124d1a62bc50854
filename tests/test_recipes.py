"""Every recipe is loaded and trains for one step, on the tiny pipeline of its family."""

from pathlib import Path

import pytest
import yaml
from tiny_pipelines import MODELS, build

import vipo
from vipo import Config, Trainer
from vipo.loading import save_pipeline

RECIPES = Path(vipo.__file__).parent / "recipes"
FAMILY = {
    "flux1_dev": "flux",
    "dance_grpo_flux": "flux",
    "mixgrpo_flux": "flux",
    "sd35_medium": "sd3",
    "flow_grpo_fast_sd35": "sd3",
    "sd15_ddim": "sd15",
    "qwen_image": "qwen_image",
    "wan21_1b": "wan",
    "wan21_14b": "wan",
    "hunyuan_video": "hunyuan_video",
    "nano_vipo": None,
    "nano_grpo": None,
    "nano_video_vipo": None,
    "nano_video_grpo": None,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines by family, saved as their hub repositories are."""
    base, made = tmp_path_factory.mktemp("pipelines"), {}

    def folder(family):
        if family not in made:
            save_pipeline(build(family), base / family, {})
            made[family] = base / family
        return str(made[family])

    return folder


def test_every_recipe_has_a_family():
    assert set(FAMILY) == {path.stem for path in RECIPES.glob("*.yaml")}


@pytest.mark.parametrize("name", [name for name, family in FAMILY.items() if family])
def test_one_step_of_every_recipe(name, folders, tmp_path, monkeypatch):
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    family = FAMILY[name]
    tiny = MODELS[family].call
    own = {key: tiny[key] for key in ("height", "width") if key in tiny}
    further = {key: value for key, value in tiny.items() if key not in (*own, "guidance_scale")}
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    recipe["model"] |= {"path": folders(family), "lora_rank": 2, "lora_alpha": 4, "device": "cpu"}
    recipe["sampling"] |= own | {"call": {**recipe["sampling"].get("call", {}), **further}}
    recipe["prompts"] |= {"path": str(tmp_path / "prompts.txt"), "per_iteration": 1, "group_size": 2}
    recipe["reward"] = {"name": "redness"}
    recipe["map"] |= {"backbone": "nano"}
    recipe["run"] |= {"output": str(tmp_path / "run")}
    recipe["optimizer"] |= {"step_fraction": 0.1}  # of the recipe's own number of steps
    config = Config.from_mapping(recipe)
    trainer = Trainer(config)
    assert trainer.policy.settings.kernel == config.sampling.kernel
    before = [p.detach().clone() for p in trainer.parameters]
    metrics = trainer.step(0)
    assert metrics["grad_norm"] > 0 and metrics["ratio_max"] == pytest.approx(1, abs=1e-2)
    assert any((p != old).any() for p, old in zip(trainer.parameters, before, strict=True))
    assert trainer.maps.shape[1] == (1 if MODELS[family].grid[0] == 1 else MODELS[family].grid[0])
