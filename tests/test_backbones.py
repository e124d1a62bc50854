"""vipo.psm.backbones: the adapter on tiny random models, saved to disk and loaded again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_backbones import CONFIGS, VIDEO, pixels, saved_under, tiny
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vipo.psm.backbones import FrozenBackbone, pixel_statistics
from vipo.psm.families import IMAGENET_MEAN, IMAGENET_STD, MODEL_TYPES


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family's name to the folder of its tiny model."""
    return saved_under(tmp_path_factory.mktemp("backbones"))


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_change_nothing_and_are_never_exceeded(saved: Callable[[str], Path], name: str) -> None:
    frames = pixels(2, 5, 45, 70)
    expected = FrozenBackbone.from_pretrained(saved(name))(frames)
    backbone = FrozenBackbone.from_pretrained(saved(name), chunk=8 if name in VIDEO else 4)
    seen: list[int] = []
    backbone.model.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[0] * (inputs[0].shape[1] if name in VIDEO else 1))
    )
    torch.testing.assert_close(backbone(frames), expected, rtol=1e-4, atol=1e-5)  # a batch's size changes its rounding
    assert seen == {"vjepa2": [6, 6], "videomae": [8, 8]}.get(name, [4, 4, 2])


def test_windows_of_a_video_model(saved: Callable[[str], Path]) -> None:
    """Short chunks make short windows; VideoMAE knows one length only."""
    frames = pixels(1, 5, 64, 64)
    backbone = FrozenBackbone.from_pretrained(saved("vjepa2"), chunk=3)
    backbone.model.predictor.register_forward_pre_hook(lambda module, inputs: pytest.fail("the predictor ran"))
    seen: list[tuple[int, ...]] = []
    backbone.model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[:2])))
    parts = [backbone(frames[:, start : start + 2]) for start in (0, 2, 4)]
    assert seen == [(1, 2)] * 3
    torch.testing.assert_close(backbone(frames), torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)
    backbone = FrozenBackbone.from_pretrained(saved("videomae"), chunk=1)
    backbone.model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[:2])))
    assert backbone(frames).shape[1] == 5 and seen[6:] == [(1, 4)] * 2


