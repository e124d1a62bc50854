"""`vipo check CONFIG --signal`: whether a map helps, measured on the untrained model instead of by a training run.

With g_i the policy gradient of group i (one prompt, G samples), the gradient signal fraction is

    f = ||E g||^2 / E ||g||^2, in [0, 1]:  the share of a group's gradient that is common to all groups

A map that helps raises f: the same expected direction, less noise. Training on B groups at once has the fraction
B f / (1 + (B - 1) f). Every map is measured on the same rollouts, so that differences are paired.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import yaml
from torch import Tensor

from .config import Config, MapConfig
from .estimators import Estimate, count_sketch, gram_matrix, jackknife, leave_one_out, signal_cosine, signal_fraction
from .maps import shared_sources
from .psm import control_maps
from .runlog import PhaseClock
from .trainer import Trainer
from .types import Experience, require_finite
from .versions import versions

LEAST_GROUPS = 4
MEMORY = 2**32
"""Bytes that the gradients of all maps and groups may take on the CPU; larger ones are sketched into as much."""
CONTROLS = ("ones", "shuffled", "inverted", "centre")
Progress = Callable[[str, int, int, str], None]
"""(stage, done, total, remark)"""


@dataclass(frozen=True)
class MapSignal:
    """One row of the table.

    Attributes:
        name: of the map.
        fraction: gradient signal fraction; an unbiased estimate may be negative.
        difference: fraction less that of ones, paired; None for ones itself.
        cosine: to scalar GRPO's expected gradient, debiased; None where noise hides either; may leave [-1, 1].
        mean_cosine: of the two mean gradients, which noise draws away from the debiased one.
        norm: root of E ||g||^2.
        seconds: spent on its maps and replays.
    """

    name: str
    fraction: Estimate
    difference: Estimate | None
    cosine: float | None
    mean_cosine: float
    norm: float
    seconds: float


@dataclass(frozen=True)
class SignalReport:
    """What `measure_signal` found.

    Attributes:
        groups: that counted.
        skipped: without a spread of rewards, or with a failed reward that the config drops.
        group_size: G.
        parameters: trained.
        sketch: numbers kept of each gradient where not all fit in memory, else None.
        seconds: in all.
        maps: one row per map, ones first, then the configured map.
        recommendation: one sentence or two.
    """

    groups: int
    skipped: int
    group_size: int
    parameters: int
    sketch: int | None
    seconds: float
    maps: list[MapSignal]
    recommendation: str

    def record(self) -> dict[str, Any]:
        """The report for a JSON file, with what it was made with."""
        return {"kind": "signal", **asdict(self), **versions()}


def signal_config(config: Config) -> Config:
    """The run that is measured: one group per iteration, all trained steps in one update, no KL, no control.

    Raises:
        ValueError: the ratio is taken per sample, where all maps of one mean have one gradient; or rewards have maps of
            their own.
    """
    if config.reward.maps:
        raise ValueError("--signal: measures one map for all rewards, not reward.maps; add --reward.maps={}")
    if config.loss.level == "sample":
        raise ValueError("--signal: at loss.level=sample a map acts through its mean only; add --loss.level=position")
    mapping = config.model_dump()
    mapping["prompts"]["per_iteration"] = 1
    mapping["optimizer"]["updates_per_rollout"] = 1
    mapping["loss"]["kl_beta"] = 0.0
    mapping["map"]["control"] = None
    return Config.from_mapping(mapping)


def map_kinds(config: Config, extra: Sequence[str] = ()) -> dict[str, MapConfig]:
    """Name the maps that are measured: ones, the configured map, its controls, and more.

    Args:
        config: of `signal_config`.
        extra: changes of the map section, "orientation=library" or "orientation=border,smoothing=0".

    Raises:
        ValueError: not a change of the map section.
    """
    own = config.map
    controls = {name: own.changed({"control": name}) for name in CONTROLS}
    kinds = {"ones": controls.pop("ones"), own.label: own, **controls}
    for text in extra:
        changes: dict[str, Any] = {}
        for change in text.split(","):
            key, separator, value = change.partition("=")
            if not separator or not key:
                raise ValueError(f"--maps: {text}: expected KEY=VALUE of the map section, e.g. orientation=skewness")
            try:
                changes[key] = yaml.safe_load(value)
            except yaml.YAMLError:
                raise ValueError(f"--maps: {text}: {value} is not a YAML value") from None
        if "device" in changes:
            raise ValueError(f"--maps: {text}: all maps are made on one device; use --map.device={changes['device']}")
        kinds[text] = own.changed(changes)
    return kinds


def measure_signal(
    config: Config,
    groups: int = 24,
    extra: Sequence[str] = (),
    *,
    progress: Progress = lambda stage, done, total, remark: None,
    build: Callable[[Config], Trainer] = Trainer,
) -> SignalReport:
    """Measure the gradient signal fraction of every map on the same rollouts. Trains and writes nothing.

    A group's prompt is an independent draw from the prompt file: each group is the first of an epoch of its own.

    Args:
        config: the run.
        groups: m, at least 4.
        extra: further maps, see `map_kinds`.
        progress: told how far it is.
        build: makes the trainer of a config.

    Returns:
        The report.

    Raises:
        ValueError: too few groups, or too few of them with a spread of rewards; a map that is none.
    """
    if groups < LEAST_GROUPS:
        raise ValueError(f"--groups: expected at least {LEAST_GROUPS}, got {groups}")
    config = signal_config(config)
    kinds = map_kinds(config, extra)
    started = time.perf_counter()
    trainer = build(config)
    parameters = sum(p.numel() for p in trainer.parameters)
    size = min(parameters, MEMORY // (4 * groups * len(kinds)))
    gradients, seconds = _gather(trainer, kinds, groups, size, progress)
    counted = len(gradients["ones"])
    if counted < LEAST_GROUPS:
        raise ValueError(
            f"--signal: {counted} of {groups} groups have rewards that differ, need {LEAST_GROUPS}: raise "
            "--groups or --prompts.group_size, or change the reward"
        )
    rows = estimate({name: torch.stack(gradients.pop(name)) for name in kinds}, seconds)  # pop: never all twice
    return SignalReport(
        groups=counted,
        skipped=groups - counted,
        group_size=config.prompts.group_size,
        parameters=parameters,
        sketch=None if size == parameters else size,
        seconds=round(time.perf_counter() - started, 2),
        maps=rows,
        recommendation=recommend(rows, counted),
    )


def _gather(
    trainer: Trainer, kinds: dict[str, MapConfig], groups: int, size: int, progress: Progress
) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
    """Sample the groups; return every map's gradients, in at most `size` numbers each, and the seconds they took."""
    maps_of = _map_maker(trainer, kinds)
    gradients: dict[str, list[Tensor]] = {name: [] for name in kinds}
    seconds = dict.fromkeys(kinds, 0.0)
    for group in range(groups):
        progress("signal", group * len(kinds), groups * len(kinds), f"group {group + 1}: rollout")
        iteration = group * len(trainer.prompts)
        found = _experience(trainer, iteration)
        if found is None or not bool(found.advantages.any()):
            continue
        made: dict[MapConfig, list[Tensor]] = {}
        for done, name in enumerate(kinds, 1):
            begun = time.perf_counter()
            gradient = policy_gradient(trainer, found, maps_of(found, kinds[name], iteration, made))
            if size < len(gradient):
                gradient = count_sketch(gradient, size, trainer.config.run.seed)
            gradients[name].append(gradient)
            seconds[name] += time.perf_counter() - begun
            progress("signal", group * len(kinds) + done, groups * len(kinds), f"group {group + 1}: {name}")
    return gradients, seconds


