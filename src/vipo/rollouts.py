"""Sample the groups of an iteration and score them. No weight changes here."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .advantages import reward_advantages, weighted_advantages
from .config import Config
from .distributed import Ranks
from .offload import visiting
from .policy import DiffusersPolicy
from .prompts import denoiser_work, prompt_batch, split_batches
from .rewards.background import Background, Scoring, afterwards
from .rewards.mixture import RewardMixture
from .runlog import PhaseClock
from .safety import evidence
from .types import Bucket, Experience, Prompt, PromptBatch, Trajectory, require_finite
from .windows import stochastic_window


class Rollouts:
    """The experience of each iteration, a function of the weights and of (run.seed, iteration).

    Args:
        config: the run.
        prompts: all prompts.
        policy: samples.
        reward: scores.
        ranks: all processes of the run; each makes its share.
        make_maps: of frames (n, F, 3, Y, X), prompts and a grid, see `Trainer.allocation_maps`; called beside the
            rollout with `reward.async`, where frames and scores are all that is needed and nothing is offloaded.

    Attributes:
        share: samples of an iteration on this rank.
        micro_batch: samples per rollout and replay call.
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        policy: DiffusersPolicy,
        reward: RewardMixture,
        ranks: Ranks,
        make_maps: Callable[..., Tensor],
    ) -> None:
        self.config, self.prompts, self.policy, self.reward, self.ranks = config, prompts, policy, reward, ranks
        overlap = config.reward.asynchronous
        self.scoring = Background(policy.device, config.reward_offload) if overlap else afterwards
        # a dropped sample may not be finite, and a backbone that waits on the CPU would be there during the rollout
        self.early = overlap and config.reward.on_failure == "stop" and config.map_offload == "none"
        self.make_maps = make_maps
        if (
            config.parallel.shard
            and config.prompts.per_iteration > 1
            and len({denoiser_work(p.call) for p in prompts}) > 1
        ):
            raise ValueError(
                "prompts.path: prompts whose calls differ in more than sizes (guidance, say) may call a denoiser "
                "unequally often, which ranks of sharded weights cannot; set prompts.per_iteration=1 or "
                "parallel.shard=false"
            )
        own = ranks.share(config.num_samples)
        self.first, self.share = own.start, own.stop - own.start
        self.micro_batch = config.sampling.given_micro_batch or self.share

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
        own = self.ranks.share(len(batch.prompts))
        with self.ranks.together(), self.scoring(self.reward) as scoring:
            with clock("rollout"):
                decoded, plan = self.sample(batch.take(own), iteration, scoring)
                buckets = _buckets(decoded)
                if config.reward.on_failure == "stop":
                    for bucket in buckets:
                        require_finite("decoded frames", bucket.frames, bucket.prompts)
            frames = {f"frames.{i}": bucket.frames for i, bucket in enumerate(buckets)}
            with (
                clock("reward"),
                evidence(**frames),
                visiting(self.reward.rewards.values(), self.policy.device, config.reward_offload),
            ):
                scored = scoring.scores([len(bucket.frames) for bucket in buckets])
        scores = [found.scores for found in scored]
        rewards = self.ranks.gather_samples(torch.cat([found.rewards for found in scores], 1))
        with evidence(**frames):
            kept = self.reward.keep(
                rewards,
                batch.prompts,
                batch.group_size,
                config.reward.on_failure,
                max_dropped=config.reward.max_dropped,
            )
        std, clip = config.reward.std, config.reward.advantage_clip
        advantages, terms = torch.zeros(len(kept), device=rewards.device), None
        advantages[kept] = weighted_advantages(
            rewards[:, kept],
            self.reward.weights,
            batch.group_size,
            combine=config.reward.combine,
            std=std,
            clip=clip,
        )
        if config.reward_maps:
            terms = torch.zeros_like(rewards)
            terms[:, kept] = reward_advantages(rewards[:, kept], batch.group_size, std=std, clip=clip)
            terms *= self.reward.weights.to(terms)[:, None]
        parts = kept[own].split([len(bucket.frames) for bucket in buckets])
        credits = [found.credit_of(part) for found, part in zip(scores, parts, strict=True)]
        if config.reward.on_failure == "drop":  # a dropped sample may itself not be finite, which no backbone takes
            for bucket, part in zip(buckets, parts, strict=True):
                bucket.frames[~part] = bucket.frames[~part].nan_to_num(0.0, 0.0, 0.0)
        made = [found.maps for found in scored if found.maps is not None]
        trajectories = [traj for traj, _ in decoded]
        return Experience(
            trajectories, plan, buckets, credits, rewards, kept, advantages, terms, own, made if self.early else None
        )

    def sample(
        self, batch: PromptBatch, iteration: int, scoring: Scoring
    ) -> tuple[list[tuple[Trajectory, Tensor]], list[list[int]]]:
        """Sample and decode in micro-batches of neighbours whose pipeline calls are equal, and ask for their scores.

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
        runs = split_batches(batch.entries, self.micro_batch)
        if self.config.parallel.in_step:
            self.ranks.equal("sampling.micro_batch: the number of micro-batches", len(runs))
        for run in runs:
            # the next one of sharded weights needs all ranks, also where a map beside the rollout has failed
            with self.ranks.together() if self.config.parallel.in_step else contextlib.nullcontext():
                traj = self.policy.rollout(
                    [batch.prompts[i] for i in run],
                    seeds=[batch.seeds[i] for i in run],
                    initial_seeds=[batch.initial_seeds[i] for i in run],
                    num_inference_steps=sampling.num_inference_steps,
                    **{**sampling.pipeline_call, **batch.entries[run[0]].call},
                )
                frames = self.policy.decode(traj)
                maps = partial(self._maps, frames, traj.prompts, traj.latent_shape[1:], iteration, self.first + run[0])
                scoring.ask(frames, traj.prompts, maps if self.early else None)
            plan = plan or self._choose_steps(traj, iteration)
            traj.keep([k for steps in plan for k in steps])
            decoded.append((traj.to("cpu") if sampling.store_on_cpu else traj, frames))
        return decoded, plan

    def _maps(
        self,
        frames: Tensor,
        prompts: Sequence[str],
        grid: tuple[int, int, int],
        iteration: int,
        first: int,
        credit: Tensor | None,
    ) -> Tensor:
        """Make the maps of a micro-batch, that begins with sample `first` of all, as soon as it is scored."""
        require_finite("decoded frames", frames, prompts)  # the rollout's own check comes later, a backbone's is vaguer
        frames, of = frames.contiguous(), self.config.num_samples  # as in a bucket: sums depend on the order in memory
        return self.make_maps(frames, prompts, grid, iteration=iteration, credit=credit, of=of, first=first)

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


def _buckets(decoded: list[tuple[Trajectory, Tensor]]) -> list[Bucket]:
    """Join decoded trajectories whose neighbours have the same shapes: all of them, unless prompts differ in size."""
    found = []
    for (_, grid), run in itertools.groupby(decoded, lambda pair: (pair[1].shape[1:], pair[0].latent_shape[1:])):
        pairs = list(run)
        prompts = [prompt for traj, _ in pairs for prompt in traj.prompts]
        found.append(Bucket(torch.cat([frames for _, frames in pairs]).contiguous(), prompts, grid))
    return found
