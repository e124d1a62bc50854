"""Evaluations during training: always the same prompts and noise, so that each pairs with the base model's.

RUN/evaluations/iteration_000000.json        the base: scores per prompt and sample, and what they depend on
                iteration_000010.json        ...
                base_features.safetensors    features of the base's samples (P, S, D), for the distance from them
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import Config
from .distributed import Ranks
from .evaluation import BATCH, Values
from .files import write_atomically
from .maps import MapSource, make_psm
from .measures import mean_pairwise_distance
from .offload import visiting
from .policy import DiffusersPolicy
from .prompts import denoiser_work, noise_seed, read_prompts, split_batches, spread, unique_prompts
from .rewards import Reward, load_rewards, score
from .rng import rng_state, set_rng_state

EVALUATIONS, FEATURES = "evaluations", "base_features.safetensors"
LEAST_PROMPTS = 8
"""Fewer prompts could all change alike by chance: 2^-8 is just below the tail of the watch's intervals."""
_HELD_OUT = {"nano": "nano_held_out", "nano_video": "nano_video_held_out"}


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation measured on P prompts with S samples each.

    Attributes:
        iteration: of the weights; 0 for the base.
        rewards: by name (P, S), NaN or infinite where a reward failed.
        diversity: (P,) within-prompt diversity, NaN with one sample.
        distance: (P,) mean cosine distance of a sample's feature from that of the base's sample of the same noise.
        seconds: wall-clock time.
    """

    iteration: int
    rewards: dict[str, Values]
    diversity: Values
    distance: Values
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Means for the metric lines; what no sample has is left out."""
        values = {**self.rewards, "diversity": self.diversity, "distance": self.distance}
        counted = {name: found[np.isfinite(found)] for name, found in values.items()}
        means = {f"eval/{name}": float(found.mean()) for name, found in counted.items() if found.size}
        return {**means, "eval/seconds": self.seconds}


