"""vipo check --memory: memory per rank and what ranks send, from configs alone."""

import json
import shutil

import pytest
import torch
from test_cli import run
from tiny_pipelines import build
from torch import nn

from vipo import Config, DiffusersPolicy, memory
from vipo.memory.ranks import blocks, per_rank, traffic
from vipo.nano import assets_path
from vipo.optimizer import moment_bytes

HELD = {
    "denoiser": 1000,
    "trained": {"weights": 80, "gradients": 80, "adamw": 160},
    "recorded": 50,
    "update": {"kept": 300, "peak": 400},
    "decode": 500,
    "idle": {"text encoders": 700, "VAE": 90},
}


def test_memory_per_rank_by_hand():
    whole = per_rank(HELD, None, 8, offload=False)
    assert whole["total"] == 1000 + 320 + 50 + 700 + 90 + 500 and "gathered blocks" not in whole
    assert per_rank(HELD, None, 8, offload=True)["total"] == 1000 + 320 + 50 + 700
    units = {"largest": 120, "largest_trained": 9, "outside": 30}
    part = per_rank(HELD, units, 8, offload=False)
    assert (part["denoiser, frozen"], part["trained weights"], part["AdamW"]) == (125, 10, 20)
    assert part["gathered blocks"] == 30 + 240 + 9
    assert part["total"] == 125 + 10 + 10 + 20 + 279 + 50 + 700 + 90 + 500


def test_bytes_sent_by_hand():
    config = Config.from_mapping(
        {
            "prompts": {"per_iteration": 1, "group_size": 6},
            "sampling": {"num_inference_steps": 5, "micro_batch": 2},
            "optimizer": {"step_fraction": 1.0, "updates_per_rollout": 2},
        }
    )
    assert traffic(config, 1000, 80, 1, 4, size=None) == {"optimizer step": 120, "iteration": 240}
    sent = traffic(config, 1000, 80, 2, 4, size=4)  # 3 micro-batches x 2 of 4 trained steps per update
    assert sent["optimizer step"] == 3 * 6 * (2 * 1000 * 2 + 80) // 4
    assert sent["iteration"] == 2 * sent["optimizer step"] + 3 * 3 * 5 * 1000 * 2 // 4
    assert not any(traffic(config, 1000, 80, 2, 1, size=1).values())
    hybrid = traffic(config, 1000, 80, 2, 16, size=4)  # and 4 groups, which all-reduce a quarter of the gradient
    assert hybrid["optimizer step"] == sent["optimizer step"] + 6 * 2 * 3 * 20 // 4
    assert hybrid["iteration"] == sent["iteration"] + 12 * 2 * 3 * 20 // 4
    with_kl = config.model_copy(update={"loss": config.loss.model_copy(update={"kl_beta": 0.1})})
    more = traffic(with_kl, 1000, 80, 2, 4, size=4)["optimizer step"] - sent["optimizer step"]
    assert more == 3 * 6 * 1000 * 2 // 4


def test_blocks_and_the_rest_are_all_parameters():
    class Inner(nn.Linear):
        pass

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.own = Inner(2, 2, bias=False), nn.Linear(3, 3, bias=False)

    class Denoiser(nn.Module):
        _no_split_modules = ("Inner", "Outer")

        def __init__(self):
            super().__init__()
            self.outer, self.single, self.rest = Outer(), Inner(2, 2, bias=False), nn.Linear(5, 5, bias=False)

    denoiser = Denoiser()
    denoiser.single.requires_grad_(False)
    assert blocks(denoiser) == {"largest": 4 * 13, "largest_trained": 4 * 13, "outside": 4 * 25}
    with pytest.raises(ValueError, match="--shard: Linear names no blocks"):
        blocks(nn.Linear(2, 2))


