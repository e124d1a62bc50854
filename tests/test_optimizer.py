"""AdamW with moments in 8 bits: its bytes, exact resumes, skipped iterations, and what is refused.

What needs bitsandbytes is skipped where it is not installed.
"""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import make, numbers, weights

from vipo.config import OptimizerConfig
from vipo.optimizer import make_optimizer, moment_bytes
from vipo.runlog import read_metrics

EIGHT = {"state": "8bit"}


def full(tmp_path, name, iterations=4, **optimizer):
    return make(
        tmp_path, train="full", optimizer={**EIGHT, **optimizer}, sampling={"num_inference_steps": 3},
        run={"output": str(tmp_path / name), "iterations": iterations, "save_every": 2, "keep": 9},
    )  # fmt: skip


def moments(trainer):
    entries = [trainer.optimizer.state[p] for p in trainer.parameters]
    return [entry[key] for entry in entries for key in sorted(entry) if key != "step"]


def test_float32_is_adamw_of_torch():
    weight = torch.nn.Parameter(torch.ones(3))
    made = make_optimizer([weight], OptimizerConfig(learning_rate=0.1, weight_decay=0.2))
    assert type(made) is torch.optim.AdamW
    assert (made.defaults["lr"], made.defaults["weight_decay"]) == (0.1, 0.2)


def test_the_bytes_of_the_moments():
    small, large, odd = torch.empty(4095), torch.empty(64, 64), torch.empty(4097)
    assert moment_bytes([small, large], "float32") == 8 * (4095 + 4096)
    assert moment_bytes([small], "8bit") == 8 * 4095
    assert moment_bytes([large], "8bit") == 2 * (4096 + 16 * 4)
    assert moment_bytes([odd], "8bit") == 2 * (4097 + 17 * 4)


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r'^optimizer.state=8bit: .*; pip install "vipo\[8bit\]" or set optimizer'):
        make(tmp_path, optimizer=EIGHT)
    assert not (tmp_path / "run").exists()


def test_shards_are_refused():
    with pytest.raises(ValueError, match=r"^optimizer.state: 8bit was not tried on sharded weights, got parallel.sh"):
        make_optimizer([torch.nn.Parameter(torch.ones(3))], OptimizerConfig(state="8bit"), sharded=True)


def test_eight_bits_resume_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    whole = full(tmp_path, "whole")
    whole.run()
    stopped = full(tmp_path, "parts")
    stopped.run(stop=lambda: stopped.iteration == 2)
    resumed = full(tmp_path, "parts")
    resumed.run(mode="resume")
    assert torch.equal(weights(resumed), weights(whole))
    ours, theirs = moments(resumed), moments(whole)
    assert {value.dtype for value in ours} == {torch.float32, torch.uint8}
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    parts, metrics = (list(map(numbers, read_metrics(tmp_path / name))) for name in ("parts", "whole"))
    assert parts == metrics
    codes = load_file(tmp_path / "parts" / "checkpoints" / "step_000002" / "state.safetensors")
    assert any(value.dtype == torch.uint8 for key, value in codes.items() if key.startswith("optimizer.state1."))
    held = {value.data_ptr(): value for value in theirs if value.shape != (256,) or value.dtype != torch.float32}
    assert sum(value.nbytes for value in held.values()) == moment_bytes(whole.parameters, "8bit")


def test_a_skipped_iteration_is_undone_in_eight_bits(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    trainer = full(tmp_path, "run", updates_per_rollout=2, skip_nonfinite=1, learning_rate=1e-2)
    trainer.step(0)
    before, state = weights(trainer).clone(), [value.clone() for value in moments(trainer)]
    step, calls = trainer.optimizer.step, []

    def bad_from_now_on():
        calls.append(step())
        trainer.parameters[0].data[...] = float("nan")

    monkeypatch.setattr(trainer.optimizer, "step", bad_from_now_on)
    with pytest.raises(FloatingPointError):
        trainer.step(1)
    assert len(calls) == 1 and torch.equal(weights(trainer), before)
    assert all(torch.equal(a, b) for a, b in zip(moments(trainer), state, strict=True))
    assert {int(trainer.optimizer.state[p]["step"]) for p in trainer.parameters} == {2}


def test_moments_of_the_other_kind_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    full(tmp_path, "run", iterations=2).run()
    other = full(tmp_path, "run", iterations=3, state="float32")
    with pytest.raises(ValueError, match=r"optimizer.state: 8bit -> float32: put it back, or give --allow-changes"):
        other.run(mode="resume")
    with pytest.raises(ValueError, match=r"^--resume: optimizer.state: the checkpoint's moments are 8bit, got float32"):
        other.run(mode="resume", allow_changes=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 2
