"""`vipo check`: everything that can go wrong in a run, tried in seconds on one small group, before the run."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .advantages import pixel_advantages
from .config import Config
from .fitting import larger_knobs
from .losses import LossStats, policy_loss
from .offload import visiting
from .policy import DiffusersPolicy
from .psm import map_statistics
from .runlog import check_output
from .trainer import Trainer
from .types import Trajectory

DRIFT = 1e-3
"""Largest difference of a replayed log-prob, in nats per element, that still counts as exact in reduced precision."""

MOST_CLIPPED = 0.5
"""Share of ratios clipped after one optimizer step, above which several updates per rollout are mostly thrown away."""


@dataclass(frozen=True)
class Finding:
    """One line of the preflight."""

    name: str
    ok: bool
    detail: str


def preflight(config: Config) -> list[Finding]:
    """Try every part of a run on one group of two samples; under torchrun on one per rank, or group of ranks.

    Args:
        config: the run.

    Returns:
        Findings in the order of the work; a run should start only if all are ok.

    Raises:
        ValueError: a part cannot even be loaded.
    """
    small = config.model_dump()
    shares = max(1, int(os.environ.get("WORLD_SIZE", "1")) // config.parallel.context)
    small["prompts"].update(per_iteration=shares, group_size=2)
    small["sampling"]["micro_batch"] = config.sampling.given_micro_batch or 2
    findings = [_output(config)]
    trainer = Trainer(Config.model_validate(small))
    policy, prompts = trainer.policy, trainer.prompts
    trainer.ranks.share(config.num_samples)
    findings.append(Finding("prompts", True, f"{len(prompts)} prompts in {config.prompts.path}"))
    count = sum(p.numel() for p in trainer.parameters)
    findings.append(
        Finding(
            "policy",
            count > 0,
            f"{type(policy.pipeline).__name__}, {count:,} trained parameters of its {', '.join(policy.denoisers)}, "
            f"on {policy.device}",
        )
    )
    pair = [prompts[0].text] * 2
    started = time.perf_counter()
    traj = policy.rollout(
        pair,
        seeds=[1, 2],
        num_inference_steps=config.sampling.num_inference_steps,
        **{**config.sampling.pipeline_call, **prompts[0].call},
    )
    rollout = time.perf_counter() - started
    c, t, h, w = traj.latent_shape
    findings.append(Finding("rollout", True, f"{rollout / 2:.2f} s per sample; latents C={c} T={t} H={h} W={w}"))
    findings.append(_replay(policy, traj, config))
    frames = policy.decode(traj)
    with visiting(trainer.reward.rewards.values(), policy.device, config.reward_offload):
        rewards, credit = trainer.reward(frames, pair)
    finite = bool(torch.isfinite(rewards).all())
    found = [
        f"{name}: {', '.join(f'{r:.3f}' for r in row)}"
        for name, row in zip(trainer.reward.rewards, rewards.tolist(), strict=True)
    ]
    findings.append(Finding("reward", finite, "; ".join(found)))
    with visiting([trainer.map_source.backbone], policy.device, config.map_offload):
        grid = traj.latent_shape[1:]
        maps = trainer.allocation_maps(frames, traj.prompts, grid, iteration=0, credit=credit)
        findings.append(_map(trainer, maps, traj, config.map.label))
    if trainer.reward_maps:
        with visiting([trainer.reward_maps.backbone], policy.device, config.map_offload):
            for name, section in trainer.reward_maps.sections.items():
                source = trainer.reward_maps.sources[section]
                own = trainer.allocation_maps(frames, traj.prompts, grid, iteration=0, credit=credit, source=source)
                findings.append(replace(_map(trainer, own, traj, section.label), name=f"map of {name}"))
    findings.append(_memory(trainer, config))
    if finite and findings[-1].ok:
        findings += [_one_step(trainer, config), _clipping(trainer, maps, traj)]
    return findings


def _memory(trainer: Trainer, config: Config) -> Finding:
    """Try one sample and two, and draw the line to the configured micro-batch: base + slope n bytes."""
    samples = config.num_samples // trainer.ranks.data_world
    used, auto = config.sampling.given_micro_batch or samples, config.sampling.micro_batch == "auto"
    fit = trainer.fit(samples if auto else min(2, used), samples=samples)
    size = fit.micro_batch if auto else used
    need = fit.need(size)
    detail = (
        f"sampling, decoding and replay of {size} at once need {need / 2**20:,.0f} MiB of {fit.limit / 2**20:,.0f} MiB "
        f"that may be used; tried {', '.join(map(str, fit.needs))}"
    )
    if size == 0 or need > fit.limit:
        return Finding("memory", False, f"{detail}; what helps: {larger_knobs(config, trainer.policy.device)}")
    return Finding("memory", True, detail)


def _clipping(trainer: Trainer, maps: Tensor, traj: Trajectory) -> Finding:
    """Replay a rollout from before the one step: what share of its ratios is clipped now, with advantages +1 and -1."""
    settings, optimizer = trainer.config.loss, trainer.config.optimizer
    advantages = pixel_advantages(torch.tensor([1.0, -1.0], device=maps.device), maps)
    found: list[LossStats] = []

    def on_step(k: int, log_probs: Tensor, old_log_probs: Tensor) -> None:
        reduction = settings.channel_reduction
        options: dict[str, Any] = {"level": settings.level, "channel_reduction": reduction}
        found.append(policy_loss(log_probs, old_log_probs, advantages, clip_range=settings.clip_range, **options)[1])

    with torch.no_grad():
        trainer.policy.replay(traj, on_step=on_step)
    clipped = float(torch.stack([stats.clip_fraction for stats in found]).mean())
    largest = float(torch.stack([stats.ratio_max for stats in found]).max())
    detail = f"after one optimizer step {clipped:.0%} of the ratios are clipped, the largest is {largest:.3g}"
    if optimizer.updates_per_rollout * optimizer.epochs == 1:
        return Finding("clipping", math.isfinite(largest), f"{detail}; one update per rollout never meets this")
    reason = "; lower optimizer.learning_rate or raise loss.clip_range" if clipped > MOST_CLIPPED else ""
    return Finding("clipping", clipped <= MOST_CLIPPED, detail + reason)


def _one_step(trainer: Trainer, config: Config) -> Finding:
    """Time one whole iteration of two samples; the configured run takes at most so much longer per sample."""
    started = time.perf_counter()
    trainer.step(0)
    seconds = (time.perf_counter() - started) * config.num_samples / trainer.config.num_samples
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )  # bytes or KiB
    memory = f"peak memory {peak:,.0f} MiB"
    device = trainer.policy.device
    if device.type == "cuda":
        memory = f"peak device memory {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB with 2 samples"
    return Finding(
        "one step",
        True,
        f"at most {seconds:.1f} s per iteration of {config.num_samples} samples, "
        f"{seconds * config.run.iterations / 60:.0f} min for {config.run.iterations}; {memory}",
    )


def _output(config: Config) -> Finding:
    try:
        check_output(Path(config.run.output))
    except ValueError as error:
        return Finding("output", False, str(error))
    return Finding("output", True, f"{config.run.output} is free")


def _replay(policy: DiffusersPolicy, traj: Trajectory, config: Config) -> Finding:
    """Replay every stochastic step under the same weights: the log-probs must be the rollout's."""
    drift: list[Tensor] = []
    with torch.no_grad():
        policy.replay(traj, on_step=lambda k, new, old: drift.append((new - old).abs().max()))
    largest = float(torch.stack(drift).max())
    precision = config.model.autocast or config.model.dtype
    detail = f"in {precision}, log-probs differ from the rollout's by at most {largest:.2g} nats"
    reason = "" if largest <= DRIFT else f", more than {DRIFT}: the ratios start wrong; try model.dtype=float32"
    return Finding("replay", largest <= DRIFT, detail + reason)


