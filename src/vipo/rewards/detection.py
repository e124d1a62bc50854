"""GenEval-style checks: are the named objects there, as many as named, in the named colour and place?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, PreTrainedModel, PreTrainedTokenizerBase

from ..files import require_safetensors
from ..psm.backbones import first_line, pixel_statistics
from ..psm.families import FAMILIES
from ..types import check_choice, check_shape
from .pixels import resized, statistics
from .preference import ClipPreference
from .weights import DTYPES, check_complete, load_tokenizer

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
PLACES = ("left of", "right of", "above", "below")
_QUERY_TOKENS = 16
_MOST = 16  # boxes per class, as GenEval
_MARGIN = 0.1  # of both objects' sizes, by which their centres must lie apart, as GenEval


class Wanted(NamedTuple):
    """One entry of GenEval's include or exclude list.

    Attributes:
        name: of the object's class.
        number: how many, >= 1.
        colour: one of COLOURS, or None.
        place: (relation, index of the included entry that it relates to), or None.
    """

    name: str
    number: int
    colour: str | None = None
    place: tuple[str, int] | None = None


class Scene(NamedTuple):
    """What a prompt asks for: at least the included objects, fewer than the excluded counts."""

    include: list[Wanted]
    exclude: list[Wanted]


def read_scenes(path: str | Path) -> dict[str, Scene]:
    """Read GenEval's evaluation_metadata.jsonl (github.com/djghosh13/geneval): prompt -> what it asks for.

    A line is {"prompt", "include": [{"class", "count", "color"?, "position"?: [relation, index]}], "exclude"?: [...]}.

    Raises:
        ValueError: unreadable, or a line that is not so.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"geneval: cannot read {path}: {first_line(error)}") from error
    scenes: dict[str, Scene] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            include = [_wanted(item, index) for index, item in enumerate(entry["include"])]
            exclude = [_wanted(item, 0) for item in entry.get("exclude", [])]
            prompt = str(entry["prompt"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"geneval: {path}, line {number}: {type(error).__name__}: {first_line(error)}") from error
        if scenes.setdefault(prompt, Scene(include, exclude)) != Scene(include, exclude):
            raise ValueError(f"geneval: {path}, line {number}: {prompt!r} was asked for differently before")
    if not scenes:
        raise ValueError(f"geneval: {path} has no prompt")
    return scenes


def _wanted(item: Mapping[str, Any], index: int) -> Wanted:
    colour, place = item.get("color"), item.get("position")
    if colour is not None:
        check_choice("color", colour, COLOURS)
    if place is not None:
        check_choice("position", place[0], PLACES)
        if not 0 <= int(place[1]) < index:
            raise ValueError(f"position: expected the index of an entry before this one, got {place[1]}")
    if int(item["count"]) < 1:
        raise ValueError(f"count: expected at least 1, got {item['count']}")
    return Wanted(str(item["class"]), int(item["count"]), colour, (place[0], int(place[1])) if place else None)


class GenEval(nn.Module):
    """Share of what a prompt asks for that an open-vocabulary detector (OWL-ViT, OWLv2) finds, frozen, in [0, 1].

        s = mean over the requirements of 1[met];  strict: s = 1[all met]

    Every included entry is a requirement (so many found), its colour and its place are one each, every excluded entry
    is one (fewer found). GenEval (arXiv 2310.11513) itself is strict, with Mask2Former's masks; here a box belongs to
    the class whose words fit it best, among all of the file, and colours are told by CLIP from the box.

    Args:
        detector: an OWL-ViT or OWLv2.
        tokenizer: its tokenizer.
        scenes: prompt -> what it asks for.
        clip: tells colours; None if no scene names one.
        mean: pixel means, 3.
        std: pixel standard deviations, 3.
        strict: all or nothing.
        threshold: least confidence of a box.
        overlap: IoU from which two boxes of one class are one.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        detector: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scenes: Mapping[str, Scene],
        clip: ClipPreference | None,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        strict: bool = False,
        threshold: float = 0.3,
        overlap: float = 0.5,
    ) -> None:
        super().__init__()
        self.detector, self.tokenizer, self.clip = detector.eval().requires_grad_(False), tokenizer, clip
        self.scenes, self.strict, self.threshold, self.overlap = dict(scenes), strict, threshold, overlap
        wanted = [item for scene in scenes.values() for item in (*scene.include, *scene.exclude)]
        self.names = sorted({item.name for item in wanted})
        if clip is None and any(item.colour for item in wanted):
            raise ValueError("geneval: the scenes name colours; a CLIP model is needed to tell them")
        channel_mean, channel_std = statistics(mean, std)
        self.register_buffer("mean", channel_mean)
        self.register_buffer("std", channel_std)

    @torch.no_grad()
    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score frames (N, F, 3, Y, X) in [0, 1] for N prompts of the file: (N,) float32, the mean over frames."""
        sizes = check_shape("frames", frames, "N F 3 Y X", {"N": len(prompts)})
        for prompt in prompts:
            if prompt not in self.scenes:
                raise ValueError(f"geneval: the metadata file has no prompt {prompt!r}")
        pictures = frames.flatten(0, 1).to(self.mean.device).float()
        scores = [self._check(self.scenes[prompts[i // sizes["F"]]], p) for i, p in enumerate(pictures)]
        return torch.tensor(scores, device=self.mean.device).view(sizes["N"], sizes["F"]).mean(1)

    def _check(self, scene: Scene, picture: Tensor) -> float:
        """Check one picture (3, Y, X): the share of requirements met, or 1 and 0."""
        found = self.detect(picture)
        met: list[bool] = []
        chosen: list[Tensor | None] = []  # per included entry its boxes, None where they are too few or the wrong ones
        for wanted in scene.include:
            boxes = found[wanted.name][: wanted.number]
            enough = len(boxes) >= wanted.number
            right = [enough]
            if wanted.colour is not None:
                right.append(enough and all(c == wanted.colour for c in self.colours(picture, boxes, wanted.name)))
            if wanted.place is not None:
                others = chosen[wanted.place[1]]
                right.append(enough and others is not None and _all_lie(boxes, wanted.place[0], others))
            met += right
            chosen.append(boxes if all(right) else None)
        met += [len(found[item.name]) < item.number for item in scene.exclude]
        return float(all(met)) if self.strict else sum(met) / max(len(met), 1)

    def detect(self, picture: Tensor) -> dict[str, Tensor]:
        """Find objects in a picture (3, Y, X): class -> boxes (n, 4) x0 y0 x1 y1 in pixels, the surest first."""
        height, width = picture.shape[1:]
        side = self.detector.config.vision_config.image_size
        longer = max(height, width)
        padded = self.detector.config.model_type == "owlv2"  # OWL-ViT stretches instead
        square = functional.pad(picture, (0, longer - width, 0, longer - height)) if padded else picture
        pixels = (resized(square[None], (side, side), "bilinear") - self.mean) / self.std
        words = [f"a photo of a {name}" for name in self.names]
        length = min(_QUERY_TOKENS, self.detector.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(words, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        output = self.detector(
            input_ids=tokens.input_ids.to(pixels.device),
            attention_mask=tokens.attention_mask.to(pixels.device),
            pixel_values=pixels.to(self.detector.dtype),
        )
        surest, labels = output.logits[0].float().sigmoid().max(-1)
        centre, size = output.pred_boxes[0].float().split(2, -1)
        extent = pixels.new_tensor([longer, longer] if padded else [width, height])
        corners = torch.cat([(centre - size / 2) * extent, (centre + size / 2) * extent], 1)
        bounds = corners.new_tensor([width, height, width, height])
        corners = torch.minimum(corners.clamp_min(0), bounds)
        return {
            name: _distinct(corners[kept], surest[kept], self.overlap)
            for index, name in enumerate(self.names)
            for kept in [(labels == index) & (surest > self.threshold)]
        }

    def colours(self, picture: Tensor, boxes: Tensor, name: str) -> list[str]:
        """Tell the colour of each box (n, 4) of a picture (3, Y, X) by CLIP, zero-shot, with GenEval's words."""
        assert self.clip is not None
        forms = (f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}", "a photo of a {} object")
        words = self.clip.embed_prompts([form.format(colour) for colour in COLOURS for form in forms])
        classes = functional.normalize(words.unflatten(0, (len(COLOURS), len(forms))).mean(1), dim=-1)
        told = []
        for x0, y0, x1, y1 in boxes.round().int().tolist():
            left, top = min(x0, picture.shape[2] - 1), min(y0, picture.shape[1] - 1)
            crop = picture[None, :, top : max(y1, top + 1), left : max(x1, left + 1)]
            vector = self.clip.tokens_and_embeddings(crop)[1][0]
            told.append(COLOURS[int((classes @ vector).argmax())])
        return told


def _distinct(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Drop boxes (n, 4) that overlap a surer one by IoU >= overlap: (m, 4), the surest first, at most 16."""
    boxes = boxes[scores.argsort(descending=True)]
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(-1)
    iou = shared / (area[:, None] + area[None] - shared).clamp_min(1e-9)
    kept: list[int] = []
    for index in range(len(boxes)):
        if len(kept) < _MOST and not bool((iou[index, kept] >= overlap).any()):
            kept.append(index)
    return boxes[kept]


def _all_lie(boxes: Tensor, relation: str, others: Tensor) -> bool:
    """Tell whether every box lies in the relation to every other one, by GenEval's rule."""
    return all(relation in relations(box, other) for box in boxes for other in others)


def relations(box: Tensor, other: Tensor) -> set[str]:
    """Return where a box (4,) lies relative to another, by their centres, less a tenth of both sizes (GenEval).

    offset = max(|c - c'| - 0.1 (size + size'), 0) sign(c - c') / |c - c'|;  beyond 0.5 on an axis it counts.
    """
    apart = (box[:2] + box[2:] - other[:2] - other[2:]) / 2
    slack = _MARGIN * (box[2:] - box[:2] + other[2:] - other[:2])
    rest = (apart.abs() - slack).clamp_min(0) * apart.sign()
    x, y = (rest / apart.norm().clamp_min(1e-6)).tolist()
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in held.items() if holds}


def load_geneval(
    path: str | None,
    device: torch.device | str,
    *,
    detector: str = "google/owlv2-base-patch16-ensemble",
    clip: str = "openai/clip-vit-large-patch14",
    strict: bool = False,
    threshold: float = 0.3,
    overlap: float = 0.5,
    dtype: str = "float32",
) -> GenEval:
    """Load GenEval-style checks.

    Args:
        path: GenEval's metadata, a .jsonl file, see `read_scenes`.
        device: of both models.
        detector: folder or hub id of an OWL-ViT or OWLv2.
        clip: folder or hub id of the CLIP model that tells colours; loaded only if the file names one.
        strict: see GenEval.
        threshold: see GenEval.
        overlap: see GenEval.
        dtype: of both models.
    """
    check_choice("dtype", dtype, DTYPES)
    if path is None:
        raise ValueError("geneval: expected a path, of GenEval's metadata file (.jsonl); see docs/rewards.md")
    scenes = read_scenes(path)
    coloured = any(item.colour for scene in scenes.values() for item in scene.include)
    try:
        config = AutoConfig.from_pretrained(detector, trust_remote_code=False)
        require_safetensors("geneval", Path(detector))
        check_choice(f"model type of the detector {detector!r}", config.model_type, ("owlv2", "owlvit"))
        model, loading = AutoModelForZeroShotObjectDetection.from_pretrained(
            detector,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"geneval: cannot load a detector from {detector}: {first_line(error)}") from error
    check_complete(loading, type(model).__name__, detector, exact=False)
    mean, std = pixel_statistics(detector, FAMILIES["clip_vision_model"].statistics)
    teller = ClipPreference.from_pretrained(clip, device=device, dtype=dtype) if coloured else None
    return GenEval(
        model, load_tokenizer(detector, clip), scenes, teller, mean=mean, std=std,
        strict=strict, threshold=threshold, overlap=overlap,
    ).to(device)  # fmt: skip
