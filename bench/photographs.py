"""Sample photographs that ship inside scikit-image, scikit-learn and Matplotlib, with subject masks drawn by hand.

The outlines are in tests/data/subject_masks.json; the pictures stay in their packages.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SUBJECT_MASKS = Path(__file__).parents[1] / "tests" / "data" / "subject_masks.json"


class Photograph(NamedTuple):
    """`picture` (3, Y, X) float32 in [0, 1], `mask` (Y, X) bool of its subject."""

    name: str
    picture: Tensor
    mask: Tensor


def load_photographs() -> list[Photograph]:
    """Read every photograph of the mask file; grey ones are repeated to three channels.

    Raises:
        ValueError: a photograph's size is not the one that its outline was drawn on.
    """
    photographs = []
    for entry in json.loads(SUBJECT_MASKS.read_text(encoding="utf-8"))["pictures"]:
        with (files(entry["package"]) / entry["file"]).open("rb") as stream:
            image = Image.open(stream).convert("RGB")
        if list(image.size) != entry["size"]:
            raise ValueError(f"{entry['name']}: outlined at {entry['size']}, the package has {image.size}; redraw it")
        mask = Image.new("1", image.size)
        draw = ImageDraw.Draw(mask)
        for polygons, inside in ((entry["polygons"], 1), (entry["holes"], 0)):
            for polygon in polygons:
                draw.polygon([tuple(vertex) for vertex in polygon], fill=inside)
        picture = torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255
        photographs.append(Photograph(entry["name"], picture, torch.from_numpy(np.array(mask))))
    return photographs