def configs_only(source, folder):
    """A copy of a pipeline's folder without any weights."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_folder_of_configs_has_the_sizes_of_the_loaded_model(tmp_path, name):
    whole = tmp_path / "whole"
    build(name).save_pretrained(whole)
    model = {"path": str(configs_only(whole, tmp_path / "configs")), "lora_rank": 4}
    size = {"sampling": {"height": 64, "width": 64}, "map": {"control": "ones"}}
    config = Config.from_mapping({"model": model, "prompts": {"per_iteration": 1, "group_size": 2}, **size})
    found = memory.measure(config, memory.find_model(config))
    policy = DiffusersPolicy(whole, kernel="ddim" if name == "sd15" else "flow_grpo", train="none", device="cpu")
    pipe = policy.pipeline
    assert found["bytes"]["denoiser"] == sum(
        t.nbytes for t in [*policy.denoiser.parameters(), *policy.denoiser.buffers()]
    )
    assert found["bytes"]["idle"]["VAE"] == sum(p.nbytes for p in pipe.vae.parameters())
    traj = policy.rollout(["a"], seeds=[0], num_inference_steps=2, height=64, width=64)
    sample = memory.find_model(config).latents(config, memory.build(memory.find_model(config).vae, torch.float32))
    assert (sample.channels, *sample.grid) == traj.latent_shape


def test_the_command_shows_the_table_and_loads_no_weights(tmp_path):
    folder = configs_only(assets_path("t2i"), tmp_path / "configs")
    (tmp_path / "run.yaml").write_text(f"model: {{path: {folder}}}\nrun: {{output: {tmp_path / 'out'}}}\n")
    shown = run(
        "check",
        tmp_path / "run.yaml",
        "--memory",
        "--ranks",
        "4",
        "--shard",
        "--parallel.context=2",
        "--parallel.shard=true",
        "--parallel.shard_size=2",
        "--map.device=cpu",
    )
    assert shown.returncode == 0, shown.stderr
    for text in (
        "replicated",
        "sharded by 2",
        "gathered blocks",
        "map's backbone nano",
        "sent per optimizer step",
        "total",
    ):
        assert text in shown.stdout
    caption = " ".join(shown.stdout.split())
    assert "not counted: rewards (nano)" in caption and not (tmp_path / "out").exists()
    assert "parallel.context: activations are those of all tokens" in caption
    assert "counted though map.device puts it on cpu: the backbone" in caption


def refused(mapping, match):
    with pytest.raises(ValueError, match=match):
        config = Config.from_mapping(mapping)
        memory.measure(config, memory.find_model(config))


def test_what_cannot_be_sized_is_one_line(tmp_path):
    refused(
        {"model": {"path": "owner/unknown"}},
        "--memory: owner/unknown is no folder with a model_index.json .*FLUX.1-dev",
    )
    refused({"model": {"path": "Qwen/Qwen-Image"}}, "--memory: set sampling.height and sampling.width")
    refused({"map": {"backbone": "owner/unknown"}}, "--memory: map.backbone: no config.json in owner/unknown; known")
    refused({"sampling": {"micro_batch": "auto"}}, "sampling.micro_batch: auto is found with the weights loaded")
    folder = configs_only(assets_path("t2i"), tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "SanaTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    refused({"model": {"path": str(folder)}}, "has SanaTransformer2DModel; it knows pipelines with a vae and one")
    with pytest.raises(ValueError, match="--ranks: expected at least 2, got 1"):
        memory.report(Config(), 1, shard=True)
    three = Config.from_mapping({"parallel": {"shard": True, "shard_size": 3}})
    with pytest.raises(ValueError, match="--ranks: expected a multiple of parallel.shard_size=3, got 8"):
        memory.report(three, 8, shard=True)


@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_the_moments_of_full_weights(tmp_path, state):
    build("sd15").save_pretrained(tmp_path / "whole")
    model = {"path": str(configs_only(tmp_path / "whole", tmp_path / "configs")), "train": "full"}
    sections = {"sampling": {"height": 64, "width": 64}, "map": {"control": "ones"}, "optimizer": {"state": state}}
    config = Config.from_mapping({"model": model, "prompts": {"per_iteration": 1, "group_size": 2}, **sections})
    found = memory.measure(config, memory.find_model(config))["bytes"]["trained"]
    weights = list(build("sd15").unet.parameters())
    assert found["weights"] == sum(p.nbytes for p in weights) and found["adamw"] == moment_bytes(weights, state)
    assert (found["adamw"] < 2 * found["weights"]) == (state == "8bit")