def _experience(trainer: Trainer, iteration: int) -> Experience | None:
    """Sample and score one group; None where a reward has failed and the config drops such groups."""
    try:
        return trainer.experience(iteration, PhaseClock(trainer.policy.device))
    except FloatingPointError:
        if trainer.config.reward.on_failure == "stop":
            raise
        return None


def _map_maker(
    trainer: Trainer, kinds: dict[str, MapConfig]
) -> Callable[[Experience, MapConfig, int, dict[MapConfig, list[Tensor]]], list[Tensor]]:
    """(group, map section, iteration, maps already made of the group) -> maps per bucket.

    A control is made from its map, and sources with one backbone share it.
    """
    device = trainer.policy.device if trainer.config.model.offload == "none" else "cpu"
    plain_kinds = [kind.model_copy(update={"control": None}) for kind in kinds.values()]
    sources = shared_sources(trainer.config.map, trainer.map_source, plain_kinds, trainer.config.map.device or device)
    for source in sources.values():
        source.check([prompt.text for prompt in trainer.prompts])

    def maps_of(
        found: Experience, kind: MapConfig, iteration: int, made: dict[MapConfig, list[Tensor]]
    ) -> list[Tensor]:
        plain = kind.model_copy(update={"control": None})
        if plain not in made:
            made[plain] = trainer.maps_of(found, iteration, sources[plain])
        if kind.control is None:
            return made[plain]
        generator = trainer.map_generator(iteration)
        return [control_maps(maps, kind.control, generator) for maps in made[plain]]

    return maps_of


