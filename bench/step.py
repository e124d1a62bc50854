"""One training step: samples per second, time outside the denoiser, what options save, growth. CPU; GPU on request.

    python bench/step.py [-o docs] [--quick]        docs/step.json and the tables of docs/performance.md
    python bench/step.py --device cuda -o FOLDER    real sizes and FOLDER/step_profile.txt; never run here

CPU seconds of this process (not wall time), least of several alternating repetitions, one thread, so samples/s are per
CPU second of one thread. Memory is the most that the tensors made during a step take at once, weights not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from step_work import (
    CUDA,
    ROOT,
    TINY,
    WIDE,
    Calls,
    Stopwatch,
    Work,
    denoiser_calls,
    joined,
    make_policy,
    make_trainer,
    run_denoiser,
)
from syncs import Syncs
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vipo import DiffusersPolicy, Trainer
from vipo.files import write_atomically
from vipo.losses import policy_loss
from vipo.memory.live import Live
from vipo.pipelines import enable_vae
from vipo.runlog import PhaseClock

BEGIN, END = "<!-- bench/step.py: begin -->", "<!-- bench/step.py: end -->"
OPTIMIZER_STEPS = 20
PROMPT = "a red cat on a green mat"
QUICK = replace(TINY, group=2, steps=3)
MIDDLE = replace(TINY, width=160, group=4)
GROWTH: dict[str, tuple[Work, list[int]]] = {
    "group": (MIDDLE, [2, 4, 8, 16]),
    "steps": (MIDDLE, [3, 6, 12, 24]),
    "pixels": (MIDDLE, [64, 128, 192, 256]),
    "frames": (replace(TINY, family="wan", group=2), [5, 9, 17, 33]),
}


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that the tensors made by `run` take at once."""
    with Live() as live:
        run()
    return live.peak


def measure_step(work: Work, repeats: int) -> dict[str, Any]:
    """Seconds of a step and of its parts, and of the same denoiser calls alone, in turns."""
    trainer, watch = make_trainer(work), Stopwatch(work.device)
    calls = denoiser_calls(trainer)
    parts: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = watch()
            result = function(*args, **kwargs)
            parts[name] = min(parts.get(name, math.inf), watch() - started)
            return result

        return call

    with Syncs() as syncs:
        trainer.step(1)
    peak = peak_bytes(lambda: trainer.step(2))
    with (
        mock.patch.object(trainer, "experience", timed("rollout", trainer.experience)),
        mock.patch.object(trainer, "maps_of", timed("map", trainer.maps_of)),
        mock.patch.object(trainer, "_update", timed("update", trainer._update)),
    ):
        found = watch.least(
            {"step": lambda: trainer.step(3), "denoiser": lambda: run_denoiser(trainer, calls)}, repeats
        )
    found |= parts
    return {
        "work": asdict(work),
        "parameters": sum(p.numel() for p in trainer.policy.denoiser.parameters()),
        "seconds": found,
        "outside": 1 - found["denoiser"] / (found["step"] - found["map"]),
        "peak_bytes": peak,
        "host_reads": dict(syncs.places.most_common()),
    }


def step_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Workload A."""
    lines = [
        "| denoiser | rollout | update | step | step's seconds | of them map | outside the denoiser | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        seconds, samples = row["seconds"], row["work"]["group"]
        rates = [f"{samples / seconds[part]:.1f} samples/s" for part in ("rollout", "update", "step")]
        cells = [f"{name}, {row['parameters'] / 1e6:.1f} M", *rates, f"{seconds['step']:.3f}", f"{seconds['map']:.3f}"]
        lines.append(_line(*cells, f"{100 * row['outside']:.1f} %", f"{row['peak_bytes'] / 2**20:.1f} MB"))
    return lines


def grouped(work: Work, repeats: int) -> dict[str, float]:
    """A rollout of one group in one batch, and sample by sample."""
    policy = make_policy(work)
    call = {"num_inference_steps": work.steps, "height": work.pixels, "width": work.pixels, "max_sequence_length": 8}

    def rollout(size: int) -> None:
        for first in range(0, work.group, size):
            policy.rollout([PROMPT] * size, seeds=range(first, first + size), guidance_scale=1.0, **call)

    return Stopwatch("cpu").least({"with": lambda: rollout(work.group), "without": lambda: rollout(1)}, repeats)


def embeddings(work: Work, repeats: int) -> dict[str, float]:
    """A replay of all trained steps on recorded embeddings, and encoding the prompts again."""
    policy = make_policy(work)
    call = {"num_inference_steps": work.steps, "height": work.pixels, "width": work.pixels, "max_sequence_length": 8}
    traj = policy.rollout([PROMPT] * work.group, seeds=range(work.group), guidance_scale=1.0, **call)

    def replay() -> None:
        policy.replay(traj, on_step=lambda k, now, old: now.mean().backward())

    def encode_again() -> None:
        with mock.patch("vipo.pipelines.conditioning", lambda pipeline: []):
            replay()

    return Stopwatch("cpu").least({"with": replay, "without": encode_again}, repeats)


def several_steps(trainer: Trainer, calls: Calls, repeats: int) -> tuple[dict[str, float], float]:
    """All trained steps in one denoiser call with backward, and one by one; and how many times the memory it takes."""
    together, apart = joined(calls), [call for call in calls if call[2]]
    work = {"with": lambda: run_denoiser(trainer, together), "without": lambda: run_denoiser(trainer, apart)}
    return Stopwatch("cpu").least(work, repeats), peak_bytes(work["with"]) / peak_bytes(work["without"])


def optimizers(weights: Sequence[Tensor], repeats: int, kind: str) -> tuple[dict[str, float], float]:
    """Steps of AdamW of a kind and of the default one; and the largest difference of the weights after as many."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(weight.shape, generator=generator) for weight in weights]
    gradients = [torch.randn(weight.shape, generator=generator) for weight in weights]

    def make(**options: Any) -> tuple[list[Tensor], Callable[[], None]]:
        weights = [tensor.clone().requires_grad_() for tensor in start]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer = torch.optim.AdamW(weights, 3e-4, weight_decay=1e-4, **options)

        def run() -> None:
            for _ in range(OPTIMIZER_STEPS):
                optimizer.step()

        return weights, run

    chosen, fast = make(**{kind: True})
    usual, slow = make()
    found = Stopwatch("cpu").least({"with": fast, "without": slow}, repeats)  # both ran as often
    return found, max(float((a - b).detach().abs().max()) for a, b in zip(chosen, usual, strict=True))


