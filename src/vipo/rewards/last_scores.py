"""One model for several rewards of a run: its scores of the last batch are kept for the rewards that ask next."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Scorer(Protocol):
    """A model with several scores."""

    def scores(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N, D)."""
        ...


class LastScores(nn.Module):
    """The scores of a model, computed once for questions in a row about one batch.

    A batch is the same if the frames are the same living tensor, unchanged since, and the prompts are equal. The
    frames are not kept alive; a new tensor is another batch, whatever its address.

    Args:
        model: a `Scorer`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._frames: weakref.ref[Tensor] | None = None
        self._version = 0
        self._prompts: list[str] = []
        self._scores = torch.empty(0)

    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N, D)."""
        version = -1 if frames.is_inference() else frames._version  # which an inference tensor does not count
        same = self._frames is not None and self._frames() is frames and version == self._version >= 0
        if not same or list(prompts) != self._prompts:
            self._frames = None  # nothing half-known, should the model fail
            scorer: Scorer = self.model  # type: ignore[assignment]
            self._scores = scorer.scores(frames, prompts)
            self._frames, self._version, self._prompts = weakref.ref(frames), version, list(prompts)
        return self._scores


class SharedReward(nn.Module):
    """A weighted sum of the scores of a model that several rewards share: sum_d weight_d s_d.

    Args:
        scores: of the model.
        weights: per score.
    """

    weights: Tensor

    def __init__(self, scores: LastScores, weights: Sequence[float]) -> None:
        super().__init__()
        self.scores = scores
        self.register_buffer("weights", torch.tensor(weights))

    @torch.no_grad()
    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N,) float32."""
        rewards: Tensor = self.scores(frames, prompts) @ self.weights
        return rewards
