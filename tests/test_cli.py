"""The command line as a user runs it: subprocesses for the main road, `main` itself for the table of bad inputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vipo.cli import main
from vipo.media import read_frames, to_image, write_video
from vipo.nano.world import render, sample_scenes

COMMANDS = ("demo", "train", "check", "maps", "eval", "report", "serve-reward")
SMALL = [
    "--prompts.per_iteration=1",
    "--prompts.group_size=2",
    "--sampling.num_inference_steps=3",
    "--run.iterations=2",
]


def run(*arguments, cwd=None):
    environment = {**os.environ, "COLUMNS": "140", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "vipo", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment
    )


def fails(capsys, *arguments):
    """Run `main`, expect exit code 2 and return the one-line error."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_help_is_complete_and_fast():
    for command in COMMANDS:
        helped = run(command, "--help")
        assert helped.returncode == 0 and "usage: vipo" in helped.stdout, helped.stderr
    keys = run("train", "--help").stdout
    assert "--loss.clip_range=0.1" in keys and "--prompts.group_size=8" in keys
    top = run("--help").stdout
    assert all(f"vipo {command}" in top for command in COMMANDS)
    imported = "import sys, vipo.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imported], check=False).returncode == 0


def test_train_check_report_resume(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"run: {{output: {tmp_path / 'run'}, save_every: 1, sample_every: 1}}\n")
    checked = run("check", config, *SMALL)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.rstrip().endswith("go")
    assert "differ from the rollout's by at most 0 nats" in checked.stdout
    assert not (tmp_path / "run").exists()
    trained = run("train", config, *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert "Traceback" not in trained.stderr and "Warning" not in trained.stderr
    page = (tmp_path / "run" / "report.html").read_text()
    assert "reward" in page
    again = run("train", config, *SMALL)
    assert again.returncode == 2
    assert "already holds a run; give --resume, --overwrite" in again.stderr
    resumed = run("train", config, *SMALL, "--run.iterations=3", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3]
    refused = fails(capsys, "train", config, *SMALL, "--resume", "--prompts.group_size=3", "--loss.kl_beta=0.1")
    assert "error: --resume: prompts.group_size: 2 -> 3: refused, " in refused and refused.count("vipo: error: ") == 2
    assert "error: --resume: loss.kl_beta: 0.0 -> 0.1: put it back, or give --allow-changes" in refused
    assert run("report", tmp_path / "run").stdout.strip() == str(tmp_path / "run" / "report.html")


def test_demo_runs_and_repeats_bit_for_bit(tmp_path):
    summaries = []
    for name in ("a", "b"):
        done = run("demo", "-o", tmp_path / name, "--iterations", 2, "--prompts", 4)
        assert done.returncode == 0, done.stderr
        assert "ViPO - GRPO" in done.stdout and "report.html" in done.stdout
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
    first, second = summaries
    for key in ("evaluation", "differences", "curves", "metrics", "notes"):
        assert first[key] == second[key], key
    samples = [{k: v for k, v in s.items() if k in ("prompt", "reward")} for s in first["samples"]]
    assert samples == [{k: v for k, v in s.items() if k in ("prompt", "reward")} for s in second["samples"]]
    grpo, vipo = first["curves"]["grpo"], first["curves"]["vipo"]
    assert grpo["reward_mean"][0] == vipo["reward_mean"][0]  # same weights, prompts and seeds
    assert grpo["reward_mean"][1] != vipo["reward_mean"][1]
    for name in ("base", "grpo", "vipo"):
        assert set(first["evaluation"][name]) == {m["name"] for m in first["metrics"]}
    page = (tmp_path / "a" / "report.html").read_text()
    for name in ("base", "grpo", "vipo"):
        assert f'value="{first["evaluation"][name]["reward"]["mean"]}"' in page
    assert 'src="http' not in page and 'href="http' not in page


def test_demo_of_clips(tmp_path):
    done = run("demo", "--video", "-o", tmp_path / "v", "--iterations", 1, "--prompts", 4)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "v" / "summary.json").read_text())
    assert (summary["modality"], summary["command"]) == ("video", "vipo demo --video --seed 0")
    names = [metric["name"] for metric in summary["metrics"]]
    assert {"motion_accuracy", "flicker", "colour_error"} <= set(names) and names[:2] == ["reward_vq", "reward_mq"]
    assert all(set(summary["evaluation"][arm]) == set(names) for arm in ("base", "grpo", "vipo"))
    for arm in ("base", "grpo", "vipo", "map"):
        assert read_frames(tmp_path / "v" / summary["samples"][0][arm]).shape[1:] == (3, 64, 64)
    config = yaml.safe_load((tmp_path / "v" / "vipo" / "config.yaml").read_text())
    assert config["map"]["pca_scope"] == "sample" and config["map"]["control"] is None
    (line,) = [json.loads(line) for line in (tmp_path / "v" / "vipo" / "metrics.jsonl").read_text().splitlines()]
    assert line["reward_mean"] == pytest.approx(line["reward_mean/nano_vq"] + line["reward_mean/nano_mq"], abs=1e-5)
    page = (tmp_path / "v" / "report.html").read_text()
    assert "data:image/webp" in page and 'src="http' not in page


