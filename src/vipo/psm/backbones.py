"""The Visual Preference Extractor: frozen vision backbones, pixel frames -> patch features (the Phi of ViPO Eq. 2)."""

from __future__ import annotations

import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol, Self, cast

import torch
import torch.nn.functional as functional
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.video_processing_utils import BaseVideoProcessor

from vipo.files import require_safetensors
from vipo.psm.families import FAMILIES, IMAGENET, MODEL_TYPES, TOWERS
from vipo.types import NonFiniteError, check_choice, check_shape

logger = logging.getLogger(__name__)

_CHUNK = 32
# On a CPU a batch gains nothing, and activations that leave the cache cost 10 to 15 % of the forward (docs/log.md).
_CPU_CHUNK_PIXELS = 512 * 512


class BackboneError(RuntimeError):
    """A vision backbone that fails or returns what is not finite; its message is one line for the user."""


class NonFiniteFeatures(NonFiniteError, BackboneError):
    """Features that are NaN, infinite or too large for a map."""


class Backbone(Protocol):
    """Anything that turns frames (N, F, 3, Y, X) in [0, 1], on any device, into features (N, F, h, w, D) on its own."""

    def __call__(self, frames: Tensor, /) -> Tensor:
        """Return features (N, F, h, w, D) whose patches cover the whole frame, row by row."""
        ...


