"""The published configs of the recipes' models, and how each pipeline calls its denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import diffusers as D
import torch
import transformers as T
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

from ..config import Config

Part = tuple[Any, dict[str, Any]]
"""A class of diffusers or transformers, and its config; what the config leaves out is the class's default."""


@dataclass(frozen=True)
class Call:
    """One call of a denoiser: samples, latent grid (T, H, W), text tokens, dtype of latents and embeddings."""

    samples: int
    grid: tuple[int, int, int]
    tokens: int
    dtype: torch.dtype


def stable_diffusion(config: Any, call: Call) -> dict[str, Any]:
    """Arguments of a U-Net."""
    return {
        "sample": torch.empty(call.samples, config.in_channels, *call.grid[1:], dtype=call.dtype),
        "timestep": torch.empty((), dtype=torch.long),
        "encoder_hidden_states": torch.empty(call.samples, call.tokens, config.cross_attention_dim, dtype=call.dtype),
    }


def sd3(config: Any, call: Call) -> dict[str, Any]:
    """Arguments of Stable Diffusion 3's transformer."""
    return {
        "hidden_states": torch.empty(call.samples, config.in_channels, *call.grid[1:], dtype=call.dtype),
        "timestep": torch.empty(call.samples),
        "encoder_hidden_states": torch.empty(call.samples, call.tokens, config.joint_attention_dim, dtype=call.dtype),
        "pooled_projections": torch.empty(call.samples, config.pooled_projection_dim, dtype=call.dtype),
    }


def flux(config: Any, call: Call) -> dict[str, Any]:
    """Arguments of FLUX.1's transformer: latents in packs of 2 x 2."""
    packs = call.grid[1] // 2 * (call.grid[2] // 2)
    return {
        "hidden_states": torch.empty(call.samples, packs, config.in_channels, dtype=call.dtype),
        "timestep": torch.empty(call.samples, dtype=call.dtype),
        "guidance": torch.empty(call.samples),
        "pooled_projections": torch.empty(call.samples, config.pooled_projection_dim, dtype=call.dtype),
        "encoder_hidden_states": torch.empty(call.samples, call.tokens, config.joint_attention_dim, dtype=call.dtype),
        "txt_ids": torch.empty(call.tokens, 3, dtype=call.dtype),
        "img_ids": torch.empty(packs, 3, dtype=call.dtype),
    }


def qwen_image(config: Any, call: Call) -> dict[str, Any]:
    """Arguments of Qwen-Image's transformer: latents in packs of 2 x 2; prompts of one length need no mask."""
    rows, columns = call.grid[1] // 2, call.grid[2] // 2
    return {
        "hidden_states": torch.empty(call.samples, rows * columns, config.in_channels, dtype=call.dtype),
        "timestep": torch.empty(call.samples, dtype=call.dtype),
        "encoder_hidden_states": torch.empty(call.samples, call.tokens, config.joint_attention_dim, dtype=call.dtype),
        "img_shapes": [[(1, rows, columns)]] * call.samples,
    }


def wan(config: Any, call: Call) -> dict[str, Any]:
    """Arguments of Wan 2.1's transformer."""
    return {
        "hidden_states": torch.empty(call.samples, config.in_channels, *call.grid, dtype=call.dtype),
        "timestep": torch.empty(call.samples),
        "encoder_hidden_states": torch.empty(call.samples, call.tokens, config.text_dim, dtype=call.dtype),
    }


def hunyuan_video(config: Any, call: Call) -> dict[str, Any]:
    """Arguments of HunyuanVideo's transformer."""
    return {
        "hidden_states": torch.empty(call.samples, config.in_channels, *call.grid, dtype=call.dtype),
        "timestep": torch.empty(call.samples),
        "encoder_hidden_states": torch.empty(call.samples, call.tokens, config.text_embed_dim, dtype=call.dtype),
        "encoder_attention_mask": torch.empty(call.samples, call.tokens, dtype=call.dtype),
        "pooled_projections": torch.empty(call.samples, config.pooled_projection_dim, dtype=call.dtype),
        "guidance": torch.empty(call.samples, dtype=call.dtype),
    }


