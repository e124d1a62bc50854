"""What three options give: model.compile, which needs a compiler; optimizer.state=8bit, bitsandbytes; reward.async.

    python bench/extras.py compile [-o docs]
    python bench/extras.py 8bit [-o docs]        needs: pip install "vipo[8bit]"
    python bench/extras.py async [-o docs]       needs: two idle cores

CPU seconds of this process (of async wall seconds), least of several alternating repetitions, one thread; a warm-up
counts the compiler's processes too. Each command writes its own table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from step_work import ROOT, WIDE, Stopwatch, make_trainer
from torch import Tensor, nn

from vipo import Config, Trainer
from vipo.config import OptimizerConfig
from vipo.files import write_atomically
from vipo.optimizer import make_optimizer
from vipo.pipelines import compile_blocks
from vipo.rewards import Reward
from vipo.runlog import PhaseClock
from vipo.types import Experience

RECIPES = ROOT / "src" / "vipo" / "recipes"
REPEATS, OPTIMIZER_STEPS, ITERATIONS = 5, 5, 20
WAIT = 0.3
"""Seconds."""
RATE = 1e-4
"""Of the run with full weights."""


def with_children() -> float:
    """CPU seconds of this process and of those it has waited for."""
    return sum(os.times()[:4])


def wide_sd3(compiled: bool) -> Trainer:
    """bench/step.py's wider SD3; its blocks by hand: diffusers names none of SD3, so that model.compile refuses it."""
    trainer = make_trainer(WIDE)
    denoiser: Any = trainer.policy.denoiser
    if compiled:
        denoiser._repeated_blocks = denoiser._no_split_modules
        compile_blocks({"transformer": denoiser})
    return trainer


def nano_video(compiled: bool) -> Trainer:
    """The embedded Wan, as its recipe trains it."""
    flag = f"--model.compile={str(compiled).lower()}"
    return Trainer(Config.from_yaml(RECIPES / "nano_video_vipo.yaml", [flag, "--prompts.per_iteration=1"]))


def drift(trainer: Trainer) -> float:
    """Largest difference of a replayed log-prob from the rollout's, nats, before any update."""
    found = trainer.experience(0, PhaseClock(trainer.policy.device))
    largest: list[Tensor] = []
    for traj in found.trajectories:
        trainer.policy.replay(traj, on_step=lambda k, new, old: largest.append((new - old).detach().abs().max()))
    return float(torch.stack(largest).max())


def updated(trainer: Trainer, found: Experience) -> None:
    """Take the optimizer's steps of one rollout, with maps of ones."""
    trainer._update(found, [torch.ones(len(bucket.frames), *bucket.grid) for bucket in found.buckets])


def compiled(name: str, make: Callable[[bool], Trainer]) -> list[str]:
    """A line per part of a step: seconds compiled, plain, their ratio; what the warm-up adds, and drifts."""
    trainers = {"with": make(True), "without": make(False)}
    clock, warm, moved = PhaseClock(torch.device("cpu")), {}, {}
    for kind, trainer in trainers.items():
        started = with_children()
        moved[kind] = drift(trainer)
        updated(trainer, trainer.experience(0, clock))
        warm[kind] = with_children() - started
        print(name, kind, f"first calls {warm[kind]:.1f} s, drift {moved[kind]:.1e} nats", flush=True)
    found = {kind: trainer.experience(1, clock) for kind, trainer in trainers.items()}
    watch = Stopwatch("cpu")
    seconds = {
        "rollout": watch.least({k: lambda t=t: t.experience(1, clock) for k, t in trainers.items()}, REPEATS),
        "update": watch.least({k: lambda k=k, t=t: updated(t, found[k]) for k, t in trainers.items()}, REPEATS),
    }
    rest = [f"{warm['with'] - warm['without']:.0f} s", *(f"{moved[kind]:.0e}" for kind in trainers)]
    return [
        _line(
            f"{name}, {part}", f"{s['with']:.3f} s", f"{s['without']:.3f} s", f"{s['with'] / s['without']:.2f}", *rest
        )
        for part, s in seconds.items()
    ]


