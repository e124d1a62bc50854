"""A reward on another machine: samples go out as PNG or MP4 in JSON, scores come back. See wire.py for the format.

`vipo serve-reward NAME` is the other end; any server that speaks the format will do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import check_choice, check_shape
from .endpoint import Endpoint, where_finite
from .wire import Format, Reply, encode_sample


@dataclass(frozen=True, kw_only=True)
class RemoteReward(Endpoint):
    """Scores from a server, `url` being the whole address, as http://127.0.0.1:8000/score.

    A score of null or NaN, and a sample that is not finite, are NaN here: reward.on_failure says what then happens.
    """

    batch: int = 8
    """Samples per request."""
    format: Format = "mp4"
    """Of clips: mp4 (small, lossy) or png (every frame, exact to 8 bits, large). Pictures are always PNG."""
    fps: float = 16.0
    """Frames per second written into an MP4."""

    def __post_init__(self) -> None:
        """Raise ValueError for a setting that cannot work."""
        super().__post_init__()
        check_choice("format", self.format, ("mp4", "png"))
        if self.batch < 1 or not 0.01 <= self.fps <= 1000:
            raise ValueError(f"expected batch >= 1 and fps of 0.01 to 1000, got {self.batch} and {self.fps}")

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N,) float32, on the CPU.

        Raises:
            ConnectionError: the server could not be reached, or answered 5xx, in every attempt.
            ValueError: it refused the request, or its reply is not one score per sample.
        """
        check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
        pixels = frames.cpu()
        parts = [slice(start, start + self.batch) for start in range(0, len(prompts), self.batch)]
        scores = self.each(lambda part: self._ask(pixels[part], prompts[part]), parts)
        return where_finite(pixels, torch.tensor([score for part in scores for score in part], dtype=torch.float32))

    def _ask(self, frames: Tensor, prompts: Sequence[str]) -> list[float]:
        pairs = zip(frames, prompts, strict=True)
        samples = [encode_sample(clip, prompt, self.format, self.fps) for clip, prompt in pairs]
        scores = self.post({"samples": samples}, Reply).scores
        if len(scores) != len(samples):
            raise ValueError(f"{self.place}: expected {len(samples)} scores, one per sample, got {len(scores)}")
        return [math.nan if score is None else score for score in scores]