class Moves(TorchFunctionMode):
    """Note the shape of every clip tensor that is sent to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and args[0].ndim == 5 and any(isinstance(argument, torch.device) for argument in args):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_frames_move_to_the_weights_a_chunk_at_a_time(saved: Callable[[str], Path]) -> None:
    for name, shapes in (
        ("dinov2", [(4, 1, 3, 45, 70), (4, 1, 3, 45, 70), (2, 1, 3, 45, 70)]),
        ("vjepa2", [(1, 4, 3, 45, 70), (1, 1, 3, 45, 70)] * 2),
    ):
        backbone = FrozenBackbone.from_pretrained(saved(name), chunk=4)
        with Moves() as moves:
            backbone(pixels(2, 5, 45, 70))
        assert moves.shapes == shapes
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # it does try to move them
            backbone(pixels(2, 5, 45, 70).to("meta"))


def test_512_pixels_are_covered_by_37_patches_without_cropping(saved: Callable[[str], Path]) -> None:
    backbone = FrozenBackbone.from_pretrained(saved("dinov2"), layer=0)
    frames = pixels(1, 1, 512, 512)
    changed = frames.clone()
    changed[..., -6:, -6:] = 1 - changed[..., -6:, -6:]  # what a crop to 36 * 14 = 504 would lose
    moved = (backbone(changed) - backbone(frames)).abs().amax(-1)[0, 0] > 1e-3
    expected = torch.zeros(37, 37, dtype=torch.bool)
    expected[-1, -1] = True
    assert torch.equal(moved, expected)


def test_frames_are_resized_as_pillow_does() -> None:
    """Black and white noise overshoots under bicubic, so the clamp shows; the projection reads one pixel alone."""
    model = tiny("dinov2")
    projection = model.embeddings.patch_embeddings.projection
    with torch.no_grad():
        model.embeddings.position_embeddings.zero_()
        projection.weight.zero_()
        projection.bias.zero_()
        for channel in range(3):
            projection.weight[channel, channel, 0, 0] = 1
    for height, width, image_size in [(100, 52, None), (40, 33, None), (100, 52, 28), (40, 33, 28)]:
        backbone = FrozenBackbone(model, mean=(0.0,) * 3, std=(1.0,) * 3, layer=0, image_size=image_size)
        frames = pixels(1, 1, height, width).round()
        rows, columns = backbone.patch_grid(height, width)
        size = (columns * 14, rows * 14)
        channels = [Image.fromarray(channel.numpy()).resize(size, Image.Resampling.BICUBIC) for channel in frames[0, 0]]
        expected = np.stack([np.asarray(channel).clip(0, 1)[::14, ::14] for channel in channels], axis=-1)
        np.testing.assert_allclose(backbone(frames)[0, 0, ..., :3], expected, atol=2e-5)  # Pillow's coefficients


def test_patch_grid(saved: Callable[[str], Path]) -> None:
    own = FrozenBackbone.from_pretrained(saved("dinov2"))
    assert own.patch_grid(512, 512) == (37, 37) and own.patch_grid(240, 416) == (18, 30)
    assert own.patch_grid(28, 42) == (2, 3) and own.patch_grid(14, 15) == (1, 2)
    scaled = FrozenBackbone.from_pretrained(saved("dinov2"), image_size=120)
    assert scaled.patch_grid(240, 416) == (9, 15) and scaled.patch_grid(416, 240) == (15, 9)
    assert scaled.patch_grid(8, 10) == (9, 11)
    assert scaled(pixels(1, 1, 240, 416)).shape == (1, 1, 9, 15, 16)
    stages = FrozenBackbone.from_pretrained(saved("resnet"), layer=2)  # 8 pixels per cell, in multiples of 32
    assert stages.patch_grid(240, 416) == (32, 52) and stages.patch_grid(64, 96) == (8, 12)
    assert stages(pixels(1, 1, 240, 416)).shape == (1, 1, 32, 52, 8)


def test_it_is_frozen(saved: Callable[[str], Path]) -> None:
    assert not FrozenBackbone(tiny("resnet").train()).model.training
    backbone = FrozenBackbone.from_pretrained(saved("resnet"))
    torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone(pixels(1, 1, 32, 32).requires_grad_()).requires_grad


@pytest.mark.parametrize("name", CONFIGS)
def test_precision_is_the_backbones_own_choice(saved: Callable[[str], Path], name: str) -> None:
    frames = pixels(1, 2, 45, 70)
    full = FrozenBackbone.from_pretrained(saved(name))
    half = FrozenBackbone.from_pretrained(saved(name), dtype=torch.bfloat16)
    reference = full(frames)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(full(frames), reference)
    rounded = half(frames)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, reference)
    assert (rounded - reference).norm() < 0.05 * reference.norm()  # 8 bits of mantissa through a few layers
    assert next(half.parameters()).dtype == torch.float32


def test_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    tiny("dinov2").to(torch.bfloat16).save_pretrained(tmp_path)
    backbone = FrozenBackbone.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    frames = pixels(1, 1, 45, 70).bfloat16()  # resized in float32, too
    assert torch.equal(backbone(frames), backbone(frames.float()))


def test_mean_and_std_come_from_the_preprocessor_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny("dinov2").save_pretrained(tmp_path)
    backbone = FrozenBackbone.from_pretrained(tmp_path)
    assert "no preprocessor config: normalising with mean (0.485, 0.456, 0.406)" in caplog.text
    assert backbone.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    assert backbone.std.flatten().tolist() == pytest.approx(IMAGENET_STD)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.25]}
    config = tmp_path / "preprocessor_config.json"
    config.write_text(json.dumps(settings))
    backbone = FrozenBackbone.from_pretrained(tmp_path)
    assert backbone.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert backbone.std.flatten().tolist() == pytest.approx([0.1, 0.2, 0.25])
    config.write_text(json.dumps({"do_normalize": False, "image_mean": [0.5, 0.4, 0.3]}))
    assert pixel_statistics(str(tmp_path)) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    config.unlink()
    for name, content in (
        ("processor_config.json", {"image_processor": settings}),
        ("video_preprocessor_config.json", settings),  # as the hub's V-JEPA 2
        ("processor_config.json", {"video_processor": settings}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        assert pixel_statistics(str(tmp_path)) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.25))
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("name", "mean"), [("clip", 0.48145466), ("siglip", 0.5), ("siglip2", 0.5), ("vjepa2", 0.485), ("sam", 0.485)]
)
def test_mean_and_std_of_the_family(saved: Callable[[str], Path], name: str, mean: float) -> None:
    backbone = FrozenBackbone.from_pretrained(saved(name))
    assert backbone.mean[0].item() == pytest.approx(mean)
    assert torch.equal(FrozenBackbone(backbone.model).std, backbone.std)  # type: ignore[arg-type]


def test_nano_is_the_packages_own_backbone(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    nano = ModuleType("vipo.nano")
    nano.assets_path = lambda name: saved("dinov3_vit") if name == "backbone" else Path("nowhere")  # type: ignore
    monkeypatch.setitem(sys.modules, "vipo.nano", nano)
    assert FrozenBackbone.from_pretrained("nano").prefix_tokens == 4


def test_loading_errors_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no readable model config.*save_pretrained"):
        FrozenBackbone.from_pretrained(tmp_path / "absent")
    T.CLIPTextConfig().save_pretrained(tmp_path / "text")
    types = ", ".join(MODEL_TYPES)
    with pytest.raises(
        ValueError, match=f"expected one of {types}, got 'clip_text_model'; did you mean 'clip_vision_m"
    ):
        FrozenBackbone.from_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="model type of the backbone: expected one of dinov2, .*, got 'clip'"):
        FrozenBackbone(tiny("clip"))
    CONFIGS["dinov2"]().save_pretrained(tmp_path / "weightless")
    with pytest.raises(ValueError, match="weights not loadable"):
        FrozenBackbone.from_pretrained(tmp_path / "weightless")


def test_incomplete_or_broken_weights_are_refused(tmp_path: Path) -> None:
    tiny("dinov2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    table = state.pop("embeddings.cls_token")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing, first 'embeddings.cls_token'"):
        FrozenBackbone.from_pretrained(tmp_path)
    save_file(state | {"embeddings.cls_token": table[..., 1:]}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights not loadable"):
        FrozenBackbone.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="weights not loadable"):
        FrozenBackbone.from_pretrained(tmp_path)


def test_call_errors(saved: Callable[[str], Path]) -> None:
    backbone = FrozenBackbone.from_pretrained(saved("dinov2"))
    with pytest.raises(ValueError, match="wrong number of dimensions"):
        backbone(torch.rand(3, 3, 28, 28))
    with pytest.raises(ValueError, match="expected shape"):
        backbone(torch.rand(1, 1, 4, 28, 28))
    for frames in (
        torch.rand(0, 1, 3, 28, 28),
        torch.rand(1, 1, 3, 0, 28),
        torch.ones(1, 1, 3, 28, 28, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="at least one pixel, floating point"):
            backbone(frames)
    with pytest.raises(ValueError, match="8 x 10 pixels are smaller than one 14-pixel patch; set image_size"):
        backbone(pixels(1, 1, 8, 10))
    with pytest.raises(ValueError, match="20 x 40 pixels are smaller than one 32-pixel patch"):
        FrozenBackbone(tiny("resnet"), layer=1)(pixels(1, 1, 20, 40))
    for options in ({"chunk": 0}, {"image_size": 0}):
        with pytest.raises(ValueError, match="chunk >= 1 and image_size >= 1"):
            FrozenBackbone(tiny("dinov2"), **options)  # type: ignore[arg-type]
