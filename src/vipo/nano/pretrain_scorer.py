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
HELD_OUT = 512


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


class PairSource:
    """Draws training pairs of every kind from one pool of pictures.

    Args:
        count: pictures in the pool; the last HELD_OUT are for evaluation only.
        seed: of everything.
        checkpoints: folders of the two generators whose samples are in the pool.
    """

    def __init__(self, count: int, seed: int, checkpoints: list[Path]) -> None:
        pipelines = [load_pipeline(path)[0] for path in checkpoints]
        self.pool = render_pairs(count, seed + 5)
        self.prompts = world.describe(self.pool.scenes)
        parts = [self.prompts[i : i + 256] for i in range(0, count, 256)]
        self.generated = torch.cat(
            [generate(pipelines[i % 2], part, (4, 8, 6)[i % 3], seed + i) for i, part in enumerate(parts)]
        )
        self.clean_decoded = through_vae(self.pool.clean, pipelines[0])
        self.faulty_decoded = through_vae(self.pool.faulty, pipelines[0])

    def words(self, rows: Tensor) -> list[str]:
        return [self.prompts[row] for row in rows.tolist()]

    def draw(self, rows: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        """Better and worse pictures (n, 3, 64, 64) in [0, 1] of pool rows (n,), by KINDS index (n,)."""
        traced = (torch.rand(len(rows)) < 0.6)[:, None, None, None]
        better = torch.where(traced, self.clean_decoded[rows], self.pool.clean[rows])
        defect = torch.where(traced, self.faulty_decoded[rows], self.pool.faulty[rows])
        options = torch.stack([defect, self.pool.wrong[rows], better, self.generated[rows]])
        better, worse = to_unit(better), to_unit(options[kind, torch.arange(len(rows))])
        worse = torch.where((kind == 2)[:, None, None, None], spoil(worse), worse)
        grain = 0.04 * torch.rand(len(rows), 1, 1, 1)
        better = (better + grain * torch.randn_like(better)).clamp(0, 1)
        return better, (worse + grain * torch.randn_like(worse)).clamp(0, 1)

    def truth(self, rows: Tensor, kind: Tensor, better: Tensor, worse: Tensor) -> tuple[Tensor, ...]:
        """What the teacher is told of better and worse pictures together: scenes, masks, faults, known."""
        changed = (kind == 1)[:, None]
        scenes = torch.cat(
            [self.pool.scenes[rows], torch.where(changed, self.pool.wrong_scenes[rows], self.pool.scenes[rows])]
        )
        fault = (6 * patch_mean((worse - better).abs())).clamp(max=1) * ~changed
        faults = torch.cat([torch.zeros_like(fault), fault])
        known = torch.cat([torch.ones(len(rows)), ((kind == 0) | (kind == 2)).float()])
        return scenes, self.pool.masks[rows].repeat(2, 1), faults, known


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
    scorer = ClipPreference.from_pretrained(initial) if initial else build_scorer()
    scorer.model.requires_grad_(True)
    teacher = Teacher(scorer.model.config.vision_config.hidden_size)
    log.info("scorer: %d parameters; generators %s", parameter_count(scorer), [path.name for path in checkpoints])
    source = PairSource(pool, seed, checkpoints)
    log.info("scorer: pairs rendered, generated and decoded")
    picks = batches(pool - HELD_OUT, 32, torch.Generator().manual_seed(seed))

    def loss_at(step: int) -> Tensor:
        rows = next(picks)
        kind = torch.multinomial(torch.tensor([0.35, 0.35, 0.15, 0.15]), len(rows), replacement=True)
        better, worse = source.draw(rows, kind)
        words = source.words(rows)
        with torch.autocast("cpu", torch.bfloat16):
            tokens, images = scorer.tokens_and_embeddings(torch.cat([better, worse]))
            hints = teacher(tokens.float(), *source.truth(rows, kind, better, worse))
        first, second = scorer.compare(images[:, None], words + words).chunk(2)
        return F.softplus(second - first).mean() + 1e-3 * torch.cat([first, second]).square().mean() + 0.3 * hints

    rate = 7e-4 if initial else 1.5e-3
    facts = fit([scorer.model, teacher], loss_at, steps=steps, learning_rate=rate, weight_decay=0.05, average=0.999)
    scorer.model.eval()
    accuracy = held_out_accuracy(scorer, source, torch.arange(pool - HELD_OUT, pool))
    scorer.model.save_pretrained(output)
    scorer.tokenizer.save_pretrained(output)
    side = {"height": world.SIZE, "width": world.SIZE}
    preprocessor = {"image_mean": list(MEAN), "image_std": list(STD), "size": side}
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


@torch.no_grad()
def held_out_accuracy(scorer: ClipPreference, source: PairSource, rows: Tensor) -> dict[str, float]:
    """Share of held-out pairs of each kind whose better picture scores higher."""
    words, accuracy = source.words(rows), {}
    for index, name in enumerate(KINDS):
        better, worse = source.draw(rows, torch.full((len(rows),), index))
        won = scorer(better[:, None], words) > scorer(worse[:, None], words)
        accuracy[f"held_out_{name}_accuracy"] = round(won.float().mean().item(), 4)
    return accuracy
