"""Embed pictures and animations of a run as data URIs that fit a byte budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageSequence, UnidentifiedImageError

EMBEDDED_AS_IS = {"PNG": "image/png", "WEBP": "image/webp", "JPEG": "image/jpeg"}
WEBP_QUALITIES = (90, 75, 60)
SMALLEST_SIDE = 64


@dataclass(frozen=True)
class Picture:
    """One embedded picture or animation.

    Attributes:
        uri: the data URI.
        width: pixels of the original.
        height: pixels of the original.
        recompressed: True when the embedded copy is smaller than the file in the run directory.
        still: of an animation, the data URI of what readers see who want no motion; None for a picture.
    """

    uri: str
    width: int
    height: int
    recompressed: bool
    still: str | None = None


def embed(path: Path, budget: int) -> Picture:
    """Embed a picture or an animation, as it is when it fits the budget, else as the best WebP that does.

    An animation keeps all its frames and their times; its still is the first frame.

    Args:
        path: an image file that Pillow can read.
        budget: largest size of the embedded file in bytes, before base64 adds a third; exceeded where a picture of
            SMALLEST_SIDE pixels at the lowest quality does not fit.

    Raises:
        ValueError: the file is no readable image; names it.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = image.format or ""
            mode = "RGBA" if image.has_transparency_data else "RGB"
            frames = [frame.convert(mode) for frame in ImageSequence.Iterator(image)]
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); delete it or write it again") from error
    width, height = frames[0].size
    still = _data_uri(_shrink(frames[:1], budget), "image/webp") if len(frames) > 1 else None
    if len(content) <= budget and kind in EMBEDDED_AS_IS:
        return Picture(_data_uri(content, EMBEDDED_AS_IS[kind]), width, height, False, still)
    return Picture(_data_uri(_shrink(frames, budget), "image/webp"), width, height, True, still)


def embed_clips(animation: Path, strip: Path, budget: int) -> Picture:
    """Embed an animation, in two thirds of the budget, and a film strip of it as its still, in the rest."""
    moving, still = embed(animation, 2 * budget // 3), embed(strip, budget // 3)
    return replace(moving, still=still.uri, recompressed=moving.recompressed or still.recompressed)


def _shrink(frames: Sequence[Image.Image], budget: int) -> bytes:
    """Encode as WebP, lowering first the quality and then the size of all frames, until the bytes fit the budget."""
    times = [round(frame.info.get("duration", 0)) for frame in frames]  # milliseconds
    while True:
        for quality in WEBP_QUALITIES:
            content = _webp(frames, times, quality)
            if len(content) <= budget:
                return content
        width, height = frames[0].size
        if max(width, height) <= SMALLEST_SIDE:
            return content
        smaller = max(1, width * 3 // 4), max(1, height * 3 // 4)
        frames = [frame.resize(smaller, Image.Resampling.LANCZOS) for frame in frames]


def _webp(frames: Sequence[Image.Image], times: Sequence[int], quality: int) -> bytes:
    """Encode one frame as a picture, several as an animation that repeats for ever."""
    stream = io.BytesIO()
    frames[0].save(
        stream,
        format="WEBP",
        quality=quality,
        method=4,
        save_all=len(frames) > 1,
        append_images=frames[1:],
        duration=list(times),
        loop=0,
    )
    return stream.getvalue()


def _data_uri(content: bytes, mime: str) -> str:
    """Return `data:<mime>;base64,<content>`."""
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"
