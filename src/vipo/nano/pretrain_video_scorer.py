"""The nano video scorers: visual quality (VQ) and motion quality (MQ), two small CLIPModels trained on pairs.

VQ reads single frames, as any CLIP preference scorer does; a clip's score is the mean over its frames. Its vision
tower continues that of the nano image scorer. MQ reads the whole clip as one picture of 9 x 3 channels (the patch
embedding becomes a tube embedding), so that it sees motion. Both compare with the prompt. In each pair the first clip
is better; the worse one has a defect of the picture (VQ) or of the motion (MQ), shows another scene or motion than the
words say, has an artefact, or was generated.

    python -m vipo.nano.pretrain_video_scorer {vq,mq} --output DIR [--generator T2V_DIR]
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from ..loading import load_pipeline
from ..rewards.preference import ClipPreference
from . import assets_path, video_world
from .pretrain import batches, fit, parameter_count, to_unit, write_card
from .pretrain_scorer import MEAN, PATCH, STD, patch_mean, spoil, to_bytes
from .pretrain_t2v import TOKENS, generate, halve, to_vae
from .video_world import COLUMN, DEFECTS, FRAMES, MOTION_DEFECTS, VISUAL_DEFECTS
from .world import SIZE

log = logging.getLogger("vipo.nano.pretrain")
HELD_OUT = 256
CONTENT = ("size", "colour", "shape", "ground")
KINDS = ("defect", "wrong_word", "artefact", "generated")
ARTEFACTS = ("shuffled", "reversed", "ghost", "stutter", "brightness")


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token for every word of the nano video world."""
    words = {"a", "on", "background"} | {word for phrase, _ in video_world.MOTIONS.values() for word in phrase.split()}
    words |= {word for name, options in video_world.ATTRIBUTES.items() if name != "motion" for word in options}
    merges: Any = []
    for word in sorted(words):  # left to right: r e d</w> -> re d</w> -> red</w>
        pieces = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(pieces)):
            merges.append(("".join(pieces[:end]), pieces[end]))
    merges = list(dict.fromkeys(merges))
    letters = sorted({letter for word in words for letter in word})
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS + 1)


def build_scorer(score: str) -> ClipPreference:
    """A CLIPModel of 3 channels for "vq", with the image scorer's vision tower; of 9 x 3 channels for "mq"."""
    tokenizer = build_tokenizer()
    frames, width = (FRAMES, 96) if score == "mq" else (1, 112)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS + 1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_channels=3 * frames,
        image_size=SIZE,
        patch_size=PATCH,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    model = CLIPModel(config)
    if score == "vq":
        trained = CLIPModel.from_pretrained(assets_path("scorer"))
        model.vision_model.load_state_dict(trained.vision_model.state_dict())
        model.visual_projection.load_state_dict(trained.visual_projection.state_dict())
    return ClipPreference(model, tokenizer, MEAN * frames, STD * frames)


def views(score: str, videos: Tensor) -> Tensor:
    """What the scorer of that name sees of clips (n, F, 3, Y, X): pictures (n, frames, channels, Y, X)."""
    return videos if score == "vq" else videos.flatten(1, 2)[:, None]


def score_clips(scorer: ClipPreference, score: str, videos: Tensor, prompts: list[str]) -> Tensor:
    """Score clips (n, F, 3, Y, X) in [0, 1]: (n,)."""
    pictures = views(score, videos)
    _, embeddings = scorer.tokens_and_embeddings(pictures.flatten(0, 1))
    return scorer.compare(embeddings.unflatten(0, pictures.shape[:2]), prompts)


