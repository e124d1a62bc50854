"""vipo.psm.families: a tiny random model of every family gives what its own `transformers` class gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from tiny_backbones import CONFIGS, IMAGES, SQUARE, TOWERS, VIDEO, pixels, saved_under, tiny, whole
from torch import Tensor
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from vipo.psm.backbones import FrozenBackbone


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family's name to the folder of its tiny model."""
    return saved_under(tmp_path_factory.mktemp("backbones"))


def outputs_by_hand(name: str, backbone: FrozenBackbone, images: Tensor) -> Any:
    """The outputs of the family's own model, made afresh, for images (M, 3, Y, X) or clips (N, F, 3, Y, X)."""
    model = tiny(name)
    # Pixels from the corner by which the picture is moved, so that cells lie where their pixels are.
    moved = {"resnet": backbone.patch_size // 2, "sam2_vision_model": 2}.get(name, 0)
    rows, columns = (torch.arange(size).add(moved).clamp(max=size - 1) for size in images.shape[-2:])
    images = images[..., rows, :][..., columns]
    inputs: dict[str, Any] = {"pixel_values": (images - backbone.mean) / backbone.std}
    if name in ("clip_vision_model", "siglip_vision_model"):
        inputs["interpolate_pos_encoding"] = True
    if name == "vjepa2":
        inputs = {"pixel_values_videos": inputs["pixel_values"]}
    if name == "siglip2_vision_model":
        flat = torch.stack([torch.tensor(convert_image_to_patches(x.numpy(), 16)) for x in inputs["pixel_values"]])
        shapes = torch.tensor([[images.shape[2] // 16, images.shape[3] // 16]] * len(flat))
        inputs = {"pixel_values": flat, "pixel_attention_mask": torch.ones(flat.shape[:2]), "spatial_shapes": shapes}
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True)


# family -> tokens before the patches, features of the last hidden state.
PREFIX = {"dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 4, "dinov3_convnext": 1, "clip_vision_model": 1}
FIRST = ("resnet", "convnext", "convnextv2", "sam_vision_model", "sam2_vision_model")  # channels before rows
CONVOLVED = (*FIRST, "dinov3_convnext")


@pytest.mark.parametrize("name", IMAGES)
def test_image_features_are_the_models_own(saved: Callable[[str], Path], name: str) -> None:
    backbone = FrozenBackbone.from_pretrained(saved(name))
    height, width = whole(name)
    frames = pixels(2, 3, height, width)
    outputs = outputs_by_hand(name, backbone, frames.flatten(0, 1))
    last = outputs.fpn_hidden_states[-1] if name == "sam2_vision_model" else outputs.last_hidden_state
    stride = 14 if name.startswith("dinov2") else 32 if "convnext" in name or name == "resnet" else 16
    grid = (height // stride, width // stride)
    tokens = last[:, PREFIX.get(name, 0) :]
    expected = last.permute(0, 2, 3, 1) if name in FIRST else tokens.reshape(6, *grid, -1)
    features = backbone(frames)
    assert features.dtype == torch.float32 and features.shape[:4] == (2, 3, *grid)
    assert backbone.patch_grid(height, width) == grid and backbone.patch_size == stride
    torch.testing.assert_close(features.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize(("name", "window"), [("vjepa2", 6), ("videomae", 4)])
def test_video_features_are_the_models_own(saved: Callable[[str], Path], name: str, window: int) -> None:
    backbone = FrozenBackbone.from_pretrained(saved(name))
    frames = pixels(2, 5, 64, 64)
    filled = torch.cat([frames, *[frames[:, -1:]] * 3], dim=1)
    windows = [filled[:, :6]] if name == "vjepa2" else [filled[:, :4], filled[:, 4:]]
    tokens = [outputs_by_hand(name, backbone, clip).last_hidden_state for clip in windows]
    tubes = torch.cat([part.reshape(2, window // 2, 4, 4, 16) for part in tokens], dim=1)
    expected = torch.stack([tubes[:, frame // 2] for frame in range(5)], dim=1)
    features = backbone(frames)
    assert features.shape == (2, 5, 4, 4, 16)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


# family -> (channels, stride) of hidden_states[0], of hidden_states[1] and of hidden_states[L].
LAYERS = {
    "dinov3_convnext": ((3, 1), (4, 4), (16, 32)),
    "resnet": ((6, 4), (4, 4), (16, 32)),
    "convnext": ((4, 4), (4, 4), (16, 32)),
    "convnextv2": ((4, 4), (4, 4), (16, 32)),
    "sam2_vision_model": ((8, 4), (8, 4), (64, 32)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_layers(saved: Callable[[str], Path], name: str) -> None:
    height, width = whole(name)
    frames = pixels(1, 4, height, width)
    patch = 14 if name.startswith("dinov2") else 16
    depth = 5 if name == "sam2_vision_model" else 4 if name in LAYERS else 2
    for layer, (channels, stride) in zip((0, 1, depth), LAYERS.get(name, [(16, patch)] * 3), strict=True):
        backbone = FrozenBackbone.from_pretrained(saved(name), layer=layer)
        hidden = outputs_by_hand(name, backbone, frames if name in VIDEO else frames[0]).hidden_states[layer]
        grid = (height // stride, width // stride)
        if hidden.ndim == 4:
            expected = hidden if name.startswith("sam") else hidden.permute(0, 2, 3, 1)
        else:
            expected = hidden[:, PREFIX.get(name, 0) :].reshape(-1, *grid, channels)
        if name in VIDEO:
            expected = expected.repeat_interleave(2, dim=0)
        features = backbone(frames)
        assert features.shape == (1, 4, *grid, channels) and backbone.patch_grid(height, width) == grid
        torch.testing.assert_close(features[0], expected, rtol=1e-5, atol=1e-5)
    for layer in (-2, depth + 1):
        with pytest.raises(ValueError, match=rf"layer: expected -1 \(last\) or 0 to {depth}, got"):
            FrozenBackbone.from_pretrained(saved(name), layer=layer)


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cell_lies_where_its_pixels_are(saved: Callable[[str], Path], name: str, layer: int) -> None:
    backbone = FrozenBackbone.from_pretrained(saved(name), layer=layer)
    height, width = (250, 374) if name in CONVOLVED else (90, 134)  # no multiple of any patch
    rows, columns = backbone.patch_grid(height, width)
    assert rows > 2 and columns > 2
    frames = pixels(1, 2, height, width)
    before = backbone(frames)
    for row, column in ((0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)):
        changed = frames.clone()
        top, left = row * height // rows, column * width // columns
        cell = changed[..., top : top + height // rows + 1, left : left + width // columns + 1]
        cell.copy_(1 - cell.round())
        moved = (backbone(changed) - before).norm(dim=-1)[0]
        for frame in moved:
            most = divmod(int(frame.argmax()), columns)
            # Convolutions see more than their cell: with random weights a neighbour may move more.
            reach = 1 if name in CONVOLVED else 0
            assert abs(most[0] - row) <= reach and abs(most[1] - column) <= reach


@pytest.mark.parametrize("name", ["dinov2", "dinov3_vit", "clip_vision_model", "siglip2_vision_model", "vjepa2"])
def test_only_its_pixels_move_an_embedding(saved: Callable[[str], Path], name: str) -> None:
    backbone = FrozenBackbone.from_pretrained(saved(name), layer=0)
    height, width = whole(name)
    frames = pixels(2, 5, height, width)
    changed = frames.clone()
    changed[1, 3, :, 30:31, 50:51] += 0.5  # patch row 1 or 2, patch column 3
    moved = (backbone(changed) - backbone(frames)).abs().amax(-1) > 0
    expected = torch.zeros_like(moved)
    expected[1, slice(2, 4) if name == "vjepa2" else 3, 30 // backbone.patch_size, 50 // backbone.patch_size] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("name", TOWERS)
def test_a_whole_checkpoint_gives_its_vision_model(saved: Callable[[str], Path], name: str) -> None:
    frames = pixels(1, 1, 64, 64)
    features = FrozenBackbone.from_pretrained(saved(name))(frames)
    checkpoint = tiny(name)
    if name == "sam":
        vision: T.PreTrainedModel = T.SamVisionModel(checkpoint.config.vision_config)
        vision.vision_encoder = checkpoint.vision_encoder
    else:
        vision = checkpoint.vision_encoder if name.startswith("sam") else checkpoint.vision_model
    torch.testing.assert_close(features, FrozenBackbone(vision)(frames), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet", T.ResNetForImageClassification), ("videomae", T.VideoMAEForPreTraining)],
)
def test_heads_are_left_out(name: str, head: Any, tmp_path: Path) -> None:
    checkpoint = head(CONFIGS[name]()).eval()
    checkpoint.save_pretrained(tmp_path)
    frames = pixels(1, 2, 64, 64)
    assert torch.equal(FrozenBackbone.from_pretrained(tmp_path)(frames), FrozenBackbone(checkpoint.base_model)(frames))


@pytest.mark.parametrize("name", ["clip", "sam2"])
def test_of_a_whole_checkpoint_only_vision_weights_must_be_there(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    vision = "vision_model." if name == "clip" else "vision_encoder."
    state = {key: value for key, value in state.items() if key.startswith(vision)}
    save_file(state, weights, metadata={"format": "pt"})
    FrozenBackbone.from_pretrained(tmp_path)
    lost = min(state)
    del state[lost]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 weights are missing, first '{lost.removeprefix(vision)}'"):
        FrozenBackbone.from_pretrained(tmp_path)


def ramp(name: str) -> T.PreTrainedModel:
    """A model whose embeddings are its position table alone: row in channel 0, column in channel 1."""
    model = tiny(name)
    table = torch.zeros(4, 4, 16)
    table[..., 0], table[..., 1] = torch.arange(4.0)[:, None], torch.arange(4.0)
    embeddings = model.embeddings
    with torch.no_grad():
        if name.startswith("dinov2"):
            projection, positions = embeddings.patch_embeddings.projection, embeddings.position_embeddings[0, 1:]
        else:
            projection, positions = embeddings.patch_embedding, embeddings.position_embedding.weight[-16:]
        for parameter in projection.parameters():
            parameter.zero_()
        positions.copy_(table.view(16, 16))
    return model


@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers", "siglip_vision_model", "siglip2_vision_model"])
def test_position_embeddings_follow_a_grid_that_is_not_square(name: str) -> None:
    backbone = FrozenBackbone(ramp(name), layer=0)
    features = backbone(pixels(1, 1, 8 * backbone.patch_size, 4 * backbone.patch_size))[0, 0]  # twice the rows
    torch.testing.assert_close(features[3, :, 1], torch.arange(4.0), rtol=0, atol=1e-4)
    rows = features[:, 2, 0]
    assert (rows.diff() > 0).all()
    torch.testing.assert_close(rows + rows.flip(0), torch.full((8,), 3.0), rtol=0, atol=1e-4)  # centred, not shifted


def test_sam2_takes_whole_windows_of_its_position_embeddings() -> None:
    """Patches of 4 pixels, windows of 6 patches and three halvings: multiples of lcm(24, 32) = 96 pixels."""
    config = CONFIGS["sam2_vision_model"]()
    config.backbone_config.window_size_per_stage = [6, 4, 4, 2]
    backbone = FrozenBackbone(T.AutoModel.from_config(config), image_size=96)
    assert backbone(pixels(1, 1, 45, 70)).shape == (1, 1, 6, 12, 12)


@pytest.mark.parametrize("name", SQUARE)
def test_a_fixed_square_is_stretched_to_and_said(
    saved: Callable[[str], Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = FrozenBackbone.from_pretrained(saved(name), image_size=64)
    said = [record.message for record in caplog.records if "stretched" in record.message]
    assert said == [f"frames are stretched to the 64 x 64 pixels of {name}"]
    assert backbone.patch_grid(240, 416) == (4, 4) and backbone.patch_grid(8, 10) == (4, 4)
    with pytest.raises(ValueError, match=f"image_size: {name} takes 64 x 64 pixels only, got 32; leave image_size out"):
        FrozenBackbone.from_pretrained(saved(name), image_size=32)


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_convolutions_answer_where_the_picture_changes(name: str) -> None:
    """A blob walks along the diagonal; the centroid of what changes in the features must walk with it."""
    torch.manual_seed(0)
    model = tiny(name)
    for parameter in model.parameters():
        parameter.data.abs_()  # nothing cancels, so that the answer is a blob too
    backbone = FrozenBackbone(model, mean=(0.0,) * 3, std=(1.0,) * 3)
    axis = torch.arange(256.0)
    places = torch.arange(96.0, 161.0, 4.0)
    bell = torch.exp(-((axis - places[:, None]) ** 2) / (2 * 12.0**2))
    frames = (bell[:, :, None] * bell[:, None])[:, None, None].expand(-1, 1, 3, -1, -1)
    answer = (backbone(frames) - backbone(torch.zeros_like(frames[:1]))).norm(dim=-1)[:, 0].double()
    centres = (torch.arange(8.0).double() + 0.5) * 32 - 0.5
    share = answer / answer.sum((1, 2), keepdim=True)
    rows, columns = (share.sum(2) * centres).sum(1), (share.sum(1) * centres).sum(1)
    for centroid in (rows, columns):
        assert (centroid - places).mean().abs() < 4  # pixels, of a stride of 32; unmoved, ResNet is 15 off
