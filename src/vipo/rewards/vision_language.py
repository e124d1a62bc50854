"""Rewards of a Qwen2-VL with a head on special tokens: HPSv3 for pictures, VideoAlign (VideoReward) for clips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLModel

from ..psm.backbones import first_line
from ..psm.families import FAMILIES
from ..types import check_choice, check_shape
from .last_scores import LastScores, SharedReward
from .pixels import resized, spread, statistics
from .weights import DTYPES, build, folder_of, load_tokenizer, read_json, read_weights, renamed, under

_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{pad}<|vision_end|>{words}<|im_end|>\n<|im_start|>assistant\n"
)
_LAYOUT = (  # of transformers before 4.52, and of PEFT around it
    (r"^(base_model\.model\.)?(model\.)?visual\.", "visual."),
    (r"^(base_model\.model\.)?(model\.)?language_model\.", "language_model."),
    (r"^(base_model\.model\.)?model\.", "language_model."),
    (r"^base_model\.model\.", ""),
)
DIMENSIONS = ("VQ", "MQ", "TA")
"""VideoAlign's: visual quality, motion quality, text alignment."""
_MEAN = {"VQ": 3.6757, "MQ": 1.1646, "TA": 2.8105}
_STD = {"VQ": 2.2476, "MQ": 1.3811, "TA": 2.5121}


class Sight(NamedTuple):
    """How frames become patches.

    Attributes:
        fewest: least pixels of a resized frame.
        most: most pixels of a resized frame.
        per_second: frames sampled per second of a clip, at least 4; None scores every frame as a picture of its own.
    """

    fewest: int
    most: int
    per_second: float | None = None


