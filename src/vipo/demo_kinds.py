"""What the two demos are about: pictures by the embedded SD3-class pipeline, clips by the embedded Wan-class one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .nano import video_world, world

METHODS = {"grpo": "Scalar GRPO", "vipo": "ViPO"}


@dataclass(frozen=True)
class Metric:
    """One measured quantity of the held-out samples.

    Attributes:
        name: key in the summary.
        label: on the page and in the table.
        description: one sentence.
        higher_is_better: the good direction.
        reward: name of the reward that it is, where it was trained on; None for an exact metric of the world.
    """

    name: str
    label: str
    description: str
    higher_is_better: bool = True
    reward: str | None = None

    def entry(self) -> dict[str, Any]:
        """The metric as the summary has it."""
        return {
            "name": self.name,
            "label": self.label,
            "higher_is_better": self.higher_is_better,
            "in_domain": self.reward is not None,
            "description": self.description,
        }


@dataclass(frozen=True)
class Kind:
    """One demo.

    Attributes:
        modality: "image" or "video".
        command: that starts it.
        recipes: by method, in vipo/recipes.
        held_out: prompt file in nano/assets; its last prompts are evaluated, its first served to choose defaults.
        metrics: the first is the headline.
        measure: exact metrics of frames (n, F, 3, Y, X) for n prompts: name -> (n,).
    """

    modality: str
    command: str
    recipes: dict[str, str]
    held_out: str
    metrics: tuple[Metric, ...]
    measure: Callable[[Tensor, Sequence[str]], dict[str, Tensor]]


_SHAPE_IOU = Metric("shape_iou", "Shape IoU", "Overlap of the drawn subject with the exact named shape, 0 to 1.")
_SHAPE_ACCURACY = Metric(
    "shape_accuracy",
    "Shape accuracy",
    "Share of samples whose subject fits the named shape better than any other shape.",
)
_COLOUR_ERROR = Metric(
    "colour_error",
    "Subject colour error",
    "Mean RGB distance of the subject's pixels to the named colour, 0 to 1.7.",
    higher_is_better=False,
)
IMAGES = Kind(
    modality="image",
    command="vipo demo",
    recipes={method: f"nano_{method}" for method in METHODS},
    held_out="prompts_held_out.txt",
    metrics=(
        Metric(
            "reward",
            "Preference score",
            "The learned scorer that both methods were trained on.",
            reward="nano",
        ),
        _SHAPE_IOU,
        _SHAPE_ACCURACY,
        _COLOUR_ERROR,
        Metric(
            "background_dirt",
            "Background dirt",
            "Mean excess RGB distance of the background to the named one; prompts without clutter only.",
            higher_is_better=False,
        ),
    ),
    measure=lambda frames, prompts: world.measure(frames[:, 0], list(prompts)),
)
CLIPS = Kind(
    modality="video",
    command="vipo demo --video",
    recipes={method: f"nano_video_{method}" for method in METHODS},
    held_out="prompts_video_held_out.txt",
    metrics=(
        Metric(
            "reward_vq",
            "Visual quality score",
            "The learned scorer of single frames; one of the two that both methods were trained on.",
            reward="nano_vq",
        ),
        Metric(
            "reward_mq",
            "Motion quality score",
            "The learned scorer of motion; the other one.",
            reward="nano_mq",
        ),
        Metric(
            "motion_accuracy",
            "Motion accuracy",
            "Share of clips whose subject's course is nearest to the named motion, of seven.",
        ),
        Metric(
            "motion_error",
            "Motion error",
            "Distance of the subject's course to the named one; 1 is a whole travel or growth.",
            higher_is_better=False,
        ),
        Metric(
            "jitter",
            "Jitter",
            "RMS distance in pixels of the subject's centre from constant speed.",
            higher_is_better=False,
        ),
        Metric(
            "flicker",
            "Flicker",
            "Mean absolute change from frame to frame away from the subject.",
            higher_is_better=False,
        ),
        _COLOUR_ERROR,
        _SHAPE_IOU,
        _SHAPE_ACCURACY,
    ),
    measure=lambda frames, prompts: video_world.measure(frames, list(prompts)),
)
