"""`vipo demo`: an embedded pipeline post-trained from the same weights by scalar GRPO and by ViPO, then compared."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from .config import Config, MapConfig
from .demo_kinds import IMAGES, METHODS, Kind
from .evaluation import Values, bootstrap_mean, evaluate, paired_difference
from .files import write_atomically
from .maps import MapSource
from .media import write_animation, write_image
from .named import read_yaml
from .nano import ASSETS
from .pictures import film_strip, overlay_clips
from .prompts import read_prompts
from .psm.latent_grid import frame_groups, spread_time
from .report import render_report
from .rewards import load_reward, score
from .runlog import CLIP_FPS, CONFIG, check_output, read_metrics, write_summary
from .safety import versions
from .trainer import Trainer

Progress = Callable[[str, int, int, str], None]
"""(stage, done, total, remark)"""


def run_demo(
    output: Path,
    kind: Kind = IMAGES,
    *,
    seed: int = 0,
    iterations: int | None = None,
    prompts: int = 128,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total, remark: None,
) -> dict[str, Any]:
    """Train both methods, evaluate, and write the run directory with report.html and summary.json.

    Args:
        output: run directory; must be new unless `overwrite`.
        kind: pictures or clips.
        seed: of everything.
        iterations: per method; None for the recipe's.
        prompts: held-out prompts evaluated.
        overwrite: replace an earlier run.
        progress: told how far each stage is.

    Returns:
        The summary.
    """
    check_output(output, overwrite=overwrite)
    if overwrite and output.exists():
        shutil.rmtree(output)
    started = time.perf_counter()
    times: dict[str, float] = {}
    configs = {method: demo_config(kind.recipes[method], output / method, seed, iterations) for method in METHODS}
    held_out = HeldOut(kind, [prompt.text for prompt in read_prompts(str(ASSETS / kind.held_out))][-prompts:], progress)
    for method, config in configs.items():
        trainer = Trainer(config)
        if not held_out.values:
            held_out.assess("base", trainer)
        begun = time.perf_counter()

        def on_iteration(
            iteration: int, metrics: dict[str, Any], method: str = method, config: Config = config
        ) -> None:
            progress(f"train {method}", iteration, config.run.iterations, f"reward {metrics['reward_mean']:.3f}")

        trainer.run(on_iteration=on_iteration)
        times[f"train_{method}"] = time.perf_counter() - begun
        held_out.assess(method, trainer)
    times["evaluate"] = held_out.seconds
    _, *grid = trainer.maps.shape
    samples = _save_samples(output, held_out, configs["vipo"].map, (grid[0], grid[1], grid[2]))
    times["total"] = time.perf_counter() - started
    summary = {
        "kind": "demo",
        "modality": kind.modality,
        "seed": seed,
        "command": f"{kind.command} --seed {seed}",
        **versions(),
        "times": {name: round(seconds, 2) for name, seconds in times.items()},
        "metrics": [metric.entry() for metric in kind.metrics],
        **compare(kind, held_out.values),
        "curves": {method: _curve(output / method) for method in METHODS},
        "samples": samples,
        "notes": notes(kind, held_out.values),
    }
    shared = {method: config.model_dump(mode="json") for method, config in configs.items()}
    write_atomically(output / CONFIG, yaml.safe_dump(shared, sort_keys=False))
    write_summary(output, summary)
    render_report(output)
    return summary


class HeldOut:
    """Held-out prompts, and what each method made of them with the same seeds.

    Args:
        kind: what is measured.
        prompts: n prompts that were not trained on.
        progress: told how far an evaluation is.

    Attributes:
        frames: by method, (n, F, 3, 64, 64).
        values: by method and metric, (n,).
        seconds: spent so far.
    """

    def __init__(self, kind: Kind, prompts: list[str], progress: Progress) -> None:
        self.kind, self.prompts, self.progress = kind, prompts, progress
        self.rewards = {m.name: load_reward(m.reward) for m in kind.metrics if m.reward}
        self.frames: dict[str, Tensor] = {}
        self.values: dict[str, dict[str, Values]] = {}
        self.seconds = 0.0

    def measures(self, frames: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        exact = self.kind.measure(frames, prompts)
        return {
            m.name: score(self.rewards[m.name], frames, prompts).rewards if m.reward else exact[m.name]
            for m in self.kind.metrics
        }

    def assess(self, name: str, trainer: Trainer) -> None:
        """Evaluate a trainer's present weights under `name`."""
        begun, total, done = time.perf_counter(), len(self.prompts), 0

        def on_batch(count: int) -> None:
            nonlocal done
            done += count
            self.progress(f"evaluate {name}", done, total, "")

        sampling = trainer.config.sampling
        self.frames[name], self.values[name] = evaluate(
            trainer.policy,
            self.prompts,
            [10_000 + i for i in range(total)],
            self.measures,
            on_batch=on_batch,
            num_inference_steps=sampling.num_inference_steps,
            **sampling.pipeline_call,
        )
        self.seconds += time.perf_counter() - begun


