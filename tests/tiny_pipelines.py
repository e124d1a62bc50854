"""Tiny random pipelines of real `diffusers` classes with tokenizers made on the spot; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers as D
import torch
import transformers as T
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class Family(NamedTuple):
    """How to build a tiny pipeline, drive it and call it.

    Attributes:
        build: makes the pipeline.
        kernel: for DiffusersPolicy.
        call: keywords of its call, guidance on.
        unguided: what to change in them to switch guidance off; empty where the model has none.
        grid: (T, H, W) of the latents.
        lora: whether diffusers has LoRA for it.
    """

    build: Callable[[], DiffusionPipeline]
    kernel: str
    call: dict[str, Any]
    unguided: dict[str, Any] = {}
    grid: tuple[int, int, int] = (1, 8, 6)
    lora: bool = True


def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def clip_text(model: type = CLIPTextModel, length: int = 77) -> tuple[Any, CLIPTokenizer]:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model(config), tokenizer


def t5_text(width: int, multilingual: bool = False) -> tuple[Any, T5Tokenizer]:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581"] + [chr(code) for code in range(33, 127)]
    vocabulary = [(piece, 0.0 if i < 3 else -2.0) for i, piece in enumerate(pieces)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    config_class, model = (T.UMT5Config, T.UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    config = config_class(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    return model(config), tokenizer


def vae(channels: int, quant: bool = False, **more: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **more,
    )


def stable_diffusion() -> StableDiffusionPipeline:
    text_encoder, tokenizer = clip_text()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae(4, quant=True),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    first, tokenizer = clip_text(CLIPTextModelWithProjection)
    second, tokenizer_2 = clip_text(CLIPTextModelWithProjection)
    third, tokenizer_3 = t5_text(64)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=96,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        text_encoder_3=third,
        tokenizer_3=tokenizer_3,
    )


def flux() -> FluxPipeline:
    first, tokenizer = clip_text()
    second, tokenizer_2 = t5_text(32)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def qwen_tokenizer() -> T.Qwen2Tokenizer:
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", *special]
    tokenizer = T.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], extra_special_tokens=special
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    return tokenizer


def byte_tokens(*special: str) -> dict[str, int]:
    """A vocabulary of special tokens, byte fallbacks and printable characters."""
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *(chr(code) for code in range(33, 127))]
    return {token: i for i, token in enumerate(tokens)}


def gemma_text() -> tuple[T.Gemma2Model, T.GemmaTokenizer]:
    tokenizer = T.GemmaTokenizer(vocab=byte_tokens("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), merges=[])
    config = T.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        head_dim=4,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return T.Gemma2Model(config), tokenizer


def llama_text(model: type = T.LlamaModel) -> tuple[Any, T.LlamaTokenizer]:
    tokenizer = T.LlamaTokenizer(vocab=byte_tokens("<unk>", "<s>", "</s>"), merges=[], model_max_length=512)
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "right"
    config = T.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return model(config), tokenizer


def qwen_text(layers: int) -> tuple[T.Qwen3ForCausalLM, T.Qwen2Tokenizer]:
    tokenizer = qwen_tokenizer()
    config = T.Qwen3Config(
        vocab_size=len(tokenizer) + 1,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T.Qwen3ForCausalLM(config), tokenizer


def qwen_vision_text() -> tuple[T.Qwen2_5_VLForConditionalGeneration, T.Qwen2Tokenizer]:
    tokenizer = qwen_tokenizer()
    tokens = tokenizer.get_vocab()
    config = T.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
            "max_position_embeddings": 2048,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
    )
    return T.Qwen2_5_VLForConditionalGeneration(config), tokenizer


def stable_diffusion_xl() -> D.StableDiffusionXLPipeline:
    first, tokenizer = clip_text()
    second, tokenizer_2 = clip_text(CLIPTextModelWithProjection)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=8 * 6 + 32,
    )
    return D.StableDiffusionXLPipeline(
        vae=vae(4, quant=True, scaling_factor=0.13025),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        add_watermarker=False,
    )


def flux_kontext() -> D.FluxKontextPipeline:
    return D.FluxKontextPipeline(**flux().components)


def flux_2_parts(guidance: bool) -> dict[str, Any]:
    transformer = D.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    autoencoder = D.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=32, norm_num_groups=1, sample_size=64
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": autoencoder, "scheduler": scheduler}


def flux_2_klein() -> D.Flux2KleinPipeline:
    text_encoder, tokenizer = qwen_text(4)
    return D.Flux2KleinPipeline(
        **flux_2_parts(False), text_encoder=text_encoder, tokenizer=tokenizer, is_distilled=False
    )


def flux_2() -> D.Flux2Pipeline:
    tokenizer = qwen_tokenizer()
    config = T.Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer) + 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        image_token_index=259,
    )
    text_encoder = T.Mistral3ForConditionalGeneration(config)
    return D.Flux2Pipeline(**flux_2_parts(True), text_encoder=text_encoder, tokenizer=tokenizer)


def qwen_image_parts() -> dict[str, Any]:
    text_encoder, tokenizer = qwen_vision_text()
    autoencoder = D.AutoencoderKLQwenImage(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = D.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
    )
    return {
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "vae": autoencoder,
        "transformer": transformer,
        "scheduler": scheduler,
    }


def qwen_image() -> D.QwenImagePipeline:
    return D.QwenImagePipeline(**qwen_image_parts())


class PictureProcessor:
    """Qwen2VLProcessor without its video half, which needs torchvision."""

    def __init__(self, images: Any, tokenizer: T.Qwen2Tokenizer) -> None:
        self.images, self.tokenizer = images, tokenizer

    def __call__(self, text: list[str], images: list[Image.Image], **options: Any) -> T.BatchFeature:
        features = self.images(images, return_tensors="pt")
        counts = features["image_grid_thw"].prod(-1) // self.images.merge_size**2
        pad = "<|image_pad|>"
        text = [line.replace(pad, pad * int(count)) for line, count in zip(text, counts, strict=True)]
        return T.BatchFeature({**self.tokenizer(text, **options), **features})


def qwen_image_edit() -> D.QwenImageEditPipeline:
    parts = qwen_image_parts()
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    return D.QwenImageEditPipeline(**parts, processor=PictureProcessor(images, parts["tokenizer"]))


def z_image() -> D.ZImagePipeline:
    text_encoder, tokenizer = qwen_text(2)
    transformer = D.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return D.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def sana() -> D.SanaPipeline:
    text_encoder, tokenizer = gemma_text()
    transformer = D.SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    autoencoder = D.AutoencoderDC(
        latent_channels=32,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8, 8, 8, 8, 32),
        decoder_block_out_channels=(8, 8, 8, 8, 8, 32),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        scaling_factor=0.41407,
    )
    return D.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def wan_vae() -> D.AutoencoderKLWan:
    return D.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def wan_transformer(in_channels: int = 16, **more: int) -> D.WanTransformer3DModel:
    return D.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        **{"in_channels": in_channels, "out_channels": 16, **more},
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def wan(**more: Any) -> D.WanPipeline:
    text_encoder, tokenizer = t5_text(32, multilingual=True)
    return D.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=wan_transformer(),
        **more,
    )


def wan_two_experts() -> D.WanPipeline:
    return wan(transformer_2=wan_transformer(), boundary_ratio=0.875)


def wan_small() -> D.WanPipeline:
    """Wan 2.2 5B: one noise level per token, and a VAE with more channels and a patch."""
    text_encoder, tokenizer = t5_text(32, multilingual=True)
    autoencoder = D.AutoencoderKLWan(
        base_dim=4,
        z_dim=48,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
        dim_mult=[1, 1, 1, 1],
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        scale_factor_spatial=16,
    )
    return D.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder,
        scheduler=D.UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=5.0,
            solver_order=1,
            disable_corrector=list(range(50)),
        ),
        transformer=wan_transformer(48, out_channels=48),
        expand_timesteps=True,
    )


def wan_image_to_video() -> D.WanImageToVideoPipeline:
    text_encoder, tokenizer = t5_text(32, multilingual=True)
    image_encoder = T.CLIPVisionModel(
        T.CLIPVisionConfig(
            hidden_size=16,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            intermediate_size=16,
            patch_size=8,
        )
    )
    return D.WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        image_processor=CLIPImageProcessorPil(crop_size=32, size=32),
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=wan_transformer(36, image_dim=16, added_kv_proj_dim=24),
    )


def hunyuan_video() -> D.HunyuanVideoPipeline:
    first, tokenizer = llama_text()
    second, tokenizer_2 = clip_text()
    transformer = D.HunyuanVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    autoencoder = D.AutoencoderKLHunyuanVideo(
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.476986,
    )
    return D.HunyuanVideoPipeline(
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        vae=autoencoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def ltx() -> D.LTXPipeline:
    text_encoder, tokenizer = t5_text(32)
    transformer = D.LTXVideoTransformer3DModel(
        in_channels=128,
        out_channels=128,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    autoencoder = D.AutoencoderKLLTXVideo(
        latent_channels=128,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    return D.LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        ),
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def cogvideox() -> D.CogVideoXPipeline:
    text_encoder, tokenizer = t5_text(32)
    transformer = D.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=1,
        sample_width=6,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=32,
    )
    autoencoder = D.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=64,
        sample_width=48,
    )
    return D.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder,
        transformer=transformer,
        scheduler=D.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    )


def cogvideox_image_to_video() -> D.CogVideoXImageToVideoPipeline:
    parts = cogvideox().components
    config = {**parts["transformer"].config, "in_channels": 32}
    return D.CogVideoXImageToVideoPipeline(
        **{**parts, "transformer": D.CogVideoXTransformer3DModel.from_config(config)}
    )


def pixart_sigma() -> D.PixArtSigmaPipeline:
    text_encoder, tokenizer = t5_text(32)
    transformer = D.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
    )
    return D.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae(4, scaling_factor=0.13025),
        transformer=transformer,
        scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    )


def lumina_2() -> D.Lumina2Pipeline:
    text_encoder, tokenizer = gemma_text()
    transformer = D.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        hidden_size=8,
        num_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[300, 32, 32],
        cap_feat_dim=8,
    )
    return D.Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def aura_flow() -> D.AuraFlowPipeline:
    text_encoder, tokenizer = t5_text(32, multilingual=True)
    transformer = D.AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return D.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae(4, scaling_factor=0.13025),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def chroma() -> D.ChromaPipeline:
    text_encoder, tokenizer = t5_text(32)
    transformer = D.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return D.ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def hidream() -> D.HiDreamImagePipeline:
    first, tokenizer = clip_text(CLIPTextModelWithProjection, 248)
    second, tokenizer_2 = clip_text(CLIPTextModelWithProjection, 248)
    third, tokenizer_3 = t5_text(32)
    fourth, tokenizer_4 = llama_text(T.LlamaForCausalLM)
    transformer = D.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    pipeline = D.HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        text_encoder_3=third,
        tokenizer_3=tokenizer_3,
        text_encoder_4=fourth,
        tokenizer_4=tokenizer_4,
        transformer=transformer,
    )
    pipeline.default_sample_size = 8  # it scales every picture to this area
    return pipeline


def mochi() -> D.MochiPipeline:
    text_encoder, tokenizer = t5_text(32)
    transformer = D.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    torch.nn.init.normal_(transformer.pos_frequencies, std=0.1)  # it is made empty
    autoencoder = D.AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    return D.MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


_SIZE = {"height": 64, "width": 48}
_CLIP = {**_SIZE, "num_frames": 9}
_SHORT = {"max_sequence_length": 32}
_OFF = {"guidance_scale": 1.0}
_RED = Image.new("RGB", (48, 64), (200, 30, 30))
FAMILIES = {
    "sd15": Family(stable_diffusion, "ddim", {**_SIZE, "guidance_scale": 5.0}, _OFF),
    "sd3": Family(stable_diffusion_3, "flow_grpo", {**_SIZE, **_SHORT, "guidance_scale": 5.0}, _OFF),
    "flux": Family(flux, "dance_grpo", {**_SIZE, **_SHORT, "guidance_scale": 3.5}, _OFF),
}
_KLEIN = {**_SIZE, **_SHORT, "guidance_scale": 4.0, "text_encoder_out_layers": (1, 2, 3)}
_TRUE = {"true_cfg_scale": 4.0, "negative_prompt": "a green hat"}
_EDIT = {"image": _RED, **_SIZE, **_TRUE}
_KONTEXT = {"image": _RED, **_SIZE, **_SHORT, "guidance_scale": 3.5, "max_area": 64 * 48, "_auto_resize": False}
_SANA = {"height": 256, "width": 192, "use_resolution_binning": False, "complex_human_instruction": None}
_HUNYUAN = {**_CLIP, **_SHORT, "prompt_template": {"template": "{}", "crop_start": 0}}
_MODELS = {
    "sdxl": Family(stable_diffusion_xl, "ddim", {**_SIZE, "guidance_scale": 5.0}, _OFF),
    "wan": Family(wan, "flow_grpo", {**_CLIP, **_SHORT, "guidance_scale": 5.0}, _OFF, (3, 8, 6)),
    "flux2_klein": Family(flux_2_klein, "flow_cps", _KLEIN, _OFF),
    "qwen_image": Family(qwen_image, "flow_grpo", {**_SIZE, **_TRUE}, {"true_cfg_scale": 1.0}),
    "z_image": Family(z_image, "flow_grpo", {**_SIZE, **_SHORT, "guidance_scale": 4.0}, {"guidance_scale": 0.0}),
    "sana": Family(sana, "flow_grpo", {**_SANA, **_SHORT, "guidance_scale": 4.5}, _OFF),
    "hunyuan_video": Family(hunyuan_video, "dance_grpo", {**_HUNYUAN, "guidance_scale": 6.0}, {}, (3, 8, 6)),
    "ltx": Family(ltx, "flow_grpo", {**_CLIP, "width": 96, **_SHORT, "guidance_scale": 3.0}, _OFF, (2, 2, 3)),
    "cogvideox": Family(cogvideox, "ddim", {**_CLIP, **_SHORT, "guidance_scale": 6.0}, _OFF, (3, 8, 6)),
    "cogvideox_i2v": Family(
        cogvideox_image_to_video, "ddim", {"image": _RED, **_CLIP, **_SHORT, "guidance_scale": 6.0}, _OFF, (3, 8, 6)
    ),
    "wan_i2v": Family(
        wan_image_to_video, "flow_grpo", {"image": _RED, **_CLIP, "guidance_scale": 5.0}, _OFF, (3, 8, 6)
    ),
    "wan22_a14b": Family(wan_two_experts, "flow_grpo", {**_CLIP, **_SHORT, "guidance_scale": 5.0}, _OFF, (3, 8, 6)),
    "wan22_5b": Family(
        wan_small, "flow_grpo", {**_CLIP, "width": 96, **_SHORT, "guidance_scale": 5.0}, _OFF, (3, 4, 6)
    ),
    "pixart_sigma": Family(
        pixart_sigma,
        "ddim",
        {**_SIZE, **_SHORT, "guidance_scale": 4.5, "use_resolution_binning": False},
        _OFF,
        lora=False,
    ),
    "flux_kontext": Family(flux_kontext, "flow_grpo", _KONTEXT, {}),
    "qwen_image_edit": Family(qwen_image_edit, "flow_grpo", _EDIT, {"true_cfg_scale": 1.0}),
    "flux2_klein_edit": Family(flux_2_klein, "flow_grpo", {**_KLEIN, "image": _RED.resize((64, 64))}, _OFF),
    "flux2": Family(flux_2, "flow_grpo", _KLEIN, {}),
    "flux2_edit": Family(flux_2, "flow_grpo", {**_KLEIN, "image": _RED.resize((64, 64))}, {}),
    "lumina2": Family(lumina_2, "flow_grpo", {**_SIZE, "max_sequence_length": 256, "guidance_scale": 4.0}, _OFF),
    "auraflow": Family(aura_flow, "flow_grpo", {**_SIZE, **_SHORT, "guidance_scale": 3.5}, _OFF),
    "chroma": Family(chroma, "flow_grpo", {**_SIZE, **_SHORT, "guidance_scale": 5.0}, _OFF),
    "hidream": Family(hidream, "flow_grpo", {**_SIZE, **_SHORT, "guidance_scale": 5.0}, _OFF),
    "mochi": Family(
        mochi,
        "flow_grpo",
        {**_SIZE, "num_frames": 7, "max_sequence_length": 16, "guidance_scale": 4.5},
        _OFF,
        (2, 8, 6),
    ),
}
MODELS = {**FAMILIES, **_MODELS}
"""Every family tried; FAMILIES are the three that the tests of other parts use."""


def build(name: str, seed: int = 0) -> DiffusionPipeline:
    """Build one family with seeded random weights and no progress bar."""
    torch.manual_seed(seed)
    pipeline = MODELS[name].build()
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()  # as from_pretrained does: T5 has dropout
    return pipeline
