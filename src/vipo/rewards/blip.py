"""ImageReward: a BLIP text encoder that looks at the picture, and linear layers on its first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig, PreTrainedTokenizerBase
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from ..psm.families import FAMILIES
from ..types import check_choice
from .pixels import fitted, per_frame, statistics
from .weights import DTYPES, build, linear_stack, load_tokenizer, read_weights, renamed, under

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, github.com/THUDM/ImageReward
_TOKENIZER = "google-bert/bert-base-uncased"
_MOST_TOKENS = 35
_HEAD = 64  # channels per attention head, in ViT-B and -L as in BERT
_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
)


class ImageReward(nn.Module):
    """ImageReward (arXiv 2304.05977), frozen.

        s(image, prompt) = (MLP(h) - 0.1672) / 1.0333,   h = first token of BERT(prompt), which attends to ViT(image)

    A clip's score is the mean of its frames' scores.

    Args:
        vision: the picture encoder.
        text: the text encoder with cross-attention.
        head: its width -> 1, linear layers in a row.
        tokenizer: BERT's.
        chunk: pictures per forward pass.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        head: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chunk: int = 32,
    ) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.tokenizer, self.chunk = tokenizer, chunk
        self.side = int(cast(int, vision.config.image_size))
        mean, std = statistics(*FAMILIES["clip_vision_model"].statistics)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Images (n, 3, Y, X) -> (n,)."""
        images = fitted(images.to(self.mean.device), self.side, "crop")
        pixels = ((images - self.mean) / self.std).to(self.vision.dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=_MOST_TOKENS, return_tensors="pt"
        ).to(seen.device)
        states = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        scores: Tensor = (self.head(states[:, 0].float())[:, 0] - _MEAN) / _STD
        return scores

    @torch.no_grad()
    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N,) float32, the mean over frames."""
        return per_frame(self._score, frames, prompts, self.chunk)


def load_image_reward(path: str, device: torch.device | str, *, dtype: str = "float32", chunk: int = 32) -> ImageReward:
    """Load ImageReward from the published weights in safetensors, under their own names (`blip.*`, `mlp.layers.*`).

    Raises:
        ValueError: these weights are not there or do not fit.
    """
    check_choice("dtype", dtype, DTYPES)
    weights = read_weights(path)
    vision = renamed(under(weights, "blip.visual_encoder."), *_VISION)
    text = under(weights, "blip.text_encoder.")
    if not vision or not text:
        raise ValueError(
            f"reward: expected blip.visual_encoder.* and blip.text_encoder.* in {path}, got {sorted(weights)[:3]}"
        )
    vision_config, text_config = _configs(vision, text)
    return ImageReward(
        build(BlipVisionModel, vision_config, vision, DTYPES[dtype], path),
        build(_TextEncoder, text_config, text, DTYPES[dtype], path),
        linear_stack(under(weights, "mlp.layers."), text_config.hidden_size, path),
        load_tokenizer(path, _TOKENIZER),
        chunk=chunk,
    ).to(device)


class _TextEncoder(BlipTextModel):
    """BlipTextModel without the pooler, which ImageReward does not have."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__(config, add_pooling_layer=False)


def _configs(vision: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Read the sizes of both encoders off their weights; BLIP's ViT norms with 1e-6, its BERT with 1e-12."""
    patch = vision["embeddings.patch_embedding.weight"]
    width, side = patch.shape[0], patch.shape[-1]
    cells = vision["embeddings.position_embedding"].shape[1] - 1
    vocabulary, size = text["embeddings.word_embeddings.weight"].shape
    return (
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=len({name.split(".")[2] for name in vision if name.startswith("encoder.layers.")}),
            num_attention_heads=width // _HEAD,
            patch_size=side,
            image_size=side * round(cells**0.5),
            layer_norm_eps=1e-6,
        ),
        BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=size,
            encoder_hidden_size=width,
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=len({name.split(".")[2] for name in text if name.startswith("encoder.layer.")}),
            num_attention_heads=size // _HEAD,
            bos_token_id=vocabulary - 2,  # [DEC]; not used
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
            layer_norm_eps=1e-12,
        ),
    )
