"""The section `watch` of the config."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from .section import Fraction, Positive, Section


class WatchConfig(Section):
    """Watching for reward hacking during training, see docs/evaluation.md."""

    every: Positive | None = None
    """Iterations between evaluations on held-out prompts, after the base's; null for none."""
    rewards: list[str] = []
    """Held-out rewards: scored, never trained on. reward.paths and reward.options hold for them too."""
    path: str | None = None
    """Prompt file; null for prompts.path, of the embedded ones for their held-out prompts."""
    prompts: Annotated[int, Field(ge=2)] = 32
    """Prompts evaluated at most, evenly spread over the file."""
    seeds: Positive = 2
    """Samples per prompt; diversity needs two."""
    stop: bool = False
    """End the run, with a checkpoint, when a reward that is trained on has risen and a held-out one has fallen."""
    diversity: Fraction = 0.5
    """Warn when the samples of a prompt are less diverse than this share of the base's."""
    group_std: Fraction = 0.2
    """Warn when the mean group_std of ten iterations falls below this share of the first ten's."""
    constant_groups: Fraction = 0.5
    """Warn when more than this share of the groups of ten iterations earned equal rewards."""
    kl: Annotated[float, Field(gt=0)] = 0.1
    """Warn when the mean kl of ten iterations exceeds this (nats per element and step); with loss.kl_beta 0, when the
    eval/kl of an evaluation does."""

    @model_validator(mode="after")
    def _check(self) -> WatchConfig:
        if self.every is None and (self.rewards or self.path):
            raise ValueError("watch.every: watch.rewards and watch.path need it; set it to 10, say")
        if self.stop and not self.rewards:
            raise ValueError("watch.stop: expected at least one held-out reward in watch.rewards, and watch.every")
        return self
