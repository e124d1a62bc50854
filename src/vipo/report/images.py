"""Embed images of a run as data URIs that fit a byte budget."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

EMBEDDED_AS_IS = {"PNG": "image/png", "WEBP": "image/webp", "JPEG": "image/jpeg"}
WEBP_QUALITIES = (90, 75, 60)
SMALLEST_SIDE = 64


@dataclass(frozen=True)
class Picture:
    """One embedded image.

    Attributes:
        uri: the data URI.
        width: pixels of the original.
        height: pixels of the original.
        recompressed: True when the embedded copy is smaller than the file in the run directory.
    """

    uri: str
    width: int
    height: int
    recompressed: bool


def embed(path: Path, budget: int) -> Picture:
    """Embed an image, as it is when it fits the budget, else as the best WebP that does.

    Args:
        path: an image file that Pillow can read.
        budget: largest size of the embedded file in bytes, before base64 adds a third.

    Raises:
        ValueError: the file is no readable image; names it.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = image.format or ""
            pixels = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); delete it or write it again") from error
    width, height = pixels.size
    if len(content) <= budget and kind in EMBEDDED_AS_IS:
        return Picture(_data_uri(content, EMBEDDED_AS_IS[kind]), width, height, recompressed=False)
    return Picture(_data_uri(_shrink(pixels, budget), "image/webp"), width, height, recompressed=True)


def _shrink(pixels: Image.Image, budget: int) -> bytes:
    """Encode as WebP, lowering first the quality and then the size, until the bytes fit the budget."""
    while True:
        for quality in WEBP_QUALITIES:
            stream = io.BytesIO()
            pixels.save(stream, format="WEBP", quality=quality, method=4)
            if stream.tell() <= budget or max(pixels.size) <= SMALLEST_SIDE:
                return stream.getvalue()
        width, height = pixels.size
        pixels = pixels.resize((max(1, width * 3 // 4), max(1, height * 3 // 4)), Image.Resampling.LANCZOS)


def _data_uri(content: bytes, mime: str) -> str:
    """Return `data:<mime>;base64,<content>`."""
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"