def channels_last(name: str, repeats: int) -> tuple[dict[str, float], float]:
    """Decoding one group of an embedded pipeline, in either memory format; and the largest difference of the frames."""
    policies = {kind: DiffusersPolicy(name, train="none", kernel="dance_grpo") for kind in ("with", "without")}
    enable_vae(policies["with"].pipeline, tiling=False, slicing=False, channels_last=True)
    traj = policies["without"].rollout([PROMPT] * 8, seeds=range(8), num_inference_steps=2)
    found = Stopwatch("cpu").least({kind: lambda p=p: p.decode(traj) for kind, p in policies.items()}, repeats)
    frames = [policy.decode(traj) for policy in policies.values()]
    return found, float((frames[0] - frames[1]).abs().max())


def measure_options(sizes: dict[str, Work], embedded: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Every option at every size; a ratio below 1 is a gain."""
    rows: list[dict[str, Any]] = []

    def row(option: str, size: str, seconds: dict[str, float], note: str = "") -> None:
        rows.append({"option": option, "denoiser": size, **seconds, "note": note})
        print(rows[-1], flush=True)

    for name, work in sizes.items():
        trainer = make_trainer(work)
        calls = denoiser_calls(trainer)
        row("one batch per group, rollout", name, grouped(work, repeats))
        row("recorded embeddings, replay", name, embeddings(work, repeats))
        seconds, memory = several_steps(trainer, calls, repeats)
        row(f"{work.steps - 1} trained steps in one denoiser call", name, seconds, f"memory x {memory:.1f}")
        trained = {"LoRA": trainer.parameters, "all weights": list(trainer.policy.denoiser.parameters())}
        for (which, weights), kind in itertools.product(trained.items(), ("fused", "foreach")):
            seconds, difference = optimizers(weights, repeats, kind)
            row(
                f"AdamW {kind} of {which}, {OPTIMIZER_STEPS} steps",
                name,
                seconds,
                f"weights differ by {difference:.0e}",
            )
    for name in embedded:
        seconds, difference = channels_last(name, 2 * repeats)
        row("channels-last VAE, decoding", name, seconds, f"frames differ by {difference:.0e}")
    return rows


def option_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ratios in one run."""
    lines = ["| option | denoiser | with | without | ratio | |", "|---|---|---|---|---|---|"]
    for row in rows:
        fast, slow = row["with"], row["without"]
        cells = (row["option"], row["denoiser"], f"{fast:.4f} s", f"{slow:.4f} s", f"{fast / slow:.2f}", row["note"])
        lines.append(_line(*cells))
    return lines


def position_loss(work: Work, repeats: int) -> dict[str, float]:
    """The update of one rollout with a map at position level, over ones at sample level: time and memory.

    The loss is timed alone, 100 calls with backward at either level: within an update the difference would drown.
    """
    trainer = make_trainer(work)
    found = trainer.experience(0, PhaseClock(trainer.policy.device))
    maps = {"position": trainer.maps_of(found, 0)}
    maps["sample"] = [torch.ones_like(part) for part in maps["position"]]

    def update(level: str) -> None:
        loss = trainer.config.loss.model_copy(update={"level": level})
        trainer.config = trainer.config.model_copy(update={"loss": loss})
        trainer.accumulate(found, maps[level], found.plan[0], defaultdict(list))

    shape = (work.group, *found.trajectories[0].latent_shape)
    old_log_probs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    log_probs = old_log_probs.clone().requires_grad_()

    def loss(level: Any) -> None:
        for _ in range(100):
            policy_loss(log_probs, old_log_probs, maps[level][0], clip_range=0.1, level=level)[0].backward()

    watch, levels = Stopwatch("cpu"), ("position", "sample")
    whole = watch.least({"sample": lambda: update("sample")}, repeats)["sample"]
    alone = watch.least({level: lambda level=level: loss(level) for level in levels}, 3 * repeats)
    peaks = {level: peak_bytes(lambda level=level: update(level)) for level in levels}
    per_step = {level: seconds / 100 for level, seconds in alone.items()}
    return {
        "time": 1 + len(found.plan[0]) * (per_step["position"] - per_step["sample"]) / whole,
        "memory": peaks["position"] / peaks["sample"],
        "seconds_update": whole,
        **{f"seconds_loss_{level}": value for level, value in per_step.items()},
    }


def measure_growth(growth: dict[str, tuple[Work, list[int]]], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds and memory of a step against one size at a time, with the powers of a log-log fit."""
    found: dict[str, dict[str, Any]] = {}
    for name, (work, sizes) in growth.items():
        seconds, peaks = [], []
        for size in sizes:
            trainer = make_trainer(replace(work, **{name: size}))
            seconds.append(Stopwatch("cpu").least({"step": lambda: trainer.step(1)}, repeats)["step"])  # noqa: B023
            peaks.append(peak_bytes(lambda: trainer.step(2)))  # noqa: B023
        powers = {"seconds_power": power(sizes, seconds), "bytes_power": power(sizes, peaks)}
        found[name] = {"sizes": sizes, "seconds": seconds, "bytes": peaks, **powers}
        print(name, found[name], flush=True)
    return found


def power(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit values = c size^power by least squares of the logarithms."""
    x, y = ([math.log(value) for value in column] for column in (sizes, values))
    middle, height = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True))
    return products / sum((a - middle) ** 2 for a in x)


