"""One run of the study: train an arm, evaluate it on held-out prompts, return a record of numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from ...advantages import group_advantages
from ...config import Config, MapConfig
from ...demo import HeldOut
from ...demo_kinds import CLIPS, IMAGES
from ...maps import make_psm
from ...measures import drift
from ...prompts import read_prompts
from ...rewards.rules import redness
from ...signal import CONTROLS, measure_signal
from ...trainer import Trainer
from ...types import Experience
from .. import ASSETS, video_world, world
from .arms import Arm, Budget, Job

KINDS = {"image": IMAGES, "video": CLIPS}
RECIPES = Path(__file__).parents[2] / "recipes"
WATCHED = ("reward_mean", "clip_fraction", "grad_norm", "map_max", "map_entropy", "constant_groups")
"""Training metrics whose means are kept."""


def subject_mask(frames: Tensor, prompts: Sequence[str]) -> Tensor:
    """The world's own mask of the subject that the prompt names: (N, F, 64, 64), the oracle's map."""
    if frames.shape[1] == 1:
        return world.measure(frames[:, 0], list(prompts))["subject_mask"][:, None]
    return video_world.measure(frames, list(prompts))["subject_mask"]


class MapOnReward(Trainer):
    """The paper's ablation: a reward per position, R_i[p] = M_i[p] r_i, normalised within its group at every p."""

    def pixel_advantages(self, found: Experience, maps: Sequence[Tensor]) -> list[Tensor]:
        """As `Trainer.pixel_advantages`, with the map on the reward."""
        (whole,) = maps
        rewards = self.reward.weights @ found.rewards
        fields = (whole * rewards[:, None, None, None]).flatten(1)
        advantages = group_advantages(fields.T.flatten(), self.config.prompts.group_size)
        return [advantages.view(fields.shape[1], -1).T.reshape(whole.shape)]


def job_config(job: Job, budget: Budget) -> Config:
    """The recipe with the changes of the arm and of the job."""
    recipe = "nano_vipo" if job.modality == "image" else "nano_video_vipo"
    run = {"run.seed": job.seed, "run.iterations": budget.iterations[job.modality]}
    run["prompts.per_iteration"] = budget.per_iteration
    changes = {**job.arm.changes, **job.changes, **run}
    texts = [f"--{key}={json.dumps(value)}" for key, value in changes.items()]
    return Config.from_yaml(RECIPES / f"{recipe}.yaml", texts)


class Exam:
    """Held-out prompts and the base model's samples of them.

    Args:
        modality: image or video.
        tuning: the first prompts of the file, which may choose settings; otherwise the last, which may not.
        prompts: how many.
    """

    def __init__(self, modality: str, tuning: bool, prompts: int) -> None:
        kind = KINDS[modality]
        texts = [prompt.text for prompt in read_prompts(str(ASSETS / kind.held_out))]
        chosen = texts[: min(prompts, len(texts) - 128)] if tuning else texts[-prompts:]
        self.held_out = HeldOut(kind, chosen, lambda *_: None)
        self.backbone = make_psm(MapConfig()).backbone
        self.masks = self.features = torch.empty(0)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """Means over the prompts of a trainer's present weights; the first call must be of the base model's."""
        held_out, known = self.held_out, "base" in self.held_out.frames
        name = "now" if known else "base"
        held_out.assess(name, trainer)
        frames, base = held_out.frames[name], held_out.frames["base"]
        if not known:
            self.masks = subject_mask(base, held_out.prompts)
            self.features = self._features(base)
        moved = drift(base, frames, self.masks)
        values = {
            **held_out.values[name],
            "redness": redness(frames, held_out.prompts).numpy(),
            "structure": functional.cosine_similarity(self._features(frames), self.features, dim=-1)
            .mean((1, 2, 3))
            .numpy(),
            **{f"drift_{where}": moved[where].numpy() for where in ("inside", "outside")},
        }
        return {key: round(float(np.nanmean(value)), 6) for key, value in values.items()}

    @torch.no_grad()
    def _features(self, frames: Tensor) -> Tensor:
        return torch.cat([self.backbone(part) for part in frames[:, ::4].split(16)])


@cache
def exam(modality: str, tuning: bool, prompts: int) -> Exam:
    """One exam per process: the base model's samples are made once."""
    return Exam(modality, tuning, prompts)


def run_job(job: Job, budget: Budget) -> dict[str, Any]:
    """Train and evaluate one arm: what is kept of it."""
    torch.set_num_threads(1)
    trainer = (MapOnReward if job.arm.on_reward else Trainer)(job_config(job, budget))
    examine = exam(job.modality, job.tuning, budget.prompts)
    if "base" not in examine.held_out.frames:
        examine(trainer)
    traced = job.table == "redness"
    trace = [{"iteration": 0, **examine(trainer)}] if traced else []
    lines = []
    for iteration in range(trainer.config.run.iterations):
        lines.append(trainer.step(iteration))
        if traced and (iteration + 1) % budget.trace_every == 0:
            trace.append({"iteration": iteration + 1, **examine(trainer)})
    record: dict[str, Any] = {
        "arm": job.arm.name,
        "seed": job.seed,
        "changes": {**job.arm.changes, **job.changes},
        "iterations": len(lines),
        "prompts": len(examine.held_out.prompts),
        "training": {name: round(float(np.mean([line[name] for line in lines])), 6) for name in WATCHED},
        "seconds": round(sum(line["seconds"] for line in lines), 1),
    }
    return {**record, "trace": trace} if traced else {**record, "metrics": examine(trainer)}


def base_metrics(modality: str, budget: Budget) -> dict[str, float]:
    """The base model's means on the prompts of the results."""
    torch.set_num_threads(1)
    job = Job("base", modality, Arm("base", "base"), 0, {})
    return Exam(modality, False, budget.prompts)(Trainer(job_config(job, budget)))


def signal_record(reward: str, arms: Sequence[Arm], budget: Budget) -> dict[str, Any]:
    """The gradient signal fraction of the arms' maps at the base model, before any training."""
    torch.set_num_threads(1)
    job = Job("signal", "image", Arm("vipo", "vipo"), 0, {"reward.name": reward})
    rows = {}
    for arm in arms:
        changes = {key: value for key, value in arm.changes.items() if key.startswith("map.")}
        control = changes.get("map.control")
        text = ",".join(f"{key.removeprefix('map.')}={value}" for key, value in changes.items())
        rows[arm.name] = control if control in CONTROLS else text or "psm"
    report = measure_signal(
        job_config(job, budget), budget.groups, [row for row in rows.values() if row not in (*CONTROLS, "psm")]
    )
    found = {row.name: row.fraction for row in report.maps}
    maps = {name: {key: getattr(found[row], key) for key in ("value", "low", "high")} for name, row in rows.items()}
    return {"groups": report.groups, "seconds": report.seconds, "maps": maps}


def equal_redness(trace: Sequence[dict[str, Any]], target: float) -> dict[str, float]:
    """Metrics where a run first reaches a redness, linear between two looks.

    Raises:
        ValueError: it never does.
    """
    before = trace[0]
    for after in trace:
        if after["redness"] >= target:
            rise = after["redness"] - before["redness"]
            share = (target - before["redness"]) / rise if rise > 0 else 0.0
            return {key: before[key] + share * (after[key] - before[key]) for key in before}
        before = after
    raise ValueError(f"the run never reaches redness {target:.3f}")
