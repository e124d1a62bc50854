"""bench/step.py runs, writes what its docstring says, and its arithmetic is right."""

import json
import sys

import pytest
import step
import step_work
import torch

QUICK = step.QUICK


def test_a_quick_run_writes_the_numbers_and_the_tables(tmp_path, monkeypatch):
    (tmp_path / "performance.md").write_text(f"before\n{step.BEGIN}\nold\n{step.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["step.py", "--quick", "-o", str(tmp_path)])
    step.main()
    found = json.loads((tmp_path / "step.json").read_text())
    seconds = found["steps"]["tiny"]["seconds"]
    assert set(seconds) == {"step", "denoiser", "rollout", "map", "update"} and min(seconds.values()) > 0
    assert found["growth"]["group"]["bytes_power"] == pytest.approx(1, abs=0.05)  # twice the samples, twice the memory
    assert found["position_loss"]["memory"] == pytest.approx(1, abs=0.01)
    assert {row["note"] for row in found["options"] if "foreach" in row["option"]} == {"weights differ by 0e+00"}
    page = (tmp_path / "performance.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    assert page.count("| tiny, 0.1 M |") == 1 and "Per-position loss" in page and "| group | 2, 4 |" in page


def test_the_floor_is_the_denoisers_calls_of_a_step():
    trainer = step_work.make_trainer(QUICK)
    calls = step_work.denoiser_calls(trainer)
    assert [trained for *_, trained in calls] == [False] * 3 + [True] * 2
    apart, together = (gradient_of(trainer, work) for work in (calls[3:], step_work.joined(calls)))
    assert apart.norm() > 0
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def gradient_of(trainer, calls):
    trainer.optimizer.zero_grad()
    for args, kwargs, _ in calls:
        trainer.policy.denoiser(*args, **kwargs)[0].sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])


def test_power_of_a_power_law():
    assert step.power([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
