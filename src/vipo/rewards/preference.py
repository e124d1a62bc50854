"""CLIP-class scorers: PickScore, HPSv2.1, CLIPScore and the embedded nano scorer; LAION's aesthetic score; CLIP-IQA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerBase

from ..files import require_safetensors
from ..nano import resolve
from ..psm.backbones import first_line, pixel_statistics
from ..psm.families import FAMILIES
from ..types import check_choice, check_shape
from .pixels import Fit, fitted, statistics
from .weights import (
    DTYPES,
    build,
    check_complete,
    folder_of,
    from_open_clip,
    is_open_clip,
    linear_stack,
    load_tokenizer,
    read_json,
    read_weights,
    under,
)

SCALES = ("logit", "cosine", "clipscore")
_TOKENIZER = "openai/clip-vit-large-patch14"  # every CLIP here has OpenAI's vocabulary


class ClipPreference(nn.Module):
    """Preference score of a CLIP model, frozen.

        logit      s(image, prompt) = exp(logit_scale) * cos(E_image(image), E_text(prompt))    PickScore, 2305.01569
        cosine     s(image, prompt) = cos(...)                                                  HPSv2, 2306.09341
        clipscore  s(image, prompt) = 2.5 * max(cos(...), 0)                                    CLIPScore, 2104.08718

    A clip's score is the mean of its frames' scores; a model with 3 F input channels reads the whole clip at once.

    Args:
        model: a transformers CLIPModel.
        tokenizer: its tokenizer.
        mean: pixel means, 3.
        std: pixel standard deviations, 3.
        scale: "logit", "cosine" or "clipscore".
        fit: how a picture that is not square is brought to the model's square, see vipo.rewards.pixels.fitted.
        chunk: pictures per forward pass.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        scale: str = "logit",
        fit: Fit = "crop",
        chunk: int = 32,
    ) -> None:
        super().__init__()
        check_choice("scale", scale, SCALES)
        check_choice("fit", fit, ("crop", "pad", "stretch"))
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.scale, self.fit, self.chunk = scale, fit, chunk
        channel_mean, channel_std = statistics(mean, std)
        self.register_buffer("mean", channel_mean)
        self.register_buffer("std", channel_std)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        scale: str = "logit",
        fit: Fit = "crop",
        chunk: int = 32,
    ) -> ClipPreference:
        """Load "nano", a folder, a hub id, or open_clip weights of ViT-H-14 (a .safetensors file or its folder).

        Raises:
            ValueError: there is no CLIP model of that name.
        """
        check_choice("dtype", dtype, DTYPES)
        path = folder_of(resolve(str(name), "scorer"))
        try:
            model = _load_clip(path, DTYPES[dtype])
        except (OSError, ValueError, SafetensorError) as error:
            reason = first_line(error).removeprefix("reward: ")
            raise ValueError(
                f"reward: cannot load a CLIP model from {path}: {reason}; is the folder complete?"
            ) from error
        default = FAMILIES["clip_vision_model"].statistics
        mean, std = pixel_statistics(str(path), default) if path.is_dir() else default
        tokenizer = load_tokenizer(path, _TOKENIZER)
        return cls(model, tokenizer, mean, std, scale=scale, fit=fit, chunk=chunk).to(device)

    def tokens_and_embeddings(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 3, Y, X) in [0, 1] -> vision tokens (n, 1 + patches, width) and unit vectors (n, D)."""
        images = fitted(images, self.model.config.vision_config.image_size, self.fit)
        output = self.model.vision_model(pixel_values=((images - self.mean) / self.std).to(self.model.dtype))
        embeddings = self.model.visual_projection(output.pooler_output)
        return output.last_hidden_state, F.normalize(embeddings.float(), dim=-1)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors (n, D)."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        pooled = self.model.text_model(
            input_ids=tokens.input_ids.to(self.mean.device), attention_mask=tokens.attention_mask.to(self.mean.device)
        ).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def embed_frames(self, frames: Tensor) -> Tensor:
        """Frames (N, F, 3, Y, X) in [0, 1] -> unit vectors (N, F, D), `chunk` pictures at a time.

        A model of 3 F channels sees the frames of a clip side by side in its channels: (N, 1, D).
        """
        channels = self.model.config.vision_config.num_channels
        if channels != 3:
            if channels != 3 * frames.shape[1]:
                raise ValueError(f"reward: this model reads clips of {channels // 3} frames, got {frames.shape[1]}")
            frames = frames.flatten(1, 2)[:, None]
        pictures = frames.flatten(0, 1).to(self.mean.device).float()
        parts = [self.tokens_and_embeddings(part)[1] for part in pictures.split(self.chunk)]
        vectors: Tensor = torch.cat(parts).unflatten(0, frames.shape[:2])
        return vectors

    def compare(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score image vectors (N, F, D) of N clips against their prompts: (N,), the mean over frames."""
        cosine = torch.einsum("nfd,nd->nf", images, self.embed_prompts(prompts))
        if self.scale == "clipscore":
            cosine = cosine.clamp_min(0) * 2.5
        scores: Tensor = cosine.mean(1) * (self.model.logit_scale.float().exp() if self.scale == "logit" else 1)
        return scores

    @torch.no_grad()
    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N,) float32."""
        check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
        return self.compare(self.embed_frames(frames), prompts)


def _load_clip(path: Path, dtype: torch.dtype) -> CLIPModel:
    """Load a CLIPModel from its own folder, or from open_clip's weights."""
    config = path / "config.json"
    if path.is_dir() and config.is_file() and read_json(config).get("model_type") == "clip":
        require_safetensors("reward", path)
        loaded: Any = CLIPModel.from_pretrained(str(path), dtype=dtype, use_safetensors=True, output_loading_info=True)
        model: CLIPModel = loaded[0]
        check_complete(loaded[1], "CLIPModel", path, exact=False)  # old ones hold position ids, which are derived now
        return model
    weights = read_weights(path)
    if not is_open_clip(weights):
        raise ValueError("neither a transformers CLIPModel (config.json) nor open_clip weights")
    found: CLIPModel = build(CLIPModel, *from_open_clip(weights), dtype, path)
    return found