@dataclass(frozen=True)
class Family:
    """How pipelines with one class of denoiser call it.

    Attributes:
        inputs: makes the denoiser's arguments.
        sequence: text tokens that reach the denoiser by default (`max_sequence_length`). Qwen-Image pads to nothing:
            128 is a longish prompt.
        guidance: classifier-free guidance doubles the batch, makes a second call, or is embedded in the model.
        clip_tokens: whether the tokens of a CLIP encoder come before these.
        float32_latents: whether the pipeline keeps its latents in float32 whatever the dtype of the weights.
    """

    inputs: Callable[[Any, Call], dict[str, Any]]
    sequence: int
    guidance: Literal["doubled", "two calls", "embedded"]
    clip_tokens: bool = False
    float32_latents: bool = False


FAMILIES: dict[type, Family] = {
    D.UNet2DConditionModel: Family(stable_diffusion, 0, "doubled", clip_tokens=True),
    D.SD3Transformer2DModel: Family(sd3, 256, "doubled", clip_tokens=True),
    D.FluxTransformer2DModel: Family(flux, 512, "embedded"),
    D.QwenImageTransformer2DModel: Family(qwen_image, 128, "two calls"),
    D.WanTransformer3DModel: Family(wan, 512, "two calls", float32_latents=True),
    D.HunyuanVideoTransformer3DModel: Family(hunyuan_video, 256, "embedded", float32_latents=True),
}
"""By the class of the denoiser."""


class Latents(NamedTuple):
    """Of one sample: channels, latent grid (T, H, W), and pixels of all its frames."""

    channels: int
    grid: tuple[int, int, int]
    pixels: int


@dataclass(frozen=True)
class Model:
    """A model: the classes of its parts with their configs.

    Attributes:
        denoiser: the transformer or U-Net.
        vae: the autoencoder.
        text_encoders: by name.
        latents: (config of the run, VAE) -> the latents of one sample.
        tokens: text tokens that reach the denoiser.
        more: parts that are neither, by name.
        backbones: of the map, by name.
    """

    denoiser: Part
    vae: Part
    text_encoders: dict[str, Part]
    latents: Callable[[Config, Any], Latents]
    tokens: int
    more: dict[str, Part] = field(default_factory=dict)
    backbones: dict[str, Part] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        """How the denoiser is called."""
        return FAMILIES[self.denoiser[0]]


