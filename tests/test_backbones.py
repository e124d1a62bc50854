"""vipo.psm.backbones on tiny random DINOv2 models, with and without register tokens, saved to disk."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
)

from vipo.psm.backbones import IMAGENET_MEAN, IMAGENET_STD, FrozenBackbone

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=14, image_size=56)


def tiny(registers: int) -> PreTrainedModel:
    torch.manual_seed(registers)
    if registers:
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **SIZES))
    return Dinov2Model(Dinov2Config(**SIZES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Saved models by their number of register tokens."""
    root = tmp_path_factory.mktemp("backbones")
    for registers in (0, 4):
        tiny(registers).save_pretrained(root / str(registers))
    return {registers: root / str(registers) for registers in (0, 4)}


def pixels(frames: int, height: int, width: int) -> Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("registers", [0, 4])
def test_features_are_the_models_patch_tokens_and_no_others(folders: dict[int, Path], registers: int) -> None:
    backbone = FrozenBackbone.from_pretrained(folders[registers])
    frames = pixels(3, 28, 42)
    normalised = (frames - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        tokens = tiny(registers).eval()(pixel_values=normalised).last_hidden_state
    assert tokens.shape[1] == 1 + registers + 2 * 3
    features = backbone(frames)
    assert features.dtype == torch.float32 and features.shape == (3, 2, 3, 16)
    torch.testing.assert_close(features.flatten(1, 2), tokens[:, -6:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_a_patch_lies_where_its_pixels_are(folders: dict[int, Path], registers: int) -> None:
    backbone = FrozenBackbone.from_pretrained(folders[registers], layer=0)
    frames = pixels(1, 42, 70)
    changed = frames.clone()
    changed[:, :, 30:40, 16:20] += 0.5  # rows 30..39 are in patch row 2, columns 16..19 in patch column 1
    moved = (backbone(changed) - backbone(frames)).abs().amax((0, 3)) > 0
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[2, 1] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("registers", [0, 4])
def test_position_embeddings_follow_a_grid_that_is_not_square(registers: int) -> None:
    model = tiny(registers)
    ramp = torch.zeros(4, 4, 16)
    ramp[..., 0], ramp[..., 1] = torch.arange(4.0)[:, None], torch.arange(4.0)
    with torch.no_grad():
        embeddings = model.embeddings
        embeddings.position_embeddings[:, 1:] = ramp.view(1, 16, 16)
        embeddings.patch_embeddings.projection.weight.zero_()
        embeddings.patch_embeddings.projection.bias.zero_()
    features = FrozenBackbone(model, layer=0)(pixels(1, 8 * 14, 4 * 14))[0]  # twice the rows, the same columns
    torch.testing.assert_close(features[3, :, 1], torch.arange(4.0), rtol=0, atol=1e-4)
    rows = features[:, 2, 0]
    assert (rows.diff() > 0).all()
    torch.testing.assert_close(rows + rows.flip(0), torch.full((8,), 3.0), rtol=0, atol=1e-4)  # centred, not shifted


def test_512_pixels_are_covered_by_37_patches_without_cropping(folders: dict[int, Path]) -> None:
    backbone = FrozenBackbone.from_pretrained(folders[0], layer=0)
    frames = pixels(1, 512, 512)
    changed = frames.clone()
    changed[:, :, -6:, -6:] = 1 - changed[:, :, -6:, -6:]  # what a crop to 36 * 14 = 504 would lose
    moved = (backbone(changed) - backbone(frames)).abs().amax((0, 3)) > 1e-3
    expected = torch.zeros(37, 37, dtype=torch.bool)
    expected[-1, -1] = True
    assert torch.equal(moved, expected)


def test_frames_are_resized_as_pillow_does() -> None:
    """Black and white noise overshoots under bicubic, so the clamp shows; the projection reads one pixel alone."""
    model = tiny(0)
    projection = model.embeddings.patch_embeddings.projection
    with torch.no_grad():
        model.embeddings.position_embeddings.zero_()
        projection.weight.zero_()
        projection.bias.zero_()
        for channel in range(3):
            projection.weight[channel, channel, 0, 0] = 1
    backbone = FrozenBackbone(model, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), layer=0)
    for height, width in [(100, 52), (40, 33)]:
        scaled = FrozenBackbone(model, mean=(0.0,) * 3, std=(1.0,) * 3, layer=0, image_size=28)
        for module in (backbone, scaled):
            frames = pixels(1, height, width).round()
            rows, columns = module.patch_grid(height, width)
            size = (columns * 14, rows * 14)
            channels = [
                Image.fromarray(channel.numpy()).resize(size, Image.Resampling.BICUBIC) for channel in frames[0]
            ]
            expected = np.stack([np.asarray(channel).clip(0, 1)[::14, ::14] for channel in channels], axis=-1)
            np.testing.assert_allclose(module(frames)[0, ..., :3], expected, atol=2e-5)  # Pillow's coefficients


def test_patch_grid(folders: dict[int, Path]) -> None:
    own = FrozenBackbone.from_pretrained(folders[0])
    assert own.patch_grid(512, 512) == (37, 37) and own.patch_grid(240, 416) == (18, 30)
    assert own.patch_grid(28, 42) == (2, 3) and own.patch_grid(3, 15) == (1, 2)
    scaled = FrozenBackbone.from_pretrained(folders[0], image_size=120)
    assert scaled.patch_grid(240, 416) == (9, 15) and scaled.patch_grid(416, 240) == (15, 9)
    assert scaled(pixels(1, 240, 416)).shape == (1, 9, 15, 16)


def test_layers(folders: dict[int, Path]) -> None:
    frames = pixels(2, 28, 28)
    last = FrozenBackbone.from_pretrained(folders[0])
    before_norm = FrozenBackbone.from_pretrained(folders[0], layer=2)(frames)
    torch.testing.assert_close(last.model.layernorm(before_norm), last(frames), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(FrozenBackbone.from_pretrained(folders[0], layer=1)(frames), before_norm)
    for layer in (-2, 3):
        with pytest.raises(ValueError, match="0 to 2, got"):
            FrozenBackbone.from_pretrained(folders[0], layer=layer)


def test_chunks_change_nothing(folders: dict[int, Path]) -> None:
    frames = pixels(5, 28, 28)
    whole = FrozenBackbone.from_pretrained(folders[0])(frames)
    torch.testing.assert_close(FrozenBackbone.from_pretrained(folders[0], chunk=2)(frames), whole, rtol=1e-5, atol=1e-5)


def test_it_is_frozen(folders: dict[int, Path]) -> None:
    backbone = FrozenBackbone.from_pretrained(folders[0])
    torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone(pixels(1, 28, 28).requires_grad_()).requires_grad


def test_precision_is_the_backbones_own_choice(folders: dict[int, Path]) -> None:
    frames = pixels(2, 28, 28)
    full = FrozenBackbone.from_pretrained(folders[0])
    half = FrozenBackbone.from_pretrained(folders[0], dtype=torch.bfloat16)
    reference = full(frames)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(full(frames), reference)
    rounded = half(frames)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, reference)
    torch.testing.assert_close(rounded, reference, rtol=0, atol=0.1)  # 8 bits of mantissa on values of order 1
    assert next(half.parameters()).dtype == torch.float32


def test_a_checkpoint_in_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    tiny(0).to(torch.bfloat16).save_pretrained(tmp_path)
    backbone = FrozenBackbone.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def test_mean_and_std_come_from_the_preprocessor_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny(0).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        backbone = FrozenBackbone.from_pretrained(tmp_path)
    assert "ImageNet's mean and std" in caplog.text
    assert backbone.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    config = tmp_path / "preprocessor_config.json"
    config.write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.25]}))
    backbone = FrozenBackbone.from_pretrained(tmp_path)
    assert backbone.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert backbone.std.flatten().tolist() == pytest.approx([0.1, 0.2, 0.25])
    config.write_text(json.dumps({"do_normalize": False, "image_mean": [0.5, 0.4, 0.3]}))
    backbone = FrozenBackbone.from_pretrained(tmp_path)
    assert backbone.mean.abs().max() == 0 and (backbone.std == 1).all()


