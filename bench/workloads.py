"""What `bench/psm.py` measures on: the paper's two step sizes, painted frames, and randomly initialised networks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel

BACKBONES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "shallow": {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12},  # base's width, for F -> cost
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}


@dataclass(frozen=True)
class Workload:
    """Decoded samples to make maps for.

    Attributes:
        samples: N.
        frames: F.
        pixels: (Y, X).
        latent_shape: (T, H, W).
        temporal_compression: c.
        paper_seconds: what the paper's own module added to its step, on its own machine; None = not reported.
    """

    samples: int
    frames: int
    pixels: tuple[int, int]
    latent_shape: tuple[int, int, int]
    temporal_compression: int = 1
    paper_seconds: float | None = None


# The paper's steps: 59.66 -> 60.47 s (FLUX.1-dev, groups of 12 images) and 203.45 -> 213.27 s (Wan2.1 14B).
IMAGES = Workload(8, 1, (512, 512), (1, 64, 64), paper_seconds=0.8)
VIDEO = Workload(1, 53, (240, 416), (14, 30, 52), 4, paper_seconds=9.8)
WORKLOADS = {
    "cpu": {"image": IMAGES, "video": VIDEO},
    "cuda": {"image": replace(IMAGES, samples=12), "video": VIDEO},
    # 529 patches: scikit-learn leaves its exact solver above 500.
    "quick": {"image": Workload(2, 1, (320, 320), (1, 40, 40)), "video": Workload(1, 5, (64, 96), (2, 8, 12), 4)},
}


def make_model(size: str, device: torch.device) -> PreTrainedModel:
    """Build a randomly initialised DINOv2 of one of BACKBONES, the same for every run."""
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**BACKBONES[size], patch_size=14, image_size=518))
    return cast(PreTrainedModel, model.eval().to(device))


def make_frames(workload: Workload, device: torch.device) -> Tensor:
    """Paint smooth grounds, a disc that drifts, and a little grain: (N, F, 3, Y, X) in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    samples, frames, (height, width) = workload.samples, workload.frames, workload.pixels
    ground = torch.rand(samples, 3, 5, 5, generator=generator)
    ground = functional.interpolate(ground, size=(height, width), mode="bicubic", align_corners=True)[:, None]
    centre = torch.rand(samples, 2, 1, generator=generator) - 0.75 + torch.linspace(0, 0.5, frames)
    down, across = (
        torch.linspace(-1, 1, size).view(shape) - centre[:, axis, :, None, None]
        for axis, (size, shape) in enumerate(((height, (-1, 1)), (width, (1, -1))))
    )
    disc = (down**2 + across**2 < 0.16).float()[:, :, None]
    colour = torch.rand(samples, 1, 3, 1, 1, generator=generator)
    grain = 0.05 * torch.randn(samples, frames, 3, height, width, generator=generator)
    return (ground * (1 - disc) + colour * disc + grain).clamp(0, 1).to(device)
