"""ImageReward on tiny BLIP encoders, saved under the published names."""

import pytest
import torch
from tiny_rewards import bert_tokenizer, pixels, rewards_of, save, shaken
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from vipo.psm.families import FAMILIES
from vipo.rewards import load_reward

PROMPTS = ["a red cat", "two dogs that run over a very green field in the morning sun", "x"]
EXACT = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folder, the two encoders and the head, whose weights lie there under ImageReward's names."""
    folder = tmp_path_factory.mktemp("imagereward")
    tokenizer = bert_tokenizer()
    tokenizer.save_pretrained(folder)
    vision = shaken(
        BlipVisionModel(
            BlipVisionConfig(
                hidden_size=128, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                patch_size=8, layer_norm_eps=1e-6,
            )
        )
    )  # fmt: skip
    text = shaken(
        BlipTextModel(
            BlipTextConfig(
                vocab_size=len(tokenizer) + 2, hidden_size=64, encoder_hidden_size=128, intermediate_size=40,
                num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=40,
            ),
            add_pooling_layer=False,
        )
    )  # fmt: skip
    head = {i: torch.nn.Linear(a, b) for i, a, b in ((0, 64, 8), (2, 8, 6), (4, 6, 4), (6, 4, 3), (7, 3, 1))}
    theirs = {
        "embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks", "layer_norm": "norm",
        "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj", "post_layernorm": "norm",
    }  # fmt: skip
    weights = {f"mlp.layers.{i}.{k}": getattr(layer, k).data for i, layer in head.items() for k in ("weight", "bias")}
    for name, tensor in vision.state_dict().items():
        for ours, other in theirs.items():
            name = name.replace(ours, other)
        weights[f"blip.visual_encoder.{name}"] = tensor
    weights |= {f"blip.text_encoder.{name}": tensor for name, tensor in text.state_dict().items()}
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    weights["blip.vision_proj.weight"] = torch.zeros(4, 128)
    save(weights, folder / "model.safetensors")
    return folder, vision, text, head


def test_image_reward_is_the_encoders_own_forward(published):
    folder, vision, text, head = published
    frames = pixels(3, 1, 3, 32, 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in FAMILIES["clip_vision_model"].statistics)
    with torch.no_grad():
        seen = vision(pixel_values=(frames[:, 0] - mean) / std).last_hidden_state
        tokens = bert_tokenizer()(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        state = text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state[:, 0]
        for layer in head.values():
            state = layer(state)
    expected = (state[:, 0] - 0.16717362830052426) / 1.0333394966054072
    assert expected.std() > 0.01
    torch.testing.assert_close(rewards_of(load_reward("imagereward", path=folder), frames, PROMPTS), expected, **EXACT)


def test_order_batch_and_one_clip(published):
    reward = load_reward("imagereward", path=published[0], options={"chunk": 2})
    frames = pixels(3, 2, 3, 40, 48)
    scores = rewards_of(reward, frames, PROMPTS)
    torch.testing.assert_close(rewards_of(reward, frames.flip(0), PROMPTS[::-1]), scores.flip(0), **EXACT)
    torch.testing.assert_close(rewards_of(reward, frames[1:2], PROMPTS[1:2]), scores[1:2], **EXACT)
    apart = [rewards_of(reward, frames[:, i : i + 1], PROMPTS) for i in range(2)]
    torch.testing.assert_close(scores, torch.stack(apart).mean(0), **EXACT)
    swapped = rewards_of(reward, frames, [PROMPTS[1], PROMPTS[0], PROMPTS[2]])
    assert (swapped - scores)[:2].abs().min() > 1e-3, "the prompt is read"


def test_other_weights_are_refused(tmp_path):
    save({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected blip\.visual_encoder\.\* and blip\.text_encoder\.\*"):
        load_reward("imagereward", path=tmp_path)
