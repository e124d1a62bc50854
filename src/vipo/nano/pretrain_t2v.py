"""The nano text-to-video pipeline: a WanPipeline with a small causal VAE and a small UMT5 text encoder.

Stage 1 (`vae`) trains the VAE: space by 8 (pixels in 2x2 patches, then two halvings with residual shortcuts, as
Wan 2.2), time by 4, 16 channels. Stage 2 (`t2v`) trains the transformer and the text encoder by flow matching on
cached latents of clips of which half have a defect, so that there is something for post-training to mend.

    python -m vipo.nano.pretrain_t2v prompts --output DIR
    python -m vipo.nano.pretrain_t2v vae --output DIR
    python -m vipo.nano.pretrain_t2v t2v --output DIR
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from ..loading import load_pipeline, save_pipeline
from . import video_world
from .pretrain import batches, fit, parameter_count, to_unit, write_card
from .world import SIZE

log = logging.getLogger("vipo.nano.pretrain")
TOKENS = 12
"""Text length in tokens: the longest prompt has 10 words, and one end token."""
CHANNELS = 16
CALL = {
    "height": SIZE,
    "width": SIZE,
    "num_frames": video_world.FRAMES,
    "max_sequence_length": TOKENS,
}
"""Keywords that every call of this pipeline needs: Wan's own defaults are for 81 frames of 832x480."""
DEFECT_SHARE = 0.5