def growth_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Sizes, seconds, memory and their powers."""
    lines = ["| against | sizes | seconds of a step | power | peak MB | power |", "|---|---|---|---|---|---|"]
    for name, row in found.items():
        seconds = ", ".join(f"{value:.2f}" for value in row["seconds"])
        megabytes = ", ".join(f"{value / 2**20:.1f}" for value in row["bytes"])
        sizes = ", ".join(map(str, row["sizes"]))
        lines.append(_line(name, sizes, seconds, f"{row['seconds_power']:.2f}", megabytes, f"{row['bytes_power']:.2f}"))
    return lines


def loss_table(found: dict[str, float]) -> list[str]:
    """The one line about the loss."""
    seconds, memory = (f"{100 * (found[name] - 1):+.2f} %" for name in ("time", "memory"))
    return [f"Per-position loss with a map against the scalar loss, one update: time {seconds}, peak memory {memory}."]


def profile_table(work: Work) -> str:
    """The profiler's table of one step: kernels, gaps (CPU time without kernels) and synchronisations."""
    trainer = make_trainer(work)
    trainer.step(0)
    cuda = work.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        trainer.step(1)
    return profiler.key_averages().table(sort_by=f"self_{work.device}_time_total", row_limit=60)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, print, and write the JSON and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--quick", action="store_true", help="a tiny denoiser, few steps, one repetition")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats, growth, embedded = 3, GROWTH, ("nano", "nano_video")
    sizes = {"tiny": TINY, "10x wider": WIDE}
    if options.quick:
        sizes = {"tiny": QUICK}
        repeats, growth, embedded = 1, {"group": (QUICK, [2, 4])}, ("nano",)
    if options.device == "cuda":
        sizes = {"SD3 Medium's size": CUDA}
        write_atomically(options.output / "step_profile.txt", profile_table(CUDA))
    found: dict[str, Any] = {"steps": {name: measure_step(work, repeats) for name, work in sizes.items()}}
    tables = [step_table(found["steps"])]
    print(found, flush=True)
    if options.device == "cpu":
        found["options"] = measure_options(sizes, embedded, repeats)
        found["position_loss"] = position_loss(list(sizes.values())[-1], repeats)
        found["growth"] = measure_growth(growth, min(repeats, 2))
        tables += [option_table(found["options"]), loss_table(found["position_loss"]), growth_table(found["growth"])]
    write_atomically(options.output / "step.json", json.dumps(found, indent=1) + "\n")
    text = "\n\n".join("\n".join(lines) for lines in tables)
    print(text)
    page = options.output / "performance.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN) if page.exists() else ("", "", "")
    write_atomically(page, f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
