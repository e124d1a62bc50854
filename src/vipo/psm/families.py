"""The families of vision models: how each takes pixels and lays out features, one row per `transformers` model type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class Family(NamedTuple):
    """How the models of one type take pixels and lay out features; every callable but `last` reads the config.

    Attributes:
        strides: pixels per cell of hidden_states[0], ..., hidden_states[L], and of the last hidden state.
        prefix_tokens: tokens before the patches, wherever the layout is "tokens".
        layouts: of the last hidden state and of hidden_states: "tokens" (B, P, D), "channels_first" or "channels_last".
        last: what `layer=-1` reads off the model's outputs.
        offset: pixels by which the centre of a cell of a given stride lies before the middle of its pixels.
        multiple: what the sides of a frame must be a multiple of, in pixels; None = the largest stride.
        side: of the only square, in pixels, that the model takes; None = any size.
        clip: least and most frames per window of a video model, always a multiple of the least; None = one image.
        flat_patches: whether the model takes flattened patches instead of pixels.
        keywords: further keywords of its forward.
        statistics: mean and std of the pixels where no preprocessor config tells.
    """

    strides: Callable[[Any], tuple[int, ...]]
    prefix_tokens: Callable[[Any], int] = lambda config: 0
    layouts: tuple[str, str] = ("tokens", "tokens")
    last: Callable[[Any], Tensor] = lambda outputs: outputs.last_hidden_state
    offset: Callable[[int], float] = lambda stride: 0.0
    multiple: Callable[[Any], int] | None = None
    side: Callable[[Any], int] | None = None
    clip: Callable[[Any], tuple[int, int]] | None = None
    flat_patches: bool = False
    keywords: Mapping[str, Any] = {}
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET


def _equal_strides(config: Any) -> tuple[int, ...]:
    """A vision transformer: every hidden state has one cell per patch."""
    return (int(config.patch_size),) * (int(config.num_hidden_layers) + 2)


def _stage_strides(stem: int, first: int, stages: int) -> tuple[int, ...]:
    """A convolutional network: stem, then a first stage of its own stride, then stages that halve the map."""
    strides = [first * 2**stage for stage in range(stages)]
    return (stem, *strides, strides[-1])


def _hiera_strides(config: Any) -> tuple[int, ...]:
    """SAM 2: blocks whose map is halved where a stage begins; the last is the neck's coarsest level in use."""
    trunk = config.backbone_config
    stages = [trunk.patch_stride[0] * trunk.query_stride[0] ** stage for stage in range(len(trunk.blocks_per_stage))]
    blocks = [stride for stride, count in zip(stages, trunk.blocks_per_stage, strict=True) for _ in range(count)]
    return (stages[0], *blocks, stages[config.num_feature_levels - 1])


_CONVNEXT = Family(
    lambda config: _stage_strides(config.patch_size, config.patch_size, len(config.hidden_sizes)),
    layouts=("channels_first", "channels_first"),
)
# model_type of a vision model -> its family.
FAMILIES: dict[str, Family] = {
    "dinov2": Family(_equal_strides, lambda config: 1),
    "dinov2_with_registers": Family(_equal_strides, lambda config: 1 + int(config.num_register_tokens)),
    "dinov3_vit": Family(_equal_strides, lambda config: 1 + int(config.num_register_tokens)),
    "dinov3_convnext": Family(  # its hidden_states[0] are the pixels; its last one is normed and led by their mean
        lambda config: _stage_strides(1, 4, len(config.hidden_sizes)),
        lambda config: 1,
        layouts=("tokens", "channels_first"),
    ),
    "resnet": Family(
        lambda config: _stage_strides(4, 8 if config.downsample_in_first_stage else 4, len(config.hidden_sizes)),
        layouts=("channels_first", "channels_first"),
        offset=lambda stride: (stride - 1) / 2,  # its padded convolutions centre cell i on pixel stride * i
    ),
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    "sam_vision_model": Family(
        _equal_strides, layouts=("channels_first", "channels_last"), side=lambda config: int(config.image_size)
    ),
    "sam2_vision_model": Family(
        _hiera_strides,
        layouts=("channels_first", "channels_last"),
        last=lambda outputs: outputs.fpn_hidden_states[-1],  # the image embedding that the mask decoder sees
        offset=lambda stride: 1.5,  # of its padded 7 x 7 patches of stride 4
        multiple=lambda config: math.lcm(  # of the windows that tile the position embeddings, too
            max(_hiera_strides(config)),
            config.backbone_config.patch_stride[0] * config.backbone_config.window_size_per_stage[0],
        ),
    ),
    "clip_vision_model": Family(
        _equal_strides, lambda config: 1, keywords={"interpolate_pos_encoding": True}, statistics=_CLIP
    ),
    "siglip_vision_model": Family(_equal_strides, keywords={"interpolate_pos_encoding": True}, statistics=_HALF),
    "siglip2_vision_model": Family(_equal_strides, flat_patches=True, statistics=_HALF),
    # transformers reads V-JEPA 2's rotary positions off crop_size, so that any other grid gets wrong rows and columns.
    "vjepa2": Family(
        _equal_strides,
        side=lambda config: int(config.crop_size),
        clip=lambda config: (config.tubelet_size, config.frames_per_clip),
        keywords={"skip_predictor": True},
    ),
    "videomae": Family(
        _equal_strides,
        side=lambda config: int(config.image_size),
        clip=lambda config: (config.num_frames, config.num_frames),
    ),
}
# model_type of a checkpoint with more than a vision model -> what precedes the names of its vision model's weights,
# where transformers does not know it by itself.
TOWERS = {"clip": "", "siglip": "", "siglip2": "", "sam": "", "sam2": "vision_encoder", "sam2_video": "vision_encoder"}
MODEL_TYPES = (*FAMILIES, *TOWERS)