class QwenReward(nn.Module):
    """Scores that a Qwen2-VL gives at special tokens of its instruction, frozen.

        s_d = (head(h at the d-th special token) - mean_d) / std_d;   the reward is sum_d weight_d s_d

    The tokens of text and picture are numbered in a row, without Qwen2-VL's rows and columns: the published code of
    both models hands the decoder embeddings and no positions, which (transformers 4.45) means just that. The head and
    its input are float32.

    Args:
        model: a Qwen2VLModel, the vision tower and the decoder.
        head: hidden size -> at least 1; the first output counts (HPSv3's second is its log-spread).
        tokenizer: Qwen2's, with the special tokens.
        instruction: a text with "{text_prompt}" in it, and the special tokens.
        tokens: the special tokens, one per dimension.
        sight: how frames become patches.
        mean: per dimension.
        std: per dimension, > 0.
        weights: per dimension.
        fps: frames per second of the clips to come, where `sight` samples by time.
        chunk: samples per forward pass.
    """

    mean: Tensor
    std: Tensor
    weights: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        model: Any,
        head: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        instruction: str,
        tokens: Sequence[str],
        sight: Sight,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        weights: Sequence[float] = (1.0,),
        fps: float = 16.0,
        chunk: int = 4,
    ) -> None:
        super().__init__()
        if fps <= 0 or chunk < 1:
            raise ValueError(f"expected fps > 0 and chunk >= 1, got {fps} and {chunk}")
        self.model, self.head, self.tokenizer = model, head, tokenizer
        self.instruction, self.sight, self.fps, self.chunk = instruction, sight, fps, chunk
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
        self.token_ids = [int(cast(int, tokenizer.convert_tokens_to_ids(token))) for token in tokens]
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.register_buffer("weights", torch.tensor(weights))
        pixel_mean, pixel_std = statistics(*FAMILIES["clip_vision_model"].statistics)
        self.register_buffer("pixel_mean", pixel_mean)
        self.register_buffer("pixel_std", pixel_std)

    @torch.no_grad()
    def scores(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts in every dimension: (N, D) float32, normalised."""
        sizes = check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
        words = list(prompts)
        if self.sight.per_second is None:
            clips = frames.flatten(0, 1)[:, None]
            words = [prompt for prompt in words for _ in range(sizes["F"])]
        else:
            clips = frames[:, sampled_frames(sizes["F"], self.fps, self.sight.per_second)]
        starts = range(0, len(clips), self.chunk)
        raw = torch.cat([self._read(clips[i : i + self.chunk], words[i : i + self.chunk]) for i in starts])
        return ((raw - self.mean) / self.std).view(sizes["N"], -1, len(self.token_ids)).mean(1)

    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts: (N,) float32."""
        return self.scores(frames, prompts) @ self.weights

    def _read(self, clips: Tensor, prompts: list[str]) -> Tensor:
        """Clips (n, f, 3, Y, X) -> raw scores (n, D)."""
        vision = self.model.config.vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        size = patch_size_of(clips.shape[3], clips.shape[4], unit, self.sight.fewest, self.sight.most)
        pictures = resized(clips.flatten(0, 1).to(self.pixel_mean.device).float(), size)
        pictures = ((pictures - self.pixel_mean) / self.pixel_std).unflatten(0, clips.shape[:2])
        patches, grid = patchify(pictures, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        video = self.sight.per_second is not None
        kind = "video" if video else "image"
        pad = self.model.config.video_token_id if video else self.model.config.image_token_id
        ids, mask = self._tokens(prompts, pad, math.prod(grid) // vision.spatial_merge_size**2)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        grids = torch.tensor([grid] * len(clips), device=ids.device)
        states = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
            **{f"pixel_values{'_videos' if video else ''}": patches, f"{kind}_grid_thw": grids},
        ).last_hidden_state  # fmt: skip
        at = torch.stack([(ids == token).int().argmax(1) for token in self.token_ids], 1)
        found = states.gather(1, at[..., None].expand(-1, -1, states.shape[2]))
        scores: Tensor = self.head(found.float())[..., 0]
        return scores

    def _tokens(self, prompts: list[str], pad: int, cells: int) -> tuple[Tensor, Tensor]:
        """Put prompts into the instruction, with `cells` picture tokens: ids and mask (n, L), padded on the right."""
        rows = []
        for prompt in prompts:
            words = self.instruction.replace("{text_prompt}", prompt)
            text = _TEMPLATE.format(pad=self.tokenizer.convert_ids_to_tokens(pad), words=words)
            row = list(self.tokenizer(text).input_ids)
            if any(row.count(token) != 1 for token in (*self.token_ids, pad)):
                raise ValueError(f"reward: the prompt {prompt!r} contains one of the model's special tokens")
            where = row.index(pad)
            rows.append([*row[:where], *[pad] * cells, *row[where + 1 :]])
        longest = max(map(len, rows))
        filler = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return ids.to(self.mean.device), mask.to(self.mean.device)


def patch_size_of(height: int, width: int, unit: int, fewest: int, most: int) -> tuple[int, int]:
    """Round a picture's sides to multiples of `unit` so that it has `fewest` to `most` pixels, about its own aspect.

    As Qwen2-VL's own processor (qwen-vl-utils, smart_resize).
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"reward: pictures of {height} x {width} pixels are too elongated (more than 200:1)")
    rows, columns = max(round(height / unit), 1) * unit, max(round(width / unit), 1) * unit
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(math.floor(side / shrink / unit), 1) * unit for side in (height, width))
    elif rows * columns < fewest:
        grow = math.sqrt(fewest / (height * width))
        rows, columns = (math.ceil(side * grow / unit) * unit for side in (height, width))
    return rows, columns


def patchify(clips: Tensor, patch: int, merge: int, tube: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Cut clips (n, f, 3, Y, X) into Qwen2-VL's flat patches, a square of `merge` x `merge` neighbours at a time.

    Frames are filled up to whole tubes with the last one.

    Returns:
        (n * T * H * W, 3 * tube * patch * patch) and the grid (T, H, W) of one clip.
    """
    missing = -clips.shape[1] % tube
    clips = torch.cat([clips, clips[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
    count, frames, channels, height, width = clips.shape
    grid = (frames // tube, height // patch, width // patch)
    cut = clips.reshape(
        count, grid[0], tube, channels, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
    ).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return cut.reshape(count * math.prod(grid), channels * tube * patch * patch), grid


def sampled_frames(total: int, fps: float, per_second: float) -> list[int]:
    """Choose frames of a clip, `per_second`, evenly, an even number, 4 to 768, as VideoAlign does.

    Raises:
        ValueError: fewer than two frames.
    """
    if total < 2:
        raise ValueError(f"reward: VideoAlign scores clips of at least 2 frames, got {total}")
    wanted = min(max(total / fps * per_second, 4), min(768, total) // 2 * 2)
    return spread(min(round(wanted / 2) * 2, total), total)


def load_hpsv3(
    path: str,
    device: torch.device | str,
    *,
    base: str = "Qwen/Qwen2-VL-7B-Instruct",
    dtype: str = "bfloat16",
    chunk: int = 4,
) -> QwenReward:
    """Load HPSv3 (arXiv 2508.03789): Qwen2-VL-7B and an MLP at "<|Reward|>", pictures at about 256 x 28 x 28 pixels.

    Args:
        path: a folder, file or hub id with the published HPSv3.safetensors.
        device: of the weights.
        base: folder or hub id of the config (and the tokenizer, where `path` has none).
        dtype: of the weights, the head's float32 apart.
        chunk: pictures per forward pass.
    """
    weights = renamed(read_weights(path), *_LAYOUT)
    model = _load_model(weights, base, path, dtype)
    width = model.config.text_config.hidden_size
    layers = under(weights, "rm_head.")
    if sorted(name for name in layers if name.endswith(".weight")) != ["0.weight", "3.weight", "5.weight"]:
        raise ValueError(f"reward: expected the head rm_head.0, .3 and .5 of HPSv3 in {path}, got {sorted(layers)}")
    first, second, last = (len(layers[f"{index}.weight"]) for index in (0, 3, 5))
    head = nn.Sequential(  # the Identity is dropout's place
        nn.Linear(width, first), nn.ReLU(), nn.Identity(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, last)
    )
    _fill(head, layers, path)
    edge = (model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size) ** 2
    return QwenReward(
        model, head, load_tokenizer(path, base), instruction=_instruction("hpsv3"), tokens=["<|Reward|>"],
        sight=Sight(256 * edge, 256 * edge), chunk=chunk,
    ).to(device)  # fmt: skip


def load_videoalign(
    path: str,
    device: torch.device | str,
    *,
    dimensions: Sequence[str] = DIMENSIONS,
    fps: float = 16.0,
    base: str = "Qwen/Qwen2-VL-2B-Instruct",
    dtype: str = "bfloat16",
    chunk: int = 1,
    shared: dict[Any, Any] | None = None,
) -> QwenReward | SharedReward:
    """Load VideoAlign's reward model (arXiv 2501.13918): Qwen2-VL-2B with LoRA, and one linear head at three tokens.

    LoRA weights are merged: W + alpha / r * B A. mean and std come from model_config.json, the published ones if it
    has none.

    Args:
        path: a folder with the weights in safetensors, and model_config.json beside them or one level up.
        device: of the weights.
        dimensions: of VQ, MQ and TA those whose sum is the reward; `QwenReward.scores` gives all three.
        fps: frames per second of the clips that will be scored.
        base: folder or hub id of the config (and the tokenizer, where `path` has none).
        dtype: of the weights, the head's float32 apart.
        chunk: clips per forward pass.
        shared: models of rewards loaded before; of equal models one is loaded, and its last scores serve all.
    """
    for dimension in dimensions:
        check_choice("dimensions", dimension, DIMENSIONS)
    weights_of = [float(dimension in dimensions) for dimension in DIMENSIONS]
    if shared is not None:
        key = ("videoalign", str(Path(path)), str(device), fps, base, dtype, chunk)
        if key not in shared:
            shared[key] = LastScores(load_videoalign(path, device, fps=fps, base=base, dtype=dtype, chunk=chunk))
        return SharedReward(shared[key], weights_of).to(device)
    place = folder_of(path)
    found = sorted(place.rglob("model_config.json")) if place.is_dir() else []
    settings = read_json(found[0]) if found else {}
    lora = settings.get("peft_lora_config", {})
    scaling = float(lora.get("lora_alpha", 128)) / float(lora.get("lora_r", 64))
    weights = renamed(merged_lora(read_weights(place), scaling), *_LAYOUT)
    model = _load_model(weights, base, path, dtype)
    head = nn.Linear(model.config.text_config.hidden_size, 1, bias=False)
    _fill(head, under(weights, "rm_head."), path)
    norm = settings.get("inference_config") or {}
    return QwenReward(
        model, head, load_tokenizer(path, base), instruction=_instruction("videoalign"),
        tokens=[f"<|{dimension}_reward|>" for dimension in DIMENSIONS],
        sight=Sight(128 * 28 * 28, int(settings.get("data_config", {}).get("max_frame_pixels", 448 * 448)), 2.0),
        mean=[float(norm.get(f"{dimension}_mean", _MEAN[dimension])) for dimension in DIMENSIONS],
        std=[float(norm.get(f"{dimension}_std", _STD[dimension])) for dimension in DIMENSIONS],
        weights=weights_of, fps=fps, chunk=chunk,
    ).to(device)  # fmt: skip


def merged_lora(weights: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Merge PEFT's `base_layer`, `lora_A` and `lora_B` weights: W + scaling * B A, in float32, kept in W's dtype."""
    merged: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        stem, is_base, kind = name.partition(".base_layer.")
        down = weights.get(f"{stem}.lora_A.default.weight") if is_base and kind == "weight" else None
        if down is not None:
            change = weights[f"{stem}.lora_B.default.weight"].float() @ down.float()
            tensor = (tensor.float() + scaling * change).to(tensor.dtype)
        merged[f"{stem}.{kind}" if is_base else name] = tensor
    return merged


def _load_model(weights: dict[str, Tensor], base: str, path: str | Path, dtype: str) -> Any:
    """Build a Qwen2VLModel with the weights of a reward model; its vocabulary is as large as its embedding."""
    check_choice("dtype", dtype, DTYPES)
    try:
        config: Any = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"reward: no readable config in {base}: {first_line(error)}") from error
    if not isinstance(config, Qwen2VLConfig):
        raise ValueError(f"reward: expected the config of a qwen2_vl in {base}, got {config.model_type}")
    embedding = weights.get("language_model.embed_tokens.weight")
    if embedding is None:
        raise ValueError(f"reward: no language_model.embed_tokens.weight in {path}, got {sorted(weights)[:3]}")
    text: Any = config.text_config
    text.vocab_size = len(embedding)
    own = {name: tensor for name, tensor in weights.items() if name.startswith(("visual.", "language_model."))}
    return build(Qwen2VLModel, config, own, DTYPES[dtype], path)


def _fill(head: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Give a head its weights, in float32."""
    try:
        head.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ValueError(f"reward: rm_head of {path} does not fit: {' '.join(str(error).split())}") from None
    head.eval().requires_grad_(False)


def _instruction(name: str) -> str:
    return (Path(__file__).parent / "instructions" / f"{name}.txt").read_text(encoding="utf-8")
