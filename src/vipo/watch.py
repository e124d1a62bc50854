"""Watch a training for reward hacking: what is trained on rises while what is held out falls, and its companions.

The rules are pure functions of the run's metric lines and of two evaluations; `Watch` calls them after every iteration
and writes RUN/watch.json: what is watched, what is not and why, and each warning once, at the iteration it began.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import list_checkpoints
from .config import Config
from .distributed import Ranks
from .evaluation import compare_groups
from .files import write_atomically
from .held_out import Evaluation, HeldOut, discard_after
from .maps import MapSource
from .policy import DiffusersPolicy
from .rewards import Reward
from .runlog import read_metrics
from .session import Session
from .types import Trajectory

log = logging.getLogger(__name__)
WATCH = "watch.json"
WINDOW = 10
"""Iterations of a mean."""
TAIL = 0.005
"""Of each side of the intervals that decide: 99 %, for every evaluation is another chance of a false alarm."""
HACKING = "reward hacking"
KL = "eval/kl"
"""Metric: the KL of the weights that are evaluated to the reference; where kl_beta is 0."""


@dataclass(frozen=True)
class WatchWarning:
    """Something that went wrong.

    Attributes:
        kind: "reward hacking", "diversity", "group std", "constant groups" or "kl".
        subject: the held-out reward, else empty; a kind and subject warn once in a run.
        sentence: what was seen, with its numbers.
        advice: what to do.
        iteration: where it was first seen.
        clean: the last look that had not seen it; 0 for the base.
    """

    kind: str
    subject: str
    sentence: str
    advice: str
    iteration: int = 0
    clean: int = 0


def hacking(
    now: Evaluation, base: Evaluation, weights: Mapping[str, float], held_out: Sequence[str]
) -> list[WatchWarning]:
    """Find the held-out rewards that fell while a reward that is trained on rose, both beyond 99 % intervals.

    Args:
        now: an evaluation.
        base: the base's, of the same prompts and noise.
        weights: of the rewards that are trained on; those of a negative one rise when they fall.
        held_out: names.
    """
    changes = {name: compare_groups(values, base.rewards[name], tail=TAIL) for name, values in now.rewards.items()}
    differences = {
        name: found["difference"] for name, found in changes.items() if found["difference"]["mean"] is not None
    }
    risen = [
        name
        for name, weight in weights.items()
        if name in differences and (differences[name]["low"] > 0 if weight > 0 else differences[name]["high"] < 0)
    ]

    def told(name: str) -> str:
        change = differences[name]
        return (
            f"{name} {change['mean']:+.3g} [{change['low']:+.3g}, {change['high']:+.3g}] "
            f"from {changes[name]['base']['mean']:.3g}"
        )

    fallen = [name for name in held_out if name in differences and differences[name]["high"] < 0]
    prompts = len(now.diversity)
    return [
        WatchWarning(
            HACKING,
            name,
            f"the held-out reward fell: {told(name)}, while what is trained on improved: "
            f"{', '.join(told(other) for other in risen)} (99 % intervals over {prompts} prompts)",
            f"look at samples/; go back to an earlier checkpoint, lower optimizer.learning_rate, set loss.kl_beta, or "
            f"train on {name} as well",
        )
        for name in (fallen if risen else [])
    ]


def diversity_fall(now: Evaluation, base: Evaluation, share: float) -> list[WatchWarning]:
    """Find a within-prompt diversity below `share` of the base's."""
    found, before = float(now.diversity.mean()), float(base.diversity.mean())
    if not found < share * before:
        return []
    return [
        WatchWarning(
            "diversity",
            "",
            f"the samples of a prompt grow alike: diversity {found:.3g}, the base's {before:.3g} "
            f"(below {share:.0%} of it)",
            "look at samples/; go back to an earlier checkpoint, set loss.kl_beta, or lower optimizer.learning_rate",
        )
    ]


def group_std_collapse(lines: Sequence[Mapping[str, Any]], share: float) -> list[WatchWarning]:
    """Find a mean group_std of the last ten iterations below `share` of the first ten's; the two must not overlap."""
    if len(lines) < 2 * WINDOW:
        return []
    first, last = (_mean(part, "group_std") for part in (lines[:WINDOW], lines[-WINDOW:]))
    if not last < share * first:
        return []
    return [
        WatchWarning(
            "group std",
            "",
            f"the rewards within groups hardly differ any more: group_std {last:.3g} over the last {WINDOW} "
            f"iterations, {first:.3g} over the first (below {share:.0%} of it)",
            "look at samples/: are they all alike? Stop here, take harder prompts, or raise sampling.eta",
        )
    ]


