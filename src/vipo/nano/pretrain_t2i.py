"""The nano text-to-image pipeline: a StableDiffusion3Pipeline with a small VAE, two small CLIP text encoders and no T5.

Stage 1 trains the VAE (factor 4, 4 latent channels), stage 2 the transformer and both text encoders by flow matching
on pictures of which 60 % have a local defect, so that there is something for post-training to mend.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ..loading import save_pipeline
from . import world
from .pretrain import batches, fit, parameter_count, render_pool, to_unit, write_card

log = logging.getLogger("vipo.nano.pretrain")
TOKENS = 24
"""Text length in tokens: the longest prompt has 15 words, and two special tokens."""
CALL = {"max_sequence_length": 0}
"""Keyword that every call of this pipeline needs: it has no T5, and its place in the sequence is left empty."""


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose BPE merges make one token of every word of the nano world."""
    words = sorted({word for attribute in world.ATTRIBUTES.values() for word in attribute})
    words += ["a", "at", "the", "on", "background", "with", "clutter", "beside", "another", "shape"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=5000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(words)] * 2, trainer)
    merges: Any = [tuple(merge) for merge in _merges(bpe)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def _merges(bpe: Tokenizer) -> list[list[str]]:
    import json

    merges: list[Any] = json.loads(bpe.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def train_vae(output: Path, *, steps: int = 5000, pool: int = 6144, seed: int = 0) -> AutoencoderKL:
    """Train the VAE on L1 + 0.5 edge L1 + 1e-5 KL, then set scaling and shift so that latents have mean 0, std 1."""
    images, _, _ = render_pool(pool, seed, defect_share=0.6)
    vae = build_vae()
    log.info("vae: %d parameters", parameter_count(vae))
    generator = torch.Generator().manual_seed(seed)
    picks = batches(pool, 24, generator)

    def loss_at(step: int) -> Tensor:
        top, left = torch.randint(0, world.SIZE // 2 + 1, (2,), generator=generator).tolist()
        crops = images[next(picks), :, top : top + world.SIZE // 2, left : left + world.SIZE // 2]
        x = to_unit(crops) * 2 - 1  # half-size crops: the VAE is convolutional, and a step costs a quarter
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + torch.exp(0.5 * posterior.logvar.clamp(-30, 20)) * torch.randn_like(posterior.mean)
            y = vae.decode(z).sample
        y = y.float()
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        return (y - x).abs().mean() + 0.5 * edges + 1e-5 * posterior.kl().mean() / z[0].numel()

    facts = fit([vae], loss_at, steps=steps, learning_rate=2e-3, average=0.995)
    vae.eval()
    with torch.no_grad():
        held_out, _, _ = render_pool(512, seed + 1, defect_share=0.6)
        x = to_unit(held_out) * 2 - 1
        z = vae.encode(x).latent_dist.mode()
        error = (vae.decode(z).sample - x).square().mean() / 4
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4), shift_factor=round(z.mean().item(), 4))
    vae.save_pretrained(output / "vae")
    psnr = -10 * torch.log10(error).item()
    write_card(
        output / "vae",
        "VAE of the nano text-to-image pipeline",
        {
            "class": "diffusers AutoencoderKL, factor 4, 4 channels",
            "parameters": parameter_count(vae),
            "data": f"{pool} procedural pictures (vipo.nano.world), 60 % with a local defect, crops of 32x32, batch 24",
            "held_out_psnr_db": round(psnr, 2),
            **facts,
        },
    )
    log.info("vae: held-out PSNR %.2f dB, scaling %.3f", psnr, vae.config.scaling_factor)
    return vae


def train(output: Path, *, steps: int = 12000, pool: int = 32768, seed: int = 0) -> None:
    """Train the whole pipeline; `output`/vae is used when it is already there."""
    if (output / "vae" / "config.json").exists():
        vae = AutoencoderKL.from_pretrained(output / "vae")
    else:
        vae = train_vae(output, seed=seed)
    vae.eval().requires_grad_(False)
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    pipeline = StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    modules = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
    log.info("t2i: %d trained parameters", parameter_count(*modules))
    images, prompts, _ = render_pool(pool, seed + 2, defect_share=0.6)
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_unit(x) * 2 - 1).latent_dist.mode() for x in images.split(256)])
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    log.info("t2i: pool encoded, latent std %.3f", latents.std().item())
    picks = batches(pool, 32, torch.Generator().manual_seed(seed))

    def loss_at(step: int) -> Tensor:
        rows = next(picks)
        words = ["" if torch.rand(()) < 0.1 else prompts[row] for row in rows.tolist()]
        embeds, _, pooled, _ = pipeline.encode_prompt(words, None, None, do_classifier_free_guidance=False, **CALL)
        x0 = latents[rows]
        noise = torch.randn_like(x0)
        sigma = torch.sigmoid(torch.randn(len(rows)) + 0.3)[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            velocity = pipeline.transformer(
                hidden_states=(1 - sigma) * x0 + sigma * noise,
                timestep=sigma.flatten() * 1000,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - x0)

    def checkpoint(step: int) -> None:
        save_pipeline(pipeline, output / "steps" / f"{step:06d}", CALL)

    facts = fit(modules, loss_at, steps=steps, learning_rate=1e-3, average=0.9995, checkpoint=checkpoint)
    save_pipeline(pipeline, output, CALL)
    write_card(
        output,
        "Nano text-to-image pipeline",
        {
            "class": "diffusers StableDiffusion3Pipeline (SD3 transformer of width 128 and depth 5, no T5)",
            "parameters": parameter_count(*modules, vae),
            "data": f"{pool} procedural pictures (vipo.nano.world), 60 % with a local defect, batch 32",
            "objective": "flow matching, logit-normal sigma (mean .3), 10 % prompts dropped",
            "load": "StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)",
            "call": "needs max_sequence_length=0: there is no T5",
            **sample_metrics(pipeline),
            **facts,
        },
    )


@torch.no_grad()
def sample_metrics(
    pipeline: StableDiffusion3Pipeline, count: int = 256, num_inference_steps: int = 20
) -> dict[str, float]:
    """Exact metrics of samples for prompts that were drawn apart from the training set's, without guidance."""
    for module in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
        module.eval()
    generator = torch.Generator().manual_seed(99)
    prompts = world.describe(world.sample_scenes(count, generator))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompts,
        guidance_scale=1.0,
        num_inference_steps=num_inference_steps,
        generator=generator,
        output_type="pt",
        **CALL,
    ).images
    metrics = world.measure(images.float(), prompts)
    return {f"sample_{k}": round(v.nanmean().item(), 4) for k, v in metrics.items() if k != "subject_mask"}
