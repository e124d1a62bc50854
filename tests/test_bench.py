"""bench/psm.py runs as a reader would run it, and finds that both sides make the same maps of the same features.

bench/memory.py counts on the meta device what real tensors take, of the calls that the pipelines really make.
"""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import extras
import memory as script
import options
import pytest
import torch
from peft import LoraConfig
from step import QUICK
from step_work import make_trainer
from tiny_pipelines import MODELS, build
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from vipo import Config, DiffusersPolicy, memory
from vipo.memory import live, published
from vipo.memory.recipe import peaks, recorded
from vipo.trainable import LORA_TARGETS

BENCH = Path(__file__).parents[1] / "bench" / "psm.py"
TIMINGS = [
    *(f"{side}_{part}" for side in ("ours", "released") for part in ("whole", "forward", "beyond")),
    *("ours_beyond_prepare", "ours_beyond_allocate", "released_full_beyond"),
]
RATIOS = ["ratio_whole", "ratio_beyond", "ratio_full_beyond", "ours_beyond_percent_of_forward", "target_percent"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The JSON of one quick run."""
    path = tmp_path_factory.mktemp("bench") / "psm.json"
    command = [sys.executable, BENCH, "--quick", "--repetitions", "2", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ours beyond" in done.stdout and not list(path.parent.glob("*.partial"))
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["image", "video"])
def test_the_same_features_give_the_released_maps(report, name):
    workload = report["workloads"][name]
    assert workload["maps_same_features_max_abs"] <= 1e-3
    assert workload["maps_subspace_vs_exact_max_abs"] <= 1e-3
    assert workload["maps_end_to_end_max_abs"] <= (0.05 if name == "image" else 1)  # uint8 and PIL; clips: also time


@pytest.mark.parametrize("name", ["image", "video"])
def test_every_timing_and_ratio_is_there(report, name):
    workload = report["workloads"][name]
    for timing in (workload[key] for key in TIMINGS):
        assert 0 < timing["min"] <= timing["median"] <= timing["max"] and timing["repetitions"] >= 1
    assert all(workload[key] > 0 for key in RATIOS)
    assert workload["ours_forward"]["median"] < workload["ours_whole"]["median"]


def test_a_clip_is_encoded_chunk_by_chunk(report):
    growth = report["scaling"]
    assert [column["most_frames_per_forward"] for column in growth["frames"].values()] == [7, 13, 27, growth["chunk"]]
    assert math.isfinite(growth["whole_power_of_frames"]) and math.isfinite(growth["beyond_power_of_frames"])


def test_bfloat16_changes_the_maps_a_little(report):
    assert 0 < report["autocast"]["maps_max_abs"] < 0.1
    assert report["autocast"]["maps_correlation"] > 0.99


ARGUMENTS = {
    "sd15": published.stable_diffusion,
    "sd3": published.sd3,
    "flux": published.flux,
    "qwen_image": published.qwen_image,
    "wan": published.wan,
    "hunyuan_video": published.hunyuan_video,
}
COMMITTED = json.loads((BENCH.parents[1] / "docs" / "memory.json").read_text())
BILLIONS = {
    "flux1_dev": {"denoiser": 11.9, "T5-XXL": 4.76, "CLIP-L": 0.123, "facebook/dinov2-large": 0.304},
    "sd35_medium": {"denoiser": 2.24, "CLIP-G": 0.695},
    "sd15_ddim": {"denoiser": 0.860, "VAE": 0.0837, "safety checker": 0.304},
    "qwen_image": {"denoiser": 20.4, "Qwen2.5-VL-7B": 8.29},
    "wan21_1b": {"denoiser": 1.42, "UMT5-XXL": 5.68},
    "wan21_14b": {"denoiser": 14.3, "VAE": 0.127},
    "hunyuan_video": {"denoiser": 12.8, "Llama-3-8B": 7.5},
}
"""Published sizes; SD3.5 Medium's 2.5 B are these weights and a table of positions of 0.23 B, a buffer."""


def tiny_denoisers(name, grid, samples=2, tokens=20):
    """One family's tiny denoiser with an adapter and its arguments, on the CPU and on the meta device."""
    real = getattr(build(name), "unet" if name == "sd15" else "transformer").requires_grad_(False)
    config = {key: value for key, value in real.config.items() if not key.startswith("_")}
    meta = memory.build((type(real), config), torch.float32)
    real.add_adapter(LoraConfig(r=Config().model.lora_rank, target_modules=LORA_TARGETS))
    for p in real.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    memory.add_adapter(meta, Config())
    call = published.Call(samples, grid, tokens, torch.float32)
    with torch.device("meta"):
        arguments = ARGUMENTS[name](meta.config, call)
    ones = {k: torch.ones(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return (real, ones), (meta, arguments)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_meta_device_counts_what_real_tensors_take(name, checkpointing):
    (real, ones), (meta, arguments) = tiny_denoisers(name, MODELS[name].grid)
    if checkpointing:
        live.use_checkpointing(real)
        live.use_checkpointing(meta)
    kept, peak = live.replayed_step(meta, arguments)
    assert (kept, peak) == live.replayed_step(real, ones)
    assert 0 < kept < peak


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_what_is_kept_is_what_autograd_saves(name):
    (real, ones), _ = tiny_denoisers(name, MODELS[name].grid)
    given = [*real.parameters(), *real.buffers(), *(v for v in ones.values() if isinstance(v, Tensor))]
    others = {tensor.untyped_storage()._cdata for tensor in given}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in others:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), live.Kernels():
        output = real(**ones, return_dict=False)[0]
    keep(output)
    assert live.replayed_step(real, ones)[0] == sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_the_peak_is_the_allocators(name, checkpointing):
    (real, ones), (meta, arguments) = tiny_denoisers(name, MODELS[name].grid)
    if checkpointing:
        live.use_checkpointing(real)
        live.use_checkpointing(meta)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with live.Kernels():
            output = real(**ones, return_dict=False)[0]
        torch.autograd.backward(output, torch.empty_like(output))
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    allocated = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    assert live.replayed_step(meta, arguments)[1] == pytest.approx(max(allocated), rel=0.06)  # CPU kernels' scratch


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_denoiser_is_called_as_its_pipeline_calls_it(name):
    family = MODELS[name]
    policy = DiffusersPolicy(build(name), kernel=family.kernel, device="cpu")
    calls = []
    policy.denoiser.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    policy.rollout(["a red hat"] * 2, seeds=[0, 1], num_inference_steps=2, **family.call)
    args, kwargs = calls[0]
    real = {**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs}
    model = next(m for m in published.MODELS.values() if m.family.inputs is ARGUMENTS[name])
    assert len(real["encoder_hidden_states"]) == (4 if model.family.guidance == "doubled" else 2)
    assert len(calls) == (4 if model.family.guidance == "two calls" else 2)
    (samples, tokens), dtype = real["encoder_hidden_states"].shape[:2], torch.float32
    ours = ARGUMENTS[name](policy.denoiser.config, published.Call(samples, family.grid, tokens, dtype))
    assert described(ours) == described(real)


def described(arguments):
    """Shapes and dtypes of tensors, other values as they are; what says nothing is left out."""
    found = {k: (v.shape, v.dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return {name: value for name, value in found.items() if value not in (None, {}, False)}


def test_the_recorded_bytes_are_those_of_a_trajectory():
    family = MODELS["wan"]
    policy = DiffusersPolicy(build("wan"), kernel="flow_grpo", device="cpu")
    traj = policy.rollout(["a red hat"] * 2, seeds=[0, 1], num_inference_steps=3, **family.call)
    held = [t for step in traj.steps.values() for t in (step.latents, step.next_latents, step.log_probs)]
    tensors = [t for t in tree_leaves([held, traj.encoded, traj.prepared]) if isinstance(t, Tensor)]
    stored = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
    config = Config.from_mapping(
        {
            "prompts": {"per_iteration": 1, "group_size": 2},
            "sampling": {"num_inference_steps": 3, "height": 64, "width": 48, "call": {"num_frames": 9}},
        }
    )
    model = published.MODELS["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    call = published.Call(2, family.grid, 32, torch.float32)
    latents = published.Latents(16, (3, 8, 6), 9 * 64 * 48)
    assert model.latents(config, None) == latents
    ours = recorded(config, model, latents, published.wan(policy.denoiser.config, call), 2)
    assert ours == stored + 2 * policy.decode(traj).nbytes


def test_autocast_keeps_normalisations_in_float32_and_products_in_its_dtype():
    x, kernels = torch.ones(1, 4, 4), live.Kernels(torch.float16)
    with kernels:
        assert torch.nn.functional.linear(x, x[0]).dtype == torch.float16
        assert torch.nn.functional.layer_norm(x.half(), (4,)).dtype == torch.float32


def test_the_committed_numbers_are_of_the_shipped_recipes_and_sum_up():
    assert list(COMMITTED) == list(script.RECIPES) and not any(name.startswith("nano") for name in COMMITTED)
    for name, recipe in COMMITTED.items():
        held = recipe["bytes"]
        state = held["denoiser"] + sum(held["trained"].values()) + held["recorded"]
        work = max(held["update"]["peak"], held["decode"])
        assert recipe["peak"] == peaks(held)
        assert recipe["peak"]["all resident"] == state + sum(held["idle"].values()) + work
        assert state + held["update"]["peak"] <= recipe["peak"]["idle parts off"] <= recipe["peak"]["all resident"]
        assert sum(held["trained"].values()) == 16 * recipe["parameters"]["trained"]
        assert recipe["flops"]["update"] > 2 * recipe["flops"]["forward"]
        assert Config.from_yaml(script.RECIPES[name]).run.iterations == recipe["iterations"]
    page = (BENCH.parents[1] / "docs" / "models.md").read_text()
    assert f"{script.BEGIN}\n{script.table(COMMITTED)}\n{script.END}" in page


def test_the_scaling_page_is_of_the_committed_numbers():
    docs = BENCH.parents[1] / "docs"
    gathered = json.loads((docs / "scaling.json").read_text())
    text = script.scaling(COMMITTED, gathered)
    assert f"{script.BEGIN}\n{text}\n{script.END}" in (docs / "scaling.md").read_text()
    assert script.units(Config.from_yaml(script.RECIPES["sd15_ddim"])) == gathered["sd15_ddim"]


@pytest.mark.parametrize("name", BILLIONS)
def test_parts_have_their_published_sizes(name):
    for part, billions in BILLIONS[name].items():
        assert COMMITTED[name]["parameters"][part] == pytest.approx(billions * 1e9, rel=0.005), part


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd35_medium", "wan21_1b"])
def test_the_committed_numbers_are_found_again(name):
    config = Config.from_yaml(script.RECIPES[name])
    assert memory.measure(config, memory.find_model(config)) == COMMITTED[name]


def test_options_are_compared_in_turns(monkeypatch):
    monkeypatch.setattr(options, "REPEATS", 1)
    found = options.prefix("nano", 4)
    assert list(found) == ["shared", "apart", "largest difference"] and found["largest difference"] < 1e-4
    assert options.recorded("nano")["three trained"] < 0.5 * options.recorded("nano")["all"]
    assert set(options.unconditional("nano_video")) == {"frozen", "trained"}


def test_the_bench_of_compiled_blocks_fills_its_rows(monkeypatch):
    monkeypatch.setattr(extras, "REPEATS", 1)
    rows = [row.split(" | ") for row in extras.compiled("tiny", lambda compiled: make_trainer(QUICK))]
    assert [row[0] for row in rows] == ["| tiny, rollout", "| tiny, update"]
    assert all(float(row[3]) > 0 and row[5:] == ["0e+00", "0e+00 |"] for row in rows)


def test_the_bench_of_rewards_beside_fills_its_row(monkeypatch):
    monkeypatch.setattr(extras, "REPEATS", 1)
    monkeypatch.setattr(extras, "WAIT", 0.01)
    name, *cells = extras.beside("waits", extras.waiting).strip("| ").split(" | ")
    assert name == "waits" and len(cells) == 3 and all(float(cell.removesuffix(" s")) > 0 for cell in cells)


def test_the_bench_of_moments_counts_every_tensor_once():
    weight = torch.nn.Parameter(torch.ones(10))
    weight.grad = torch.ones(10)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    entry = optimizer.state[weight]
    entry["again"] = entry["exp_avg"]
    assert extras.state_bytes(optimizer) == 2 * 40 + 4