def constant_groups(lines: Sequence[Mapping[str, Any]], share: float, per_iteration: int) -> list[WatchWarning]:
    """Find more than `share` of the groups of the last ten iterations without any difference in their rewards."""
    if len(lines) < WINDOW:
        return []
    last = lines[-WINDOW:]
    groups = WINDOW * per_iteration - sum(line["dropped_groups"] for line in last)
    found = sum(line["constant_groups"] for line in last)
    if not found > share * groups:
        return []
    return [
        WatchWarning(
            "constant groups",
            "",
            f"{found:.0f} of the {groups:.0f} groups of the last {WINDOW} iterations taught nothing: all samples of "
            f"each earned the same (more than {share:.0%})",
            "take prompts that the model neither always nor never solves, larger groups, or a finer reward",
        )
    ]


def kl_growth(lines: Sequence[Mapping[str, Any]], bound: float) -> list[WatchWarning]:
    """Find a mean KL to the reference above `bound` nats per element and step over the last ten iterations."""
    if len(lines) < WINDOW or not all("kl" in line for line in lines[-WINDOW:]):
        return []
    found = _mean(lines[-WINDOW:], "kl")
    if not found > bound:
        return []
    return [
        WatchWarning(
            "kl",
            "",
            f"the model has moved far from its reference: KL {found:.3g} nats per element and step over the last "
            f"{WINDOW} iterations (bound {bound:g})",
            "raise loss.kl_beta or lower optimizer.learning_rate",
        )
    ]


def kl_at_evaluation(metrics: Mapping[str, Any], bound: float) -> list[WatchWarning]:
    """Find an `eval/kl` above `bound` nats per element and step, or NaN; a line without one says nothing."""
    if metrics.get(KL, 0.0) <= bound:
        return []
    return [
        WatchWarning(
            "kl",
            "",
            f"the model has moved far from its reference: KL {metrics[KL]:.3g} nats per element and step on this "
            f"iteration's own samples (bound {bound:g})",
            "set loss.kl_beta, lower optimizer.learning_rate, or go back to an earlier checkpoint",
        )
    ]


@torch.no_grad()
def mean_kl(policy: DiffusersPolicy, rollout: Sequence[Trajectory], steps: Sequence[int]) -> Tensor:
    """Compute the exact Gaussian KL to the reference, nats per element and step: mean (mu - mu_ref)^2 / (2 std^2).

    Two denoiser passes per step: with the reference weights and with the present ones.

    Args:
        policy: with an adapter, or with a reference that it keeps.
        rollout: its micro-batches.
        steps: ascending, of their `stochastic_steps`.

    Returns:
        A scalar, detached.
    """
    found: list[Tensor] = []

    def on_step(k: int, new: Tensor, old: Tensor, kl: Tensor) -> None:
        found.append(kl.mean((1, 2, 3, 4)))

    policy.add_reference(*rollout, steps=steps)
    for traj in rollout:
        policy.replay(traj.to(policy.device), steps=steps, on_step=on_step, with_kl=True)
    return torch.cat(found).mean()


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([line[key] for line in lines]))


