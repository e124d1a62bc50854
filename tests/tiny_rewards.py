"""Tiny random models of the classes that rewards load, saved to folders as the published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as T
from safetensors.torch import save_file
from tiny_pipelines import clip_tokenizer, qwen_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from vipo.rewards import score

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def rewards_of(reward: Any, frames: Tensor, prompts: list[str]) -> Tensor:
    return score(reward, frames, prompts).rewards


def pixels(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def shaken(model: Any) -> Any:
    """The model with every weight random, so that none is 0 or 1 and no part is idle."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(weights: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, path)


def clip_folder(path: Path, width: int = 32, text: int = 32, heads: tuple[int, int] = (4, 4)) -> T.CLIPModel:
    """Save a CLIPModel with tokenizer and image statistics."""
    tokenizer = clip_tokenizer()
    words = {
        "vocab_size": len(tokenizer), "hidden_size": text, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": heads[1], "bos_token_id": tokenizer.bos_token_id, "hidden_act": "gelu",
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": width, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": heads[0],
        "image_size": 32, "patch_size": 8, "hidden_act": "gelu",
    }  # fmt: skip
    torch.manual_seed(0)
    model = shaken(T.CLIPModel(T.CLIPConfig(text_config=words, vision_config=vision, projection_dim=16)))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model


def clip_logits(model: T.CLIPModel, images: Tensor, prompts: list[str], mean: Any = MEAN, std: Any = STD) -> Tensor:
    """transformers' own forward: logits of every image (n, 3, 32, 32) for every prompt."""
    tokens = clip_tokenizer()(prompts, padding="max_length", return_tensors="pt")
    normal = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        return model(pixel_values=normal, **tokens).logits_per_image


def open_clip_weights(model: T.CLIPModel) -> dict[str, Tensor]:
    """The model's weights under open_clip's names, written from open_clip's side of the table."""
    own = model.state_dict()
    found = {
        "visual.class_embedding": own["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": own["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": own["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": own["visual_projection.weight"].T,
        "token_embedding.weight": own["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": own["text_model.embeddings.position_embedding.weight"],
        "text_projection": own["text_projection.weight"].T,
        "logit_scale": own["logit_scale"],
    }
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = own[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = own[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = own[f"text_model.final_layer_norm.{kind}"]
        for theirs, ours in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
            for layer in range(2):
                block, from_block = f"{theirs}.resblocks.{layer}", f"{ours}.encoder.layers.{layer}"
                rows = [own[f"{from_block}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = torch.cat(rows)
                found[f"{block}.attn.out_proj.{kind}"] = own[f"{from_block}.self_attn.out_proj.{kind}"]
                found[f"{block}.ln_1.{kind}"] = own[f"{from_block}.layer_norm1.{kind}"]
                found[f"{block}.ln_2.{kind}"] = own[f"{from_block}.layer_norm2.{kind}"]
                found[f"{block}.mlp.c_fc.{kind}"] = own[f"{from_block}.mlp.fc1.{kind}"]
                found[f"{block}.mlp.c_proj.{kind}"] = own[f"{from_block}.mlp.fc2.{kind}"]
    return found


def bert_tokenizer() -> T.BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(ByteLevel.alphabet())]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T.BertTokenizer(vocab={word: i for i, word in enumerate(dict.fromkeys(words))})


def qwen_folder(path: Path) -> T.Qwen2VLModel:
    """Save the config and tokenizer of a tiny Qwen2-VL; return a model with them and some room for new tokens."""
    tokenizer = qwen_tokenizer()
    tokens = tokenizer.get_vocab()
    config = T.Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 5, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 1, "num_heads": 2},
        image_token_id=tokens["<|image_pad|>"], video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"], vision_end_token_id=tokens["<|vision_end|>"],
    )  # fmt: skip
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    return shaken(T.Qwen2VLModel(config))