class Aesthetic(nn.Module):
    """LAION's aesthetic score: linear layers on the unit image vector of CLIP ViT-L/14, frozen; prompts are not read.

        s(image) = W_k (... (W_1 e + b_1) ...) + b_k,   e = E_image(image) / |E_image(image)|

    v1 is one layer (github.com/LAION-AI/aesthetic-predictor), the "improved" one 768-1024-128-64-16-1 without
    activations (github.com/christophschuhmann/improved-aesthetic-predictor). About 1 to 10; DDPO's reward.

    Args:
        clip: the CLIP model.
        head: D -> 1.
    """

    def __init__(self, clip: ClipPreference, head: nn.Module) -> None:
        super().__init__()
        self.clip, self.head = clip, head

    @torch.no_grad()
    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1]: (N,) float32, the mean over frames."""
        check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
        scores: Tensor = self.head(self.clip.embed_frames(frames))[..., 0].mean(1)
        return scores


def load_aesthetic(
    path: str, device: torch.device | str, *, clip: str = "openai/clip-vit-large-patch14", dtype: str = "float32"
) -> Aesthetic:
    """Load LAION's aesthetic score: the head from `path`, the CLIP model from `clip`.

    Args:
        path: a .safetensors file, folder or hub id with the head; of a whole scorer as imscore's only the head is read.
        device: of the weights.
        clip: folder or hub id of the CLIP model that the head was trained on.
        dtype: of the CLIP model.
    """
    scorer = ClipPreference.from_pretrained(clip, device=device, dtype=dtype)
    weights = read_weights(path)
    head = under(weights, "mlp.layers.") or under(weights, "layers.") or weights
    return Aesthetic(scorer, linear_stack(head, scorer.model.config.projection_dim, path).to(device))


class ClipQuality(nn.Module):
    """CLIP-IQA (arXiv 2207.12396): how much more a picture looks like a good photo than a bad one. Reads no prompt.

        s(image) = softmax(exp(logit_scale) * [cos(image, "Good photo."), cos(image, "Bad photo.")])_0   in [0, 1]

    Args:
        clip: any CLIP model; the paper's is an RN50 without position embeddings.
        words: the pair of texts, the good one first.
    """

    def __init__(self, clip: ClipPreference, words: tuple[str, str] = ("Good photo.", "Bad photo.")) -> None:
        super().__init__()
        self.clip, self.words = clip, words

    @torch.no_grad()
    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1]: (N,) float32, the mean over frames."""
        check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
        cosine = self.clip.embed_frames(frames) @ self.clip.embed_prompts(self.words).T
        scores: Tensor = (self.clip.model.logit_scale.float().exp() * cosine).softmax(-1)[..., 0].mean(1)
        return scores


def load_quality(path: str, device: torch.device | str, *, dtype: str = "float32") -> ClipQuality:
    """Load CLIP-IQA on the CLIP model of a folder or hub id."""
    return ClipQuality(ClipPreference.from_pretrained(path, device=device, dtype=dtype))


def load_clip(
    path: str,
    device: torch.device | str,
    *,
    scale: str = "logit",
    fit: Fit = "crop",
    dtype: str = "float32",
    chunk: int = 32,
) -> ClipPreference:
    """Load a ClipPreference; see there."""
    return ClipPreference.from_pretrained(path, device=device, dtype=dtype, scale=scale, fit=fit, chunk=chunk)
