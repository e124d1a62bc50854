"""`vipo eval`, mostly as a user runs it: a tiny run of the embedded pipeline, the command, its files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_pipelines import build

from vipo import Config, Trainer
from vipo.cli import main
from vipo.comparison.record import regression
from vipo.comparison.samples import SampleStore, read_sample, write_sample
from vipo.comparison.sides import contest_of_models, contest_of_run, fingerprint
from vipo.loading import save_pipeline
from vipo.measures import drift, mean_pairwise_distance
from vipo.nano import ASSETS
from vipo.report import render_report
from vipo.types import Prompt

PROMPTS = "a large red star at the left\na small blue ring at the top\na huge green cross at the right\n"
STEPS = "--sampling.num_inference_steps=2"


def train(folder, **model):
    mapping = {
        "model": model,
        "sampling": {"num_inference_steps": 2, "eta": 0.8},
        "prompts": {"per_iteration": 1, "group_size": 4},
        "optimizer": {"learning_rate": 1e-2},
        "run": {"output": str(folder), "iterations": 2, "save_every": 1, "tensorboard": False},
    }
    Trainer(Config.from_mapping(mapping)).run()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text(PROMPTS)
    return tmp_path / "p.txt"


def command(*arguments):
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "vipo", "eval", *map(str, arguments)], environment


def run(*arguments):
    words, environment = command(*arguments)
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def call(*arguments):
    """Run the command in this process."""
    with pytest.raises(SystemExit) as caught:
        main(["eval", *map(str, arguments)])
    assert caught.value.code == 0


def record(folder):
    return json.loads((folder / "eval.json").read_text())


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}


def test_a_run_against_its_base(trained, prompts, tmp_path):
    out = tmp_path / "out"
    arguments = (trained, "--prompts", prompts, "--rewards", "nano", "brightness", "-o", out)
    done = run(*arguments)
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert "trained on: 3 prompts x 2 seeds" in done.stdout and "held-out: 3 prompts x 2 seeds" in done.stdout
    found = record(out)
    nano, brightness = found["rewards"]
    assert (nano["name"], nano["in_domain"], brightness["in_domain"]) == ("nano", True, False)
    assert found["subject"]["checkpoint"] == 2 and found["prompts"]["count"] == 3 and found["seeds"] == 2
    assert len(files(out / "samples")) == 12 and found["fingerprints"]["base"] != found["fingerprints"]["trained"]
    scores = found["samples"]["brightness"]
    expected = np.mean(scores["trained"]) - np.mean(scores["base"])
    assert brightness["difference"]["mean"] == pytest.approx(expected) and expected != 0
    assert brightness["difference"]["low"] <= expected <= brightness["difference"]["high"]
    assert any("intervals of 3 prompts are too narrow" in note for note in found["notes"])
    rows = found["per_prompt"]
    assert [row["prompt"] for row in rows] == PROMPTS.splitlines()
    assert rows[1]["rewards"]["nano"]["base"] == pytest.approx(np.mean(found["samples"]["nano"]["base"][1]))
    assert 0 < found["drift"]["whole"]["mean"] < 1 and "backbone nano" in found["diversity"]["measure"]
    harm = [rows[pair["prompt"]]["regression"] for pair in found["pairs"]]
    assert harm == sorted(harm) and len(harm) == 3
    assert all((out / pair[key]).is_file() for pair in found["pairs"] for key in ("base", "trained", "map"))
    page = (out / "report.html").read_text()
    assert f'value="{brightness["difference"]["mean"]}"' in page and f'value="{nano["base"]["low"]}"' in page
    assert page.index("Rewards that were trained on") < page.index("Held-out rewards") < page.index("worst regressions")
    assert 'src="http' not in page and str(out) not in json.dumps(found)
    before = (out / "eval.json").read_bytes(), files(out / "samples"), page
    times = {path: path.stat().st_mtime_ns for path in (out / "samples").rglob("*.png")}
    call(*arguments)  # nothing is sampled again
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert ((out / "eval.json").read_bytes(), files(out / "samples"), (out / "report.html").read_text()) == before
    assert render_report(out).read_text() == page


def test_a_killed_evaluation_goes_on_and_gives_the_same(trained, prompts, tmp_path):
    arguments = [trained, "--prompts", prompts, "--sampling.micro_batch=2", "--sampling.num_inference_steps=40"]
    words, environment = command(*arguments, "-o", tmp_path / "killed")
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(files(tmp_path / "killed")) < 2 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = files(tmp_path / "killed")
    assert 2 <= len(left) < 12 and not (tmp_path / "killed" / "eval.json").exists()
    next((tmp_path / "killed").rglob("*.png")).unlink()  # of a batch of which the rest is there
    (tmp_path / "killed" / "eval.json.partial").write_text("{")
    call(*arguments, "-o", tmp_path / "killed")
    call(*arguments, "-o", tmp_path / "whole")
    assert (tmp_path / "killed" / "eval.json").read_bytes() == (tmp_path / "whole" / "eval.json").read_bytes()
    assert files(tmp_path / "killed" / "samples") == files(tmp_path / "whole" / "samples")


def test_a_model_against_itself_and_then_against_one_changed_byte(prompts, tmp_path):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(ASSETS / "t2i", copy)
    arguments = ("--model", "nano", "--trained", copy, "--prompts", prompts, "--rewards", "nano", "-o", out, STEPS)
    call(*arguments)
    same = record(out)
    (reward,) = same["rewards"]
    assert reward["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "win_rate": 0.5}
    assert reward["sign_test"] == {"better": 0, "worse": 0, "equal": 3, "p": 1.0} and reward["in_domain"] is None
    assert same["diversity"]["difference"]["mean"] == same["drift"]["whole"]["mean"] == 0
    assert any("the same weights" in note for note in same["notes"]) and len(files(out / "samples")) == 6
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    content, stat = bytearray(weights.read_bytes()), weights.stat()
    content[-1] ^= 0x40  # the exponent of the last weight; size and date stay
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    call(*arguments)
    other = record(out)
    assert other["fingerprints"]["base"] == same["fingerprints"]["base"] != other["fingerprints"]["trained"]
    assert other["drift"]["whole"]["mean"] > 0 and len(files(out / "samples")) == 12


def test_an_adapter_of_diffusers_equals_the_checkpoint(trained, prompts, tmp_path):
    weights = trained / "checkpoints" / "step_000001" / "weights"
    settings = ("--prompts", prompts, "--rewards", "brightness", "--seeds", 1, STEPS, "--sampling.guidance_scale=1.0")
    call("--model", "nano", "--lora", weights, *settings, "-o", tmp_path / "lora")
    call(trained, "--checkpoint", 1, *settings, "-o", tmp_path / "run")
    lora, checkpoint = record(tmp_path / "lora"), record(tmp_path / "run")
    assert lora["samples"] == checkpoint["samples"] and lora["drift"] == checkpoint["drift"]
    assert lora["diversity"] is None and "two seeds per prompt" in (tmp_path / "lora" / "report.html").read_text()


def test_the_trained_side_is_the_trained_policy(trained):
    config = Config.from_yaml(trained / "config.yaml")
    contest = contest_of_run(trained)
    policy = Trainer(config).policy
    with torch.no_grad():
        from safetensors.torch import load_file

        state = load_file(trained / "checkpoints" / "step_000002" / "state.safetensors")
        for name, parameter in policy.trainable_parameters().items():
            parameter.copy_(state[f"weight.{name}"])
    settings = {"seeds": [3, 4], "num_inference_steps": 2, "guidance_scale": 1.0}
    expected = policy.generate(["a red star"] * 2, **settings)
    torch.testing.assert_close(contest.trained.load(config).generate(["a red star"] * 2, **settings), expected)
    base = contest.base.load(config).generate(["a red star"] * 2, **settings)
    assert (base - expected).abs().max() > 1e-3


def test_a_run_of_all_weights_on_a_published_set(tmp_path):
    folder = train(tmp_path / "run", train="full")
    (tmp_path / "set.csv").write_text("Prompts,Category\na red star,Colors\ntwo rings,Counting\na red star,Colors\n")
    call(folder, "--prompts", tmp_path / "set.csv", "--rewards", "brightness")
    found, page = record(folder / "eval"), (folder / "eval" / "report.html").read_text()
    assert found["drift"]["whole"]["mean"] > 0 and "1 repeated prompts of the file were left out." in found["notes"]
    assert [(entry["category"], entry["prompts"]) for entry in found["categories"]] == [("Colors", 1), ("Counting", 1)]
    rows, second = found["per_prompt"], found["categories"][1]["differences"]["brightness"]
    assert second["mean"] == rows[1]["rewards"]["brightness"]["difference"] and "Differences by category" in page


def test_clips_keep_equal_frames_and_are_compared(tmp_path, prompts):
    clip = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)).repeat(5, 1, 1, 1)
    write_sample(tmp_path / "clip", clip)
    torch.testing.assert_close(read_sample(tmp_path / "clip.safetensors"), (clip * 255).round() / 255)
    for seed in range(2):
        save_pipeline(build("wan", seed), tmp_path / f"wan{seed}", {})
    out, size = tmp_path / "out", "--sampling.call={num_frames: 9, height: 64, width: 48, max_sequence_length: 16}"
    arguments = ("--model", tmp_path / "wan0", "--trained", tmp_path / "wan1", "--prompts", prompts, STEPS, size)
    call(*arguments, "--rewards", "brightness", "motion_smoothness", "--limit", 2, "-o", out)
    kept = list((out / "samples").rglob("*.safetensors"))
    assert len(kept) == 8 and read_sample(kept[0]).shape == (9, 3, 64, 48)
    found = record(out)
    assert found["pairs"][0]["base"].endswith(".webp") and found["drift"]["whole"]["mean"] > 0
    assert found["sampling"]["num_frames"] == 9 and "guidance_scale" not in found["sampling"]


def test_samples_are_rounded_before_anything_looks_and_do_not_depend_on_their_neighbours(tmp_path):
    contest = contest_of_models("nano", None, "nano", ["brightness"], [STEPS])
    prompts = [Prompt(text) for text in PROMPTS.splitlines()]
    store = SampleStore(tmp_path / "a", prompts, 2, contest.config)
    store.make(contest.base, lambda done: None)
    frames = store.read(contest.base, [0, 5])
    direct = contest.base.load(contest.config).generate(
        [PROMPTS.splitlines()[0], PROMPTS.splitlines()[2]],
        seeds=[store.noise[0], store.noise[5]],
        num_inference_steps=2,
    )
    assert torch.equal(frames, (frames * 255).round() / 255)
    assert (frames - direct).abs().max() <= 0.5 / 255 + 1e-4
    fewer = SampleStore(tmp_path / "a", prompts[2:], 2, contest.config)
    assert fewer.noise == store.noise[4:] and fewer.file(contest.base, 1) == store.file(contest.base, 5)
    reseeded = SampleStore(tmp_path / "a", prompts, 2, contest.config, seed=1)
    assert not set(reseeded.noise) & set(store.noise) and reseeded.file(contest.base, 0) is None
    other = Prompt(prompts[0].text, {"guidance_scale": 2.0}, "{...}")
    assert SampleStore(tmp_path / "a", [other], 1, contest.config).file(contest.base, 0) is None


def test_rewards_keep_the_paths_and_options_of_their_run(trained, tmp_path):
    folder, scorer = tmp_path / "run", str(ASSETS / "scorer")
    shutil.copytree(trained, folder)
    text = (folder / "config.yaml").read_text()
    assert "  paths: {}\n" in text
    (folder / "config.yaml").write_text(text.replace("  paths: {}\n", f"  paths: {{nano: {scorer}}}\n"))
    options = ["--reward.options={pickscore: {dtype: bfloat16}}", "--reward.paths={pickscore: here}"]
    section = contest_of_run(folder, None, ["pickscore", "nano"], options).config.reward
    assert section.paths == {"nano": scorer, "pickscore": "here"} and section.options == {
        "pickscore": {"dtype": "bfloat16"}
    }
    other = contest_of_run(folder, None, ["brightness"])
    assert other.config.reward.paths == {} and other.in_domain == {"nano"}


def test_rewards_keep_the_device_of_their_run(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    section = yaml.safe_load((folder / "config.yaml").read_text())
    section["reward"]["device"] = "cuda:1"
    (folder / "config.yaml").write_text(yaml.safe_dump(section))
    assert contest_of_run(folder).config.reward.device == "cuda:1"
    assert contest_of_run(folder, None, ["redness"], ["--reward.device=null"]).config.reward.device is None


def test_fingerprints_are_of_bytes_and_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.safetensors").write_bytes(b"12")
    first = fingerprint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "notes.md").write_text("not loaded")
    assert fingerprint(tmp_path / "b") == first
    (tmp_path / "b" / "x.safetensors").rename(tmp_path / "b" / "y.safetensors")
    assert fingerprint(tmp_path / "b") != first


def test_pairwise_distance_by_hand():
    features = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]], [[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]]])
    torch.testing.assert_close(mean_pairwise_distance(features), torch.tensor([2 / 3, 4 / 3], dtype=torch.float64))
    assert mean_pairwise_distance(features[:, :1]).isnan().all()


def test_drift_by_hand_and_of_an_even_map():
    base = torch.zeros(2, 1, 3, 2, 2)
    trained = torch.tensor([0.4, 0.2, 0.0, 0.2]).view(1, 1, 1, 2, 2).expand(2, 1, 3, 2, 2)
    maps = torch.tensor([[2.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]).view(2, 1, 2, 2)
    found = drift(base, trained, maps)
    # weights 1, .5, 0, 0: inside (.4 + .1) / 1.5, outside (.1 + 0 + .2) / 2.5
    torch.testing.assert_close(found["whole"], torch.full((2,), 0.2, dtype=torch.float64))
    assert found["inside"][0] == pytest.approx(1 / 3) and found["outside"][0] == pytest.approx(0.12)
    assert found["inside"].isnan().tolist() == found["outside"].isnan().tolist() == [False, True]


def test_regression_puts_rewards_on_one_scale():
    found = regression({"a": np.array([-100.0, 100.0, 0.0]), "b": np.array([0.1, -0.1, np.nan]), "c": np.zeros(3)})
    np.testing.assert_allclose(found, [(-1 / np.sqrt(2 / 3) + 1) / 3, (1 / np.sqrt(2 / 3) - 1) / 3, 0])


BAD = [
    ([], "expected a run directory or --model PIPELINE"),
    (["nothing"], "nothing holds no run of vipo train"),
    (["RUN", "--model", "nano"], "one of them"),
    (["RUN", "--lora", "x"], "--lora and --trained go with --model"),
    (["RUN", "--checkpoint", 7], "no checkpoint of iteration 7; there are 1, 2"),
    (["RUN", "--loss.level=sample"], "vipo eval takes --model.KEY"),
    (["RUN", "--reward.std=sample"], "vipo eval takes --reward.paths, .options and .device only"),
    (["RUN", "--reward.paths={pickscore: here}"], "'pickscore' is not in reward.name"),
    (["RUN", "--reward.options={nano: {dtpe: float32}}"], "did you mean 'dtype'?"),
    (["RUN", "--sampling.num_inference_step=3"], "did you mean sampling.num_inference_steps?"),
    (["RUN", "--rewards", "pickscor"], "did you mean 'pickscore'?"),
    (["RUN", "--prompts", "none.tsv"], "prompts.path: no such file: none.tsv"),
    (["RUN", "--seeds", 0], "expected --seeds"),
    (["RUN", "--sampling.height=63"], "have to be divisible by 8"),
    (["RUN", "-o", "RUN"], "is a run directory"),
    (["RUN", "-o", "full"], "full holds thesis.txt, which is no part of an evaluation"),
    (["--model", "nano"], "--lora FOLDER or as --trained PIPELINE"),
    (["--model", "nano", "--lora", "full", "--prompts", "general", "--rewards", "nano"], "no .safetensors in full"),
    (["--model", "./gone", "--trained", "nano", "--rewards", "nano"], "no such folder: ./gone"),
    (["--model", "nano", "--trained", "nano", "--rewards", "nano"], "--prompts: expected a file"),
    (["--model", "nano", "--trained", "nano", "--rewards", "remote", "--prompts", "general"], "needs an address"),
    (["--model", "nano", "--trained", "nano", "--prompts", "general"], "--rewards: expected at least one"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_is_one_line_and_writes_nothing(trained, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("precious")
    before = sorted(trained.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(["eval", *(str(trained) if word == "RUN" else str(word) for word in arguments)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and "Traceback" not in error
    assert len(re.findall("^vipo: error:", error, re.MULTILINE)) == 1
    assert sorted(trained.rglob("*")) == before and [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_adapter_of_another_model_is_refused(trained, tmp_path, prompts, capsys):
    from safetensors.torch import load_file, save_file

    weights = load_file(trained / "checkpoints" / "step_000002" / "weights" / "pytorch_lora_weights.safetensors")
    (tmp_path / "lora").mkdir()
    save_file(
        {key.replace("blocks.0", "blocks.70"): w for key, w in weights.items()}, tmp_path / "lora" / "a.safetensors"
    )
    with pytest.raises(SystemExit):
        main(["eval", "--model", "nano", "--lora", str(tmp_path / "lora"), "--prompts", str(prompts), STEPS]
             + ["--rewards", "nano", "--seeds", "1", "-o", str(tmp_path / "out")])  # fmt: skip
    assert f"of {len(weights)} tensors of" in capsys.readouterr().err


def test_a_runs_own_held_out_reward_can_be_evaluated(trained, tmp_path):
    """The watch's rewards are no part of an evaluation's config, where they would collide with what it measures by."""
    run = tmp_path / "watched"
    shutil.copytree(trained, run)
    mapping = yaml.safe_load((run / "config.yaml").read_text())
    mapping["watch"] |= {"every": 5, "rewards": ["redness"]}
    (run / "config.yaml").write_text(yaml.safe_dump(mapping))
    contest = contest_of_run(run, rewards=["redness"])
    assert list(contest.config.reward.weights) == ["redness"] and contest.in_domain == {"nano"}