def disturb(videos: Tensor, still: Tensor, generator: torch.Generator, which: Tensor | None = None) -> Tensor:
    """Give each clip (n, F, 3, Y, X) one of ARTEFACTS, by index `which` (n,) or at random; `still` ones brightness."""
    count, frames = videos.shape[:2]
    rows = torch.arange(count)[:, None]
    if which is None:
        which = torch.randint(0, len(ARTEFACTS), (count,), generator=generator)
    which = torch.where(still, ARTEFACTS.index("brightness"), which)
    order = torch.rand(count, frames, generator=generator).argsort(1)
    ghost = (videos + videos.roll(2, 1) + videos.roll(-2, 1)) / 3
    ghost[:, :2], ghost[:, -2:] = (videos[:, :2] + videos[:, 2:4]) / 2, (videos[:, -2:] + videos[:, -4:-2]) / 2
    held = videos[:, torch.arange(frames) // 3 * 3]
    light = 0.12 * torch.randn(count, frames, 1, 1, 1, generator=generator)
    options = torch.stack([videos[rows, order], videos.flip(1), ghost, held, videos + light])
    return options[which, torch.arange(count)].clamp(0, 1)


class Pool(NamedTuple):
    """Rendered clips uint8 (n, F, 3, 64, 64): clean, with a defect, of another scene; and their truth."""

    clean: Tensor
    faulty: Tensor
    wrong: Tensor
    scenes: Tensor
    wrong_scenes: Tensor
    defects: Tensor


def change_word(scenes: Tensor, names: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """Change one of the attributes `names` of every scene."""
    rows = torch.arange(len(scenes))
    column = torch.tensor([COLUMN[name] for name in names])[
        torch.randint(0, len(names), (len(scenes),), generator=generator)
    ]
    options = torch.tensor([len(words) for words in video_world.ATTRIBUTES.values()])[column]
    shift = 1 + (torch.rand(len(scenes), generator=generator) * (options - 1)).long().minimum(options - 2)
    changed = scenes.clone()
    changed[rows, column] = (changed[rows, column] + shift) % options
    return changed


def render_pool(score: str, count: int, seed: int) -> Pool:
    """Render clips, the same with a defect, and the same pose with another word, all seeded alike."""
    generator = torch.Generator().manual_seed(seed)
    names, columns = (VISUAL_DEFECTS, CONTENT) if score == "vq" else (MOTION_DEFECTS, ("motion",))
    first = DEFECTS.index(names[0])
    parts: list[Pool] = []
    for start in range(0, count, 64):
        scenes = video_world.sample_scenes(min(64, count - start), generator)
        defects = torch.randint(first, first + len(names), (len(scenes),), generator=generator)
        changed = change_word(scenes, columns, generator)
        clean, faulty, wrong = (
            video_world.render(rows, torch.Generator().manual_seed(seed * 7919 + start), chosen)
            for rows, chosen in ((scenes, None), (scenes, defects), (changed, None))
        )
        strength = 1.0 if score == "mq" else 0.3 + 0.7 * torch.rand(len(scenes), 1, 1, 1, 1, generator=generator)
        spoiled = clean.videos + strength * (faulty.videos - clean.videos)
        shown, faulted, other = (to_bytes(videos) for videos in (clean.videos, spoiled, wrong.videos))
        parts.append(Pool(shown, faulted, other, scenes, changed, defects))
    return Pool(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def through_vae(clips: Tensor, vae: AutoencoderKLWan) -> Tensor:
    """Encode and decode uint8 clips in chunks."""
    done = [vae.decode(vae.encode(to_vae(part)).latent_dist.mode()).sample for part in clips.split(32)]
    return to_bytes(torch.cat([y.transpose(1, 2) / 2 + 0.5 for y in done]))


class PairSource:
    """Draws training pairs of every kind from one pool of clips; the last HELD_OUT are for evaluation only.

    Every second clip, and its worse versions, have gone through the generator's VAE, so that its traces do not tell.
    """

    def __init__(self, score: str, count: int, seed: int, generator: Path | None) -> None:
        self.score = score
        self.pool = render_pool(score, count, seed + 5)
        self.prompts = video_world.describe(self.pool.scenes)
        self.still = self.pool.scenes[:, COLUMN["motion"]] == list(video_world.MOTIONS).index("still")
        log.info("%s: %d clips rendered in three versions", score, count)
        self.generated = self.pool.wrong
        self.odds = torch.tensor([0.4, 0.4, 0.2, 0.0])
        if generator is None:
            return
        vae = AutoencoderKLWan.from_pretrained(generator / "vae").eval()
        for clips in (self.pool.clean, self.pool.faulty, self.pool.wrong):
            clips[::2] = through_vae(clips[::2], vae)
        log.info("%s: every second clip decoded", score)
        if (generator / "model_index.json").is_file():
            pipeline = load_pipeline(generator)[0]
            self.generated = to_bytes(generate(pipeline, self.prompts, num_inference_steps=8, seed=seed))
            self.odds = torch.tensor([0.35, 0.35, 0.15, 0.15])
            log.info("%s: clips generated", score)

    def words(self, rows: Tensor) -> list[str]:
        return [self.prompts[row] for row in rows.tolist()]

    def draw(self, rows: Tensor, kind: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Better and worse clips in [0, 1] of pool rows (n,), by index of the kind, and whether they differ (n,).

        VQ sees two frames at a time: a step costs less, and each clip is seen many times.
        """
        pool = self.pool
        frames = torch.randperm(FRAMES, generator=generator)[:2] if self.score == "vq" else torch.arange(FRAMES)
        at = (rows[:, None], frames)
        better = pool.clean[at]
        worse = torch.stack([pool.faulty[at], pool.wrong[at], better, self.generated[at]])
        better, worse = to_unit(better), to_unit(worse[kind, torch.arange(len(rows))])
        artefact = (kind == 2).view(-1, 1, 1, 1, 1)
        if self.score == "vq":
            spoiled = spoil(worse.flatten(0, 1)).view_as(worse)
        else:
            spoiled = disturb(worse, self.still[rows], generator)
        worse = torch.where(artefact, spoiled, worse)
        differs = (better - worse).abs().mean((1, 2, 3, 4)) > 5e-4
        frozen = self.still[rows] & (pool.defects[rows] == DEFECTS.index("freeze")) & (kind == 0)
        grain = 0.04 * torch.rand(len(rows), 1, 1, 1, 1)
        noisy = [(clips + grain * torch.randn_like(clips)).clamp(0, 1) for clips in (better, worse)]
        return noisy[0], noisy[1], differs & ~frozen


class Teacher(nn.Module):
    """Auxiliary heads that speed up the vision tower; they see the world's truth and are thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.ModuleDict(
            {name: nn.Linear(width, len(words)) for name, words in video_world.ATTRIBUTES.items()}
        )
        self.fault = nn.Linear(width, 1)

    def forward(self, tokens: Tensor, scenes: Tensor, faults: Tensor, names: tuple[str, ...]) -> Tensor:
        """Loss of vision tokens (n, 65, D): words of the scenes (n, 5) from the first, faults (n, 64) from the rest."""
        pooled = tokens[:, 0]
        words = [F.cross_entropy(self.words[name](pooled), scenes[:, COLUMN[name]]) for name in names]
        patches = F.binary_cross_entropy_with_logits(self.fault(tokens[:, 1:])[..., 0], faults)
        return 0.5 * torch.stack(words).sum() + 2 * patches


def pair_loss(
    scorer: ClipPreference, teacher: Teacher, source: PairSource, rows: Tensor, generator: torch.Generator
) -> Tensor:
    """Logistic loss on the difference of scores of one batch of pairs, with the teacher's hints."""
    kind = torch.multinomial(source.odds, len(rows), replacement=True, generator=generator)
    better, worse, valid = source.draw(rows, kind, generator)
    words = source.words(rows)
    pictures = views(source.score, torch.cat([better, worse]))
    tokens, embeddings = scorer.tokens_and_embeddings(pictures.flatten(0, 1))
    first, second = scorer.compare(embeddings.unflatten(0, pictures.shape[:2]), words + words).chunk(2)
    loss = (F.softplus(second - first) * valid).sum() / valid.sum().clamp_min(1)

    scenes = source.pool.scenes[rows]
    changed = (kind == 1)[:, None]
    shown = torch.where(changed, source.pool.wrong_scenes[rows], scenes)
    told = torch.cat([torch.ones(len(rows), dtype=torch.bool), kind < 2])
    names = CONTENT if source.score == "vq" else ("motion", "size", "shape")
    fault = (worse - better).abs().flatten(0, 1)
    fault = (6 * patch_mean(fault)).unflatten(0, better.shape[:2]).clamp(max=1) * ~changed[:, None]
    faults = torch.cat([torch.zeros_like(fault), fault])
    faults = faults.flatten(0, 1) if source.score == "vq" else faults.mean(1)
    repeat = pictures.shape[1]
    told, truth = told.repeat_interleave(repeat), torch.cat([scenes, shown]).repeat_interleave(repeat, 0)
    hints: Tensor = teacher(tokens[told], truth[told], faults[told], names)
    return loss + 1e-3 * torch.cat([first, second]).square().mean() + 0.3 * hints


def train(
    score: str,
    output: Path,
    *,
    steps: int = 5000,
    pool: int = 2048,
    seed: int = 0,
    generator: Path | None = None,
) -> None:
    """Train one scorer, "vq" or "mq", into `output`/`score`; `generator` is a text-to-video pipeline's folder."""
    scorer = build_scorer(score)
    scorer.model.requires_grad_(True)
    teacher = Teacher(scorer.model.config.vision_config.hidden_size)
    source = PairSource(score, pool, seed, generator)
    log.info("%s: %d parameters", score, parameter_count(scorer))
    picks = batches(pool - HELD_OUT, 24, torch.Generator().manual_seed(seed))
    draws = torch.Generator().manual_seed(seed)
    folder = output / score

    def save(step: int) -> None:
        save_scorer(scorer, folder)
        log.info("%s: %s", score, held_out_accuracy(scorer, source, 64))

    facts = fit(
        [scorer.model, teacher],
        lambda step: pair_loss(scorer, teacher, source, next(picks), draws),
        steps=steps,
        learning_rate=1.5e-3,
        weight_decay=0.05,
        average=0.998,
        checkpoint=save,
    )
    save_scorer(scorer, folder)
    title = {"vq": "visual quality", "mq": "motion quality"}[score]
    reads = {"vq": "one frame, mean over frames", "mq": "the clip as 9 x 3 channels"}[score]
    made = "none" if generator is None else generator.name
    write_card(
        folder,
        f"Nano video scorer: {title}",
        {
            "class": f"transformers CLIPModel; score = exp(logit_scale) * cosine; reads {reads}",
            "parameters": parameter_count(scorer),
            "data": f"{pool} procedural clips in pairs ({', '.join(KINDS)}), batch 24 pairs",
            "generator": made,
            **({"continues": "vision tower of the nano image scorer"} if score == "vq" else {}),
            "objective": "logistic loss on the difference of scores; auxiliary heads for words and faults",
            **held_out_accuracy(scorer, source),
            **facts,
        },
    )


def save_scorer(scorer: ClipPreference, folder: Path) -> None:
    """Write the model, its tokenizer and the pixel statistics of all its channels."""
    scorer.model.save_pretrained(folder)
    halve(folder)
    scorer.tokenizer.save_pretrained(folder)
    side = {"height": SIZE, "width": SIZE}
    mean, std = scorer.mean.flatten().tolist(), scorer.std.flatten().tolist()
    settings = {"image_mean": mean, "image_std": std, "size": side}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1) + "\n")


@torch.no_grad()
def held_out_accuracy(scorer: ClipPreference, source: PairSource, count: int = HELD_OUT) -> dict[str, float]:
    """Share of held-out pairs whose better clip scores higher, for every kind, defect and artefact."""
    pool, score = source.pool, source.score
    rows = torch.arange(len(pool.scenes) - count, len(pool.scenes))
    words, generator = source.words(rows), torch.Generator().manual_seed(7)

    def scored(clips: Tensor) -> Tensor:
        starts = range(0, len(clips), 64)
        return torch.cat([score_clips(scorer, score, clips[i : i + 64], words[i : i + 64]) for i in starts])

    accuracy: dict[str, float] = {}
    for index, name in enumerate(KINDS):
        if source.odds[index] == 0:
            continue
        better, worse, valid = source.draw(rows, torch.full((len(rows),), index), generator)
        won = (scored(better) > scored(worse)).float()
        groups = {name: valid}
        if name == "defect":
            groups |= {
                f"{name}_{DEFECTS[d]}": valid & (pool.defects[rows] == d) for d in pool.defects.unique().tolist()
            }
        if name == "wrong_word":
            changed = pool.scenes[rows] != pool.wrong_scenes[rows]
            groups |= {f"{name}_{a}": valid & changed[:, c] for a, c in COLUMN.items() if changed[:, c].any()}
        accuracy |= {f"held_out_{key}": round(won[chosen].mean().item(), 4) for key, chosen in groups.items()}
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vipo.nano.pretrain_video_scorer", description=__doc__)
    parser.add_argument("score", choices=("vq", "mq"))
    parser.add_argument("--output", type=Path, required=True, help="folder; the scorer goes to its subfolder vq or mq")
    parser.add_argument(
        "--generator", type=Path, help="output of pretrain_t2v: its VAE, and its samples if trained, are in the pairs"
    )
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps")
    parser.add_argument("--pool", type=int, default=2048, help="rendered clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    given = {"steps": options.steps, "pool": options.pool, "seed": options.seed, "generator": options.generator}
    train(options.score, options.output, **given)


if __name__ == "__main__":
    main()