def _map(trainer: Trainer, maps: Tensor, traj: Trajectory, label: str) -> Finding:
    """The map and its own mean everywhere must give different gradients, or the map has no effect."""
    statistics = map_statistics(maps)
    even = maps.mean((1, 2, 3), keepdim=True).expand_as(maps)
    gradients = [_gradient(trainer, traj, m) for m in (maps, even)]
    change = float((gradients[0] - gradients[1]).norm() / gradients[0].norm().clamp_min(1e-30))
    level = trainer.config.loss.level
    detail = (
        f"{label}: entropy {statistics['entropy']:.2f} of 1, mean {statistics['mean']:.2f}, "
        f"max {statistics['max']:.2f}, border to centre {statistics['border_to_centre']:.2f}, "
        f"{statistics['constant']} of {len(maps)} constant; "
        f"against an even map it changes the gradient by {change:.0%} (level {level})"
    )
    if label == "ones":
        return Finding("map", True, "none (map.control = ones): every position is pushed alike")
    if level == "sample":
        return Finding(
            "map", False, f"{detail}: at level sample a map acts through its mean only; set loss.level=position"
        )
    reason = "" if change > 1e-3 else ": the map does not act; look at it with vipo maps"
    return Finding("map", change > 1e-3, detail + reason)


def _gradient(trainer: Trainer, traj: Trajectory, maps: Tensor) -> Tensor:
    """Gradient of the loss for one step, with advantages +1 and -1."""
    advantages = pixel_advantages(torch.tensor([1.0, -1.0], device=maps.device), maps)
    settings = trainer.config.loss
    for p in trainer.parameters:
        p.grad = None

    def on_step(k: int, log_probs: Tensor, old_log_probs: Tensor) -> None:
        loss, _ = policy_loss(
            log_probs,
            old_log_probs,
            advantages,
            clip_range=settings.clip_range,
            level=settings.level,
            channel_reduction=settings.channel_reduction,
        )
        loss.backward()

    trainer.policy.replay(traj, steps=traj.stochastic_steps[:1], on_step=on_step)
    gradient = torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])
    for p in trainer.parameters:
        p.grad = None
    return gradient
