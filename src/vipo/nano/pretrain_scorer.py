"""The nano preference scorer: a small CLIPModel trained on pairs, as PickScore is.

In each pair the first picture suits the prompt better. The worse one has a local defect of any strength, a wrong
word, an off-world artefact (noise, blur, colour cast, checks, bleached or saturated colours), or was made by a
generator in training. All pictures may have gone through the generator's VAE, so that its traces do not tell.
A scorer trained on one kind of fault only is soon exploited by the policy.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from ..loading import load_pipeline
from ..rewards.preference import ClipPreference
from . import world
from .pretrain import batches, fit, parameter_count, to_unit, write_card
from .pretrain_t2i import CALL, TOKENS, build_tokenizer

log = logging.getLogger("vipo.nano.pretrain")
KINDS = ("defect", "wrong_word", "artefact", "generated")
MEAN, STD = (0.5,) * 3, (0.25,) * 3
PATCH = 8


def build_scorer() -> ClipPreference:
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=112,
        intermediate_size=224,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=PATCH,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    return ClipPreference(CLIPModel(config), tokenizer, MEAN, STD)


def change_word(scenes: Tensor, generator: torch.Generator) -> Tensor:
    """Change one attribute of every scene; subject words are changed more often than background words."""
    odds = torch.tensor(
        [2.0, 2.0, 6.0, 2.0, 1.0, 2.0, 1.0]
    )  # size, colour, shape, place, pattern, ground, surroundings
    column = torch.multinomial(odds, len(scenes), replacement=True, generator=generator)
    rows = torch.arange(len(scenes))
    options = torch.tensor([len(words) for words in world.ATTRIBUTES.values()])[column]
    shift = 1 + (torch.rand(len(scenes), generator=generator) * (options - 1)).long().minimum(options - 2)
    changed = scenes.clone()
    changed[rows, column] = (changed[rows, column] + shift) % options
    return changed


def spoil(images: Tensor) -> Tensor:
    """Give each picture one off-world artefact of random strength."""
    count = len(images)
    strength = 0.1 + 0.9 * torch.rand(count, 1, 1, 1)
    noise = 0.25 * torch.randn_like(images)
    fine = F.interpolate(torch.randn(count, 3, 16, 16), world.SIZE, mode="bicubic") * 0.25
    cast = 0.4 * (torch.rand(count, 3, 1, 1) - 0.5)
    axis = torch.arange(world.SIZE)
    period = torch.randint(2, 9, (count, 1, 1, 1))
    grid = 0.3 * (((axis[:, None] // period + axis // period) % 2).float() - 0.5)
    grey = images.mean(1, keepdim=True)
    options = torch.stack(
        [
            images + noise,
            images + fine,
            world.blur(images, 4),
            images + cast,
            images + grid,
            grey + (images - grey) * 0.2,
            grey + (images - grey) * 2.2,
            0.5 + (images - 0.5) * 2.0,
        ]
    )
    chosen = options[torch.randint(0, len(options), (count,)), torch.arange(count)]
    return (images + strength * (chosen - images)).clamp(0, 1)


class Pairs(NamedTuple):
    """A pool of rendered pairs; pictures uint8 (n, 3, 64, 64), masks (n, 64), scenes (n, 7)."""

    clean: Tensor
    faulty: Tensor
    wrong: Tensor
    masks: Tensor
    scenes: Tensor
    wrong_scenes: Tensor


def render_pairs(count: int, seed: int) -> Pairs:
    """Render pictures, the same with a defect of random strength, and the same pose with a changed word."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Pairs] = []
    for start in range(0, count, 512):
        scenes = world.sample_scenes(min(512, count - start), generator)
        pose = seed * 7919 + start
        defects = torch.randint(1, len(world.DEFECTS), (len(scenes),), generator=generator)
        clean, masks = world.render(scenes, torch.Generator().manual_seed(pose))
        faulty = world.render(scenes, torch.Generator().manual_seed(pose), defects).images
        strength = 0.3 + 0.7 * torch.rand(len(scenes), 1, 1, 1, generator=generator)
        changed = change_word(scenes, generator)
        wrong = world.render(changed, torch.Generator().manual_seed(pose)).images
        spoiled = to_bytes(clean + strength * (faulty - clean))
        parts.append(Pairs(to_bytes(clean), spoiled, to_bytes(wrong), patch_mean(masks[:, None]), scenes, changed))
    return Pairs(*(torch.cat(column) for column in zip(*parts, strict=True)))


