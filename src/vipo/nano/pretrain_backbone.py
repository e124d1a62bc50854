"""The nano vision backbone: a Dinov2Model of width 96, depth 4 and patch 4 on 64x64 pictures (a 16x16 patch grid).

Two objectives together: masked patches are filled in (pixels, as SimMIM, arXiv 2111.09886), which keeps features
local, and the words of the prompt are read off the CLS token and off the mean patch token, which makes the named
subject stand out against clutter, textures and the unnamed second shape. No mask of the subject is ever shown.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from . import world
from .pretrain import batches, fit, parameter_count, render_pool, to_unit, write_card

log = logging.getLogger("vipo.nano.pretrain")
PATCH = 4
MEAN, STD = 0.5, 0.25
"""Pixel mean and standard deviation, also written to preprocessor_config.json."""


def build_backbone() -> Dinov2Model:
    return Dinov2Model(
        Dinov2Config(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=3,
            mlp_ratio=2,
            image_size=world.SIZE,
            patch_size=PATCH,
            layerscale_value=1.0,
        )
    )


def augment(images: Tensor) -> Tensor:
    """Brightness, contrast and pixel noise per picture: nuisances that the words do not name."""
    count = len(images)
    gain = 1 + 0.2 * (2 * torch.rand(count, 1, 1, 1) - 1)
    shift = 0.1 * (2 * torch.rand(count, 1, 1, 1) - 1)
    noise = 0.08 * torch.rand(count, 1, 1, 1) * torch.randn_like(images)
    return (images * gain + shift + noise).clamp(0, 1)


def train(output: Path, *, steps: int = 3000, pool: int = 16384, seed: int = 0) -> None:
    """Train the backbone and write it with its preprocessor config and model card."""
    backbone = build_backbone()
    width, names = backbone.config.hidden_size, list(world.ATTRIBUTES)
    heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in world.ATTRIBUTES.items()})
    pixels = nn.Linear(width, 3 * PATCH * PATCH)
    log.info("backbone: %d parameters", parameter_count(backbone))
    images, _, scenes = render_pool(pool, seed + 3, defect_share=0.5)
    picks = batches(pool, 32, torch.Generator().manual_seed(seed))
    grid = world.SIZE // PATCH

    def word_loss(token: Tensor, rows: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(heads[n](token), scenes[rows, world.COLUMN[n]]) for n in names]).mean()

    def loss_at(step: int) -> Tensor:
        rows = next(picks)
        x = (augment(to_unit(images[rows])) - MEAN) / STD
        hidden = torch.rand(len(rows), grid // 2, grid // 2) < 0.4
        hidden = hidden.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        hidden[: len(rows) // 2] = False  # half of the batch is seen whole
        with torch.autocast("cpu", torch.bfloat16):
            tokens = backbone(pixel_values=x, bool_masked_pos=hidden).last_hidden_state
            words = word_loss(tokens[:, 0], rows) + word_loss(tokens[:, 1:].mean(1), rows)
            filled = pixels(tokens[:, 1:])
        target = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)
        missing = ((filled.float() - target).abs().mean(-1) * hidden).sum() / hidden.sum().clamp_min(1)
        return words + missing

    facts = fit([backbone, heads, pixels], loss_at, steps=steps, learning_rate=1e-3, weight_decay=0.04, average=0.999)
    backbone.eval().save_pretrained(output)
    preprocessor = {
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "size": {"height": world.SIZE, "width": world.SIZE},
    }
    (output / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n")
    with torch.no_grad():
        held_out, _, truth = render_pool(512, seed + 4, defect_share=0.0)
        token = backbone(pixel_values=(to_unit(held_out) - MEAN) / STD).last_hidden_state[:, 0]
        accuracy = {
            f"held_out_{n}_accuracy": round(
                (heads[n](token).argmax(1) == truth[:, world.COLUMN[n]]).float().mean().item(), 3
            )
            for n in names
        }
    write_card(
        output,
        "Nano vision backbone",
        {
            "class": "transformers Dinov2Model, width 96, depth 4, patch 4",
            "parameters": parameter_count(backbone),
            "data": f"{pool} procedural pictures (vipo.nano.world), 50 % with a local defect, batch 32",
            "objective": "words of the prompt from CLS and mean patch token, masked patches filled in",
            **accuracy,
            **facts,
        },
    )
    log.info("backbone: %s", accuracy)
