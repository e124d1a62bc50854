"""A tiny random vision model of every family that vipo.psm.families knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T
from torch import Tensor

VIT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
PATCH16 = dict(VIT, intermediate_size=32, patch_size=16, image_size=64)
CONV = dict(hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 1, 1])
HIERA = dict(
    model_type="sam2_hiera_det_model", hidden_size=8, blocks_per_stage=[1, 1, 2, 1], global_attention_blocks=[3],
    embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2], window_size_per_stage=[8, 4, 4, 2],
)  # fmt: skip
SAM2 = dict(backbone_config=HIERA, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=12)
SAM = dict(VIT, output_channels=8, mlp_dim=32, image_size=64, patch_size=16, window_size=3, global_attn_indexes=[1])
SIGLIP2 = dict(VIT, intermediate_size=32, patch_size=16, num_patches=16)
DINOV2 = dict(VIT, mlp_ratio=2, patch_size=14, image_size=56)
VJEPA2 = dict(
    VIT, patch_size=16, crop_size=64, frames_per_clip=8, mlp_ratio=2, pred_hidden_size=16, pred_num_attention_heads=2,
    pred_num_hidden_layers=1,
)  # fmt: skip
CONFIGS: dict[str, Any] = {
    "dinov2": lambda: T.Dinov2Config(**DINOV2),
    "dinov2_with_registers": lambda: T.Dinov2WithRegistersConfig(num_register_tokens=4, **DINOV2),
    "dinov3_vit": lambda: T.DINOv3ViTConfig(num_register_tokens=3, **PATCH16),
    "dinov3_convnext": lambda: T.DINOv3ConvNextConfig(**CONV),
    "resnet": lambda: T.ResNetConfig(embedding_size=6, layer_type="basic", **CONV),
    "convnext": lambda: T.ConvNextConfig(**CONV),
    "convnextv2": lambda: T.ConvNextV2Config(**CONV),
    "sam_vision_model": lambda: T.SamVisionConfig(**SAM),
    "sam2_vision_model": lambda: T.Sam2VisionConfig(**SAM2),
    "clip_vision_model": lambda: T.CLIPVisionConfig(**PATCH16),
    "siglip_vision_model": lambda: T.SiglipVisionConfig(**PATCH16),
    "siglip2_vision_model": lambda: T.Siglip2VisionConfig(**SIGLIP2),
    "vjepa2": lambda: T.VJEPA2Config(**VJEPA2),
    "videomae": lambda: T.VideoMAEConfig(num_frames=4, **PATCH16),
}
TEXT = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40,
    max_position_embeddings=8,
)  # fmt: skip
MASKS = dict(mlp_dim=8, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=8)
PROMPTS = dict(image_size=64, mask_input_channels=4)
SAM2_PARTS = dict(
    vision_config=dict(SAM2, model_type="sam2_vision_model"),
    prompt_encoder_config=dict(PROMPTS, hidden_size=12),
    mask_decoder_config=dict(MASKS, hidden_size=12),
)
TOWERS: dict[str, Any] = {
    "clip": lambda: T.CLIPConfig(text_config=TEXT, vision_config=PATCH16),
    "siglip": lambda: T.SiglipConfig(text_config=TEXT, vision_config=PATCH16),
    "siglip2": lambda: T.Siglip2Config(text_config=TEXT, vision_config=SIGLIP2),
    "sam": lambda: T.SamConfig(
        vision_config=SAM, prompt_encoder_config=dict(PROMPTS, hidden_size=8),
        mask_decoder_config=dict(MASKS, hidden_size=8),
    ),
    "sam2": lambda: T.Sam2Config(**SAM2_PARTS),
    "sam2_video": lambda: T.Sam2VideoConfig(
        **SAM2_PARTS, memory_attention_hidden_size=12, memory_attention_num_layers=1, memory_encoder_hidden_size=12,
        memory_attention_feed_forward_hidden_size=8, memory_encoder_output_channels=4, memory_fuser_embed_dim=12,
        memory_fuser_intermediate_dim=8, mask_downsampler_embed_dim=12,
    ),
}  # fmt: skip
VIDEO = ("vjepa2", "videomae")
SQUARE = ("sam_vision_model", *VIDEO)
IMAGES = [name for name in CONFIGS if name not in VIDEO]


def tiny(name: str) -> T.PreTrainedModel:
    """A model whose every weight is random, so that none is 0 or 1 and no part of it is idle."""
    torch.manual_seed(0)
    model = T.AutoModel.from_config((CONFIGS | TOWERS)[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def saved_under(root: Path) -> Callable[[str], Path]:
    """Return a function from a family's name to the folder of its tiny model, saved once."""

    def folder(name: str) -> Path:
        if not (root / name).exists():
            tiny(name).save_pretrained(root / name)
        return root / name

    return folder


def pixels(samples: int, frames: int, height: int, width: int) -> Tensor:
    return torch.rand(samples, frames, 3, height, width, generator=torch.Generator().manual_seed(0))


def whole(name: str) -> tuple[int, int]:
    """Height and width that the family takes without resizing."""
    return (64, 64) if name in SQUARE else (56, 84) if name.startswith("dinov2") else (64, 96)
