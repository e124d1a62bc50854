"""What the options of a run save, as ratios in one run: shared prefix steps, the frozen branch, stored steps.

    python bench/options.py [-o docs]

CPU seconds of this process (not wall time), least of several alternating repetitions, embedded pipelines, one thread.
Writes the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vipo import DiffusersPolicy
from vipo.files import write_atomically
from vipo.prompts import read_prompts
from vipo.types import StepRecord, Trajectory

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench/options.py: begin -->", "<!-- bench/options.py: end -->"
REPEATS, GROUP, STEPS = 5, 8, 8


def seconds(work: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Least CPU seconds of each of several pieces of work, taken in turns."""
    best = dict.fromkeys(work, float("inf"))
    for _ in range(REPEATS):
        for name, run in work.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    return best


def prefix(name: str, first: int) -> dict[str, float]:
    """A rollout of one group whose first `first` of 8 steps are deterministic: shared, and apart."""
    policy = DiffusersPolicy(name, kernel="dance_grpo", eta=0.5, stochastic_steps=range(first, STEPS - 1))
    prompt = read_prompts(name)[0].text
    call: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 1.0}

    def rollout(share: bool) -> Trajectory:
        return policy.rollout(
            [prompt] * GROUP, seeds=range(GROUP), initial_seeds=[7] * GROUP, share_prefix=share, **call
        )

    difference = (rollout(True).final - rollout(False).final).abs().max().item()
    found = seconds({"shared": lambda: rollout(True), "apart": lambda: rollout(False)})
    return {**found, "largest difference": difference}


def unconditional(name: str) -> dict[str, float]:
    """The replay of one step of one group with guidance: gradient through one branch, and through both."""
    policy = DiffusersPolicy(name, kernel="dance_grpo", eta=0.5)
    prompt = read_prompts(name)[0].text
    traj = policy.rollout([prompt] * GROUP, seeds=range(GROUP), num_inference_steps=STEPS, guidance_scale=3.0)

    def replay(kind: str) -> None:
        policy.unconditional = kind  # type: ignore[assignment]
        policy.replay(traj, steps=[2], on_step=lambda k, new, old: new.mean().backward())

    return seconds({"frozen": lambda: replay("frozen"), "trained": lambda: replay("trained")})


def recorded(name: str) -> dict[str, float]:
    """MB of the steps of one group: all of them, and three trained ones."""
    policy = DiffusersPolicy(name, kernel="dance_grpo", eta=0.5)
    prompt = read_prompts(name)[0].text
    traj = policy.rollout([prompt] * GROUP, seeds=range(GROUP), num_inference_steps=2 * STEPS)
    every = _megabytes(traj)
    traj.keep([1, 4, 9])
    return {"three trained": _megabytes(traj), "all": every}


def _megabytes(traj: Trajectory) -> float:
    """Of the records, every tensor once."""
    records: list[StepRecord] = list(traj.steps.values())
    tensors = [t for r in records for t in (r.latents, r.next_latents, r.log_probs) if t is not None]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values()) / 2**20


def main() -> None:
    """Measure, print, and write the table into performance.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| option | pipeline | with | without | ratio |", "|---|---|---|---|---|"]

    def row(option: str, name: str, unit: str, found: dict[str, float]) -> None:
        (_, with_it), (_, without) = list(found.items())[:2]
        cells = [option, name, f"{with_it:.3f} {unit}", f"{without:.3f} {unit}", f"{with_it / without:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], {k: f"{v:.2g}" for k, v in found.items()}, flush=True)

    for name in ("nano", "nano_video"):
        for first in (2, 4):
            row(
                f"prefix of {first} of {STEPS} steps shared by {GROUP} samples, rollout", name, "s", prefix(name, first)
            )
    row("unconditional: frozen, replay of one guided step", "nano_video", "s", unconditional("nano_video"))
    row("recorded steps: 3 trained of 16", "nano_video", "MB", recorded("nano_video"))
    page = options.output / "performance.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    write_atomically(page, f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
