"""Where a reward's weights come from: safetensors in a folder, a file or on the hub, under whatever names they have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, PreTrainedTokenizerBase

from ..psm.backbones import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNSAFE = (".pt", ".pth", ".bin", ".ckpt")
_FEWEST_TOKENS = 16  # transformers makes an empty tokenizer, of special tokens only, of a folder without one
_VISION_HEAD, _TEXT_HEAD = 80, 64  # channels per head of open_clip's ViT-H-14, which its weights do not tell


def folder_of(path: str | Path) -> Path:
    """Return a local folder or file as it is, and of a hub id the folder where its small files and safetensors are.

    Raises:
        ValueError: it is neither.
    """
    if Path(path).exists():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"reward: {str(path)!r} is no folder or file here, and not loadable from the hub: {first_line(error)}"
        ) from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read every tensor of a .safetensors file, or of all of a folder's or hub id's (shards), on the CPU.

    Nothing is unpickled: a .pt or .pth file can run code when it is loaded, so it has to be converted first, once, by
    whoever trusts it.

    Raises:
        ValueError: nothing there, only files that can run code, several models, or a damaged file.
    """
    place = folder_of(path)
    files = [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
    unsafe = [file for file in (files or sorted(place.rglob("*"))) if file.suffix in _UNSAFE]
    if unsafe or not files:
        found = f"only {unsafe[0].name}, which could run code when loaded" if unsafe else "none"
        raise ValueError(
            f"reward: expected .safetensors weights in {path}, got {found}; convert a .pt or .pth that you trust with "
            "`python tools/to_safetensors.py IN OUT` of the source tree (docs/rewards.md)"
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            part = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"reward: {file} is not readable: {first_line(error)}") from error
        if twice := weights.keys() & part.keys():
            raise ValueError(f"reward: {path} holds several models ({min(twice)!r} is there twice); name one file")
        weights |= part
    return weights


def renamed(weights: Mapping[str, Tensor], *rules: tuple[str, str]) -> dict[str, Tensor]:
    """Rename weights by (regular expression, replacement) rules, of each name the first that matches."""
    names: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        rule = next((rule for rule in rules if re.search(rule[0], name)), None)
        names[re.sub(*rule, name, count=1) if rule else name] = tensor
    return names


def under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def build(kind: Any, config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype, source: str | Path) -> Any:
    """Build a transformers model of class `kind` with exactly these weights.

    Raises:
        ValueError: a weight is missing, has no place, or has another shape.
    """
    try:
        model, loading = kind.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:
        raise ValueError(f"reward: the weights of {source} do not fit a {kind.__name__}: {first_line(error)}") from None
    check_complete(loading, kind.__name__, source)
    model.eval().requires_grad_(False)
    return model


def check_complete(loading: Mapping[str, Any], kind: str, source: str | Path, *, exact: bool = True) -> None:
    """Raise ValueError for weights missing or, if `exact`, left over: transformers only warns, and leaves noise."""
    for problem in ("missing_keys", "mismatched_keys", *(["unexpected_keys"] if exact else [])):
        if names := sorted(map(str, loading[problem])):
            raise ValueError(
                f"reward: the weights of {source} do not fit a {kind}: {len(names)} {problem.replace('_keys', '')}, "
                f"first {names[0]}"
            )


def linear_stack(weights: Mapping[str, Tensor], width: int, source: str | Path) -> nn.Sequential:
    """Rebuild a head of linear layers in a row, one number out, from `<index>.weight` and `<index>.bias`, in float32.

    Layers without weights (dropout) may be counted in the indices; a bare `weight` and `bias` are one layer.

    Raises:
        ValueError: no such head, it does not take vectors of `width`, or its layers do not follow on each other.
    """
    named = {name if "." in name else f"0.{name}": tensor.float() for name, tensor in weights.items()}
    indices = sorted({int(name.split(".")[0]) for name in named if name.split(".")[0].isdigit()})
    layers, size = [], width
    for index in indices:
        weight, bias = named.get(f"{index}.weight"), named.get(f"{index}.bias")
        if weight is None or bias is None or weight.shape[1:] != (size,):
            break
        layer = nn.Linear(size, len(weight))
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
        size = len(weight)
    if not indices or len(layers) < len(indices) or size != 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        raise ValueError(f"reward: expected linear layers from {width} channels to 1 in {source}, got {shapes}")
    return nn.Sequential(*layers).eval().requires_grad_(False)


def load_tokenizer(path: str | Path, fallback: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies with a model, or, where none does, the one it was published to be used with.

    Raises:
        ValueError: neither is loadable.
    """
    place = folder_of(path)
    beside = sorted(place.rglob("tokenizer_config.json")) if place.is_dir() else []
    source = beside[0].parent if beside else Path(fallback)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"reward: no tokenizer in {path}, and none loadable from {source}: {first_line(error)}"
        ) from error
    if len(tokenizer) < _FEWEST_TOKENS:
        raise ValueError(f"reward: the tokenizer of {source} is empty ({len(tokenizer)} tokens)")
    return tokenizer


def read_json(path: Path) -> Any:
    """Read a JSON file; ValueError names a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"reward: {path} is not readable JSON: {first_line(error)}") from error


_OPEN_CLIP = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
)
_OPEN_CLIP_BLOCK = (
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)


def from_open_clip(weights: Mapping[str, Tensor]) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """Put an open_clip state dict (github.com/mlfoundations/open_clip) under the names of transformers' CLIPModel.

    The fused query, key and value rows of each block are split, the two projections (in, out) are transposed. Sizes
    are read off the weights, except heads: ViT-H-14's, 80 channels each for pictures and 64 for words, with exact GELU.

    Returns:
        The config, and the weights, which share the given ones' memory.
    """
    # imscore's checkpoints have it all under "model."; old open_clip files hold the causal mask, which is derived.
    plain = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    plain.pop("attn_mask", None)
    named: dict[str, Tensor] = {}
    for name, tensor in renamed(renamed(plain, *_OPEN_CLIP), *_OPEN_CLIP_BLOCK).items():
        if match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                named[f"{match[1]}.self_attn.{part}_proj.{match[2]}"] = rows
        else:
            named[name] = tensor.T.contiguous() if name.endswith("_projection.weight") else tensor
    patch = named["vision_model.embeddings.patch_embedding.weight"]
    cells = len(named["vision_model.embeddings.position_embedding.weight"]) - 1
    vocabulary = len(named["text_model.embeddings.token_embedding.weight"])
    text = _tower(named, "text_model") | {
        "vocab_size": vocabulary,
        "max_position_embeddings": len(named["text_model.embeddings.position_embedding.weight"]),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
    }
    vision = _tower(named, "vision_model") | {
        "patch_size": patch.shape[-1],
        "image_size": patch.shape[-1] * round(cells**0.5),
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=len(named["visual_projection.weight"]))
    return config, named


def _tower(named: Mapping[str, Tensor], tower: str) -> dict[str, Any]:
    """Read the sizes of one transformer off its weights."""
    fc1 = named[f"{tower}.encoder.layers.0.mlp.fc1.weight"]
    layers = {name.split(".")[3] for name in named if name.startswith(f"{tower}.encoder.layers.")}
    return {
        "hidden_size": fc1.shape[1],
        "intermediate_size": fc1.shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": fc1.shape[1] // (_TEXT_HEAD if tower == "text_model" else _VISION_HEAD),
        "hidden_act": "gelu",
    }


def is_open_clip(weights: Mapping[str, Tensor]) -> bool:
    """Tell whether weights have open_clip's names."""
    return any(name.removeprefix("model.") == "visual.class_embedding" for name in weights)