def test_maps_of_pictures_and_a_clip(tmp_path):
    drawing = render(sample_scenes(3, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    for i in range(2):
        to_image(drawing.images[i]).save(tmp_path / f"{i}.png")
    write_video(tmp_path / "clip.mp4", drawing.images, 8)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(2):
        to_image(drawing.masks[i].expand(3, -1, -1)).save(masks / f"{i}.png")
    names = [tmp_path / name for name in ("0.png", "1.png", "clip.mp4", "broken.png")]
    made = run("maps", *names[:3], "-o", tmp_path / "out", "--spatial-compression", 4, "--map.floor=0.25")
    assert made.returncode == 0 and "allocation maps of 3 inputs" in made.stdout, made.stderr
    assert np.load(tmp_path / "out" / "0" / "map.npy").min() >= 0.25
    assert np.load(tmp_path / "out" / "clip" / "map.npy").shape == (3, 16, 16)
    for place in ("0/overlay.png", "0/components.png", "0/sheet.png", "clip/overlay.mp4", "clip/components.mp4"):
        assert (tmp_path / "out" / place).stat().st_size > 500
    measured = run("maps", *names, "-o", tmp_path / "measured", "--spatial-compression", 4, "--ground-truth", masks)
    assert measured.returncode == 1 and "2 failures" in measured.stdout
    errors = measured.stderr.splitlines()
    assert len(errors) == 2 and "clip.mp4: no mask" in errors[0] and "broken.png: not readable" in errors[1]
    found = json.loads((tmp_path / "measured" / "maps.json").read_text())
    assert found["overall"]["measured"] == 2 and found["overall"]["map"]["AUC"]["mean"] > 0.9
    assert "agreement with 2 masks" in measured.stdout and "control: centre" in measured.stdout


def test_bad_input_of_maps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no such file or folder: nothing" in fails(capsys, "maps", "nothing", "-o", "out")
    assert "no such file or folder: x, y" in fails(capsys, "maps", "x", "y", "-o", "out")
    assert "did you mean map.orientation?" in fails(capsys, "maps", ".", "-o", "out", "--map.orientatoin=border")
    assert "vipo maps takes --map.KEY=VALUE" in fails(capsys, "maps", ".", "-o", "out", "--loss.level=sample")
    assert "the following arguments are required: -o" in fails(capsys, "maps", ".")
    assert "no picture or video there" in fails(capsys, "maps", ".", "-o", "out")
    Path("a.png").write_bytes(b"x")
    assert "did you mean 'border'" in fails(capsys, "maps", "a.png", "-o", "out", "--orientation", "bordr")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "bert"}')
    assert "model type of backbone 'text'" in fails(capsys, "maps", "a.png", "-o", "out", "--backbone", "text")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("precious")
    assert "is not empty and holds no maps.json" in fails(capsys, "maps", "a.png", "-o", "full", "--overwrite")
    assert not Path("out").exists() and Path("full/thesis.txt").read_text() == "precious"


BAD_CONFIGS = [
    ("modle: {path: nano}", [], "modle: unknown key; did you mean model?"),
    ("prompts: {groupsize: 4}", [], "did you mean prompts.group_size?"),
    ("prompts: {group_size: eight}", [], "prompts.group_size: expected a valid integer"),
    ("prompts: {group_size: 1}", [], "prompts.group_size: expected greater than or equal to 2, got 1"),
    ("", ["--loss.levle=sample"], "loss.levle: unknown key; did you mean loss.level?"),
    ("", ["--frobnicate"], "--frobnicate: expected --section.key=value"),
    ("reward: {name: hps}", [], "unknown reward 'hps'; "),
    ("model: {path: ./no/such/folder}", [], "pipeline: no such folder: ./no/such/folder"),
    ("prompts: {path: none.txt}", [], "prompts.path: no such file: none.txt"),
    ("map: {backbone: ./nowhere}", [], "./nowhere"),
    ("", ["--sampling.height=63"], "have to be divisible by 8 but are 63 and 64"),
    ("", ["--sampling.call.foo=1"], "call: StableDiffusion3Pipeline takes no keyword 'foo'"),
    ("sampling: {kernel: ddim}", [], "is a flow scheduler; expected one of flow_grpo, dance_grpo, flow_cps"),
]


@pytest.mark.parametrize(("text", "overrides", "message"), BAD_CONFIGS)
def test_bad_configs_are_one_clear_line_and_write_nothing(tmp_path, monkeypatch, capsys, text, overrides, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    error = fails(capsys, "train", "bad.yaml", *overrides)
    assert message in error
    assert error.startswith("vipo: error: ") and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"caf\xe9", "is not UTF-8")])