def write_prompts(output: Path, *, seed: int = 2026) -> None:
    """Write 600 training prompts and 224 held-out ones, all different."""
    scenes = video_world.sample_scenes(1200, torch.Generator().manual_seed(seed))
    prompts = list(dict.fromkeys(video_world.describe(scenes)))
    output.mkdir(parents=True, exist_ok=True)
    (output / "prompts_video_held_out.txt").write_text("\n".join(prompts[:224]) + "\n")
    (output / "prompts_video_train.txt").write_text("\n".join(prompts[224:824]) + "\n")


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose vocabulary has one piece for every word of the nano video world."""
    words = {"a", "on", "background"} | {word for phrase, _ in video_world.MOTIONS.values() for word in phrase.split()}
    words |= {word for name, options in video_world.ATTRIBUTES.items() if name != "motion" for word in options}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)] + [(f"\u2581{word}", -1.0) for word in sorted(words)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_vae() -> AutoencoderKLWan:
    patch = 2
    return AutoencoderKLWan(
        base_dim=24,
        z_dim=CHANNELS,
        is_residual=True,  # after 400 steps 15.3 dB on the subject; the plain blocks of Wan 2.1 had 12.9 dB
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=3 * patch**2,
        out_channels=3 * patch**2,
        patch_size=patch,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=64,
        freq_dim=64,
        ffn_dim=384,
        num_layers=6,
        rope_max_seq_len=32,
    )


def build_pipeline(vae: AutoencoderKLWan) -> WanPipeline:
    tokenizer = build_tokenizer()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0, num_train_timesteps=1000
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(tokenizer),
        vae=vae,
        scheduler=scheduler,
        transformer=build_transformer(),
    )


class ClipPool(NamedTuple):
    """Rendered clips uint8 (n, F, 3, 64, 64), subject masks uint8 (n, F, 64, 64), and prompts."""

    clips: Tensor
    masks: Tensor
    prompts: list[str]


def render_clips(count: int, seed: int, defect_share: float = DEFECT_SHARE) -> ClipPool:
    """Render `count` clips in chunks, of which `defect_share` have a defect."""
    generator = torch.Generator().manual_seed(seed)
    videos, masks, prompts = [], [], []
    for start in range(0, count, 64):
        scenes = video_world.sample_scenes(min(64, count - start), generator)
        defects = torch.randint(1, len(video_world.DEFECTS), (len(scenes),), generator=generator)
        defects = defects * (torch.rand(len(scenes), generator=generator) < defect_share).long()
        drawn = video_world.render(scenes, generator, defects)
        videos.append((drawn.videos * 255).round().to(torch.uint8))
        masks.append((drawn.masks * 255).round().to(torch.uint8))
        prompts += video_world.describe(scenes)
    return ClipPool(torch.cat(videos), torch.cat(masks), prompts)


def to_vae(clips: Tensor) -> Tensor:
    """uint8 clips (n, F, 3, Y, X) -> what the VAE sees: float32 (n, 3, F, Y, X) in [-1, 1]."""
    return to_unit(clips).transpose(1, 2) * 2 - 1


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: Tensor, chunk: int = 64) -> Tensor:
    """Latents (n, 16, T, 8, 8) of uint8 clips, not normalised."""
    return torch.cat([vae.encode(to_vae(part)).latent_dist.mode() for part in clips.split(chunk)])


def reconstruction_loss(y: Tensor, x: Tensor, masks: Tensor) -> Tensor:
    """L1 + 2 L2 + L1 of differences in space and time, seven times as much at the subject; masks (n, F, Y, X).

    Without the weights the small subject is lost: 12.3 dB on it after 3600 steps of plain L1 and edges.
    """
    weight = 1 + 6 * F.max_pool3d(masks[:, None], (1, 5, 5), 1, (0, 2, 2))
    weight = weight / weight.mean()
    error = y - x
    edges = [(error.diff(dim=d).abs() * weight.narrow(d, 1, weight.shape[d] - 1)).mean() for d in (2, 3, 4)]
    return (weight * (error.abs() + 2 * error.square())).mean() + 0.25 * torch.stack(edges).sum()


def train_vae(
    output: Path, *, steps: int = 6000, pool: int = 3072, seed: int = 0, initial: Path | None = None
) -> AutoencoderKLWan:
    """Train the VAE on `reconstruction_loss` and a little KL, then measure the statistics of its latents.

    The first 85 % of the steps see crops of 32x32 about the middle, which cost a quarter; the rest see whole frames.
    `initial` continues a VAE at half the learning rate instead of starting from random weights.
    """
    clips, masks, _ = render_clips(pool, seed)
    vae = AutoencoderKLWan.from_pretrained(initial) if initial else build_vae()
    log.info("vae: %d parameters, %d clips", parameter_count(vae), len(clips))
    generator = torch.Generator().manual_seed(seed)
    picks = batches(pool, 8, generator)
    half = SIZE // 2

    def loss_at(step: int) -> Tensor:
        rows = next(picks)
        top, left = torch.randint(4, half - 3, (2,), generator=generator).tolist()
        crop = (slice(top, top + half), slice(left, left + half))
        if step > 0.85 * steps:
            rows, crop = rows[:3], (slice(None), slice(None))
        x, subject = to_vae(clips[rows, :, :, *crop]), to_unit(masks[rows, :, *crop])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + torch.exp(0.5 * posterior.logvar.clamp(-30, 20)) * torch.randn_like(posterior.mean)
            y = vae.decode(z).sample
        kl: Tensor = posterior.kl().mean() / z[0].numel()
        return reconstruction_loss(y.float(), x, subject) + 1e-5 * kl

    def save(step: int) -> None:
        vae.save_pretrained(output / "vae")

    rate = 1.5e-3 if initial else 3e-3
    facts = fit([vae], loss_at, steps=steps, learning_rate=rate, average=0.995, checkpoint=save)
    finish_vae(
        vae, output, seed, {"continues": initial.parent.name if initial else "random weights", "clips": pool, **facts}
    )
    return vae


def finish_vae(vae: AutoencoderKLWan, output: Path, seed: int, facts: dict[str, Any]) -> None:
    """Set the statistics of the latents, save the VAE, and write its card."""
    vae.eval()
    z = encode(vae, render_clips(192, seed + 1).clips)
    psnr, subject_psnr = reconstruction_psnr(vae, seed + 2)
    axes = (0, 2, 3, 4)
    vae.register_to_config(
        latents_mean=[round(v, 4) for v in z.mean(axes).tolist()],
        latents_std=[round(v, 4) for v in z.std(axes).tolist()],
    )
    vae.save_pretrained(output / "vae")
    write_card(
        output / "vae",
        "VAE of the nano text-to-video pipeline",
        {
            "class": "diffusers AutoencoderKLWan with residual blocks as Wan 2.2: space by 8, time by 4, 16 channels",
            "parameters": parameter_count(vae),
            "data": "procedural clips (vipo.nano.video_world), half with a defect; crops of 32x32, then whole frames",
            "held_out_psnr_db": psnr,
            "held_out_subject_psnr_db": subject_psnr,
            **facts,
        },
    )
    log.info("vae: held-out PSNR %.2f dB, %.2f dB on the subject", psnr, subject_psnr)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, seed: int) -> tuple[float, float]:
    """PSNR in dB of 128 clean clips through the VAE: everywhere, and where the subject is."""
    generator = torch.Generator().manual_seed(seed)
    videos, masks = video_world.render(video_world.sample_scenes(128, generator), generator)
    x = videos.transpose(1, 2) * 2 - 1
    y = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(32)])
    error = (y - x).square().mean(1) / 4
    everywhere, subject = error.mean(), (error * masks).sum() / masks.sum()
    return round(-10 * torch.log10(everywhere).item(), 2), round(-10 * torch.log10(subject).item(), 2)


def train(output: Path, *, steps: int = 12000, pool: int = 8192, seed: int = 0, initial: Path | None = None) -> None:
    """Train the whole pipeline; `output`/vae is used when it is already there.

    `initial` continues the transformer and text encoder of a pipeline's folder, at half the learning rate.
    """
    if (output / "vae" / "training.json").exists():
        vae = AutoencoderKLWan.from_pretrained(output / "vae")
    else:
        vae = train_vae(output, seed=seed)
    vae.eval().requires_grad_(False)
    torch.manual_seed(seed)
    pipeline = build_pipeline(vae)
    modules = [pipeline.transformer, pipeline.text_encoder]
    if initial:
        before = load_pipeline(initial)[0]
        pipeline.transformer.load_state_dict(before.transformer.state_dict())
        pipeline.text_encoder.load_state_dict(before.text_encoder.state_dict())
    log.info("t2v: %d trained parameters", parameter_count(*modules))
    latents, prompts = cached_latents(output, vae, pool, seed + 3)
    log.info("t2v: pool encoded, latent std %.3f", latents.std().item())
    picks = batches(pool, 32, torch.Generator().manual_seed(seed))

    def loss_at(step: int) -> Tensor:
        rows = next(picks)
        words = ["" if torch.rand(()) < 0.1 else prompts[row] for row in rows.tolist()]
        embeds, _ = pipeline.encode_prompt(words, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
        x0 = latents[rows]
        noise = torch.randn_like(x0)
        sigma = torch.sigmoid(torch.randn(len(rows)) + 0.5)[:, None, None, None, None]
        velocity = pipeline.transformer(  # float32: at this width, bfloat16 was no faster on a CPU
            hidden_states=(1 - sigma) * x0 + sigma * noise,
            timestep=sigma.flatten() * 1000,
            encoder_hidden_states=embeds,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, noise - x0)

    def checkpoint(step: int) -> None:
        save_pipeline(pipeline, output / "steps" / f"{step:06d}", CALL)
        log.info("t2v: %s", sample_metrics(pipeline, 24))

    rate = 1e-3 if initial else 2e-3
    facts = fit(modules, loss_at, steps=steps, learning_rate=rate, average=0.999, checkpoint=checkpoint)
    save_pipeline(pipeline, output, CALL)
    for component in ("vae", "transformer", "text_encoder"):
        halve(output / component)
    pipeline = load_pipeline(output)[0]  # the card is of what was written
    write_card(
        output,
        "Nano text-to-video pipeline",
        {
            "class": "diffusers WanPipeline (Wan transformer of width 128 and depth 6, UMT5 of width 64 and depth 2)",
            "parameters": parameter_count(*modules, vae),
            "data": f"{pool} procedural clips (vipo.nano.video_world), half with a defect, batch 32",
            "objective": "flow matching, logit-normal sigma (mean .5), 10 % prompts dropped",
            "continues": initial.name if initial else "random weights",
            "load": "WanPipeline.from_pretrained(folder); float16 files, float32 when loaded",
            "call": "needs height=64, width=64, num_frames=9, max_sequence_length=12 (vipo.json has them)",
            **sample_metrics(pipeline),
            **facts,
        },
    )


def halve(folder: Path) -> None:
    """Rewrite all weights in a folder as float16: half the size."""
    for path in folder.glob("*.safetensors"):
        weights = {key: value.half() if value.is_floating_point() else value for key, value in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})


def cached_latents(output: Path, vae: AutoencoderKLWan, pool: int, seed: int) -> tuple[Tensor, list[str]]:
    """Normalised latents (pool, 16, T, 8, 8) and prompts; rendered and encoded in parts, and kept in `output`."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    weights = float(sum(p.detach().double().abs().sum() for p in vae.parameters()))  # another VAE, another cache
    path = output / "cache" / f"latents_{pool}_{seed}_{weights:.8e}.safetensors"
    if not path.exists():
        latents, prompts = [], []
        for start in range(0, pool, 512):
            clips, _, words = render_clips(min(512, pool - start), seed + 1009 * start)
            latents.append((encode(vae, clips) - mean) / std)
            prompts += words
            log.info("t2v: %d of %d clips encoded", len(prompts), pool)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(latents)}, path, metadata={"prompts": json.dumps(prompts)})
    with safe_open(path, "pt") as cache:
        return cache.get_tensor("latents"), json.loads(cache.metadata()["prompts"])


