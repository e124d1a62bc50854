"""The training loop: the only file that changes weights. Read `Trainer.step` first; it is the whole algorithm."""

from __future__ import annotations

import itertools
import logging
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import diffusers
import torch
import transformers
from peft import LoraConfig
from torch import Tensor

from . import __version__
from .advantages import pixel_advantages, weighted_advantages
from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from .config import Config
from .losses import LossStats, policy_loss
from .maps import MapSource
from .offload import visiting
from .pipelines import compile_blocks, enable_vae
from .policy import DiffusersPolicy
from .prompts import prompt_batch, read_prompts, split_batches
from .psm import PerceptualStructuring, map_statistics
from .psm.latent_grid import frame_groups
from .rewards import Reward, load_reward
from .rewards.mixture import RewardMixture
from .runlog import PhaseClock, RunLog, check_output, write_summary
from .trainable import LORA_TARGETS, Training
from .types import Bucket, Experience, PromptBatch, Trajectory, require_finite
from .windows import stochastic_window

log = logging.getLogger(__name__)
Resume = Literal["no", "resume", "overwrite"]


class Trainer:
    """Post-train a policy with group-relative rewards spread by an allocation map.

    Args:
        config: the run.
        policy: default: made from `config.model` and `config.sampling`.
        psm: frames -> maps; default: made from `config.map`.
        reward: default: `config.reward.name`.

    Raises:
        ValueError: anything in the config that cannot work, before anything is written.
    """

    def __init__(
        self,
        config: Config,
        *,
        policy: DiffusersPolicy | None = None,
        psm: PerceptualStructuring | None = None,
        reward: Reward | None = None,
    ) -> None:
        self.config = config
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.prompts = read_prompts(config.prompts.path)
        torch.manual_seed(config.run.seed)  # the adapter's initial weights
        self.policy = policy or make_policy(config)
        waits = "cpu" if config.model.offload != "none" else self.policy.device
        weights = config.reward.weights
        paths, options = config.reward.paths, config.reward.options
        if reward is not None and len(weights) > 1:
            raise ValueError(f"reward: one object was given for several names: {', '.join(weights)}; name one")
        rewards = {
            name: load_reward(name, waits, path=paths.get(name), options=options.get(name))
            if reward is None
            else reward
            for name in weights
        }
        self.reward = RewardMixture(rewards, weights)
        self.map_source = MapSource(config.map, waits, psm=psm)
        self.map_source.check([prompt.text for prompt in self.prompts])
        if config.model.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
        self.parameters = list(self.policy.trainable_parameters().values())
        if config.loss.kl_beta > 0:
            self.policy.keep_reference()
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay
        )
        self.iteration = 0
        self.frames = self.maps = torch.empty(0)

    def run(self, *, mode: Resume = "no", on_iteration: Callable[[int, dict[str, Any]], None] | None = None) -> None:
        """Train to the configured number of iterations, writing the run directory.

        The first iteration comes before the first byte: what fails at once writes nothing and removes nothing.

        Args:
            mode: "no" needs a new directory; "resume" continues its newest checkpoint; "overwrite" starts again.
            on_iteration: called after each iteration with its 1-based number and metrics (a progress bar).
        """
        run = self.config.run
        check_output(run.output, resume=mode == "resume", overwrite=mode == "overwrite")
        checkpoints = run.output / "checkpoints"
        if mode == "resume" and list_checkpoints(checkpoints):
            self.iteration = load_checkpoint(list_checkpoints(checkpoints)[-1], self.policy, self.optimizer)
        elif mode == "resume":
            log.warning("--resume: %s has no checkpoint yet; the run starts again", run.output)
        started = time.perf_counter()
        first = self.step(self.iteration) if self.iteration < run.iterations else None
        with RunLog(run.output, self.config.to_yaml(), keep_until=self.iteration, tensorboard=run.tensorboard) as files:
            while self.iteration < run.iterations:
                metrics, first = first or self.step(self.iteration), None
                self.iteration += 1
                files.metrics(self.iteration, metrics)
                last = self.iteration == run.iterations
                if self.iteration == 1 or last or self.iteration % run.sample_every == 0:
                    files.pictures(self.iteration, self.frames, self.maps)
                if last or self.iteration % run.save_every == 0:
                    save_checkpoint(checkpoints, self.iteration, self.policy, self.optimizer, keep=run.keep)
                if on_iteration:
                    on_iteration(self.iteration, metrics)
            seconds = round(time.perf_counter() - started, 2)
        summary = {"kind": "train", "state": "finished", "iterations": self.iteration, "seconds": seconds}
        write_summary(run.output, {**summary, **versions()})

    def step(self, iteration: int) -> dict[str, Any]:
        """One iteration: sample groups, score them, spread their advantages over the latent grid, update.

        Invariants: old log-probs are those of the weights that sampled; a position's advantage is its group's
        advantage times its map; nothing non-finite reaches the optimizer.
        """
        clock = PhaseClock(self.policy.device)
        found = self.experience(iteration, clock)
        with clock("map"):
            maps = self.maps_of(found, iteration)
        with clock("update"):
            losses = self._update(found, maps)
        self.frames, self.maps = found.buckets[0].frames, maps[0]
        rewards, group_size = found.rewards[:, found.kept], self.config.prompts.group_size
        total = self.reward.weights.to(rewards.device) @ rewards
        grouped = total.view(-1, group_size)
        metrics = {
            "reward_mean": grouped.mean(),
            "reward_std": grouped.std(correction=0),
            "group_std": grouped.std(1, correction=0).mean(),
            **{f"reward_mean/{name}": mean for name, mean in self.reward.means(rewards).items()},
            "constant_groups": (found.advantages[found.kept].view(-1, group_size) == 0).all(1).sum(),
            "dropped_groups": (~found.kept).sum() // group_size,
            "advantage_abs": found.advantages.abs().mean(),
            **losses,
            **{f"map_{name}": value for name, value in _mean_statistics(maps).items()},
        }
        return {**{name: float(value) for name, value in metrics.items()}, **clock.seconds()}

    def experience(self, iteration: int, clock: PhaseClock) -> Experience:
        """Sample the groups of an iteration and score them."""
        config = self.config
        batch = prompt_batch(
            self.prompts,
            iteration,
            per_iteration=config.prompts.per_iteration,
            group_size=config.prompts.group_size,
            seed=config.run.seed,
            same_initial_noise=config.sampling.same_initial_noise,
        )
        with clock("rollout"):
            decoded, plan = self._rollout(batch, iteration)
            buckets = _buckets(decoded)
        with clock("reward"), visiting(self.reward.rewards.values(), self.policy.device, config.model.offload):
            scores = [self.reward(bucket.frames, bucket.prompts) for bucket in buckets]
            rewards = torch.cat([found.rewards for found in scores], 1)
            kept = self.reward.keep(rewards, batch.prompts, batch.group_size, config.reward.on_failure)
        advantages = torch.zeros(len(kept), device=rewards.device)
        advantages[kept] = weighted_advantages(
            rewards[:, kept],
            self.reward.weights,
            batch.group_size,
            combine=config.reward.combine,
            std=config.reward.std,
            clip=config.reward.advantage_clip,
        )
        parts = kept.split([len(bucket.frames) for bucket in buckets])
        credits = [found.credit_of(part) for found, part in zip(scores, parts, strict=True)]
        return Experience([traj for traj, _ in decoded], plan, buckets, credits, rewards, kept, advantages)

    def _rollout(self, batch: PromptBatch, iteration: int) -> tuple[list[tuple[Trajectory, Tensor]], list[list[int]]]:
        """Sample and decode in micro-batches of neighbours whose pipeline calls are equal.

        Returns:
            Trajectories that hold the trained steps only, with their frames; and the trained steps of every update.
        """
        sampling = self.config.sampling
        first, end = sampling.reach
        steps = stochastic_window(
            sampling.window_mode,
            sampling.window or end - first,
            (first, end),
            iteration=iteration,
            seed=self.config.run.seed,
            every=sampling.window_every,
            stride=sampling.window_stride,
        )
        self.policy.settings = replace(self.policy.settings, stochastic_steps=steps)
        decoded: list[tuple[Trajectory, Tensor]] = []
        plan: list[list[int]] = []
        for run in split_batches(batch.entries, sampling.micro_batch or len(batch.prompts)):
            traj = self.policy.rollout(
                [batch.prompts[i] for i in run],
                seeds=[batch.seeds[i] for i in run],
                initial_seeds=[batch.initial_seeds[i] for i in run],
                num_inference_steps=sampling.num_inference_steps,
                **{**sampling.pipeline_call, **batch.entries[run[0]].call},
            )
            frames = self.policy.decode(traj)
            plan = plan or self._choose_steps(traj, iteration)
            traj.keep([k for steps in plan for k in steps])
            decoded.append((traj.to("cpu") if sampling.store_on_cpu else traj, frames))
        return decoded, plan

    def maps_of(self, found: Experience, iteration: int, source: MapSource | None = None) -> list[Tensor]:
        """Make the maps of every bucket, by the configured source or another."""
        source = source or self.map_source
        with visiting([source.backbone], self.policy.device, self.config.model.offload):
            return [
                self.allocation_maps(b.frames, b.prompts, b.grid, iteration=iteration, credit=credit, source=source)
                for b, credit in zip(found.buckets, found.credits, strict=True)
            ]

    def allocation_maps(
        self,
        frames: Tensor,
        prompts: Sequence[str],
        grid: tuple[int, int, int],
        *,
        iteration: int,
        credit: Tensor | None = None,
        source: MapSource | None = None,
    ) -> Tensor:
        """Make the maps (N, T, H, W) of frames (N, F, 3, Y, X) on a latent grid (T, H, W), as `maps_of`."""
        compression, alone = frame_groups(frames.shape[1], grid[0])
        return (source or self.map_source)(
            frames,
            prompts,
            grid,
            compression,
            first_frame_alone=alone,
            credit=credit,
            generator=self.map_generator(iteration),
        )

    def map_generator(self, iteration: int) -> torch.Generator:
        """Make the generator of an iteration's random controls."""
        return torch.Generator().manual_seed(self.config.run.seed * 1_000_003 + iteration)

    def _update(self, found: Experience, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Take the configured optimizer steps on one rollout; return their mean statistics."""
        settings = self.config.optimizer
        totals: defaultdict[str, list[Tensor]] = defaultdict(list)
        for steps in found.plan:
            self.accumulate(found, maps, steps, totals)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm)
            require_finite("gradient", norm)
            totals["grad_norm"].append(norm.detach())
            self.optimizer.step()
        return {name: torch.stack(values).mean() for name, values in totals.items()}

    def accumulate(
        self, found: Experience, maps: Sequence[Tensor], steps: list[int], totals: defaultdict[str, list[Tensor]]
    ) -> None:
        """Set the parameters' gradients to those of the loss over all samples and the given trained steps.

        Args:
            found: the rollout.
            maps: (n, T, H, W) per bucket.
            steps: those that one optimizer step trains.
            totals: the statistics of every loss are appended.
        """
        self.optimizer.zero_grad(set_to_none=True)
        rows = iter([row for part in self.pixel_advantages(found, maps) for row in part])
        samples = len(found.advantages)
        for traj in found.trajectories:
            part = torch.stack(list(itertools.islice(rows, len(traj))))
            self._accumulate(traj, part, steps, weight=len(traj) / (samples * len(steps)), totals=totals)
        losses = torch.stack(totals["loss"][-len(found.trajectories) * len(steps) :]).view(-1, len(steps))
        require_finite(f"loss of steps {steps} (micro-batch, step)", losses)  # once: a check waits for the device

    def pixel_advantages(self, found: Experience, maps: Sequence[Tensor]) -> list[Tensor]:
        """Spread the advantages of a rollout over the latent grid: (n, T, H, W) per bucket."""
        shares = found.advantages.split([len(m) for m in maps])
        return [pixel_advantages(share, m) for share, m in zip(shares, maps, strict=True)]

    def _choose_steps(self, traj: Trajectory, iteration: int) -> list[list[int]]:
        """Draw the trained steps and deal them out to the updates, ascending within each."""
        seed = (self.config.run.seed * 1_000_003 + iteration) ^ 0x51EB
        order = torch.randperm(len(traj.stochastic_steps), generator=torch.Generator().manual_seed(seed))
        chosen = [traj.stochastic_steps[i] for i in order.tolist()][: self.config.trained_steps]
        if not chosen:
            raise ValueError(
                f"sampling.window: none of the stochastic steps {self.policy.settings.stochastic_steps} is a step of "
                f"the trained denoisers ({', '.join(self.policy.denoisers)}); set sampling.window_range to their steps"
            )
        updates = min(self.config.optimizer.updates_per_rollout, len(chosen))
        return [sorted(chosen[i::updates]) for i in range(updates)] * self.config.optimizer.epochs

    def _accumulate(
        self,
        traj: Trajectory,
        advantages: Tensor,
        steps: list[int],
        *,
        weight: float,
        totals: defaultdict[str, list[Tensor]],
    ) -> None:
        """Add the gradient of one micro-batch: one backward per step, so one step's graph is in memory."""
        settings = self.config.loss
        with_kl = settings.kl_beta > 0

        def on_step(k: int, log_probs: Tensor, old_log_probs: Tensor, kl: Tensor | None = None) -> None:
            loss, stats = policy_loss(
                log_probs,
                old_log_probs,
                advantages,
                clip_range=settings.clip_range,
                level=settings.level,
                channel_reduction=settings.channel_reduction,
            )
            if kl is not None:
                loss = loss + settings.kl_beta * kl.mean()
                totals["kl"].append(kl.detach().mean())
            (loss * weight).backward()
            totals["loss"].append(loss.detach())
            for name in LossStats._fields:
                totals[name].append(getattr(stats, name))

        traj = traj.to(self.policy.device)
        if with_kl:
            self.policy.add_reference(traj, steps)
        self.policy.replay(traj, steps=steps, on_step=on_step, with_kl=with_kl)


def _buckets(decoded: list[tuple[Trajectory, Tensor]]) -> list[Bucket]:
    """Join decoded trajectories whose neighbours have the same shapes: all of them, unless prompts differ in size."""
    found = []
    for (_, grid), run in itertools.groupby(decoded, lambda pair: (pair[1].shape[1:], pair[0].latent_shape[1:])):
        pairs = list(run)
        prompts = [prompt for traj, _ in pairs for prompt in traj.prompts]
        found.append(Bucket(torch.cat([frames for _, frames in pairs]), prompts, grid))
    return found


def _mean_statistics(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Statistics of maps of one or several shapes, weighted by the number of samples; counts are summed."""
    if len(maps) == 1:
        return map_statistics(maps[0])
    found = [map_statistics(part) for part in maps]
    weights = torch.tensor([float(len(part)) for part in maps], device=maps[0].device)
    weights = weights / weights.sum()
    mean = {name: (torch.stack([f[name].float() for f in found]) * weights).sum() for name in found[0]}
    return {
        **mean,
        "constant": torch.stack([f["constant"] for f in found]).sum(),
        "max": torch.stack([f["max"] for f in found]).amax(),
    }


def make_policy(config: Config, *, trainable: bool = True) -> DiffusersPolicy:
    """Build the policy of a config; without adapter and gradients where it is not `trainable`."""
    model = config.model
    lora = LoraConfig(
        r=model.lora_rank,
        lora_alpha=model.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=model.lora_targets or LORA_TARGETS,
    )
    train: Training = lora if model.train == "lora" else "full"
    chosen = train if model.denoisers is None else dict.fromkeys(model.denoisers, train)
    policy = DiffusersPolicy(
        model.path,
        kernel=config.sampling.kernel,
        eta=config.sampling.eta,
        shift=config.sampling.shift,
        unconditional=config.sampling.unconditional,
        offload=model.offload,
        train=chosen if trainable else "none",
        dtype=getattr(torch, model.dtype),
        autocast=getattr(torch, model.autocast) if model.autocast else None,
        device=model.device,
    )
    vae = {"tiling": model.vae_tiling, "slicing": model.vae_slicing, "channels_last": model.vae_channels_last}
    enable_vae(policy.pipeline, **vae)
    if model.compile:
        compile_blocks(policy.denoisers)
    return policy


def versions() -> dict[str, Any]:
    """What a run was made with."""
    return {
        "vipo_version": __version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
    }
