"""Several processes on one machine (gloo): the result does not depend on how many there are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_trainer import make

from vipo.build import make_policy
from vipo.config import Config
from vipo.console import how_to_go_on
from vipo.distributed import Ranks, _buckets, shard_like, start, whole
from vipo.trainer import Trainer

HERE = Path(__file__).parent
PROMPTS = "a cat\nthe dog\nthe hat\na bus\n"
CONFIG = {
    "sampling": {
        "kernel": "flow_cps",
        "eta": 0.7,
        "num_inference_steps": 3,
        "height": 32,
        "width": 32,
        "guidance_scale": 1.0,
    },
    "prompts": {"per_iteration": 2, "group_size": 4},
    "reward": {"name": "ranks:red_less_blue"},
    "map": {"control": "shuffled", "source": "ranks:bright"},
    "optimizer": {"learning_rate": 1e-3},
}
SHARD, FULL = {"parallel": {"shard": True}}, {"model": {"train": "full"}}
OFFLOAD = {"parallel": {"shard": True, "cpu_offload": True}}
BESIDE = {
    "reward": {"async": True},
    "map": {"control": None, "source": "ranks:gone_on_rank_1"},
    "sampling": {"micro_batch": 1},
}
AVERAGE, KL = {"optimizer": {"ema": 0.5}}, {"loss": {"kl_beta": 0.1}}


def case(name, world, *changes, iterations=2, **more):
    config = {key: dict(value) for key, value in CONFIG.items()}
    for change in changes:
        for section, values in change.items():
            config[section] = {**config.get(section, {}), **values}
    return {"name": name, "world": world, "family": "sd3", "iterations": iterations, "config": config, **more}


def run(folder, cases):
    """What every rank of every case found: name -> list by rank, None where a rank wrote nothing."""
    (folder / "prompts.txt").write_text(PROMPTS)
    sizes = [{"prompt": "a cat"}, {"prompt": "the dog", "height": 48}]
    (folder / "sizes.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in sizes * 2))
    paths = {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "ranks.py"), str(folder), json.dumps(cases)]
    subprocess.run(command, check=True, env={**os.environ, **paths}, capture_output=True)
    files = {c["name"]: [folder / f"{c['name']}_{rank}.json" for rank in range(c["world"])] for c in cases}
    return {name: [json.loads(f.read_text()) if f.exists() else None for f in row] for name, row in files.items()}


def assert_equal(alone, several, *, sizes=False):
    """Samples, metrics and weights of one process and of several."""
    (one,) = alone
    for i, frames in enumerate(one["frames"]):
        joined = [value for rank in several for value in rank["frames"][i]]
        if not sizes:  # of several sizes a trainer shows the first
            assert joined == pytest.approx(frames, abs=1e-6)
    for rank in several:
        for mine, line in zip(rank["metrics"], one["metrics"], strict=True):
            # a ratio of means over samples, and the largest per micro-batch, of which the mean is taken; own seconds
            skip = ("seconds", "map_border_to_centre", "ratio_max")
            numbers = {name: value for name, value in line.items() if not name.startswith(skip)}
            assert {name: mine[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)
        assert rank["weights"] == several[0]["weights"]
    for kind in ("weights", "ema") if one["ema"] else ("weights",):
        start, end, other = (torch.tensor(v) for v in (one["start"], one[kind], several[0][kind]))
        # AdamW turns the rounding of a 0 into a step
        assert (other - end).abs().mean() < 1e-3 * (end - start).abs().mean()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    two = [
        case("one", 1, AVERAGE),
        case("two", 2, AVERAGE),
        case("four", 4, AVERAGE),
        case("sharded", 2, AVERAGE, SHARD),
        case("offloaded", 2, AVERAGE, OFFLOAD),
        case("hybrid", 4, AVERAGE, {"parallel": {"shard": True, "shard_size": 2}}),
    ]
    both = FULL, AVERAGE, KL
    full = [
        case("full_one", 1, *both),
        case("full_sharded", 2, *both, SHARD),
        case("full_saved", 2, *both, SHARD, iterations=1, mode="no"),
        case("full_resumed", 2, *both, iterations=2, mode="resume", begun_by="full_saved"),
    ]
    constant = {"reward": {"name": "ranks:blind_to_a"}}
    idle = [case("idle_one", 1, constant), case("idle_two", 2, constant)]
    bad = [
        case("nan_loss", 2, {"parallel": {"shard": True, "timeout": 30}}, bad=[["advantages", 1, 0]]),
        case("nan_weight", 2, SHARD, iterations=1, bad_weight=1),
        case("auto", 2, {"sampling": {"micro_batch": "auto"}}, iterations=1),
        case("runs_out", 2, {"sampling": {"micro_batch": "auto"}}, SHARD, iterations=1, runs_out=1),
        case("nan_rewards", 2, {"reward": {"name": "ranks:failing"}}, iterations=1),
        case("dies", 2, {"parallel": {"timeout": 30}}, dies=[1, 1]),
        case("uneven", 3, iterations=1),
        case("no_groups", 2, {"parallel": {"shard": True, "shard_size": 3}}, iterations=1),
    ]
    undone = {"optimizer": {"skip_nonfinite": 2, "updates_per_rollout": 2, "step_fraction": 1.0, "ema": 0.5}}
    small = {"sampling": {"micro_batch": 2}, "parallel": {"timeout": 30}}
    once = {"optimizer": {"skip_nonfinite": 1}, "parallel": {"timeout": 30}}
    met = [["advantages", 1, 1], ["latents", 0, 2]]
    skipped = [
        case("skip_one", 1, undone, iterations=4, bad=[["advantages", 0, 1], ["latents", 0, 2]]),
        case("skip_two", 2, undone, small, iterations=4, bad=met),
        case("skip_sharded", 2, undone, small, {"parallel": {"shard": True}}, iterations=4, bad=met),
        case("skip_beside", 2, once, SHARD, BESIDE),
        case("skip_limit", 2, once, bad=[["latents", 1, 0], ["advantages", 0, 1]]),
    ]
    resumed = [
        case("saved", 2, AVERAGE, SHARD, iterations=1, mode="no"),
        case("resumed", 1, AVERAGE, iterations=2, mode="resume", begun_by="saved"),
    ]
    folder = tmp_path_factory.mktemp("ranks")
    sizes = {"prompts": {"path": str(folder / "sizes.jsonl"), "per_iteration": 4, "group_size": 2}}
    guided = [{"prompt": "a cat"}, {"prompt": "the dog", "guidance_scale": 4.0}]
    (folder / "guided.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in guided))
    bad.append(case("guided", 2, {"prompts": {"path": str(folder / "guided.jsonl"), "per_iteration": 2}}, SHARD))
    sized = [case("sizes_one", 1, sizes, iterations=1), case("sizes_two", 2, sizes, iterations=1)]
    watch = {"every": 1, "path": "nano_held_out", "prompts": 8, "seeds": 1, "stop": True}
    stops = [
        case(
            f"stop_{rank}",
            2,
            {
                "reward": {"name": "ranks:rising"},
                "watch": {**watch, "rewards": [f"ranks:falling_on_rank_{rank}"]},
                "parallel": {"timeout": 30},
            },
            mode="no",
        )
        for rank in (0, 1)
    ]
    watched = {"watch": {"every": 1, "path": "nano_held_out", "prompts": 9, "seeds": 2, "rewards": ["ranks:counted"]}}
    watched |= {"sampling": {"micro_batch": 4}}  # 18 samples: five batches
    watches = [
        case("watch_one", 1, watched, iterations=1, mode="no"),
        case("watch_two", 2, watched, iterations=1, mode="no"),
        case("watch_sharded", 2, watched, SHARD, iterations=1, mode="no"),
    ]
    return run(folder, [*watches, *two, *full, *idle, *bad, *skipped, *resumed, *sized, *stops]) | {"folder": folder}


@pytest.mark.parametrize(
    ("alone", "several"),
    [
        ("one", "two"),
        ("one", "four"),
        ("one", "sharded"),
        ("one", "offloaded"),
        ("one", "hybrid"),
        ("full_one", "full_sharded"),
        ("idle_one", "idle_two"),
        ("skip_one", "skip_two"),
        ("skip_one", "skip_sharded"),
        ("sizes_one", "sizes_two"),
    ],
)
def test_the_result_does_not_depend_on_the_number_of_ranks(found, alone, several):
    assert_equal(found[alone], found[several], sizes=alone.startswith("sizes"))


@pytest.mark.parametrize("kind", ["", "full_"])
def test_a_run_goes_on_with_another_number_of_ranks_or_whole_weights(found, kind):
    (one,) = found[f"{kind}one"]
    assert_equal([{**one, "metrics": one["metrics"][1:], "frames": []}], found[f"{kind}resumed"])
    assert [len(rank["metrics"]) for rank in found[f"{kind}saved"]] == [1, 1]


def test_the_kl_of_sharded_weights_is_to_the_weights_before_training(found):
    first, second = (line["kl"] for line in found["full_sharded"][0]["metrics"])
    assert first == 0 and second > 1e-4  # and equal to that of one process, see above


def test_the_average_of_sharded_weights_is_saved_beside_them(found):
    folder = found["folder"] / "run_full_saved" / "checkpoints" / "step_000001"
    saved, average = (
        load_file(next((folder / w).rglob("transformer/*.safetensors"))) for w in ("weights", "weights_ema")
    )
    assert any(not torch.equal(saved[name], average[name]) for name in saved)


def test_training_moved_the_weights(found):
    start, end = (found["one"][0][key] for key in ("start", "weights"))
    assert max(abs(a - b) for a, b in zip(start, end, strict=True)) > 1e-3
    assert found["one"][0]["metrics"][0]["constant_groups"] == 0
    assert sum(line["constant_groups"] for line in found["idle_two"][0]["metrics"]) >= 1


def test_a_rank_that_dies_stops_the_others(found):
    survivor, dead = found["dies"]
    assert dead is None
    assert "RankError: rank 0 of 2 has lost the others" in survivor["error"] and "--resume" in survivor["error"]


@pytest.mark.parametrize("name", ["watch_two", "watch_sharded"])
def test_ranks_share_the_evaluations_of_the_watch(found, name):
    """Each batch is scored once, as one process does it; the base has the same numbers bit for bit."""
    read = [
        [json.loads(file.read_text()) for file in sorted((found["folder"] / f"run_{n}" / "evaluations").glob("*.json"))]
        for n in ("watch_one", name)
    ]
    for alone, several in zip(*read, strict=True):
        for key in ("diversity", "distance"):
            assert several[key] == pytest.approx(alone[key], abs=1e-5)
        for reward, values in alone["rewards"].items():
            assert np.array(several["rewards"][reward]) == pytest.approx(np.array(values), abs=1e-5)
    (base, later), (shared_base, _) = read
    assert shared_base["rewards"] == base["rewards"] and shared_base["diversity"] == base["diversity"]
    assert base["rewards"] != later["rewards"]
    assert [sum(rank["counted"] for rank in found[n]) for n in ("watch_one", name)] == [36, 36]
    assert [rank["counted"] for rank in found[name]] == [20, 16]
    alone, several = (found[n][0]["metrics"][0]["eval/kl"] for n in ("watch_one", name))
    assert several == pytest.approx(alone, rel=1e-3) and alone > 0


def test_rank_0_alone_ends_a_run_by_its_watch(found):
    assert [rank["iterations"] for rank in found["stop_0"]] == [1, 1]
    assert [rank["iterations"] for rank in found["stop_1"]] == [2, 2]
    one, other = ([line["eval/kl"] for line in rank["metrics"]] for rank in found["stop_1"])
    assert one == other and min(one) > 0  # each measures its own share, and all know the mean


def test_what_is_not_finite_on_one_rank_is_named_there_and_ends_all(found):
    """A replay of sharded weights needs all ranks: none may look for the bad tensor alone."""
    other, bad = found["nan_loss"]
    assert "FloatingPointError: iteration 1: loss of step 0 is not finite" in bad["error"]
    assert "iteration 1: rank 1 has met a tensor that is not finite, and names it; debug bundle: " in other["error"]
    assert other["error"].endswith("/debug/iteration_000001_rank1")
    _, bad = found["nan_weight"]
    assert "FloatingPointError: iteration 1: weight " in bad["error"]


@pytest.mark.parametrize("name", ["skip_one", "skip_two", "skip_sharded"])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(found, name):
    for rank in found[name]:
        assert [line.get("skipped", 0) for line in rank["metrics"]] == [0, 1, 1, 0]
        assert [line["skipped_iterations"] for line in rank["metrics"]] == [0, 1, 2, 2]


def test_a_map_beside_the_rollout_that_fails_on_one_rank_is_skipped_by_all(found):
    """One rank learns of it between two micro-batches, for which sharded weights need all."""
    for rank in found["skip_beside"]:
        assert [line.get("skipped", 0) for line in rank["metrics"]] == [1, 0]


def test_the_limit_of_skipped_iterations_counts_those_of_all_ranks(found):
    bad, other = (rank["error"] for rank in found["skip_limit"])
    assert "FloatingPointError: iteration 2: loss of step " in bad and "1 iterations were skipped" in bad
    assert "iteration 2: rank 0 has met a tensor that is not finite" in other and "1 iterations were skipped" in other


def test_every_rank_has_a_debug_bundle_of_its_own(found):
    assert all(
        "FloatingPointError: iteration 1: reward 'ranks:failing' ret" in r["error"] for r in found["nan_rewards"]
    )
    bundles = sorted((found["folder"] / "run_nan_rewards" / "debug").iterdir())
    assert [bundle.name for bundle in bundles] == ["iteration_000001", "iteration_000001_rank1"]
    assert all((bundle / "tensors.safetensors").is_file() for bundle in bundles)


def test_auto_finds_one_micro_batch_for_all_within_a_share(found):
    assert [rank["metrics"][0]["micro_batch"] for rank in found["auto"]] == [4, 4]


def test_a_rank_that_runs_out_of_memory_in_a_sharded_trial_ends_all(found):
    """It has left the others in the middle of a replay: they do not wait for parallel.timeout, here ten minutes."""
    other, out = found["runs_out"]
    assert "OutOfMemory: sampling.micro_batch=auto: memory ran out at 2 samples" in out["error"]
    assert out["error"].endswith("set sampling.micro_batch=1, which fitted")
    assert "RankError: rank 0 of 2 has lost the others" in other["error"]


def test_a_world_without_a_rank_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE=2 is set but not RANK"):
        start()


def test_one_process_is_not_sharded(tmp_path):
    config = Config.from_mapping({"parallel": {"shard": True}})
    assert make_policy(config, trainable=False).denoisers  # as vipo eval does
    with pytest.raises(ValueError, match="parallel.shard: one process has nobody to share with"):
        Trainer(config)


def test_a_resume_compares_the_ranks(tmp_path, monkeypatch):
    """On machines without a common disk the others would find no checkpoint and begin anew."""
    make(tmp_path, run={"iterations": 1}).run()
    trainer, asked = make(tmp_path, run={"iterations": 1}), []
    monkeypatch.setattr(Ranks, "equal", lambda self, name, value: asked.append((name, value)))
    trainer.run(mode="resume")
    assert asked == [("--resume: the iteration of the newest checkpoint", 1)]


def test_samples_that_cannot_be_shared_are_refused(found):
    assert all("8 samples cannot be shared evenly by 3 ranks" in rank["error"] for rank in found["uneven"])


def test_groups_that_do_not_divide_the_ranks_are_refused(found):
    words = "parallel.shard_size: expected a divisor of the number of ranks, 2, got 3"
    assert all(words in rank["error"] for rank in found["no_groups"])


def test_prompts_that_keep_sharded_ranks_out_of_step_are_refused(found):
    assert all("set prompts.per_iteration=1 or parallel.shard=false" in rank["error"] for rank in found["guided"])


def test_alone_everything_is_what_it_was():
    ranks, values = Ranks(), {"a": torch.tensor(1.5)}
    parameter = torch.nn.Parameter(torch.ones(2))
    ranks.sum_gradients([parameter])
    assert parameter.grad is None and ranks.reduce(values) == values and ranks.share(7) == slice(0, 7)
    assert ranks.gather(values["a"]) is values["a"] and ranks.any(True) and not ranks.any(False)
    assert ranks.device(None) is None and ranks.device("cpu") == "cpu"
    tensor = torch.ones(3)
    assert whole(tensor) is tensor and shard_like(tensor, tensor) is tensor


def test_every_rank_has_a_device_of_its_own(monkeypatch):
    assert Ranks(1, 2, 1).device("cuda") == "cuda:1" and Ranks(1, 2, 1).device("cpu") == "cpu"
    assert Ranks().device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="cuda:1 cannot be that of 2 ranks; write cuda"):
        Ranks(0, 2).device("cuda:1")
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="rank 1: 1 GPUs here, none for local rank 1; start fewer ranks"):
        start(device="cuda")


@pytest.mark.parametrize(
    ("world", "here", "expected"),
    [
        (1, 1, "to go on: vipo train run.yaml --resume"),
        (2, 2, "to go on: torchrun --nproc-per-node 2 -m vipo train run.yaml --resume"),
        (
            8,
            4,
            "to go on, on every machine and with torchrun's --nnodes and --rdzv options as before: "
            "torchrun --nproc-per-node 4 -m vipo train run.yaml --resume",
        ),
    ],
)
def test_the_way_to_go_on_is_that_of_the_launcher(monkeypatch, world, here, expected):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    assert how_to_go_on(["train", "run.yaml", "--overwrite"]) == expected


def test_gradients_travel_in_buckets_of_one_kind(monkeypatch):
    monkeypatch.setattr("vipo.distributed.BUCKET", 40)
    sizes = [(4, torch.float32), (5, torch.float32), (9, torch.float32), (40, torch.float32), (2, torch.float64)]
    parts = list(_buckets([torch.zeros(n, dtype=dtype) for n, dtype in sizes]))
    assert [[len(t) for t in part] for part in parts] == [[4, 5], [9], [40], [2]]


def test_what_cannot_be_sharded_is_refused():
    with pytest.raises(ValueError, match="parallel.cpu_offload"):
        Config.from_mapping({"parallel": {"cpu_offload": True}})
    with pytest.raises(ValueError, match="parallel.shard_size: goes with parallel.shard=true"):
        Config.from_mapping({"parallel": {"shard_size": 2}})


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vipo"]
    config = ["--prompts.per_iteration=1", "--prompts.group_size=4", "--sampling.num_inference_steps=2"]
    run = [*config, "--run.iterations=2", f"--run.output={tmp_path / 'run'}"]
    done = subprocess.run([*torchrun, "train", "nano_vipo", *run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1 and (tmp_path / "run" / "report.html").is_file()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ranks"] == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_the_check_under_torchrun_is_of_a_rank_and_told_once(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "-m", "vipo"]
    config = ["--prompts.per_iteration=2", "--prompts.group_size=6", "--sampling.num_inference_steps=2"]
    run = [*config, f"--run.output={tmp_path / 'run'}"]
    done = subprocess.run([*torchrun, "check", "nano_vipo", *run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("clipping") == 1 and done.stdout.splitlines()[-1] == "go"
    assert "sampling, decoding and replay of 4 at once" in done.stdout
    uneven = subprocess.run([*torchrun, "check", "nano_vipo", "--prompts.group_size=8"], capture_output=True, text=True)
    assert uneven.returncode and "32 samples cannot be shared evenly by 3 ranks" in uneven.stderr
