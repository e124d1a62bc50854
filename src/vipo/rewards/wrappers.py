"""Rewards made of other rewards: a picture's reward for clips, and the scorers of the imscore package."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..types import check_choice, check_shape
from .pixels import per_frame, spread

IMSCORE = {
    "clipscore": ("preference", "CLIPScore", "RE-N-Y/clipscore-vit-large-patch14"),
    "cyclereward": ("cyclereward", "CycleReward", "NagaSaiAbhinay/CycleReward-Combo"),
    "evalmuse": ("evalmuse", "EvalMuse", "RE-N-Y/evalmuse"),
    "hpsv2": ("hps", "HPSv2", "RE-N-Y/hpsv21"),
    "hpsv3": ("hpsv3", "HPSv3", "RE-N-Y/hpsv3"),
    "imagereward": ("imreward", "ImageReward", "RE-N-Y/ImageReward"),
    "laion_aesthetic": ("aesthetic", "LAIONAestheticScorer", "RE-N-Y/laion-aesthetic"),
    "mps": ("mps", "MPS", "RE-N-Y/mpsv1"),
    "pickscore": ("pickscore", "PickScorer", "RE-N-Y/pickscore"),
    "shadow_aesthetic": ("aesthetic", "ShadowAesthetic", "RE-N-Y/aesthetic-shadow-v2"),
    "siglip_preference": ("preference", "SiglipPreferenceScorer", "RE-N-Y/pickscore-siglip"),
    "vqascore": ("vqascore", "VQAScore", "RE-N-Y/clip-t5-xxl"),
}
"""Scorers of imscore (github.com/RE-N-Y/imscore): name -> its module, class and weights."""


class PerFrame:
    """A picture's reward for clips: the mean over `count` frames, spread evenly, first and last included.

    The rewards here average over all frames by themselves; this scores fewer, or serves a user's own picture reward.

    Args:
        reward: scores frames (n, 1, 3, Y, X) for n prompts.
        count: frames per clip, >= 1.
    """

    def __init__(self, reward: Callable[[Tensor, list[str]], Tensor], count: int = 8) -> None:
        if count < 1:
            raise ValueError(f"PerFrame: expected count >= 1, got {count}")
        self.reward, self.count = reward, count

    @torch.no_grad()
    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N,) float32."""
        sizes = check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
        chosen = frames[:, spread(self.count, sizes["F"])]
        words = [prompt for prompt in prompts for _ in range(chosen.shape[1])]
        scores = torch.as_tensor(self.reward(chosen.flatten(0, 1)[:, None], words)).float()
        if scores.shape != (len(words),):
            raise ValueError(f"PerFrame: expected {len(words)} numbers for as many pictures, got {tuple(scores.shape)}")
        return scores.view(sizes["N"], -1).mean(1)


def load_imscore(
    path: str | None, device: torch.device | str, *, scorer: str = "mps", chunk: int = 16
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Load a scorer of the imscore package as a reward; a clip's score is the mean of its frames'.

    Args:
        path: folder or hub id of its weights; None = the published ones.
        device: of the weights.
        scorer: one of IMSCORE.
        chunk: pictures per call.

    Raises:
        ValueError: imscore is not installed, or knows no such scorer.
    """
    check_choice("scorer", scorer, IMSCORE)
    module, name, weights = IMSCORE[scorer]
    try:
        kind: Any = getattr(importlib.import_module(f"imscore.{module}.model"), name)
    except ImportError as error:
        raise ValueError(f'imscore: {error}; pip install "vipo[imscore]"') from error
    except AttributeError as error:
        raise ValueError(f"imscore: {error}; a newer version may have it") from error
    return _ImScore(kind.from_pretrained(path or weights).to(device).eval().requires_grad_(False), chunk)


class _ImScore(torch.nn.Module):
    """A scorer of imscore as a reward that moves with its weights."""

    def __init__(self, model: Any, chunk: int) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    @torch.no_grad()
    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Frames (N, F, 3, Y, X) in [0, 1] and N prompts -> (N,), the mean over frames."""
        device = next((p.device for p in self.parameters()), frames.device)

        def score(pictures: Tensor, words: list[str]) -> Tensor:
            return torch.as_tensor(self.model.score(pictures.to(device), words)).reshape(len(words))

        return per_frame(score, frames, prompts, self.chunk)
