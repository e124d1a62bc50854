"""`vipo demo`: the embedded pipeline post-trained from the same weights by scalar GRPO and by ViPO, then compared."""

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

from .config import Config
from .evaluation import Values, bootstrap_mean, evaluate, paired_difference
from .files import write_atomically
from .media import to_image
from .named import read_yaml
from .nano import ASSETS
from .nano.world import measure
from .pictures import overlay, sheet
from .prompts import read_prompts
from .psm import PerceptualStructuring
from .report import render_report
from .rewards.preference import ClipPreference
from .runlog import CONFIG, check_output, read_metrics, write_summary
from .trainer import Trainer, versions

METHODS = {"grpo": "Scalar GRPO", "vipo": "ViPO"}
METRICS: list[dict[str, Any]] = [
    {
        "name": "reward",
        "label": "Preference score",
        "higher_is_better": True,
        "in_domain": True,
        "description": "The learned scorer that both methods were trained on.",
    },
    {
        "name": "shape_iou",
        "label": "Shape IoU",
        "higher_is_better": True,
        "in_domain": False,
        "description": "Overlap of the drawn subject with the exact named shape, 0 to 1.",
    },
    {
        "name": "shape_accuracy",
        "label": "Shape accuracy",
        "higher_is_better": True,
        "in_domain": False,
        "description": "Share of samples whose subject fits the named shape better than any other shape.",
    },
    {
        "name": "colour_error",
        "label": "Subject colour error",
        "higher_is_better": False,
        "in_domain": False,
        "description": "Mean RGB distance of the subject's pixels to the named colour, 0 to 1.7.",
    },
    {
        "name": "background_dirt",
        "label": "Background dirt",
        "higher_is_better": False,
        "in_domain": False,
        "description": "Mean excess RGB distance of the background to the named one; prompts without clutter only.",
    },
]
Progress = Callable[[str, int, int, str], None]
"""(stage, done, total, remark)"""


def run_demo(
    output: Path,
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
    configs = {method: demo_config(method, output / method, seed, iterations) for method in METHODS}
    held_out = HeldOut(
        [prompt.text for prompt in read_prompts(str(ASSETS / "prompts_held_out.txt"))][-prompts:], progress
    )
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
    samples = _save_samples(output, held_out)
    times["total"] = time.perf_counter() - started
    summary = {
        "kind": "demo",
        "seed": seed,
        "command": f"vipo demo --seed {seed}",
        **versions(),
        "times": {name: round(seconds, 2) for name, seconds in times.items()},
        "metrics": METRICS,
        **compare(held_out.values),
        "curves": {method: _curve(output / method) for method in METHODS},
        "samples": samples,
        "notes": notes(held_out.values),
    }
    shared = {method: config.model_dump(mode="json") for method, config in configs.items()}
    write_atomically(output / CONFIG, yaml.safe_dump(shared, sort_keys=False))
    write_summary(output, summary)
    render_report(output)
    return summary


class HeldOut:
    """Held-out prompts, and what each method made of them with the same seeds.

    Args:
        prompts: n prompts that were not trained on; the file's last ones: its first served to choose the defaults.
        progress: told how far an evaluation is.

    Attributes:
        frames: by method, (n, 1, 3, 64, 64).
        values: by method and metric, (n,).
        seconds: spent so far.
    """

    def __init__(self, prompts: list[str], progress: Progress) -> None:
        self.prompts, self.progress = prompts, progress
        self.scorer = ClipPreference.from_pretrained("nano")
        self.frames: dict[str, Tensor] = {}
        self.values: dict[str, dict[str, Values]] = {}
        self.seconds = 0.0

    def measures(self, frames: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        exact = measure(frames[:, 0], list(prompts))
        return {m["name"]: self.scorer(frames, prompts) if m["name"] == "reward" else exact[m["name"]] for m in METRICS}

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


def demo_config(method: str, output: Path, seed: int, iterations: int | None) -> Config:
    """The recipe of one method, with the demo's output, seed and length."""
    mapping = read_yaml(Path(__file__).parent / "recipes" / f"nano_{method}.yaml")
    mapping["run"] = {**mapping.get("run", {}), "output": str(output), "seed": seed}
    if iterations is not None:
        mapping["run"]["iterations"] = iterations
    return Config.from_mapping(mapping)


def compare(values: dict[str, dict[str, Values]]) -> dict[str, Any]:
    """Means with intervals per method, and paired differences between methods."""
    means = {name: {m["name"]: bootstrap_mean(v[m["name"]]) for m in METRICS} for name, v in values.items()}
    differences = {
        f"{new}-{old}": {
            m["name"]: paired_difference(
                values[new][m["name"]], values[old][m["name"]], higher_is_better=m["higher_is_better"]
            )
            for m in METRICS
        }
        for new, old in (("grpo", "base"), ("vipo", "base"), ("vipo", "grpo"))
    }
    count = len(values["base"]["reward"])
    return {"evaluation": {"prompts": count, **means}, "differences": differences}


def notes(values: dict[str, dict[str, Values]]) -> list[str]:
    """Plain remarks on what did not improve, so that the page does not hide it."""
    remarks = ["One seed of a small world: the intervals cover prompts, not training runs."]
    for method, title in METHODS.items():
        for m in METRICS:
            label = m["label"][0].lower() + m["label"][1:]
            change = paired_difference(values[method][m["name"]], values["base"][m["name"]])
            low, high = change["low"], change["high"]
            if low is None or high is None:
                continue
            worse = high < 0 if m["higher_is_better"] else low > 0
            if worse:
                remarks.append(f"{title} made {label} worse than the base model's.")
            elif low <= 0 <= high:
                remarks.append(f"{title} changed {label} by no more than the interval.")
    return remarks


def _curve(run: Path) -> dict[str, list[float]]:
    lines = read_metrics(run)
    return {key: [line[key] for line in lines] for key in ("iteration", "reward_mean", "reward_std")}


@torch.no_grad()
def _save_samples(output: Path, held_out: HeldOut, count: int = 12) -> list[dict[str, Any]]:
    """Save the first held-out samples, chosen by position and not by result, and the map over ViPO's."""
    psm, frames = PerceptualStructuring.from_pretrained("nano"), held_out.frames
    (output / "images").mkdir(parents=True, exist_ok=True)
    maps = psm(frames["vipo"][:count], latent_shape=(1, 16, 16))
    shown = {
        **{name: f[:count, 0] for name, f in frames.items()},
        "map": overlay(frames["vipo"][:count, 0], maps[:, 0]),
    }
    overview = sheet(torch.cat([pictures[:8] for pictures in shown.values()]), columns=8)  # rows: base, GRPO, ViPO, map
    overview.resize((2 * overview.width, 2 * overview.height)).save(output / "images" / "overview.png")
    samples = []
    for i, prompt in enumerate(held_out.prompts[:count]):
        entry: dict[str, Any] = {"prompt": prompt}
        for name, pictures in shown.items():
            entry[name] = f"images/sample_{i:03d}_{name}.png"
            to_image(pictures[i]).save(output / entry[name])
        entry["reward"] = {name: float(np.round(v["reward"][i], 4)) for name, v in held_out.values.items()}
        samples.append(entry)
    return samples