class HeldOut:
    """Samples and scores the present weights, without a trace in the weights or in any random state of the training.

    Args:
        config: the run, with `watch.every` set.
        policy: with the weights to evaluate.
        trained: rewards that are trained on, by name.
        source: the run's maps, whose backbone sees how alike samples are; without one, `map.backbone` is loaded.
        ranks: all processes of the run, which share the batches: each is scored once.
        shared: models of the rewards that are trained on, see `load_rewards`.

    Raises:
        ValueError: prompts, a reward or a backbone that is not there, or too few prompts.
    """

    def __init__(
        self,
        config: Config,
        policy: DiffusersPolicy,
        trained: Mapping[str, Reward],
        source: MapSource,
        *,
        ranks: Ranks | None = None,
        shared: dict[Any, Any] | None = None,
    ) -> None:
        self.config, self.policy, watch = config, policy, config.watch
        self.ranks = ranks or Ranks()
        self.path = watch.path or _HELD_OUT.get(config.prompts.path, config.prompts.path)
        self.prompts = spread(unique_prompts(read_prompts(self.path)), watch.prompts)
        if len(self.prompts) < LEAST_PROMPTS:
            raise ValueError(
                f"watch.path: {self.path} has {len(self.prompts)} different prompts, expected at least {LEAST_PROMPTS}:"
                " over fewer no interval means anything"
            )
        waits = "cpu" if config.model.offload != "none" else policy.device
        home, seen = config.reward.device or waits, config.map.device or waits
        paths, options = config.reward.paths, config.reward.options
        with self._undisturbed():
            self.rewards = dict(trained) | load_rewards(watch.rewards, home, paths, options, shared)
            pickled = config.model.allow_pickle
            self.backbone = source.backbone or make_psm(config.map, seen, allow_pickle=pickled).backbone
        self._base_features: Tensor | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the values depend on besides the weights, as JSON has it."""
        sampling, maps = self.config.sampling, self.config.map
        found = {
            "prompts": [[prompt.text, prompt.key] for prompt in self.prompts],
            "seeds": self.config.watch.seeds,
            "rewards": sorted(self.rewards),
            "reward paths or options": [self.config.reward.paths, self.config.reward.options],
            "sampling": [sampling.num_inference_steps, sampling.shift, sampling.pipeline_call],
            "backbone": [maps.backbone, maps.layer, maps.image_size],
        }
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain

    @property
    def description(self) -> str:
        """What is evaluated and when, in words."""
        trained_on = {prompt.text for prompt in read_prompts(self.config.prompts.path)}
        seen = sum(prompt.text in trained_on for prompt in self.prompts)
        samples = f"{self.config.watch.seeds} sample{'' if self.config.watch.seeds == 1 else 's'}"
        known = f"{seen} of them trained on" if seen else "none of them trained on"
        return (
            f"every {self.config.watch.every} iterations {len(self.prompts)} prompts of {self.path} ({known}) with "
            f"{samples} each, against the base's with the same noise"
        )

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Give the global random states back as they were: a reward may draw from any."""
        state, tensors = rng_state(self.policy.device)
        try:
            yield
        finally:
            set_rng_state(state, tensors, self.policy.device)

    def measure(self, iteration: int) -> Evaluation:
        """Sample and score the present weights; those of iteration 0 are what later ones are held against."""
        started, seeds = time.perf_counter(), self.config.watch.seeds
        with self._undisturbed():
            rewards, features = self._scores()
        if iteration == 0:
            self._base_features = features
        assert self._base_features is not None, "the base comes first"
        distance = 1 - functional.cosine_similarity(features.double(), self._base_features.double(), dim=-1)
        return Evaluation(
            iteration,
            {name: values.double().numpy().reshape(-1, seeds) for name, values in rewards.items()},
            mean_pairwise_distance(features).numpy(),
            distance.clamp_min(0).mean(1).numpy(),
            round(time.perf_counter() - started, 2),
        )

    @torch.no_grad()
    def _scores(self) -> tuple[dict[str, Tensor], Tensor]:
        """Rewards by name (P * S,), and the samples' mean features (P, S, D): of each batch by one rank, for all."""
        sampling, seeds, device = self.config.sampling, self.config.watch.seeds, self.policy.device
        entries = [prompt for prompt in self.prompts for _ in range(seeds)]
        noise = [noise_seed(prompt, j, 0) for prompt in self.prompts for j in range(seeds)]
        rewards = torch.zeros(len(self.rewards), len(entries))
        rows: list[int] = []
        features: list[Tensor] = []
        batches = split_batches(entries, sampling.given_micro_batch or BATCH)
        calls = [entries[batch[0]].call for batch in batches]
        for turn, own in turns(calls, self.ranks, in_step=self.config.parallel.shard):
            batch = batches[turn]
            texts = [entries[i].text for i in batch]
            frames = self.policy.generate(
                texts,
                seeds=[noise[i] for i in batch],
                num_inference_steps=sampling.num_inference_steps,
                **{**sampling.pipeline_call, **entries[batch[0]].call},
            )
            if not own:
                continue
            rows += batch
            for i, (name, reward) in enumerate(self.rewards.items()):
                with visiting([reward], device, self.config.reward_offload):
                    home = self.config.reward.device
                    rewards[i, batch] = score(reward, frames, texts, name, home).rewards.cpu()
            with visiting([self.backbone], device, self.config.map_offload):
                features.append(self.backbone(frames).float().mean((1, 2, 3)).cpu())
        width = int(self.ranks.largest(features[0].shape[-1] if features else 0))
        found = torch.zeros(len(entries), width)
        found[rows] = torch.cat([torch.zeros(0, width), *features])
        # what another rank has scored is 0 here: the sum changes no bit of it
        return dict(zip(self.rewards, self.ranks.sum(rewards), strict=True)), self.ranks.sum(found).unflatten(
            0, (-1, seeds)
        )

    def save(self, folder: Path, found: Evaluation) -> None:
        """Write an evaluation into a run directory, with the base's also its features."""
        record = {
            "iteration": found.iteration,
            "settings": self.settings,
            "rewards": {name: _with_null(values) for name, values in found.rewards.items()},
            "diversity": _with_null(found.diversity),
            "distance": _with_null(found.distance),
            "seconds": found.seconds,
        }
        if found.iteration == 0 and self._base_features is not None:
            features = {"features": self._base_features}
            write_atomically(folder / EVALUATIONS / FEATURES, lambda partial: save_file(features, partial))
        write_atomically(_file(folder, found.iteration), json.dumps(record, allow_nan=False) + "\n")

    def load_base(self, folder: Path) -> Evaluation:
        """Read the base's evaluation back, as a resumed run needs it.

        Raises:
            ValueError: it is not there, or was made with other prompts, rewards or sampling.
        """
        file = _file(folder, 0)
        if not file.is_file():
            raise ValueError(
                f"watch.every: {folder} has no evaluation of the base ({file.name}), its run began without; "
                "set watch.every=null, watch.rewards=[] and watch.path=null, or start again"
            )
        record = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, value in self.settings.items() if record["settings"].get(name) != value]
        if changed:
            raise ValueError(
                f"--resume: the base in {file} was evaluated with other {changed[0]}, so nothing can be held against "
                "it; give the run's earlier settings, or start again"
            )
        self._base_features = load_file(file.with_name(FEATURES))["features"]
        read = {name: np.array(values, dtype=np.float64) for name, values in record["rewards"].items()}
        diversity, distance = (np.array(record[name], dtype=np.float64) for name in ("diversity", "distance"))
        return Evaluation(0, read, diversity, distance, float(record["seconds"]))


def turns(calls: Sequence[Mapping[str, Any]], ranks: Ranks, *, in_step: bool) -> Iterator[tuple[int, bool]]:
    """Yield the batches that a rank samples, and whether it scores them: every one is scored by one rank.

    Args:
        calls: keywords of the pipeline's call, of each batch.
        ranks: all processes; those that share tokens sample the same batches, and the first of them scores.
        in_step: all must call their denoisers equally often, as those of sharded weights. A rank without a batch of its
            own then samples another's; all sample all where the calls differ in more than sizes.
    """
    share, shares, leads = ranks.data_rank, ranks.data_world, ranks.rank % ranks.context == 0
    if not in_step:
        yield from ((i, leads) for i in range(share, len(calls), shares))
    elif len({denoiser_work(call) for call in calls}) > 1:
        yield from ((i, leads and i % shares == share) for i in range(len(calls)))
    else:
        for first in range(0, len(calls), shares):
            mine = first + share
            yield (mine, leads) if mine < len(calls) else (first, False)


def discard_after(folder: Path, iteration: int) -> None:
    """Remove a run's evaluations of iterations beyond `iteration`."""
    for file in (folder / EVALUATIONS).glob("iteration_*.json"):
        if int(file.stem.removeprefix("iteration_")) > iteration:
            file.unlink()


def _file(folder: Path, iteration: int) -> Path:
    return folder / EVALUATIONS / f"iteration_{iteration:06d}.json"


def _with_null(values: Values) -> Any:
    """Nested lists, with None for what is not finite."""
    plain = values.astype(object)
    plain[~np.isfinite(values)] = None
    return plain.tolist()
