"""CLIP-class preference scorers: PickScore, HPSv2.1 in CLIP form, and the embedded nano scorer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from ..nano import resolve
from ..psm.backbones import first_line, pixel_statistics
from ..psm.families import FAMILIES
from ..types import check_shape


class ClipPreference(nn.Module):
    """Preference score of a CLIP model (PickScore, arXiv 2305.01569), frozen.

        s(image, prompt) = exp(logit_scale) * cos(E_image(image), E_text(prompt))

    A clip's score is the mean of its frames' scores; a model with 3 F input channels reads the whole clip at once.

    Args:
        model: a transformers CLIPModel.
        tokenizer: its tokenizer.
        mean: pixel means, 3.
        std: pixel standard deviations, 3.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: torch.device | str = "cpu") -> ClipPreference:
        """Load "nano", a folder or a hub id.

        Raises:
            ValueError: there is no CLIP model of that name.
        """
        path = resolve(str(name), "scorer")
        try:
            model = CLIPModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"reward: cannot load a CLIP model from {path}: {first_line(error)}") from error
        mean, std = pixel_statistics(path, FAMILIES["clip_vision_model"].statistics)
        return cls(model, tokenizer, mean, std).to(device)

    def tokens_and_embeddings(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 3, Y, X) in [0, 1] -> vision tokens (n, 1 + patches, width) and unit vectors (n, D)."""
        side = self.model.config.vision_config.image_size
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        output = self.model.vision_model(pixel_values=(images - self.mean) / self.std)
        embeddings = self.model.visual_projection(output.pooler_output)
        return output.last_hidden_state, F.normalize(embeddings.float(), dim=-1)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors (n, D)."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        pooled = self.model.text_model(
            input_ids=tokens.input_ids.to(self.mean.device), attention_mask=tokens.attention_mask.to(self.mean.device)
        ).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def compare(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score image vectors (N, F, D) of N clips against their prompts: (N,), the mean over frames."""
        cosine = torch.einsum("nfd,nd->nf", images, self.embed_prompts(prompts)).mean(1)
        scores: Tensor = self.model.logit_scale.exp() * cosine
        return scores

    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N,) float32."""
        sizes = check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
        channels = self.model.config.vision_config.num_channels
        if channels != 3:  # reads the frames of a clip side by side in its channels, so that it sees motion
            if channels != 3 * sizes["F"]:
                raise ValueError(f"reward: this model reads clips of {channels // 3} frames, got {sizes['F']}")
            frames = frames.flatten(1, 2)[:, None]
        _, images = self.tokens_and_embeddings(frames.flatten(0, 1).float())
        return self.compare(images.unflatten(0, frames.shape[:2]), prompts)
