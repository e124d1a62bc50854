"""The training loop: the only file that changes weights. Read `Trainer.step` first; it is the whole algorithm."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from .advantages import pixel_advantages, weighted_advantages
from .build import make_policy as make_policy
from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from .config import Config
from .fitting import Fit, OutOfMemory, advice, find_micro_batch, larger_knobs, waiting_bytes, within_memory
from .losses import LossStats, policy_loss
from .maps import MapSource, mean_statistics
from .offload import visiting
from .policy import DiffusersPolicy
from .prompts import prompt_batch, read_prompts, split_batches
from .psm import PerceptualStructuring
from .psm.latent_grid import frame_groups
from .rewards import Reward, load_reward
from .rewards.mixture import RewardMixture
from .runlog import PhaseClock, RunLog, check_output, read_metrics, write_summary
from .safety import NonFiniteGuard, evidence, require_finite_gradients, undone_if_not_finite, versions
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
        self.policy = policy or within_memory(
            lambda: make_policy(config), lambda: f"what saves memory: {larger_knobs(config, torch.device('cuda'))}"
        )
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
        self.micro_batch = config.sampling.given_micro_batch or config.num_samples
        self._auto = config.sampling.micro_batch == "auto"
        if self._auto:
            fit = self.fit(config.num_samples)
            if fit.micro_batch == 0:
                knobs = larger_knobs(config, self.policy.device)
                raise OutOfMemory(f"sampling.micro_batch=auto: not even one sample fits ({fit}); what helps: {knobs}")
            self.micro_batch = fit.micro_batch
            log.info("sampling.micro_batch: %d of %d samples (%s)", fit.micro_batch, config.num_samples, fit)

    def run(self, *, mode: Resume = "no", on_iteration: Callable[[int, dict[str, Any]], None] | None = None) -> None:
        """Train to the configured number of iterations, writing the run directory.

        The first iteration comes before the first byte: what fails at once writes nothing and removes nothing.

        Args:
            mode: "no" needs a new directory; "resume" continues its newest checkpoint; "overwrite" starts again.
            on_iteration: called after each iteration that was not skipped, with its 1-based number and metrics.

        Raises:
            FloatingPointError: a tensor is not finite and `optimizer.skip_nonfinite` iterations have been skipped.
        """
        run = self.config.run
        check_output(run.output, resume=mode == "resume", overwrite=mode == "overwrite")
        checkpoints = run.output / "checkpoints"
        if mode == "resume" and list_checkpoints(checkpoints):
            self.iteration = load_checkpoint(list_checkpoints(checkpoints)[-1], self.policy, self.optimizer)
        elif mode == "resume":
            log.warning("--resume: %s has no checkpoint yet; the run starts again", run.output)
        chosen = [line["micro_batch"] for line in read_metrics(run.output) if "micro_batch" in line]
        if self._auto and self.iteration and chosen:
            self.micro_batch = chosen[-1]  # a resumed run goes on with its numbers
        started = time.perf_counter()
        guard = NonFiniteGuard(self.config, self.batch, done=self.iteration)
        first = guard.attempt(self.step, self.iteration, again=True) if self.iteration < run.iterations else None
        with RunLog(run.output, self.config.to_yaml(), keep_until=self.iteration, tensorboard=run.tensorboard) as files:
            while self.iteration < run.iterations:
                metrics, first = first or guard.attempt(self.step, self.iteration), None
                self.iteration += 1
                files.metrics(self.iteration, metrics)
                last = self.iteration == run.iterations
                trained = "skipped" not in metrics
                if trained and (self.iteration == 1 or last or self.iteration % run.sample_every == 0):
                    files.pictures(self.iteration, self.frames, self.maps)
                if last or self.iteration % run.save_every == 0:
                    guard.check_state(self.iteration, self.policy.trainable_parameters(), self.optimizer)
                    save_checkpoint(checkpoints, self.iteration, self.policy, self.optimizer, keep=run.keep)
                if on_iteration and trained:
                    on_iteration(self.iteration, metrics)
            seconds = round(time.perf_counter() - started, 2)
        summary = {"kind": "train", "state": "finished", "iterations": self.iteration, "seconds": seconds}
        if self._auto:
            summary["micro_batch"] = self.micro_batch
        write_summary(run.output, {**summary, **versions()})

    def step(self, iteration: int) -> dict[str, Any]:
        """Take one iteration (`_step`).

        Raises:
            NonFiniteError: the first tensor that is NaN or infinite.
            OutOfMemory: with the settings that would help, and a micro-batch that fits.
        """
        return within_memory(lambda: self._step(iteration), self._memory_advice)

    def _step(self, iteration: int) -> dict[str, Any]:
        """One iteration: sample groups, score them, spread their advantages over the latent grid, update.

        Invariants: old log-probs are those of the weights that sampled; a position's advantage is its group's
        advantage times its map; nothing non-finite reaches the optimizer.
        """
        clock = PhaseClock(self.policy.device)
        found = self.experience(iteration, clock)
        with clock("map"), evidence(found=found):
            maps = self.maps_of(found, iteration)
        undo = self.config.optimizer.skip_nonfinite > 0 and len(found.plan) > 1
        with clock("update"), evidence(found=found, maps=maps), undone_if_not_finite(self.optimizer, undo):
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
            **{f"map_{name}": value for name, value in mean_statistics(maps).items()},
        }
        chosen = {"micro_batch": self.micro_batch} if self._auto else {}
        return {**{name: float(value) for name, value in metrics.items()}, **clock.seconds(), **chosen}

    def batch(self, iteration: int) -> PromptBatch:
        """Prompts and seeds of an iteration."""
        return prompt_batch(
            self.prompts,
            iteration,
            per_iteration=self.config.prompts.per_iteration,
            group_size=self.config.prompts.group_size,
            seed=self.config.run.seed,
            same_initial_noise=self.config.sampling.same_initial_noise,
        )

    def experience(self, iteration: int, clock: PhaseClock) -> Experience:
        """Sample the groups of an iteration and score them."""
        config = self.config
        batch = self.batch(iteration)
        with clock("rollout"):
            decoded, plan = self._rollout(batch, iteration)
            buckets = _buckets(decoded)
            if config.reward.on_failure == "stop":
                for bucket in buckets:
                    require_finite("decoded frames", bucket.frames, bucket.prompts)
        offload, frames = config.model.offload, {f"frames.{i}": bucket.frames for i, bucket in enumerate(buckets)}
        with clock("reward"), visiting(self.reward.rewards.values(), self.policy.device, offload), evidence(**frames):
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
        for run in split_batches(batch.entries, self.micro_batch):
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

    def fit(self, most: int, samples: int | None = None) -> Fit:
        """Find the largest micro-batch up to `most` that fits into the free memory with `samples` per iteration."""
        trained = sum(p.nbytes for p in self.parameters)
        later = trained * (1 if self.optimizer.state else 3)  # a gradient, and moments that are not there yet
        device = self.policy.device
        samples = samples or self.config.num_samples
        return find_micro_batch(self.try_micro_batch, samples, device, later=later, most=most)

    def try_micro_batch(self, size: int) -> float:
        """Sample, decode and replay a step of `size` samples with its gradient, and forget it: no weight changes.

        Returns:
            Bytes per sample that would wait on the device for the update.
        """
        pixels = [math.prod(p.call.get(key, 1) for key in ("height", "width", "num_frames")) for p in self.prompts]
        entry, seeds = self.prompts[pixels.index(max(pixels))], list(range(size))
        batch = PromptBatch([entry.text] * size, [0] * size, seeds, seeds, size, [entry] * size)
        before, self.micro_batch = self.micro_batch, size
        try:
            with torch.random.fork_rng():
                (((traj, frames),), plan) = self._rollout(batch, 0)
                steps = sorted({plan[0][0], plan[0][-1]})  # of both denoisers, where there are two
                even = torch.ones(size, *traj.latent_shape[1:], device=self.policy.device)
                self._accumulate(traj, even, steps, weight=1.0, totals=defaultdict(list))
        finally:
            self.micro_batch = before
            self.optimizer.zero_grad(set_to_none=True)
        on_device = not self.config.sampling.store_on_cpu or self.policy.device.type == "cpu"
        return waiting_bytes(traj, frames, on_device=on_device)

    def _memory_advice(self) -> str:
        self.optimizer.zero_grad(set_to_none=True)
        return advice(self.config, self.policy.device, self.fit, self.micro_batch)

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
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            require_finite_gradients(self.policy.trainable_parameters(), norm)
            torch.nn.utils.clip_grads_with_norm_(self.parameters, settings.max_grad_norm, norm)
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
            with evidence(step=k, log_probs=log_probs, trajectory=traj, advantages=advantages):
                require_finite(f"log-prob of step {k}", log_probs, traj.prompts)
                require_finite(f"loss of step {k}", loss)
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