def test_nano_is_the_packages_own_backbone(folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    nano = ModuleType("vipo.nano")
    nano.assets_path = lambda name: folders[4] if name == "backbone" else Path("nowhere")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vipo.nano", nano)
    assert FrozenBackbone.from_pretrained("nano").prefix_tokens == 5


def test_loading_errors_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no readable model config.*save_pretrained"):
        FrozenBackbone.from_pretrained(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no readable model config"):
        FrozenBackbone.from_pretrained(tmp_path / "empty")
    CLIPTextConfig().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="expected one of dinov2, dinov2_with_registers, got 'clip_text_model'"):
        FrozenBackbone.from_pretrained(tmp_path / "text")
    Dinov2Config(**SIZES).save_pretrained(tmp_path / "weightless")
    with pytest.raises(ValueError, match="weights not loadable"):
        FrozenBackbone.from_pretrained(tmp_path / "weightless")


def test_incomplete_or_broken_weights_are_refused(tmp_path: Path) -> None:
    tiny(0).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    del state["embeddings.cls_token"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing, first 'embeddings.cls_token'"):
        FrozenBackbone.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="weights not loadable"):
        FrozenBackbone.from_pretrained(tmp_path)


def test_call_errors(folders: dict[int, Path]) -> None:
    backbone = FrozenBackbone.from_pretrained(folders[0])
    with pytest.raises(ValueError, match="wrong number of dimensions"):
        backbone(torch.rand(3, 28, 28))
    with pytest.raises(ValueError, match="expected shape"):
        backbone(torch.rand(1, 4, 28, 28))
    with pytest.raises(ValueError, match="at least one pixel"):
        backbone(torch.rand(0, 3, 28, 28))
    with pytest.raises(ValueError, match="frames are on meta, the backbone is on cpu"):
        backbone(pixels(1, 28, 28).to("meta"))
    for options in ({"chunk": 0}, {"image_size": 0}):
        with pytest.raises(ValueError, match="chunk >= 1 and image_size >= 1"):
            FrozenBackbone(tiny(0), **options)  # type: ignore[arg-type]
