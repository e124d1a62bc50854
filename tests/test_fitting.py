"""Out of memory: the message, the micro-batch found by trying, and that it gives what the same number by hand gives."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_trainer import make, numbers, weights

from vipo import fitting
from vipo.fitting import OutOfMemory, find_micro_batch
from vipo.runlog import read_metrics

CPU = torch.device("cpu")


def linear_trial(base, slope, waiting=0.0, breaks_at=None):
    """A trial that holds base + slope n bytes for real, or runs out of memory."""
    tried = []

    def trial(size):
        tried.append(size)
        if breaks_at is not None and size >= breaks_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total capacity")
        torch.empty(base + slope * size, dtype=torch.uint8)
        return waiting

    return trial, tried


@pytest.mark.parametrize(
    ("limit", "expected", "sizes"),
    [
        (10**9, 12, [1, 2, 4, 8, 12]),  # everything fits
        (1000 + 100 * 5, 4, [1, 2, 4, 5]),  # 5 fit; 12 samples make three micro-batches of 4, as with 5
        (1000 + 100 * 7, 6, [1, 2, 4, 7]),
        (1000 + 100 * 3, 3, [1, 2, 3]),
        (1000, 0, [1]),
    ],
)
def test_the_line_through_two_needs_finds_the_largest_that_fits(limit, expected, sizes):
    trial, tried = linear_trial(1000, 100)
    found = find_micro_batch(trial, 12, CPU, later=0, limit=limit)
    assert (found.micro_batch, tried) == (expected, sizes)
    assert found.needs[1] == 1100 and found.need(9) == (1900 if expected else 9 * 1100 or None)


@pytest.mark.parametrize(("limit", "expected", "sizes"), [(2199, 1, [1]), (2200, 12, [1, 2, 4, 8, 12])])
def test_where_memory_must_not_run_out_two_are_tried_only_if_twice_one_fits(limit, expected, sizes):
    trial, tried = linear_trial(1000, 100)
    found = find_micro_batch(trial, 12, CPU, later=0, limit=limit, once=True)
    assert (found.micro_batch, tried) == (expected, sizes)


def test_what_waits_and_what_comes_later_count():
    trial, _ = linear_trial(1000, 100, waiting=50.0)
    found = find_micro_batch(trial, 12, CPU, later=30, limit=10**9)
    assert found.needs[2] == 1000 + 200 + 10 * 50 + 30
    assert find_micro_batch(trial, 12, CPU, later=0, most=2, limit=10**9).needs.keys() == {1, 2}


def test_ranks_agree_on_the_least_of_them():
    """Of two ranks, the other needs 100 bytes more and has 30 less; both try the same sizes."""
    trials = [linear_trial(10, 5), linear_trial(110, 5)]
    alone = find_micro_batch(trials[1][0], 12, CPU, later=0, limit=150)
    agreed = find_micro_batch(
        trials[0][0], 12, CPU, later=0, limit=180, agree=lambda number: number + (100 if number > 0 else 30)
    )
    assert agreed == alone and 0 < agreed.micro_batch < 12


def test_a_size_that_breaks_is_approached_by_halves():
    trial, tried = linear_trial(0, 1, breaks_at=7)
    found = find_micro_batch(trial, 16, CPU, later=0, limit=10**9)
    assert tried == [1, 2, 4, 8, 6, 7] and found.micro_batch == 6 and "8: more than there is" in str(found)

    with pytest.raises(OutOfMemory, match="ran out at 8 samples, .* set sampling.micro_batch=4, which fitted"):
        find_micro_batch(trial, 16, CPU, later=0, limit=10**9, once=True)
    at_once = find_micro_batch(linear_trial(0, 1, breaks_at=1)[0], 16, CPU, later=0, limit=10**9, once=True)
    assert at_once.micro_batch == 0

    def programming_error(size):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        find_micro_batch(programming_error, 4, CPU, later=0, limit=1)


def test_auto_is_the_same_as_its_number_by_hand(tmp_path, monkeypatch):
    whole = make(tmp_path)
    needs = whole.fit(6).needs
    assert needs[1] < needs[2] < needs[4]
    before = weights(whole).clone(), torch.get_rng_state()
    whole.try_micro_batch(2)
    assert torch.equal(weights(whole), before[0]) and torch.equal(torch.get_rng_state(), before[1])
    limit = (needs[2] + (needs[4] - needs[2]) * 0.6) / fitting.USABLE  # 3 fit
    monkeypatch.setattr(fitting, "free_memory", lambda device: limit)
    runs = []
    for name, size in (("auto", "auto"), ("by_hand", 3)):
        trainer = make(tmp_path, sampling={"micro_batch": size}, run={"output": str(tmp_path / name), "iterations": 2})
        trainer.run()
        lines = [numbers(line) for line in read_metrics(tmp_path / name)]
        runs.append(([{k: v for k, v in line.items() if k != "micro_batch"} for line in lines], weights(trainer)))
    assert [line["micro_batch"] for line in read_metrics(tmp_path / "auto")] == [3, 3]
    assert json.loads((tmp_path / "auto" / "summary.json").read_text())["micro_batch"] == 3
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    monkeypatch.setattr(fitting, "free_memory", lambda device: 10**12)
    resumed = make(tmp_path, sampling={"micro_batch": "auto"}, run={"output": str(tmp_path / "auto"), "iterations": 3})
    assert resumed.micro_batch == 6
    resumed.run(mode="resume")
    assert resumed.micro_batch == 3  # as the run was begun
    monkeypatch.setattr(fitting, "free_memory", lambda device: 1000)
    with pytest.raises(OutOfMemory, match="auto: not even one sample fits .* what helps: model.gradient_checkpointing"):
        make(tmp_path, sampling={"micro_batch": "auto"})


def test_a_step_that_runs_out_names_what_fits(tmp_path):
    trainer = make(tmp_path)
    before = weights(trainer).clone()

    def breaks(module, args, kwargs):
        if torch.is_grad_enabled() and len(kwargs["hidden_states"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total capacity")

    trainer.policy.denoiser.register_forward_pre_hook(breaks, with_kwargs=True)
    message = (
        r"out of memory \(CUDA out of memory. Tried to allocate 2 GiB\); sampling.micro_batch=3 instead of 6 would fit "
        r"\(needed by size: 1: .* MiB, 2: .* 5: more than there is; limit .*\); what else .* first: "
        r"sampling.micro_batch \(smaller, or auto\), model.gradient_checkpointing=true, model.vae_tiling=true"
    )
    with pytest.raises(OutOfMemory, match=message):
        trainer.run()
    assert torch.equal(weights(trainer), before) and not (tmp_path / "run").exists()


LIMITED = """
import resource, sys
from vipo.cli import main
from vipo.trainer import Trainer

whole = Trainer.step

def limited(self, iteration):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + 150 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return whole(self, iteration)

Trainer.step = limited
main(sys.argv[1:])
"""


def test_the_command_line_under_a_real_limit(tmp_path):
    """150 MiB beyond the loaded models: 64 samples of the nano pipeline need several times that."""
    (tmp_path / "run.yaml").write_text(f"run: {{output: {tmp_path / 'run'}}}\n")
    arguments = ["train", str(tmp_path / "run.yaml"), "--prompts.group_size=64", "--sampling.num_inference_steps=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments, "--prompts.per_iteration=1"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("vipo: error: out of memory (")
    assert "sampling.micro_batch" in done.stderr and "model.gradient_checkpointing=true" in done.stderr