@torch.no_grad()
def generate(pipeline: WanPipeline, prompts: list[str], *, num_inference_steps: int = 16, seed: int = 99) -> Tensor:
    """Sample clips (n, F, 3, 64, 64) in [0, 1] without guidance, in chunks."""
    pipeline.set_progress_bar_config(disable=True)
    modules = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    generator = torch.Generator().manual_seed(seed)
    clips = [
        pipeline(
            prompts[start : start + 64],
            guidance_scale=1.0,
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type="pt",
            **CALL,
        ).frames
        for start in range(0, len(prompts), 64)
    ]
    for module, mode in zip(modules, training, strict=True):
        module.train(mode)
    return torch.cat(clips).float().clamp(0, 1)


def sample_metrics(pipeline: WanPipeline, count: int = 128) -> dict[str, float]:
    """Exact metrics of samples for prompts that were drawn apart from the training set's, without guidance."""
    prompts = video_world.describe(video_world.sample_scenes(count, torch.Generator().manual_seed(99)))
    metrics = video_world.measure(generate(pipeline, prompts), prompts)
    return {f"sample_{k}": round(v.mean().item(), 4) for k, v in metrics.items() if k != "subject_mask"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vipo.nano.pretrain_t2v", description=__doc__)
    parser.add_argument("stage", choices=("prompts", "vae", "t2v"))
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained pipeline")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the stage's own)")
    parser.add_argument("--pool", type=int, help="rendered clips (default: the stage's own)")
    parser.add_argument("--initial", type=Path, help="a VAE (vae) or a pipeline's folder (t2v) to continue")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    given = {key: getattr(options, key) for key in ("steps", "pool", "initial") if getattr(options, key) is not None}
    if options.stage == "prompts":
        write_prompts(options.output)
        return
    stage = {"vae": train_vae, "t2v": train}[options.stage]
    stage(options.output, seed=options.seed, **given)


if __name__ == "__main__":
    main()
