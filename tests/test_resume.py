"""Runs that end before they should: killed, stopped, locked out, without disk, with damaged checkpoints; and go on."""

import errno
import fcntl
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_trainer import brightness, make, numbers, weights
from tiny_pipelines import build

from vipo.checkpoint import latest_checkpoint, list_checkpoints
from vipo.comparison.sides import contest_of_run
from vipo.lock import RunLock, require_unlocked
from vipo.runlog import read_metrics

SCHEDULED = {"ema": 0.9, "warmup": 2, "schedule": "cosine"}


def interrupted(folder, kills, seed):
    root = Path(__file__).parent
    path = os.pathsep.join([str(root), str(root.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, root / "interruptions.py", folder, str(kills), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text())


def check_kills(report, count, seed):
    found = report["kills"]
    assert len(found) == count
    for number, kill in enumerate(found):
        assert kill["same"], f"seed {seed}, kill {number}: {kill['moments']}\n{kill['log']}"
    moments = [moment for kill in found for moment in kill["moments"]]
    assert sum(moment["code"] == -9 for moment in moments) >= count  # all but late ones
    assert any(moment["partial"] for moment in moments), "none fell into the writing of a checkpoint"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return interrupted(tmp_path_factory.mktemp("interrupted"), 6, seed=0)


def test_a_killed_run_goes_on_to_the_same_weights(report):
    check_kills(report, 6, 0)


@pytest.mark.slow
def test_fifty_killed_runs_go_on_to_the_same_weights(tmp_path):
    check_kills(interrupted(tmp_path, 50, seed=1), 50, 1)


def test_sigterm_saves_and_a_second_ctrl_c_exits_at_once(report):
    found = report["signals"]
    assert found["once"] == 0
    assert "SIGTERM: finishing this iteration, then saving" in found["once_log"]
    said = "stopped by SIGTERM; iteration 2 is saved; to go on: vipo train run.yaml --run.output=signals --resume"
    assert said in found["once_log"]
    assert found["once_checkpoints"] == ["step_000002"]
    assert (found["summary"]["state"], found["summary"]["iterations"]) == ("stopped", 2)
    assert found["twice"] == 130 and found["twice_checkpoints"] == []
    assert "SIGINT: finishing this iteration, then saving; Ctrl-C again exits at once" in found["twice_log"]
    assert found["resumed"] == 0 and all(found["same"].values())


def test_a_directory_takes_one_run_at_a_time(report):
    found = report["signals"]
    assert found["locked_out"] == 2
    said = found["locked_log"]
    assert f"signals is being written by process {found['holder']} on " in said and said.count("\n") == 1


@pytest.mark.parametrize(("cause", "words"), [("full", "File too large"), ("read_only", "Permission denied")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(report, cause, words):
    found = report["disk"]
    assert found[cause] == 2
    (line,) = [line for line in found[f"{cause}_log"].splitlines() if line.startswith("vipo: error: ")]
    assert "cannot write disk/checkpoints/step_000004: " in line and words in line and "with --resume" in line
    assert "Traceback" not in found[f"{cause}_log"]
    assert found[f"{cause}_left"] == ["step_000002"] and found[f"{cause}_intact"]
    assert found["resumed"] == 0 and found["same"]


@pytest.mark.parametrize(
    ("cause", "words"), [("no_space", "No space left on device"), ("remounted", "Read-only file system")]
)
def test_a_file_system_that_is_full_or_turns_read_only_leaves_the_last_good_one(report, cause, words):
    """A real one, mounted at the run's checkpoints; the first two causes above are a process's own limits."""
    if report["disk"]["not_mounted"]:
        pytest.skip(f"no file system can be mounted here: {report['disk']['not_mounted']}")
    test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(report, cause, words)


def test_what_was_mounted_is_gone_with_its_process(tmp_path, monkeypatch):
    """Also where that is killed, and nobody unmounts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    from interruptions import mount_below

    if (child := os.fork()) == 0:
        try:
            (tmp_path / "reason").write_text(mount_below(Path("checkpoints")))
            (tmp_path / "mounted").write_text(Path("/proc/self/mounts").read_text())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    if reason := (tmp_path / "reason").read_text():
        pytest.skip(f"no file system can be mounted here: {reason}")
    assert f" {tmp_path}/checkpoints tmpfs " in (tmp_path / "mounted").read_text()
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def restless(frames, prompts):
    """Draws from all global generators, and fails for one sample now and then."""
    noise = torch.rand(len(frames)) + torch.from_numpy(np.random.rand(len(frames))).float() + random.random()
    rewards = brightness(frames, prompts) + 0.1 * noise
    if np.random.rand() < 0.5:
        rewards[0] = float("nan")
    return rewards


@pytest.mark.parametrize("train", ["lora", "full"])
def test_ten_iterations_are_five_and_five(tmp_path, train):
    def trainer(name, iterations, **more):
        return make(
            tmp_path, restless, train, on_failure="drop", map={"control": "random"}, optimizer=SCHEDULED,
            sampling={"num_inference_steps": 3}, prompts={"per_iteration": 2, "group_size": 2},
            run={"output": str(tmp_path / name), "iterations": iterations, "save_every": 5, **more},
        )  # fmt: skip

    whole = trainer("whole", 10)
    whole.run()
    stopped = trainer("parts", 10)
    stopped.run(stop=lambda: stopped.iteration == 5)
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["state"] == "stopped"
    spent = json.loads((tmp_path / "parts" / "checkpoints" / "step_000005" / "state.json").read_text())["seconds"]
    resumed = trainer("parts", 10)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # whatever happened in between
    resumed.run(mode="resume")
    assert torch.equal(weights(resumed), weights(whole))
    assert all(torch.equal(a, b) for a, b in zip(resumed.ema.values, whole.ema.values, strict=True))
    ours, theirs = (list(map(numbers, read_metrics(tmp_path / name))) for name in ("parts", "whole"))
    assert ours == theirs and {line["dropped_groups"] for line in ours} == {0, 1}
    assert ours[0]["learning_rate"] == pytest.approx(5e-4) and ours[1]["learning_rate"] == pytest.approx(1e-3)
    summary = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["seconds"] > spent > 0
    assert summary["seconds"] >= sum(line["seconds"] for line in read_metrics(tmp_path / "parts"))


def test_averaged_weights_are_a_folder_that_diffusers_loads(tmp_path):
    trainer = make(tmp_path, optimizer={"ema": 0.5, "learning_rate": 3e-2}, run={"iterations": 2})
    first = weights(trainer).clone()
    trainer.run()
    moved = torch.cat([value.flatten() for value in trainer.ema.values]) - first
    assert 0 < moved.norm() < (weights(trainer) - first).norm()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32, "max_sequence_length": 8}
    shown = {}
    for name in ("weights", "weights_ema"):
        plain = build("sd3")
        plain.load_lora_weights(checkpoint / name)
        shown[name] = plain("a cat", generator=torch.Generator().manual_seed(1), output_type="pt", **call)[0]
    ours = trainer.policy.generate(["a cat"], seeds=[1], **call)[:, 0]
    torch.testing.assert_close(shown["weights"], ours, rtol=0, atol=1e-5)
    assert not torch.allclose(shown["weights_ema"], ours, atol=1e-3)
    with trainer.ema.in_place():
        averaged = trainer.policy.generate(["a cat"], seeds=[1], **call)[:, 0]
    torch.testing.assert_close(shown["weights_ema"], averaged, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    make(folder, run={"iterations": 3, "save_every": 1, "keep": 3}).run()
    return folder


def copy(finished, tmp_path):
    for path in finished.rglob("*"):
        target = tmp_path / path.relative_to(finished)
        target.mkdir(parents=True, exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    return tmp_path / "run" / "checkpoints"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (lambda c: os.truncate(c / "state.safetensors", 100), "state.safetensors has 100 bytes, expected"),
    "one bit": (
        lambda c: flip(c / "weights" / "pytorch_lora_weights.safetensors"),
        "weights/pytorch_lora_weights.safetensors is damaged: its SHA-256",
    ),
    "missing": (lambda c: (c / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "no manifest.json: half-written, or of a version"),
    "no list": (lambda c: (c / "manifest.json").write_text("{"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(finished, tmp_path, caplog, damage):
    checkpoints = copy(finished, tmp_path)
    spoil, message = DAMAGES[damage]
    spoil(checkpoints / "step_000003")
    assert latest_checkpoint(checkpoints) == checkpoints / "step_000002"
    assert f"skipped a damaged checkpoint: step_000003: {message}" in caplog.text
    with pytest.raises(ValueError, match=f"step_000003: {message}"):
        contest_of_run(tmp_path / "run", 3)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(finished, tmp_path):
    checkpoints = copy(finished, tmp_path)
    flip(checkpoints / "step_000003" / "state.safetensors")
    trainer = make(tmp_path, run={"iterations": 3, "save_every": 1, "keep": 1, "keep_best": False})
    trainer.run(mode="resume")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["damaged_000003", "step_000003"]
    again, before = (
        load_file(run / "checkpoints" / "step_000003" / "state.safetensors")
        for run in (tmp_path / "run", finished / "run")
    )
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert list(map(numbers, read_metrics(tmp_path / "run"))) == list(map(numbers, read_metrics(finished / "run")))
    for checkpoint in list_checkpoints(checkpoints):
        flip(checkpoint / "config.yaml")
    with pytest.raises(ValueError, match=r"no undamaged checkpoint \(step_000003: config.yaml is .*start again with"):
        make(tmp_path).run(mode="resume")


def test_the_newest_and_the_best_are_kept(tmp_path):
    """The reward is highest in the second iteration, so its checkpoint outlives newer ones; of equals the newer."""
    values = iter([0.1, 0.9, 0.3, 0.2, 0.9, 0.4])

    def told(frames, prompts):
        return torch.linspace(-0.01, 0.01, len(frames)) + next(values)

    seen = []
    trainer = make(tmp_path, told, map={"control": "ones"}, run={"iterations": 6, "save_every": 1, "keep": 1})
    folder = tmp_path / "run" / "checkpoints"
    trainer.run(on_iteration=lambda i, metrics: seen.append([int(p.name[5:]) for p in list_checkpoints(folder)]))
    assert seen == [[1], [2], [2, 3], [2, 4], [5], [5, 6]]
    state = json.loads((folder / "step_000005" / "state.json").read_text())
    assert state["score"] == pytest.approx(0.9, abs=1e-3)
    assert state["next"]["prompt"] == 10 and state["versions"]["torch"] == torch.__version__


def test_a_changed_config_is_listed_refused_or_allowed_and_recorded(finished, tmp_path, caplog):
    copy(finished, tmp_path)
    run = tmp_path / "run"
    make(tmp_path, run={"iterations": 3, "keep": 9}).run(mode="resume")  # nothing but places and keep
    changed = {"optimizer": {"learning_rate": 0.5}, "run": {"iterations": 4}}
    with pytest.raises(ValueError, match="optimizer.learning_rate: 0.001 -> 0.5: put it back, or give --allow-changes"):
        make(tmp_path, **changed).run(mode="resume")
    with pytest.raises(ValueError, match="prompts.group_size: 3 -> 2: refused"):
        make(tmp_path, prompts={"group_size": 2}).run(mode="resume", allow_changes=True)
    assert len(read_metrics(run)) == 3
    make(tmp_path, **changed).run(mode="resume", allow_changes=True)
    assert "--resume: optimizer.learning_rate: 0.001 -> 0.5" in caplog.text
    assert read_metrics(run)[-1]["learning_rate"] == 0.5
    assert "learning_rate: 0.5" in (run / "config.yaml").read_text()
    assert [path.name for path in sorted(run.glob("config*"))] == ["config.yaml", "config_000003.yaml"]
    assert (run / "config_000003.yaml").read_text() == (finished / "run" / "config.yaml").read_text()
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    with pytest.raises(ValueError, match="its prompts are not those of the checkpoint; put them back, or give --allow"):
        make(tmp_path, **changed).run(mode="resume")


def test_a_run_killed_before_its_first_file_may_be_started_or_resumed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "leftover.png").touch()
    make(tmp_path, run={"iterations": 1}).run(mode="resume")
    assert len(read_metrics(tmp_path / "run")) == 1 and not (tmp_path / "run" / "leftover.png").exists()


def test_a_lock_is_held_by_one_and_freed(tmp_path):
    run = tmp_path / "run"
    with RunLock(run) as lock:
        assert not run.exists()  # a new run writes nothing before its first iteration
        lock.take()
        with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on .*; wait, stop that one"):
            require_unlocked(run)
        with pytest.raises(ValueError, match="is being written by"), RunLock(run):
            pass
    require_unlocked(run)
    with (run / ".lock").open("r+") as another:
        fcntl.flock(another, fcntl.LOCK_SH)  # another rank that asks in the same instant
        require_unlocked(run)


def test_a_file_system_without_locks_is_said_so(tmp_path, monkeypatch, caplog):
    def no_locks(stream, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunLock(tmp_path / "run") as lock:
        lock.take()
    assert "cannot be locked (No locks available): make sure that no other run writes there" in caplog.text


def test_a_run_that_began_meanwhile_is_not_overwritten(tmp_path):
    """Both found a new directory; the other one has finished its first iteration sooner."""

    def overtaken(frames, prompts):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("theirs")
        return brightness(frames, prompts)

    with pytest.raises(ValueError, match="already holds a run"):
        make(tmp_path, overtaken).run()
    assert (tmp_path / "run" / "config.yaml").read_text() == "theirs"