def test_bad_prompt_files(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_bytes(content)
    Path("run.yaml").write_text("prompts: {path: p.txt}")
    assert message in fails(capsys, "train", "run.yaml")
    assert not Path("runs").exists()


def test_other_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "config: no such file: none.yaml" in fails(capsys, "train", "none.yaml")
    assert "unrecognized arguments: --foo" in fails(capsys, "demo", "--foo")
    assert "--iterations: expected at least 1" in fails(capsys, "demo", "--iterations", "0")
    Path("run.yaml").write_text("")
    assert "holds no run" in fails(capsys, "train", "run.yaml", "--resume")
    assert "--allow-changes: goes with --resume only" in fails(capsys, "train", "run.yaml", "--allow-changes")
    assert "nothing" in fails(capsys, "report", "nothing")
    Path("demo").mkdir()
    Path("demo/thesis.txt").write_text("precious")
    assert "is not empty and holds no run" in fails(capsys, "demo", "-o", "demo", "--overwrite")
    assert Path("demo/thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("command", ["demo", "report run", "eval run", "maps a.png -o out", "check nano_vipo --signal"])
def test_what_is_one_process_is_refused_under_torchrun(tmp_path, monkeypatch, capsys, command):
    """Two of `vipo eval` wrote the same files: one found those of the other gone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process does this, got WORLD_SIZE=2" in fails(capsys, *command.split())
    assert not list(tmp_path.iterdir())


def test_a_nan_reward_names_the_sample_and_loses_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad_reward.py").write_text(
        "import torch\n\n\ndef nan(frames, prompts):\n    return torch.full((len(frames),), float('nan'))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("run.yaml").write_text("reward: {name: 'bad_reward:nan'}\nrun: {output: out}\n")
    error = fails(capsys, "train", "run.yaml", *SMALL)
    assert "reward 'bad_reward:nan' returned nan for sample 0 of 2, prompt" in error
    assert "reward.on_failure=drop" in error
    assert [path.name for path in Path("out").iterdir()] == ["debug"]
    assert error.rstrip().endswith(f"debug bundle: {Path('out/debug/iteration_000001')}")
    assert "debug bundle" in fails(capsys, "train", "run.yaml", *SMALL)  # the bundle alone is no run: it may be written
    Path("out/config.yaml").write_text("model: {path: nano}\n")
    fails(capsys, "train", "run.yaml", *SMALL, "--overwrite")  # the earlier run goes only when the first step is done
    assert Path("out/config.yaml").read_text() == "model: {path: nano}\n"


BESIDE = ["--reward.async=true", "--sampling.micro_batch=auto", "--prompts.per_iteration=1", "--prompts.group_size=2"]


@pytest.mark.parametrize(("control", "more"), [("centre", BESIDE), ("inverted", [])])
def test_check_says_go_with_controls(tmp_path, capsys, control, more):
    (tmp_path / "run.yaml").write_text(f"map: {{control: {control}}}\nrun: {{output: {tmp_path / 'out'}}}\n")
    with pytest.raises(SystemExit) as caught:
        main(["check", str(tmp_path / "run.yaml"), "--sampling.num_inference_steps=3", *more])
    assert caught.value.code == 0, capsys.readouterr().out


def test_check_says_no_go_when_the_map_cannot_act(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"loss: {{level: sample}}\nrun: {{output: {tmp_path / 'out'}}}\n")
    with pytest.raises(SystemExit) as caught:
        main(["check", str(tmp_path / "run.yaml"), "--sampling.num_inference_steps=3"])
    assert caught.value.code == 2
    assert "no-go: map" in capsys.readouterr().out
