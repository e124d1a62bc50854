"""The training loop: the only file that changes weights. Read `Trainer.step` first; it is the whole algorithm."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .advantages import mixed_pixel_advantages, pixel_advantages
from .build import make_policy as make_policy
from .config import Config
from .distributed import local, start, whole
from .ema import WeightAverage
from .fitting import Fit, OutOfMemory, advice, find_micro_batch, larger_knobs, waiting_bytes, within_memory
from .losses import LossStats, policy_loss
from .maps import MapSource, mean_statistics
from .offload import visiting
from .optimizer import make_optimizer, moment_bytes
from .policy import DiffusersPolicy
from .prompts import read_prompts
from .psm import PerceptualStructuring
from .psm.latent_grid import frame_groups
from .reward_maps import RewardMaps
from .rewards import Reward, load_rewards
from .rewards.background import afterwards
from .rewards.mixture import RewardMixture
from .rng import seed_all
from .rollouts import Rollouts
from .runlog import PhaseClock, read_metrics
from .safety import NonFiniteGuard, evidence, require_finite_gradients, undone_if_not_finite
from .schedule import learning_rate
from .session import Resume, Session
from .types import Experience, NonFiniteError, PromptBatch, Trajectory, find_device, require_finite
from .watch import KL, Watch, mean_kl

_NOT_MEANS = {"sums": ("constant",), "maxima": ("max",)}
"""Map statistics that are not means over samples."""


log = logging.getLogger(__name__)


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
        self.ranks = start(device=config.model.device, timeout=config.parallel.timeout, context=config.parallel.context)
        if self.ranks.world == 1 and config.parallel.shard:
            raise ValueError("parallel.shard: one process has nobody to share with; start with torchrun, or set false")
        seed_all(config.run.seed)  # the adapter's initial weights
        self.policy = policy or within_memory(
            lambda: make_policy(config, ranks=self.ranks),
            lambda: f"what saves memory: {larger_knobs(config, torch.device('cuda'))}",
        )
        waits = "cpu" if config.model.offload != "none" else self.policy.device
        weights = config.reward.weights
        if reward is not None and len(weights) > 1:
            raise ValueError(f"reward: one object was given for several names: {', '.join(weights)}; name one")
        given = None if reward is None else dict.fromkeys(weights, reward)
        shared: dict[Any, Any] = {}  # models that held-out rewards use too
        for key, elsewhere in (("reward.device", config.reward.device), ("map.device", config.map.device)):
            find_device(elsewhere, key)
        home = config.reward.device or waits
        rewards = given or load_rewards(list(weights), home, config.reward.paths, config.reward.options, shared)
        self.reward = RewardMixture(rewards, weights, config.reward.device)
        self.map_source = MapSource(
            config.map, config.map.device or waits, psm=psm, allow_pickle=config.model.allow_pickle
        )
        own = config.reward_maps
        self.reward_maps = (
            RewardMaps(config.map, self.map_source, own, list(weights), config.map.device or waits) if own else None
        )
        (self.reward_maps or self.map_source).check([prompt.text for prompt in self.prompts])
        if config.model.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
        self.parameters = list(self.policy.trainable_parameters().values())
        if not config.parallel.shard:
            self.ranks.replicate(self.parameters)
        if config.loss.kl_beta > 0:
            self.policy.keep_reference()
        elif config.watch.every:
            self.policy.keep_reference("cpu")  # asked now and then, and no reason to give up the accelerator's memory
        self.optimizer = make_optimizer(self.parameters, config.optimizer, sharded=config.parallel.shard)
        self.ema = WeightAverage(self.parameters, config.optimizer.ema) if config.optimizer.ema else None
        self.iteration = 0
        self.frames = self.maps = torch.empty(0)
        self.watch = Watch(config, self.policy, self.reward.rewards, self.map_source, ranks=self.ranks, shared=shared)
        early = functools.partial(self.allocation_maps, source=self.reward_maps)
        self.rollouts = Rollouts(config, self.prompts, self.policy, self.reward, self.ranks, early)
        self._auto = config.sampling.micro_batch == "auto"
        if self._auto:
            with self.ranks.guard():
                fit = self.fit(self.rollouts.share)
            if fit.micro_batch == 0:
                knobs = larger_knobs(config, self.policy.device)
                raise OutOfMemory(f"sampling.micro_batch=auto: not even one sample fits ({fit}); what helps: {knobs}")
            self.rollouts.micro_batch = fit.micro_batch
            log.info("sampling.micro_batch: %d of %d samples (%s)", fit.micro_batch, self.rollouts.share, fit)

    @property
    def micro_batch(self) -> int:
        """Samples per rollout and replay call."""
        return self.rollouts.micro_batch

    def run(
        self,
        *,
        mode: Resume = "no",
        allow_changes: bool = False,
        stop: Callable[[], bool] | None = None,
        on_iteration: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        """Train to the configured number of iterations, writing the run directory.

        The first iteration comes before the first byte: what fails at once writes nothing and removes nothing.

        Args:
            mode: "no" needs a new directory; "resume" continues its newest checkpoint; "overwrite" starts again.
            allow_changes: resume with a config that differs from the checkpoint's, see `vipo.changes.check_changes`.
            stop: asked after each iteration; True saves and ends the run.
            on_iteration: called after each iteration that was not skipped, with its 1-based number and metrics.

        Raises:
            FloatingPointError: a tensor is not finite and `optimizer.skip_nonfinite` iterations have been skipped.
        """
        run = self.config.run
        with Session(self.config, mode, self.prompts, self.policy, self.optimizer, self.ema, self.ranks) as session:
            if mode == "resume":
                self.iteration = session.resume(allow_changes=allow_changes)
                self.ranks.equal("--resume: the iteration of the newest checkpoint", self.iteration)
            chosen = [line["micro_batch"] for line in read_metrics(run.output) if "micro_batch" in line]
            if self._auto and self.iteration and chosen:
                self.rollouts.micro_batch = chosen[-1]  # a resumed run goes on with its numbers
            self.watch.begin(run.output, self.iteration)
            stopped = self.ranks.any(self.watch.stops)
            guard = NonFiniteGuard(self.config, self.rollouts.batch, done=self.iteration, rank=self.ranks.rank)
            begins = self.iteration < run.iterations and not stopped
            first = guard.attempt(self.step, self.iteration, again=True) if begins else None
            session.begin(self.iteration)
            self.watch.open(session)
            while self.iteration < run.iterations and not stopped:
                metrics, first = first or guard.attempt(self.step, self.iteration), None
                self.iteration += 1
                metrics = self.watch(run.output, self.iteration, metrics)
                session.metrics(self.iteration, metrics)
                trained = "skipped" not in metrics
                last = self.iteration == run.iterations or self.watch.stops
                stopped = self.ranks.any(self.watch.stops or (stop is not None and stop()))
                if trained and (self.iteration == 1 or last or self.iteration % run.sample_every == 0):
                    session.pictures(self.iteration, self.frames, self.maps)
                if last or stopped or self.iteration % run.save_every == 0:
                    guard.check_state(self.iteration, self.policy.trainable_parameters(), self.optimizer)
                    session.save(self.iteration)
                if on_iteration and trained:
                    on_iteration(self.iteration, metrics)
            self.watch.close(session.checkpoints)
            session.end(self.iteration, stopped=stopped, **({"micro_batch": self.micro_batch} if self._auto else {}))

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
        with clock("map"), self.ranks.together(), evidence(found=found):
            made = self.maps_of(found, iteration, self.reward_maps)
        maps = [part[0] for part in made] if self.reward_maps else made
        rate = learning_rate(self.config.optimizer, iteration, self.config.run.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        undo = self.config.optimizer.skip_nonfinite > 0 and len(found.plan) > 1
        average = self.ema.values if self.ema else ()
        with clock("update"), evidence(found=found, maps=maps), undone_if_not_finite(self.optimizer, undo, average):
            losses = self.ranks.reduce(self._update(found, made))
        if self.watch.kl_due(iteration + 1):  # of the new weights, as what is evaluated; every rank on its own share
            with clock("watch"):
                steps = sorted({k for part in found.plan for k in part})
                losses |= self.ranks.reduce({KL: mean_kl(self.policy, found.trajectories, steps)})
        self.frames, self.maps = found.buckets[0].frames, maps[0]
        rewards, group_size = found.rewards[:, found.kept], self.config.prompts.group_size
        total = self.reward.weights.to(rewards.device) @ rewards
        grouped = total.view(-1, group_size)
        metrics: dict[str, Any] = {
            "reward_mean": grouped.mean(),
            "reward_std": grouped.std(correction=0),
            "group_std": grouped.std(1, correction=0).mean(),
            **{f"reward_mean/{name}": mean for name, mean in self.reward.means(rewards).items()},
            "constant_groups": (found.advantages[found.kept].view(-1, group_size) == 0).all(1).sum(),
            "dropped_groups": (~found.kept).sum() // group_size,
            "advantage_abs": found.advantages.abs().mean(),
            "learning_rate": rate,
            **losses,
            **{f"map_{name}": v for name, v in self.ranks.reduce(mean_statistics(maps), **_NOT_MEANS).items()},
            **(self.ranks.reduce(self.reward_maps.statistics(made)) if self.reward_maps else {}),
        }
        chosen = {"micro_batch": self.micro_batch} if self._auto else {}
        return {**{name: float(value) for name, value in metrics.items()}, **clock.seconds(), **chosen}

    def experience(self, iteration: int, clock: PhaseClock) -> Experience:
        """Sample the groups of an iteration and score them."""
        return self.rollouts.experience(iteration, clock)

    def fit(self, most: int, samples: int | None = None, *, alone: bool = False) -> Fit:
        """Find the largest micro-batch up to `most` that fits into the free memory with `samples` per iteration.

        Unless `alone`, all ranks must ask, and find the same.
        """
        own = [local(p.detach()) for p in self.parameters]
        moments = moment_bytes(own, self.config.optimizer.state)
        gradient = sum(p.nbytes for p in own)
        later = gradient + (0 if self.optimizer.state else moments)  # a gradient, and moments that are not there yet
        device = self.policy.device
        agree = float if alone else self.ranks.largest
        samples = samples or self.rollouts.share
        once = self.config.parallel.in_step
        return find_micro_batch(self.try_micro_batch, samples, device, later=later, most=most, agree=agree, once=once)

    def try_micro_batch(self, size: int) -> float:
        """Sample, decode and replay a step of `size` samples with its gradient, and forget it: no weight changes.

        Returns:
            Bytes per sample that would wait on the device for the update.
        """
        pixels = [math.prod(p.call.get(key, 1) for key in ("height", "width", "num_frames")) for p in self.prompts]
        entry, seeds = self.prompts[pixels.index(max(pixels))], list(range(size))
        batch = PromptBatch([entry.text] * size, [0] * size, seeds, seeds, size, [entry] * size)
        before, self.rollouts.micro_batch = self.micro_batch, size
        try:
            with torch.random.fork_rng(), afterwards(self.reward) as unscored:
                (((traj, frames),), plan) = self.rollouts.sample(batch, 0, unscored)
                steps = sorted({plan[0][0], plan[0][-1]})  # of both denoisers, where there are two
                even = torch.ones(size, *traj.latent_shape[1:], device=self.policy.device)
                self._accumulate(traj, even, steps, weight=1.0, totals=defaultdict(list))
        finally:
            self.rollouts.micro_batch = before
            self.optimizer.zero_grad(set_to_none=True)
        on_device = not self.config.sampling.store_on_cpu or self.policy.device.type == "cpu"
        return waiting_bytes(traj, frames, on_device=on_device)

    def _memory_advice(self) -> str:
        self.optimizer.zero_grad(set_to_none=True)
        fit = None if self.config.parallel.in_step else functools.partial(self.fit, alone=True)  # others may not try
        return advice(self.config, self.policy.device, fit, min(self.micro_batch, self.rollouts.share))

    def maps_of(self, found: Experience, iteration: int, source: MapSource | RewardMaps | None = None) -> list[Tensor]:
        """Make the maps of every bucket, by the map section's source or another, in the rollout's micro-batches."""
        if found.maps is not None and source is self.reward_maps:
            return found.maps
        source = source or self.map_source
        sizes = iter([len(traj) for traj in found.trajectories])
        first, maps = found.own.start, []
        with visiting([source.backbone], self.policy.device, self.config.map_offload):
            for bucket, credit in zip(found.buckets, found.credits, strict=True):
                parts, start = [], 0
                while start < len(bucket.frames):
                    part = slice(start, start + next(sizes))
                    made = self.allocation_maps(
                        bucket.frames[part],
                        bucket.prompts[part],
                        bucket.grid,
                        iteration=iteration,
                        credit=None if credit is None else credit[part],
                        source=source,
                        of=len(found.kept),
                        first=first + start,
                    )
                    parts.append(made)
                    start = part.stop
                maps.append(torch.cat(parts, -4))
                first += start
        return maps

    def allocation_maps(
        self,
        frames: Tensor,
        prompts: Sequence[str],
        grid: tuple[int, int, int],
        *,
        iteration: int,
        credit: Tensor | None = None,
        source: MapSource | RewardMaps | None = None,
        of: int | None = None,
        first: int = 0,
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
            of=of,
            first=first,
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
            norm = whole(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
            require_finite_gradients(self.policy.trainable_parameters(), norm)
            torch.nn.utils.clip_grads_with_norm_(self.parameters, settings.max_grad_norm, norm)
            totals["grad_norm"].append(norm.detach())
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        return {name: torch.stack(values).mean() for name, values in totals.items()}

    def accumulate(
        self, found: Experience, maps: Sequence[Tensor], steps: list[int], totals: defaultdict[str, list[Tensor]]
    ) -> None:
        """Set the parameters' gradients to those of the loss over all samples and the given trained steps.

        Args:
            found: the rollout.
            maps: (n, T, H, W) per bucket; with reward.maps (1 + R, n, T, H, W), see `RewardMaps`.
            steps: those that one optimizer step trains.
            totals: the statistics of every loss are appended.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self.ranks.together():
            rows = iter([row for part in self.pixel_advantages(found, maps) for row in part])
        samples = len(found.advantages)
        scale = self.ranks.world if self.config.parallel.shard else 1  # shards are averaged over the ranks
        parts = []
        for traj in found.trajectories:
            part = torch.stack(list(itertools.islice(rows, len(traj))))
            self._accumulate(traj, part, steps, weight=scale * len(traj) / (samples * len(steps)), totals=totals)
            parts.append((traj, part))
        checked = torch.stack(totals.pop("checked"))
        bad = not bool(torch.isfinite(checked).all())  # asked once: it waits for the device
        with self.ranks.together():
            if self.ranks.any(bad) if self.config.parallel.in_step else bad:  # all must replay
                seen: list[NonFiniteError] = []
                for traj, part in parts:
                    self._accumulate(traj, part, steps, weight=0.0, totals=defaultdict(list), seen=seen)
                for error in seen[:1]:
                    raise error
                require_finite("loss", checked)
        self.ranks.sum_gradients(self.parameters)

    def pixel_advantages(self, found: Experience, maps: Sequence[Tensor]) -> list[Tensor]:
        """Spread the advantages of a rollout over the latent grid: (n, T, H, W) per bucket."""
        if found.terms is not None:
            terms = found.terms[:, found.own].split([part.shape[1] for part in maps], 1)
            return [mixed_pixel_advantages(term, part[1:]) for term, part in zip(terms, maps, strict=True)]
        shares = found.advantages[found.own].split([len(m) for m in maps])
        return [pixel_advantages(share, m) for share, m in zip(shares, maps, strict=True)]

    def _accumulate(
        self,
        traj: Trajectory,
        advantages: Tensor,
        steps: list[int],
        *,
        weight: float,
        totals: defaultdict[str, list[Tensor]],
        seen: list[NonFiniteError] | None = None,
    ) -> None:
        """Add the gradient of one micro-batch: one backward per step, so one step's graph is in memory.

        What is not finite is noted for `accumulate`. The first such tensor is put into `seen`, where it is given; the
        replay goes on, for other ranks may wait for its weights.
        """
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
            finite = torch.isfinite(log_probs.detach()).all()
            totals["checked"].append(torch.where(finite, loss.detach(), torch.nan))
            if seen is not None and not seen:
                try:
                    with evidence(step=k, log_probs=log_probs, trajectory=traj, advantages=advantages):
                        require_finite(f"log-prob of step {k}", log_probs, traj.prompts)
                        require_finite(f"loss of step {k}", loss)
                except NonFiniteError as error:
                    seen.append(error)
            (loss * weight).backward()
            totals["loss"].append(loss.detach())
            for name in LossStats._fields:
                totals[name].append(getattr(stats, name))

        traj = traj.to(self.policy.device)
        if with_kl:
            self.policy.add_reference(traj, steps=steps)
        self.policy.replay(traj, steps=steps, on_step=on_step, with_kl=with_kl)