_NOT_LOADED = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError),
    *(SafetensorError, UnpicklingError, EOFError),
)
"""What transformers and torch raise for a file of weights, or of their index, that is none."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class FrozenBackbone(torch.nn.Module):
    """A `transformers` vision model that is never trained: no gradient, always in eval mode.

    Frames are resized (bicubic, antialiased) so that whole patches cover the whole image: nothing is cropped, and the
    grid's aspect ratio is the image's to within a patch; position embeddings are interpolated by the model. SAM,
    V-JEPA 2 and VideoMAE take one square only: frames are stretched to it.

    Attributes:
        patch_size: pixels of the resized frame per feature cell, on a side, at `layer`.
        prefix_tokens: tokens before the patches (class, registers), which are dropped.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        layer: int = -1,
        image_size: int | None = None,
        chunk: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Wrap a loaded vision model.

        Args:
            model: a vision model of one of MODEL_TYPES.
            mean: per RGB channel, in units of [0, 1] pixels; None = what the model's family was trained with.
            std: likewise, > 0.
            layer: -1 = the last hidden state, after the final norm where the model applies one to patches (SAM and
                SAM 2: the image embedding, after the neck); 0..L = `hidden_states[layer]`, without that norm, 0 being
                the embeddings (DINOv3 ConvNeXt: the pixels). In ResNet, ConvNeXt and DINOv3 ConvNeXt these are the
                stages, in SAM 2 the blocks, and the grid is as fine as they are.
            image_size: pixels of the frame's shorter side before rounding up to whole patches; None = its own size, or
                that of a model that takes one square only.
            chunk: frames per forward pass, and on the device of the weights at any time; None = 32, on a CPU as many
                as make up 512 x 512 pixels. A video model sees at least one window: V-JEPA 2 min(chunk,
                frames_per_clip) frames in whole tubes, so that a smaller chunk means shorter windows; VideoMAE always
                its num_frames.
            dtype: autocast dtype inside the network; None = float32. The weights stay as they are.

        Raises:
            ValueError: another model type, or an option out of range.
        """
        super().__init__()
        config = model.config
        check_choice("model type of the backbone", config.model_type, tuple(FAMILIES))
        family = FAMILIES[config.model_type]
        strides = family.strides(config)
        if not -1 <= layer <= len(strides) - 2:
            raise ValueError(f"layer: expected -1 (last) or 0 to {len(strides) - 2}, got {layer}")
        if (chunk is not None and chunk < 1) or (image_size is not None and image_size < 1):
            raise ValueError(f"expected chunk >= 1 and image_size >= 1, or None, got {chunk} and {image_size}")
        self._side = family.side(config) if family.side else None
        if self._side and image_size not in (None, self._side):
            raise ValueError(
                f"image_size: {config.model_type} takes {self._side} x {self._side} pixels only, got {image_size}; "
                "leave image_size out"
            )
        if self._side:
            logger.warning(
                "frames are stretched to the %d x %d pixels of %s", self._side, self._side, config.model_type
            )
        self.model = model.requires_grad_(False)
        self.eval()
        self._family = family
        self._unit = family.multiple(config) if family.multiple else max(strides)
        self._least_frames, most = family.clip(config) if family.clip else (1, 1)
        self._window = max(min(chunk or _CHUNK, most) // self._least_frames, 1) * self._least_frames
        self.patch_size = strides[layer]
        self.prefix_tokens = family.prefix_tokens(config)
        self.layer, self.image_size, self.chunk, self.dtype = layer, image_size, chunk, dtype
        self.register_buffer("mean", torch.tensor(mean or family.statistics[0]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or family.statistics[1]).view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        layer: int = -1,
        image_size: int | None = None,
        chunk: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        allow_pickle: bool = False,
    ) -> Self:
        """Load a backbone, and its mean and std from its preprocessor config (its family's where there is none).

        Args:
            name_or_path: a folder written by `save_pretrained`, a hub id such as "facebook/dinov2-base", or "nano". Of
                a checkpoint with more than a vision model (CLIP, SigLIP, SAM, SAM 2) only that is loaded.
            layer: see `__init__`.
            image_size: see `__init__`.
            chunk: see `__init__`.
            dtype: see `__init__`.
            device: where the weights go; None = the CPU.
            allow_pickle: read the tensors of a .bin where there is no safetensors (with weights_only).

        Raises:
            ValueError: nothing loadable there, another model type, incomplete weights, or an option out of range.
        """
        name = str(name_or_path)
        if name == "nano":
            from vipo.nano import assets_path  # lazily: only this name needs the assets

            name = str(assets_path("backbone"))
        model = _load_model(name, allow_pickle=allow_pickle)
        mean, std = pixel_statistics(name, FAMILIES[model.config.model_type].statistics)
        backbone = cls(model, mean=mean, std=std, layer=layer, image_size=image_size, chunk=chunk, dtype=dtype)
        return backbone.to(device)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever the mode: a parent's `train()` must not switch dropout on."""
        return super().train(False)

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (h, w): the feature cells that cover a frame of `height` x `width` pixels at `image_size`.

        Raises:
            ValueError: the frame is smaller than one patch and no `image_size` says how far to enlarge it.
        """
        if self._side:
            return self._side // self.patch_size, self._side // self.patch_size
        shorter = min(height, width)
        if self.image_size is None and shorter < self._unit:
            raise ValueError(
                f"frames of {height} x {width} pixels are smaller than one {self._unit}-pixel patch; set image_size"
            )
        size = self.image_size or shorter
        unit = shorter * self._unit
        cells = self._unit // self.patch_size
        return -(-height * size // unit) * cells, -(-width * size // unit) * cells

    def _chunk_for(self, height: int, width: int) -> int:
        """Return how many frames of `height` x `width` pixels go through the model at once."""
        if self.chunk or self.mean.device.type != "cpu":
            return self.chunk or _CHUNK
        rows, columns = self.patch_grid(height, width)
        return max(_CPU_CHUNK_PIXELS // (rows * columns * self.patch_size**2), 1)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Extract patch features, `chunk` frames at a time.

        A video model sees each clip in windows, the last one filled up with its last frame; a tube's feature is that
        of each of its frames. An image model sees every frame by itself.

        Args:
            frames: (N, F, 3, Y, X), floating point in [0, 1], on any device: a chunk moves to the weights in its turn.

        Returns:
            (N, F, h, w, D), float32, on the device of the weights, without gradient.

        Raises:
            ValueError: wrong shape or dtype, no frames, or frames smaller than one patch.
        """
        check_shape("frames", frames, "N F 3 Y X")
        if frames.numel() == 0 or not frames.is_floating_point():
            raise ValueError(
                f"frames: expected at least one pixel, floating point in [0, 1], got {frames.dtype} of shape "
                f"{tuple(frames.shape)}; divide uint8 frames by 255"
            )
        clips = frames if self._family.clip else frames.flatten(0, 1).unsqueeze(1)
        features = [
            _joined([self._encode(window) for window in group.split(self._window, dim=1)], dim=1)
            for group in clips.split(max(self._chunk_for(*frames.shape[3:]) // self._window, 1))
        ]
        return _joined(features).view(*frames.shape[:2], *features[0].shape[2:])

    def _encode(self, clips: Tensor) -> Tensor:
        """Encode one chunk (B, f, 3, Y, X) -> (B, f, h, w, D); f = 1 for image models."""
        batch, frames = clips.shape[:2]
        grid = self.patch_grid(*clips.shape[3:])
        missing = -frames % self._least_frames  # to whole tubes or a whole window
        pixels = self._normalised(clips.to(self.mean.device, non_blocking=True).flatten(0, 1), grid)
        keywords = dict(self._family.keywords)
        if self._family.clip:
            pixels = pixels.unflatten(0, (batch, frames))
            pixels = torch.cat([pixels, pixels[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        if self._family.flat_patches:  # each is (rows, columns, channels), flattened
            pixels = functional.pixel_unshuffle(pixels, self.patch_size).unflatten(1, (3, -1)).permute(0, 3, 4, 2, 1)
            pixels = pixels.flatten(3).flatten(1, 2)
            keywords |= {"pixel_attention_mask": None, "spatial_shapes": torch.tensor([grid] * batch)}
        with torch.autocast(pixels.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            outputs = self.model(pixels, output_hidden_states=self.layer >= 0, return_dict=True, **keywords)
        features = self._family.last(outputs) if self.layer < 0 else cast(Tensor, outputs.hidden_states[self.layer])
        layout = self._family.layouts[self.layer >= 0]
        if layout == "tokens":
            features = features[:, self.prefix_tokens :].unflatten(1, (-1, *grid))
        else:
            features = (features.movedim(1, -1) if layout == "channels_first" else features).unsqueeze(1)
        tubelet = (frames + missing) // features.shape[1]
        features = features.float()
        return features if tubelet == 1 else features.repeat_interleave(tubelet, dim=1)[:, :frames]

    def _normalised(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Resize images (M, 3, Y, X) to whole cells, in float32, and normalise them."""
        images = images.float()
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if images.shape[2:] != size:
            images = functional.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)
            images.clamp_(0, 1)  # bicubic overshoots at edges
        offset = round(self._family.offset(self.patch_size))
        if offset:  # move the picture so that the cells lie where their pixels are
            images = functional.pad(images, (0, offset, 0, offset), mode="replicate")[..., offset:, offset:]
        return (images - self.mean).div_(self.std)


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Concatenate, without the copy that torch.cat makes of a single tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _load_model(name: str, *, allow_pickle: bool = False) -> PreTrainedModel:
    """Load a vision model in float32 from a folder or the hub; every failure is a ValueError that names the fix."""
    fix = 'give a folder written by save_pretrained, a hub id such as "facebook/dinov2-base", or "nano"'
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        if "custom code" in reason:
            reason = "it brings code of its own, which is never run"
        raise ValueError(f"backbone {name!r}: no readable model config ({reason}); {fix}") from error
    check_choice(f"model type of backbone {name!r}", config.model_type, MODEL_TYPES)
    if not allow_pickle:
        require_safetensors(f"backbone {name!r}", Path(name))
    tower = TOWERS.get(config.model_type)
    key_mapping = {rf"^{tower}\.": ""} if tower else None
    config = config if tower is None else config.vision_config
    try:
        model, loading = AutoModel.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            key_mapping=key_mapping,
            use_safetensors=None if allow_pickle else True,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except _NOT_LOADED as error:
        raise ValueError(f"backbone {name!r}: weights not loadable ({first_line(error)}); {fix}") from error
    # transformers only warns here and leaves such weights random, which would be a map of nothing.
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(f"backbone {name!r}: {len(missing)} weights are missing, first {missing[0]!r}; {fix}")
    return cast(PreTrainedModel, model)


def pixel_statistics(
    name: str, default: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read mean and std from the image or video processor's JSON without building one: some need torchvision."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        try:
            settings, _ = BaseVideoProcessor.get_video_processor_dict(name)
        except OSError:
            logger.warning(
                "backbone %r has no preprocessor config: normalising with mean %s and std %s", name, *default
            )
            return default
    if not settings.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple(settings.get("image_mean") or default[0]), tuple(settings.get("image_std") or default[1])