def demo_config(recipe: str, output: Path, seed: int, iterations: int | None) -> Config:
    """A recipe with the demo's output, seed and length."""
    mapping = read_yaml(Path(__file__).parent / "recipes" / f"{recipe}.yaml")
    mapping["run"] = {**mapping.get("run", {}), "output": str(output), "seed": seed}
    if iterations is not None:
        mapping["run"]["iterations"] = iterations
    return Config.from_mapping(mapping)


def compare(kind: Kind, values: dict[str, dict[str, Values]]) -> dict[str, Any]:
    """Means with intervals per method, and paired differences between methods."""
    means = {name: {m.name: bootstrap_mean(v[m.name]) for m in kind.metrics} for name, v in values.items()}
    differences = {
        f"{new}-{old}": {
            m.name: paired_difference(values[new][m.name], values[old][m.name], higher_is_better=m.higher_is_better)
            for m in kind.metrics
        }
        for new, old in (("grpo", "base"), ("vipo", "base"), ("vipo", "grpo"))
    }
    count = len(values["base"][kind.metrics[0].name])
    return {"evaluation": {"prompts": count, **means}, "differences": differences}


def comparison_table(summary: dict[str, Any]) -> Any:
    """Make the table of held-out means with 95 % intervals, and ViPO's paired difference to GRPO."""
    from rich.table import Table

    table = Table(title=f"{summary['evaluation']['prompts']} held-out prompts, mean [95 % interval]")
    for heading in ("metric", "base", *METHODS.values(), "ViPO - GRPO"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")

    def cell(entry: dict[str, Any]) -> str:
        return "-" if entry["mean"] is None else f"{entry['mean']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"

    for metric in summary["metrics"]:
        arrow = "higher is better" if metric["higher_is_better"] else "lower is better"
        rows = [summary["evaluation"][name][metric["name"]] for name in ("base", *METHODS)]
        difference = summary["differences"]["vipo-grpo"][metric["name"]]
        table.add_row(f"{metric['label']} ({arrow})", *map(cell, rows), cell(difference))
    return table


def notes(kind: Kind, values: dict[str, dict[str, Values]]) -> list[str]:
    """Plain remarks on what did not improve, so that the page does not hide it."""
    remarks = ["One seed of a small world: the intervals cover prompts, not training runs."]
    for method, title in METHODS.items():
        for m in kind.metrics:
            label = m.label[0].lower() + m.label[1:]
            change = paired_difference(values[method][m.name], values["base"][m.name])
            low, high = change["low"], change["high"]
            if low is None or high is None:
                continue
            worse = high < 0 if m.higher_is_better else low > 0
            if worse:
                remarks.append(f"{title} made {label} worse than the base model's.")
            elif low <= 0 <= high:
                remarks.append(f"{title} changed {label} by no more than the interval.")
    return remarks


def _curve(run: Path) -> dict[str, list[float]]:
    lines = read_metrics(run)
    return {key: [line[key] for line in lines] for key in ("iteration", "reward_mean", "reward_std")}


@torch.no_grad()
def _save_samples(
    output: Path, held_out: HeldOut, config: MapConfig, grid: tuple[int, int, int], count: int = 12
) -> list[dict[str, Any]]:
    """Save the first held-out samples, chosen by position and not by result, and the map over ViPO's."""
    frames = {name: f[:count] for name, f in held_out.frames.items()}
    compression, alone = frame_groups(frames["vipo"].shape[1], grid[0])
    maps = MapSource(config)(frames["vipo"], held_out.prompts[:count], grid, compression, first_frame_alone=alone)
    spread = spread_time(maps, compression, first_frame_alone=alone)
    shown = {**frames, "map": overlay_clips(frames["vipo"], spread)}
    folder = output / "images"
    rows = {"image": [f[:8, 0] for f in shown.values()], "video": [f[i] for i in range(3) for f in shown.values()]}
    overview = film_strip(torch.stack(rows[held_out.kind.modality]))  # rows: base, GRPO, ViPO, map
    write_image(folder / "overview.png", overview.resize((2 * overview.width, 2 * overview.height)))
    samples = []
    for i, prompt in enumerate(held_out.prompts[:count]):
        entry: dict[str, Any] = {"prompt": prompt}
        for name, clips in shown.items():
            entry[name] = f"images/sample_{i:03d}_{name}.{'png' if len(clips[i]) == 1 else 'webp'}"
            if len(clips[i]) == 1:
                write_image(output / entry[name], clips[i, 0])
            else:
                write_animation(output / entry[name], clips[i], CLIP_FPS)
        headline = held_out.kind.metrics[0].name
        entry["reward"] = {name: float(np.round(v[headline][i], 4)) for name, v in held_out.values.items()}
        samples.append(entry)
    return samples
