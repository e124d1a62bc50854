"""Does memory stay flat? Trains the nano pipeline for some minutes and fits resident memory against the iteration.

    python bench/soak.py --minutes 30      a table, and docs/soak.json

RSS = a + b * iteration by least squares over all iterations after the warm-up, in MiB per 100 iterations. The points of
a trace lean on their neighbours, so the interval is that of the means of ten blocks (Student's t), not of the points.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from vipo import Config, Trainer
from vipo.files import write_atomically

BLOCKS = 10
PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20


class _Enough(Exception):
    """Ends the run when its minutes are over."""


def resident() -> float:
    """Resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def slope(iterations: NDArray[Any], memory: NDArray[Any]) -> tuple[float, float, float]:
    """Slope of memory per 100 iterations, with its 95 % interval, from the means of BLOCKS blocks.

    Raises:
        ValueError: fewer than two points per block.
    """
    if len(iterations) < 2 * BLOCKS:
        raise ValueError(f"{len(iterations)} iterations are too few for {BLOCKS} blocks; give more --minutes")
    x, y = (np.array([part.mean() for part in np.array_split(v, BLOCKS)]) for v in (iterations, memory))
    fit = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, BLOCKS - 2)) * fit.stderr
    return 100 * fit.slope, 100 * (fit.slope - half), 100 * (fit.slope + half)


def soak(minutes: float, recipe: str) -> dict[str, Any]:
    """Train for so long and return the trace and its slope."""
    config = Config.from_yaml(Path(__file__).parents[1] / "src" / "vipo" / "recipes" / f"{recipe}.yaml")
    memory: list[float] = []
    started = time.monotonic()

    def on_iteration(iteration: int, metrics: dict[str, Any]) -> None:
        memory.append(resident())
        if time.monotonic() - started > 60 * minutes:
            raise _Enough

    with tempfile.TemporaryDirectory() as folder:
        run = config.run.model_copy(update={"output": Path(folder) / "run", "iterations": 10**9})
        with contextlib.suppress(_Enough):
            Trainer(config.model_copy(update={"run": run})).run(on_iteration=on_iteration)
    warm = len(memory) // 5
    found = slope(np.arange(warm, len(memory)), np.array(memory[warm:]))
    return {
        "recipe": recipe,
        "minutes": minutes,
        "iterations": len(memory),
        "warm_up": warm,
        "mib_at_warm_up": round(memory[warm], 1),
        "mib_at_end": round(memory[-1], 1),
        "mib_largest": round(max(memory), 1),
        "mib_per_100_iterations": [round(value, 3) for value in found],
        "torch": torch.__version__,
        "trace": [round(value, 1) for value in memory[:: max(1, len(memory) // 500)]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--recipe", default="nano_vipo", choices=("nano_vipo", "nano_grpo", "nano_video_vipo"))
    parser.add_argument("--json", type=Path, default=Path(__file__).parents[1] / "docs" / "soak.json")
    options = parser.parse_args()
    record = soak(options.minutes, options.recipe)
    table = Table("recipe", "iterations", "MiB after warm-up", "at the end", "largest", "MiB per 100 iterations [95 %]")
    mean, low, high = record["mib_per_100_iterations"]
    sizes = [f"{record[key]:.1f}" for key in ("mib_at_warm_up", "mib_at_end", "mib_largest")]
    table.add_row(record["recipe"], str(record["iterations"]), *sizes, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    Console().print(table)
    write_atomically(options.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