def compile_table() -> list[str]:
    """Both denoisers."""
    with tempfile.TemporaryDirectory(prefix="vipo-compiled-") as cache:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # nothing from earlier
        rows = [
            row for name, make in (("nano_video", nano_video), ("SD3, 7.5 M", wide_sd3)) for row in compiled(name, make)
        ]
    head = [
        "| part | compiled | plain | ratio | warm-up | drift, compiled | drift, plain |",
        "|---|---|---|---|---|---|---|",
    ]
    return head + rows


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of every tensor of the state, once."""
    tensors = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def optimizer_steps(name: str, weights: Sequence[Tensor]) -> str:
    """A line: bytes of state per weight and seconds of a step, in 8 bits and in float32."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for state in ("8bit", "float32"):
        ours = [nn.Parameter(weight.detach().clone()) for weight in weights]
        for weight in ours:
            weight.grad = torch.randn(weight.shape, generator=generator)
        made[state] = make_optimizer(ours, OptimizerConfig(state=state))  # type: ignore[arg-type]
    run = {state: lambda o=o: [o.step() for _ in range(OPTIMIZER_STEPS)] for state, o in made.items()}
    seconds = Stopwatch("cpu").least(run, REPEATS)
    count = sum(weight.numel() for weight in weights)
    cells = [f"{state_bytes(o) / count:.2f} bytes" for o in made.values()]
    cells += [f"{1000 * seconds[state] / OPTIMIZER_STEPS:.1f} ms" for state in made]
    return _line(f"{name}, all {count / 1e6:.1f} M weights", *cells, f"{seconds['8bit'] / seconds['float32']:.1f}")


def training(seed: int) -> str:
    """A sentence: full weights of nano trained either way from one seed."""
    changed = ["--model.train=full", f"--optimizer.learning_rate={RATE}", f"--run.seed={seed}"]
    rewards, ends = {}, {}
    for state in ("8bit", "float32"):
        trainer = Trainer(Config.from_yaml(RECIPES / "nano_vipo.yaml", [*changed, f"--optimizer.state={state}"]))
        start = torch.cat([p.detach().flatten() for p in trainer.parameters])
        rewards[state] = [trainer.step(iteration)["reward_mean"] for iteration in range(ITERATIONS)]
        ends[state] = torch.cat([p.detach().flatten() for p in trainer.parameters])
    apart = max(abs(a - b) for a, b in zip(*rewards.values(), strict=True))
    share = float((ends["8bit"] - ends["float32"]).norm() / (ends["float32"] - start).norm())
    first, last = (sum(part) / 5 for part in (rewards["float32"][:5], rewards["float32"][-5:]))
    ours = sum(rewards["8bit"][-5:]) / 5
    return (
        f"Full weights of nano, seed {seed}, {ITERATIONS} iterations at {RATE}: the weights end {100 * share:.1f} % of "
        f"the way apart that float32 moved them; mean rewards differ by {apart:.4f} at most, those of the last five "
        f"iterations are {ours:.3f} in 8 bits and {last:.3f} in float32 (first five: {first:.3f})."
    )


def eight_bit_table() -> list[str]:
    """State, steps, and training."""
    sd3 = make_trainer(WIDE).policy.denoiser
    wide = [p for name, p in sd3.named_parameters() if "lora" not in name]
    nano = Trainer(Config.from_yaml(RECIPES / "nano_vipo.yaml", ["--model.train=full"])).parameters
    lines = [
        "| weights | state, 8 bits | state, float32 | a step, 8 bits | a step, float32 | ratio |",
        "|---|---|---|---|---|---|",
    ]
    lines += [optimizer_steps("SD3", wide), optimizer_steps("nano", nano), ""]
    return [*lines, *(training(seed) for seed in (0, 1))]


def waiting(frames: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that waits as for a server."""
    time.sleep(WAIT)
    return frames.mean((1, 2, 3, 4))


def beside(name: str, reward: Reward | None) -> str:
    """A line: wall seconds of rollout, reward and map, in sequence and with the last two in a thread beside."""
    made = {
        flag: Trainer(
            Config.from_yaml(
                RECIPES / "nano_vipo.yaml", ["--sampling.micro_batch=8", f"--reward.async={str(flag).lower()}"]
            ),
            reward=reward,
        )
        for flag in (False, True)
    }
    seconds: dict[bool, list[float]] = {flag: [] for flag in made}
    for turn in range(REPEATS + 1):  # the first is the warm-up
        for flag, trainer in made.items():
            started = time.perf_counter()
            found = trainer.experience(turn, PhaseClock(trainer.policy.device))
            trainer.maps_of(found, turn)
            seconds[flag].append(time.perf_counter() - started)
    plain, overlapped = (min(seconds[flag][1:]) for flag in made)
    return _line(name, f"{plain:.3f} s", f"{overlapped:.3f} s", f"{overlapped / plain:.2f}")


def async_table() -> list[str]:
    """The recipe's own reward, and one that only waits."""
    head = ["| nano_vipo, 4 micro-batches of 8 | in sequence | beside | ratio |", "|---|---|---|---|"]
    slow = f"a reward that waits {WAIT} s per micro-batch, and the map"
    return [*head, beside("its reward and map", None), beside(slow, waiting)]


TABLES: dict[str, Callable[[], list[str]]] = {
    "compile": compile_table,
    "8bit": eight_bit_table,
    "async": async_table,
}


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, print, and write one table into performance.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=TABLES)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = "\n".join(TABLES[options.what]())
    print(text)
    page = options.output / "performance.md"
    begin, end = (f"<!-- bench/extras.py {options.what}: {word} -->" for word in ("begin", "end"))
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    write_atomically(page, f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main()