class Watch:
    """Evaluates where `watch.every` says so, applies the rules after every iteration, and tells what it finds.

    Args:
        config: the run.
        policy: whose weights are watched.
        trained: rewards that are trained on, by name.
        source: the run's maps.
        ranks: all processes of the run; rank 0 alone writes the files and may end the run.
        shared: models of the rewards that are trained on.

    Attributes:
        warnings: those of this run so far.
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
        self.config, self.policy, self.write = config, policy, ranks is None or ranks.main
        every = config.watch.every
        self.held_out = HeldOut(config, policy, trained, source, ranks=ranks, shared=shared) if every else None
        self.warnings: list[WatchWarning] = []
        self._lines: list[dict[str, Any]] = []
        self._base: Evaluation | None = None

    @property
    def stops(self) -> bool:
        """Whether the run is to end here; only the rank that writes says so, and the others ask it."""
        return self.write and self.config.watch.stop and any(warning.kind == HACKING for warning in self.warnings)

    def due(self, iteration: int) -> bool:
        """Whether the weights after this 1-based iteration are evaluated."""
        every = self.config.watch.every
        return every is not None and (iteration % every == 0 or iteration == self.config.run.iterations)

    def kl_due(self, iteration: int) -> bool:
        """Whether `mean_kl` of this 1-based iteration is wanted: with a KL term every line has its `kl` already."""
        return self.due(iteration) and self.config.loss.kl_beta == 0

    def begin(self, folder: Path, iteration: int) -> None:
        """Evaluate the base before its weights change; of a run that is resumed, read what it has written.

        Raises:
            ValueError: a run to resume has no evaluation of its base, or one with other settings.
        """
        self.warnings, self._lines = [], []
        if iteration == 0:
            self._base = self.held_out.measure(0) if self.held_out else None
            return
        self._base = self.held_out.load_base(folder) if self.held_out else None
        self._lines = [line for line in read_metrics(folder) if 1 <= line["iteration"] <= iteration]
        if (folder / WATCH).is_file():
            written = json.loads((folder / WATCH).read_text(encoding="utf-8"))["warnings"]
            self.warnings = [WatchWarning(**entry) for entry in written if entry["iteration"] <= iteration]

    def open(self, files: Session) -> None:
        """Write what `begin` found, now that there is a run directory; evaluations that will be redone go."""
        if not self.write:
            return
        discard_after(files.folder, len(self._lines))
        if self.held_out and self._base and not self._lines:
            self.held_out.save(files.folder, self._base)
            files.metrics(0, self._base.metrics())
        self._write(files.folder)

    def __call__(self, folder: Path, iteration: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Look at one iteration and warn of what begins with it.

        Args:
            folder: the run directory.
            iteration: 1-based, as its metric line has it.
            metrics: of the step.

        Returns:
            The metrics, with those of an evaluation where one was due.
        """
        metrics = dict(metrics)
        self._lines.append(metrics)
        found = self._by_lines()
        if self.held_out and self.due(iteration):
            now = self.held_out.measure(iteration)
            if self.write:
                self.held_out.save(folder, now)
            metrics.update(now.metrics())
            found += self._by_evaluation(now, metrics)
        known = {(warning.kind, warning.subject) for warning in self.warnings}
        begun = [replace(w, iteration=iteration) for w in found if (w.kind, w.subject) not in known]
        for warning in begun:
            log.warning(
                "warning at iteration %d, %s: %s; %s", iteration, warning.kind, warning.sentence, warning.advice
            )
        self.warnings += begun
        if begun and self.write:
            self._write(folder)
        return metrics

    def _by_lines(self) -> list[WatchWarning]:
        watch, lines = self.config.watch, [line for line in self._lines if "skipped" not in line]
        found = [
            *group_std_collapse(lines, watch.group_std),
            *constant_groups(lines, watch.constant_groups, self.config.prompts.per_iteration),
            *kl_growth(lines, watch.kl),
        ]
        trained = [i for i, line in enumerate(self._lines) if "skipped" not in line][-WINDOW:]
        return [replace(warning, clean=trained[0]) for warning in found]  # as many iterations came before these

    def _by_evaluation(self, now: Evaluation, metrics: Mapping[str, Any]) -> list[WatchWarning]:
        assert self._base is not None
        watch, every = self.config.watch, self.config.watch.every or 1
        found = hacking(now, self._base, self.config.reward.weights, watch.rewards)
        found += diversity_fall(now, self._base, watch.diversity) + kl_at_evaluation(metrics, watch.kl)
        return [replace(warning, clean=(now.iteration - 1) // every * every) for warning in found]

    def close(self, checkpoints: Path) -> None:
        """Say why the run was stopped, if it was."""
        if not self.stops:
            return
        first = next(warning for warning in self.warnings if warning.kind == HACKING)
        before = [path for path in list_checkpoints(checkpoints) if int(path.name.removeprefix("step_")) <= first.clean]
        log.warning(
            "stopped at iteration %d by watch.stop: %s. From before it (iteration %d or earlier): %s. "
            "--resume --watch.stop=false goes on",
            first.iteration,
            first.sentence,
            first.clean,
            before[-1] if before else "no checkpoint (run.save_every, run.keep), only the base",
        )

    def _write(self, folder: Path) -> None:
        watched, not_watched = self.coverage()
        record = {
            "watched": watched,
            "not_watched": not_watched,
            "evaluations": self.held_out.description if self.held_out else None,
            "in_domain": list(self.config.reward.weights),
            "held_out": self.config.watch.rewards,
            "stopped": self.stops,
            "warnings": [asdict(warning) for warning in self.warnings],
        }
        write_atomically(folder / WATCH, json.dumps(record, indent=1) + "\n")

    def coverage(self) -> tuple[list[str], list[str]]:
        """Say in sentences what is watched, and what is not and why."""
        config, watch, length = self.config, self.config.watch, self.config.run.iterations
        watched: list[str] = []
        not_watched: list[str] = []

        def tell(what: str, missing: str) -> None:
            (not_watched if missing else watched).append(f"{what}: {missing}" if missing else what)

        off = "" if self.held_out else "watch.every is not set"
        named = f": {', '.join(watch.rewards)}" if watch.rewards else ""
        tell(f"held-out rewards{named}", off or ("" if watch.rewards else "watch.rewards names none"))
        tell("diversity within prompts", off or ("" if watch.seeds > 1 else "it needs watch.seeds=2 or more"))
        tell("spread of rewards within groups", "" if length >= 2 * WINDOW else f"it needs {2 * WINDOW} iterations")
        tell("groups of equal rewards", "" if length >= WINDOW else f"it needs {WINDOW} iterations")
        if config.loss.kl_beta > 0:
            tell("KL to the reference", "" if length >= WINDOW else f"it needs {WINDOW} iterations")
        else:
            tell("KL to the reference", off and f"loss.kl_beta is 0 and {off}, so no KL is computed")
        return watched, not_watched
