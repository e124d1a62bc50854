"""What the study compares: arms as changes of the recipes nano_vipo and nano_video_vipo, and in what order they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RATES = (3e-4, 1e-3, 3e-3)
TUNING_SEEDS = {"image": (100, 101), "video": (100,)}
SCALAR = {"map.control": "ones", "loss.level": "sample", "loss.clip_range": 1e-3}
"""Scalar GRPO as in the recipe nano_grpo."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: key in the records.
        label: in the tables.
        changes: of the recipe's config, by "section.key".
        on_reward: multiply the reward by the map before groups are normalised, instead of the advantage.
    """

    name: str
    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    on_reward: bool = False


_ORACLE = {"map.source": "vipo.nano.study.runs:subject_mask"}
FIRST = (
    Arm("grpo", "scalar GRPO", SCALAR),
    Arm("ones_position", "ones, ratio per position", {"map.control": "ones"}),
    Arm("vipo", "ViPO, default map"),
    Arm(
        "released",
        "ViPO, released orientation and min-max",
        {"map.orientation": "library", "map.normalisation": "minmax"},
    ),
    Arm("oracle", "oracle mask", _ORACLE),
    Arm("shuffled", "shuffled map", {"map.control": "shuffled"}),
)
"""The arms that matter most, run first."""
REST = (
    Arm("inverted", "inverted map", {"map.control": "inverted"}),
    Arm("centre_blob", "a blob at the centre", {"map.control": "centre"}),
    Arm("on_reward", "map on the reward", on_reward=True),
    Arm("average", "components averaged", {"map.weighting": "mean"}),
    Arm("minmax", "min-max normalisation", {"map.normalisation": "minmax"}),
    Arm("border", "orientation border", {"map.orientation": "border"}),
    Arm("skewness", "orientation skewness", {"map.orientation": "skewness"}),
    Arm("energy", "orientation energy", {"map.orientation": "energy"}),
    Arm("library", "orientation library", {"map.orientation": "library"}),
    *(Arm(f"components_{k}", f"K = {k}", {"map.components": k}) for k in (1, 2, 4, 5)),
    *(Arm(f"smoothing_{s}", f"sigma = {s}", {"map.smoothing": s}) for s in (0, 0.5, 2)),
)
"""Of pictures."""
AGAIN = dict.fromkeys(("image", "video"), (FIRST[0], FIRST[2], REST[3]))
"""On fresh seeds: scalar GRPO, ViPO, and the arms whose interval lay above scalar GRPO."""
VIDEO_REST = (
    Arm("inverted", "inverted map", {"map.control": "inverted"}),
    Arm("motion", "map x frame difference", {"map.motion": "difference"}),
    Arm("per_frame", "one PCA basis per frame", {"map.pca_scope": "frame"}),
    REST[3],
    Arm("mq_motion", "MQ on its own motion map", {"reward.maps": {"nano_mq": {"motion": "difference"}}}),
)
CLIPS_OF_EPOCHS = {"grpo": (1e-4, 1e-3, 1e-2), "vipo": (1e-3, 1e-2, 1e-1)}
"""Clip ranges tried with two inner epochs, by arm."""
REDNESS = tuple(arm for arm in FIRST if arm.name in ("grpo", "vipo", "oracle", "shuffled")) + REST[:1]


@dataclass(frozen=True)
class Budget:
    """How long and how much.

    Attributes:
        iterations: of pictures and of clips.
        prompts: evaluated after training.
        seeds: of every arm.
        trace_every: iterations between two looks in the redness test.
        groups: per map in the signal table.
        most: of learning rates, clip ranges, tuning seeds, other arms and signal tables this many; None for all.
        per_iteration: prompts, of 8 samples each.
    """

    iterations: Mapping[str, int]
    prompts: int
    seeds: int
    trace_every: int
    groups: int
    most: int | None = None
    per_iteration: int = 4


FULL = Budget({"image": 30, "video": 20}, 128, 5, 3, 160)
QUICK = Budget({"image": 1, "video": 1}, 4, 1, 1, 4, most=1, per_iteration=1)
"""Some runs of every table, one iteration each: a minute or two; the numbers say nothing."""


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        table: which table it belongs to: sweep, arms, again, clips, epochs, redness.
        modality: image or video.
        arm: what is trained.
        seed: of the run.
        changes: beside the arm's, the learning rate among them.
    """

    table: str
    modality: str
    arm: Arm
    seed: int
    changes: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Name of its record."""
        extra = [f"{name.split('.')[-1]}={value}" for name, value in self.changes.items()]
        return "/".join([self.table, self.modality, self.arm.name, *extra, f"seed={self.seed}"])

    @property
    def tuning(self) -> bool:
        """Whether it chooses a setting, and so must not see the prompts that the results are about."""
        return self.table in ("sweep", "clips")


def sweep_jobs(modality: str, budget: Budget) -> Iterator[Job]:
    """Learning rates of scalar GRPO and ViPO."""
    for seed in TUNING_SEEDS[modality][: budget.most]:
        for rate in RATES[: budget.most]:
            for arm in (FIRST[0], FIRST[2]):
                yield Job("sweep", modality, arm, seed, {"optimizer.learning_rate": rate})


def arm_jobs(modality: str, rates: Mapping[str, float], budget: Budget) -> Iterator[Job]:
    """The first six arms seed by seed, then the others."""
    rest = REST if modality == "image" else VIDEO_REST
    for arms in (FIRST, rest[: budget.most]):
        for seed in range(budget.seeds):
            for arm in arms:
                yield Job("arms", modality, arm, seed, _rate(rates, arm))


def again_jobs(modality: str, rates: Mapping[str, float], budget: Budget) -> Iterator[Job]:
    """The arms of AGAIN on as many seeds that nothing was chosen by."""
    for seed in range(budget.seeds, 2 * budget.seeds):
        for arm in AGAIN[modality][: budget.most and budget.most + 1]:
            yield Job("again", modality, arm, seed, _rate(rates, arm))


def clip_jobs(rates: Mapping[str, float], budget: Budget) -> Iterator[Job]:
    """Clip ranges with two inner epochs, which leave the ratio 1."""
    for arm in (FIRST[0], FIRST[2]):
        for clip in CLIPS_OF_EPOCHS[arm.name][: budget.most]:
            yield Job("clips", "image", arm, TUNING_SEEDS["image"][0], {**_rate(rates, arm), **_epochs(clip)})


def epoch_jobs(rates: Mapping[str, float], clips: Mapping[str, float], budget: Budget) -> Iterator[Job]:
    """Two inner epochs with the chosen clip ranges; ones per position takes ViPO's."""
    for seed in range(budget.seeds):
        for arm in FIRST[:3]:
            changes = {**_rate(rates, arm), **_epochs(clips["grpo" if arm.name == "grpo" else "vipo"])}
            yield Job("epochs", "image", arm, seed, changes)


def redness_jobs(rates: Mapping[str, float], budget: Budget) -> Iterator[Job]:
    """The paper's redness test, looked at several times on the way."""
    for seed in range(budget.seeds):
        for arm in REDNESS:
            yield Job("redness", "image", arm, seed, {**_rate(rates, arm), "reward.name": "redness"})


def _rate(rates: Mapping[str, float], arm: Arm) -> dict[str, float]:
    """The rate of an arm: scalar GRPO's for arms without a map, ViPO's for all others."""
    return {"optimizer.learning_rate": rates["grpo" if arm.name in ("grpo", "ones_position") else "vipo"]}


def _epochs(clip: float) -> dict[str, float]:
    return {"optimizer.epochs": 2, "loss.clip_range": clip}


def best(scores: Mapping[float, Sequence[float]]) -> float:
    """The setting with the highest mean score."""
    return max(scores, key=lambda setting: sum(scores[setting]) / len(scores[setting]))


def in_domain(metrics: Mapping[str, float]) -> float:
    """What was trained on: the preference score, of clips the sum of the two."""
    return metrics["reward"] if "reward" in metrics else metrics["reward_vq"] + metrics["reward_mq"]