def patch_mean(pictures: Tensor) -> Tensor:
    """Mean over the scorer's 8x8 patches and over channels: (n, 64)."""
    return F.avg_pool2d(pictures.mean(1, keepdim=True), PATCH).flatten(1)


def to_bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
def through_vae(images: Tensor, pipeline: StableDiffusion3Pipeline) -> Tensor:
    """Encode and decode uint8 pictures in chunks."""
    vae = pipeline.vae.eval()
    done = [vae.decode(vae.encode(to_unit(x) * 2 - 1).latent_dist.mode()).sample / 2 + 0.5 for x in images.split(256)]
    return to_bytes(torch.cat(done))


@torch.no_grad()
def generate(pipeline: StableDiffusion3Pipeline, prompts: list[str], steps: int, seed: int) -> Tensor:
    """Sample pictures, uint8, in chunks."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    done = [
        pipeline(
            prompts[i : i + 128],
            guidance_scale=1.0,
            num_inference_steps=steps,
            generator=generator,
            output_type="pt",
            **CALL,
        ).images
        for i in range(0, len(prompts), 128)
    ]
    return to_bytes(torch.cat(done))


class Teacher(nn.Module):
    """Auxiliary heads that speed up the vision tower; they see the world's truth and are thrown away afterwards.

    The CLS token names the drawn words; every patch tells how much of it the subject covers and how faulty it is.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in world.ATTRIBUTES.items()})
        self.patches = nn.Linear(width, 2)

    def forward(self, tokens: Tensor, scenes: Tensor, masks: Tensor, faults: Tensor, known: Tensor) -> Tensor:
        """Loss of tokens (n, 65, D) where `known` (n,) is 1; scenes (n, 7), masks and faults (n, 64) in [0, 1]."""
        names = enumerate(world.ATTRIBUTES)
        words = sum(
            F.cross_entropy(self.words[name](tokens[:, 0]), scenes[:, i], reduction="none") for i, name in names
        )
        patches = F.binary_cross_entropy_with_logits(
            self.patches(tokens[:, 1:]), torch.stack([masks, faults], -1), reduction="none"
        ).mean((1, 2))
        return ((0.5 * words + 2 * patches) * known).sum() / known.sum()


