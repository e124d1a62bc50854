"""The Visual Preference Extractor: frozen vision backbones, pixel frames -> patch features (the Phi of ViPO Eq. 2)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
import torch.nn.functional as functional
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from vipo.psm.allocation import check_choice
from vipo.types import check_shape

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# model_type -> how many tokens precede the patches in the hidden states, read off the model's config.
_PREFIX_TOKENS: dict[str, Callable[[Any], int]] = {
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + int(config.num_register_tokens),
}
MODEL_TYPES = tuple(_PREFIX_TOKENS)


class BackboneError(RuntimeError):
    """A vision backbone that fails or returns what is not finite; its message is one line for the user."""


class Backbone(Protocol):
    """Anything that turns frames (M, 3, Y, X), float32 in [0, 1], into patch features (M, h, w, D)."""

    def __call__(self, frames: Tensor, /) -> Tensor:
        """Return features (M, h, w, D) whose patches cover the whole frame, row by row."""
        ...


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class FrozenBackbone(torch.nn.Module):
    """A `transformers` vision transformer that is never trained: no gradient, always in eval mode.

    Frames are resized (bicubic, antialiased) so that whole patches cover the whole image: nothing is cropped, and
    the grid's aspect ratio is the image's to within a patch. Position embeddings are interpolated by the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        layer: int = -1,
        image_size: int | None = None,
        chunk: int = 32,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: of one of MODEL_TYPES.
            mean: per RGB channel, in units of [0, 1] pixels.
            std: likewise, > 0.
            layer: -1 = the last hidden state, after the final norm; 0..L = `hidden_states[layer]`, without that norm,
                0 being the embeddings.
            image_size: pixels of the frame's shorter side before rounding up to whole patches; None = its own size.
            chunk: frames per forward pass.
            dtype: autocast dtype inside the network; None = float32. The weights stay as they are.

        Raises:
            ValueError: another model type, or an option out of range.
        """
        super().__init__()
        config = model.config
        check_choice("model type of the backbone", config.model_type, MODEL_TYPES)
        if not -1 <= layer <= config.num_hidden_layers:
            raise ValueError(f"layer: expected -1 (last, normed) or 0 to {config.num_hidden_layers}, got {layer}")
        if chunk < 1 or (image_size is not None and image_size < 1):
            raise ValueError(f"expected chunk >= 1 and image_size >= 1 or None, got {chunk} and {image_size}")
        self.model = model.requires_grad_(False)
        self.eval()
        self.patch_size = int(config.patch_size)
        self.prefix_tokens = _PREFIX_TOKENS[config.model_type](config)
        self.layer, self.image_size, self.chunk, self.dtype = layer, image_size, chunk, dtype
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        layer: int = -1,
        image_size: int | None = None,
        chunk: int = 32,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load a backbone, and its mean and std from `preprocessor_config.json` (ImageNet's where there is none).

        Args:
            name_or_path: a folder written by `save_pretrained`, a hub id such as "facebook/dinov2-base", or "nano".
            layer: see `__init__`.
            image_size: see `__init__`.
            chunk: see `__init__`.
            dtype: see `__init__`.
            device: where the weights go; None = the CPU.

        Raises:
            ValueError: nothing loadable there, another model type, incomplete weights, or an option out of range.
        """
        name = str(name_or_path)
        if name == "nano":
            from vipo.nano import assets_path  # lazily: only this name needs the assets

            name = str(assets_path("backbone"))
        model = _load_model(name)
        mean, std = pixel_statistics(name)
        backbone = cls(model, mean=mean, std=std, layer=layer, image_size=image_size, chunk=chunk, dtype=dtype)
        return backbone.to(device)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever the mode: a parent's `train()` must not switch dropout on."""
        return super().train(False)

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (h, w): the patches, rounded up, that cover a frame of `height` x `width` pixels at `image_size`."""
        shorter = min(height, width)
        size = self.image_size or shorter
        unit = shorter * self.patch_size
        return -(-height * size // unit), -(-width * size // unit)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Extract patch features, `chunk` frames at a time.

        Args:
            frames: (M, 3, Y, X), in [0, 1], on the device of the weights.

        Returns:
            (M, h, w, D), float32, without gradient.

        Raises:
            ValueError: wrong shape, no frames, or another device.
        """
        check_shape("frames", frames, "M 3 Y X")
        if frames.numel() == 0:
            raise ValueError(f"frames: expected at least one pixel, got shape {tuple(frames.shape)}")
        if frames.device != self.mean.device:
            raise ValueError(
                f"frames are on {frames.device}, the backbone is on {self.mean.device}: "
                f'load it with device="{frames.device}" or move one of them'
            )
        parts = [frames[start : start + self.chunk].float() for start in range(0, len(frames), self.chunk)]
        return torch.cat([self._patch_features(part) for part in parts])

    def _patch_features(self, frames: Tensor) -> Tensor:
        """Resize, normalise and encode one chunk (M, 3, Y, X) -> (M, h, w, D)."""
        rows, columns = self.patch_grid(*frames.shape[2:])
        size = (rows * self.patch_size, columns * self.patch_size)
        if frames.shape[2:] != size:
            frames = functional.interpolate(frames, size=size, mode="bicubic", align_corners=False, antialias=True)
            frames = frames.clamp(0, 1)  # bicubic overshoots at edges
        with torch.autocast(frames.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            outputs = self.model(
                pixel_values=(frames - self.mean) / self.std, output_hidden_states=self.layer >= 0, return_dict=True
            )
        tokens = cast(Tensor, outputs.hidden_states[self.layer] if self.layer >= 0 else outputs.last_hidden_state)
        return torch.unflatten(tokens[:, self.prefix_tokens :].float(), 1, (rows, columns))


def _load_model(name: str) -> PreTrainedModel:
    """Load a vision model in float32 from a folder or the hub; every failure is a ValueError that names the fix."""
    fix = 'give a folder written by save_pretrained, a hub id such as "facebook/dinov2-base", or "nano"'
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone {name!r}: no readable model config ({first_line(error)}); {fix}") from error
    check_choice(f"model type of backbone {name!r}", config.model_type, MODEL_TYPES)
    try:
        model, loading = AutoModel.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"backbone {name!r}: weights not loadable ({first_line(error)}); {fix}") from error
    # transformers only warns here and leaves such weights random, which would be a map of nothing.
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(f"backbone {name!r}: {len(missing)} weights are missing, first {missing[0]!r}; {fix}")
    return cast(PreTrainedModel, model)


def pixel_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read mean and std from the image processor's JSON without building one: some need torchvision."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        logger.warning("backbone %r has no preprocessor_config.json: normalising with ImageNet's mean and std", name)
        settings = {}
    if not settings.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple(settings.get("image_mean", IMAGENET_MEAN)), tuple(settings.get("image_std", IMAGENET_STD))