def _latents(channels: int) -> Callable[[Config, Any], Latents]:
    """Every published model here has 8 x 8 pixels, and four frames after the first, per latent position."""

    def latents(config: Config, vae: Any) -> Latents:
        frames = config.sampling.call.get("num_frames", 1)
        height, width = (config.sampling.height or 0) // 8, (config.sampling.width or 0) // 8
        return Latents(channels, ((frames - 1) // 4 + 1, height, width), frames * 8 * height * 8 * width)

    return latents


_DINOV2_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
BACKBONES: dict[str, Part] = {
    "facebook/dinov2-base": (T.Dinov2Model, {"image_size": 518, "patch_size": 14}),
    "facebook/dinov2-large": (T.Dinov2Model, {**_DINOV2_LARGE, "image_size": 518, "patch_size": 14}),
}
_FOUR_STAGES: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_VAE_16 = {**_FOUR_STAGES, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_L["projection_dim"] = 768
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_CLIP_G["projection_dim"] = 1280
_T5: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_T5 |= {"feed_forward_proj": "gated-gelu", "vocab_size": 32128}
_SD35: dict[str, Any] = {"sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24}
_SD35 |= {"joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048}
_SD35 |= {"out_channels": 16, "pos_embed_max_size": 384, "dual_attention_layers": range(13), "qk_norm": "rms_norm"}
_ATTENTION_24: dict[str, Any] = {"num_attention_heads": 24, "attention_head_dim": 128}
_FLUX = {**_ATTENTION_24, "num_layers": 19, "num_single_layers": 38, "joint_attention_dim": 4096}
_FLUX |= {"pooled_projection_dim": 768, "guidance_embeds": True, "in_channels": 64}
_QWEN = {**_ATTENTION_24, "num_layers": 60, "joint_attention_dim": 3584, "in_channels": 64, "out_channels": 16}
_QWEN_TEXT: dict[str, Any] = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
_QWEN_TEXT |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
_QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
_WAN: dict[str, Any] = {"attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096}
_WAN |= {"freq_dim": 256, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
_WAN_SMALL = {**_WAN, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
_WAN_LARGE = {**_WAN, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_WAN_VAE = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
_WAN_VAE["temperal_downsample"] = [False, True, True]
_HUNYUAN = {**_ATTENTION_24, "num_layers": 20, "num_single_layers": 40, "num_refiner_layers": 2, "in_channels": 16}
_HUNYUAN |= {"text_embed_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "out_channels": 16}
_LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA |= {"num_key_value_heads": 8, "vocab_size": 128320}
_SAFETY_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SAFETY = {"vision_config": {**_SAFETY_VISION, "patch_size": 14}, "projection_dim": 768}
_UMT5: dict[str, Part] = {"UMT5-XXL": (T.UMT5EncoderModel, {**_T5, "vocab_size": 256384})}
_QWEN_VL = {"text_config": _QWEN_TEXT, "vision_config": _QWEN_VISION}

MODELS = {
    "black-forest-labs/FLUX.1-dev": Model(
        (D.FluxTransformer2DModel, _FLUX),
        (D.AutoencoderKL, _VAE_16),
        {"CLIP-L": (T.CLIPTextModel, _CLIP_L), "T5-XXL": (T.T5EncoderModel, _T5)},
        *(_latents(16), 512),
    ),
    "stabilityai/stable-diffusion-3.5-medium": Model(
        (D.SD3Transformer2DModel, _SD35),
        (D.AutoencoderKL, _VAE_16),
        {
            "CLIP-L": (T.CLIPTextModelWithProjection, _CLIP_L),
            "CLIP-G": (T.CLIPTextModelWithProjection, _CLIP_G),
            "T5-XXL": (T.T5EncoderModel, _T5),
        },
        *(_latents(16), 77 + 256),
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Model(
        (D.UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768}),
        (D.AutoencoderKL, {**_FOUR_STAGES, "latent_channels": 4}),
        {"CLIP-L": (T.CLIPTextModel, _CLIP_L)},
        *(_latents(4), 77),
        more={"safety checker": (StableDiffusionSafetyChecker, _SAFETY)},
    ),
    "Qwen/Qwen-Image": Model(
        (D.QwenImageTransformer2DModel, _QWEN),
        (D.AutoencoderKLQwenImage, _WAN_VAE),
        {"Qwen2.5-VL-7B": (T.Qwen2_5_VLForConditionalGeneration, _QWEN_VL)},
        *(_latents(16), 128),
    ),
    **{
        f"Wan-AI/Wan2.1-T2V-{size}-Diffusers": Model(
            (D.WanTransformer3DModel, config),
            (D.AutoencoderKLWan, _WAN_VAE),
            _UMT5,
            *(_latents(16), 512),
        )
        for size, config in {"1.3B": _WAN_SMALL, "14B": _WAN_LARGE}.items()
    },
    "hunyuanvideo-community/HunyuanVideo": Model(
        (D.HunyuanVideoTransformer3DModel, _HUNYUAN),
        (D.AutoencoderKLHunyuanVideo, {"latent_channels": 16}),
        {"Llama-3-8B": (T.LlamaModel, _LLAMA), "CLIP-L": (T.CLIPTextModel, _CLIP_L)},
        *(_latents(16), 256),
    ),
}