def train(
    output: Path,
    *,
    steps: int = 4000,
    pool: int = 5120,
    seed: int = 0,
    generator: Path | None = None,
    initial: Path | None = None,
) -> None:
    """Train the scorer against samples of a middle and of the last checkpoint of `generator`, a t2i output folder.

    `initial` continues a scorer at half the learning rate instead of starting from random weights.
    """
    if generator is None:
        raise ValueError("--generator: the scorer needs the output folder of `pretrain t2i`, with its steps/")
    checkpoints = sorted((generator / "steps").glob("*"))
    checkpoints = [checkpoints[len(checkpoints) // 2], checkpoints[-1]]
    pipelines = [load_pipeline(path)[0] for path in checkpoints]
    scorer = ClipPreference.from_pretrained(initial) if initial else build_scorer()
    scorer.model.requires_grad_(True)
    teacher = Teacher(scorer.model.config.vision_config.hidden_size)
    log.info("scorer: %d parameters; generators %s", parameter_count(scorer), [p.name for p in checkpoints])
    pairs = render_pairs(pool, seed + 5)
    prompts = world.describe(pairs.scenes)
    parts = [prompts[i : i + 256] for i in range(0, pool, 256)]
    generated = torch.cat(
        [generate(pipelines[i % 2], part, (4, 8, 6)[i % 3], seed + i) for i, part in enumerate(parts)]
    )
    decoded, faulty_decoded = through_vae(pairs.clean, pipelines[0]), through_vae(pairs.faulty, pipelines[0])
    log.info("scorer: pairs rendered, generated and decoded")
    held = 512
    picks = batches(pool - held, 32, torch.Generator().manual_seed(seed))

    def draw(rows: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        """Better and worse pictures (n, 3, 64, 64) of the pairs' kinds."""
        traced = (torch.rand(len(rows)) < 0.6)[:, None, None, None]
        better = torch.where(traced, decoded[rows], pairs.clean[rows])
        defect = torch.where(traced, faulty_decoded[rows], pairs.faulty[rows])
        worse = torch.stack([defect, pairs.wrong[rows], better, generated[rows]])[kind, torch.arange(len(rows))]
        better, worse = to_unit(better), to_unit(worse)
        worse = torch.where((kind == 2)[:, None, None, None], spoil(worse), worse)
        grain = 0.04 * torch.rand(len(rows), 1, 1, 1)
        better = (better + grain * torch.randn_like(better)).clamp(0, 1)
        return better, (worse + grain * torch.randn_like(worse)).clamp(0, 1)

    def loss_at(step: int) -> Tensor:
        rows = next(picks)
        kind = torch.multinomial(torch.tensor([0.35, 0.35, 0.15, 0.15]), len(rows), replacement=True)
        better, worse = draw(rows, kind)
        words = [prompts[row] for row in rows.tolist()]
        changed = (kind == 1)[:, None]
        drawn = torch.cat([pairs.scenes[rows], torch.where(changed, pairs.wrong_scenes[rows], pairs.scenes[rows])])
        fault = (6 * patch_mean((worse - better).abs())).clamp(max=1) * ~changed
        faults, masks = torch.cat([torch.zeros_like(fault), fault]), pairs.masks[rows].repeat(2, 1)
        known = torch.cat([torch.ones(len(rows)), ((kind == 0) | (kind == 2)).float()])
        with torch.autocast("cpu", torch.bfloat16):
            tokens, images = scorer.tokens_and_embeddings(torch.cat([better, worse]))
            hints = teacher(tokens.float(), drawn, masks, faults, known)
        first, second = scorer.compare(images[:, None], words + words).chunk(2)
        return F.softplus(second - first).mean() + 1e-3 * torch.cat([first, second]).square().mean() + 0.3 * hints

    facts = fit(
        [scorer.model, teacher],
        loss_at,
        steps=steps,
        learning_rate=7e-4 if initial else 1.5e-3,
        weight_decay=0.05,
        average=0.999,
    )
    scorer.model.eval()
    accuracy = {}
    with torch.no_grad():
        rows = torch.arange(pool - held, pool)
        words = [prompts[row] for row in rows.tolist()]
        for index, name in enumerate(KINDS):
            better, worse = draw(rows, torch.full((held,), index))
            won = scorer(better[:, None], words) > scorer(worse[:, None], words)
            accuracy[f"held_out_{name}_accuracy"] = round(won.float().mean().item(), 4)
    scorer.model.save_pretrained(output)
    scorer.tokenizer.save_pretrained(output)
    preprocessor = {
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "size": {"height": world.SIZE, "width": world.SIZE},
    }
    (output / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n")
    write_card(
        output,
        "Nano preference scorer",
        {
            "class": "transformers CLIPModel; score = exp(logit_scale) * cosine, as PickScore",
            "parameters": parameter_count(scorer),
            "data": f"{pool} procedural pictures in pairs: defects, wrong words, artefacts, generated; batch 32 pairs",
            "generators": ", ".join(f"t2i step {path.name}" for path in checkpoints),
            "continues": json.loads((initial / "training.json").read_text()) if initial else "random weights",
            "objective": "logistic loss on the difference of scores; auxiliary heads for words, subject and faults",
            **accuracy,
            **facts,
        },
    )
    log.info("scorer: %s", accuracy)