def policy_gradient(trainer: Trainer, found: Experience, maps: list[Tensor]) -> Tensor:
    """Gradient (P,) of the loss over the trained steps, on the CPU."""
    trainer.accumulate(found, maps, found.plan[0], defaultdict(list))
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.parameters]
    gradient = torch.cat([part.flatten().float().cpu() for part in parts])
    trainer.optimizer.zero_grad(set_to_none=True)
    require_finite("gradient", gradient)
    return gradient


def estimate(gradients: dict[str, Tensor], seconds: dict[str, float]) -> list[MapSignal]:
    """Compare the gradients (m, P) of every map on the same m groups, "ones" among them, with those of ones.

    Raises:
        ValueError: all gradients of a map are 0.
    """
    ones = gram_matrix(gradients["ones"], gradients["ones"])
    rows = []
    for name, values in gradients.items():
        own, cross = gram_matrix(values, values), gram_matrix(values, gradients["ones"])
        if not bool(own.any()):
            raise ValueError(
                f"--signal: the gradient of {name} is 0 in every group: its maps are 0, or nothing is trained"
            )
        fraction, left_out = signal_fraction(own), leave_one_out(own)
        difference = jackknife(fraction - signal_fraction(ones), left_out - leave_one_out(ones))
        rows.append(
            MapSignal(
                name=name,
                fraction=jackknife(fraction, left_out),
                difference=None if name == "ones" else difference,
                cosine=signal_cosine(cross, own, ones),
                mean_cosine=float(cross.sum() / (own.sum() * ones.sum()).sqrt()),
                norm=float(own.diagonal().mean().sqrt()),
                seconds=round(seconds[name], 2),
            )
        )
    return rows


def recommend(rows: Sequence[MapSignal], groups: int) -> str:
    """Say in words what rows of `estimate` (ones, the configured map, others) mean for a run.

    A half-width shrinks as 1 / m while m f < 1, where noise hides the mean, and as 1 / sqrt(m) later: the two laws give
    the least and the largest number of groups that a difference needs.
    """
    ones, own, *_ = rows
    compared = [(row, row.difference) for row in rows if row.difference is not None]
    better = [row for row, difference in compared if difference.low > 0]
    if better:
        best = max(better, key=lambda row: row.fraction.value)
        facts = f"its gradient signal fraction is {best.fraction}, that of ones {ones.fraction.value:.4f}"
        if best.name == "inverted":
            return f"The inverted {own.name} map has the most signal: {own.name} points the wrong way here; {facts}."
        if best.name == "shuffled":
            return f"The shuffled {own.name} map has the most signal: its places say nothing; {facts}."
        changes = "control=centre" if best.name == "centre" else best.name
        setting = " ".join(f"--map.{change}" for change in changes.split(","))
        return f"Use the {own.name} map{'' if best is own else f' with {setting}'}: {facts}."
    if own.difference is not None and own.difference.high < 0:
        return f"Do not use the {own.name} map: {own.difference} less ones is a loss; try others, or map.control=ones."
    row, difference = max(
        (pair for pair in compared if pair[0].name not in ("shuffled", "inverted")),
        key=lambda pair: pair[0].fraction.value,
    )
    if difference.value <= 0:
        more = f"try other maps, or --groups {4 * groups}"
        return f"{groups} groups cannot tell any map from ones, and none is ahead: {more}."
    ratio = (difference.high - difference.value) / difference.value
    least, most = math.ceil(groups * ratio), math.ceil(groups * ratio**2)
    return (
        f"{groups} groups cannot tell any map from ones. {row.name} is ahead by {difference}; if that is real, between "
        f"{least} and {most} groups would show it (--groups {least})."
    )


def signal_table(report: SignalReport) -> Any:
    """The report as a rich table."""
    from rich.table import Table

    title = f"{report.groups} groups of {report.group_size} ({report.skipped} more without a spread of rewards)"
    table = Table(title=title if report.skipped else f"{report.groups} groups of {report.group_size}")
    for heading in ("map", "signal fraction", "less that of ones", "cosine to scalar GRPO", "seconds"):
        table.add_column(heading, justify="left" if heading == "map" else "right")
    for row in report.maps:
        cosine = "-" if row.cosine is None else f"{row.cosine:.2f}"
        difference = "" if row.difference is None else str(row.difference)
        table.add_row(
            row.name, str(row.fraction), difference, f"{cosine} ({row.mean_cosine:.2f})", f"{row.seconds:.1f}"
        )
    return table
