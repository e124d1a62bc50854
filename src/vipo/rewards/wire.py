"""What travels between `RemoteReward` and `vipo serve-reward`: JSON, both ends in one place.

    request   POST /score   {"samples": [SAMPLE, ...]}
    SAMPLE    {"prompt": "a red cat", "frames": ["<base64 of a PNG>", ...]}            a picture is one frame
              {"prompt": "a red cat", "video": "<base64 of an MP4>", "fps": 16}        a clip; fps may be left out
    reply     {"scores": [0.25, null, ...]}   one per sample, in order, higher is better; null: no score for this one
    errors    HTTP 4xx or 5xx, {"detail": "one line"}

PNGs have 8 bits per channel, which is what a decoded sample is saved with: a score may differ from the local one by
what rounding to 1/255 makes of it. An MP4 is H.264 with halved colour planes, so it loses detail, and an odd height
or width is made even; it is much smaller.
"""

from __future__ import annotations

import base64
import io
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import av
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..media import read_frames, to_image, write_video

Format = Literal["mp4", "png"]
_PNG = b"\x89PNG\r\n\x1a\n"


class TooLargeError(ValueError):
    """A request is larger than the server takes."""


class Sample(BaseModel):
    """One picture or clip and its prompt."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str
    frames: Annotated[list[str], Field(min_length=1)] | None = None
    video: str | None = None
    fps: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Sample:
        if (self.frames is None) == (self.video is None):
            raise ValueError("expected either frames or video")
        return self


class Request(BaseModel):
    """What the client sends."""

    model_config = ConfigDict(extra="forbid", strict=True)
    samples: list[Sample]


class Reply(BaseModel):
    """What the server answers."""

    model_config = ConfigDict(strict=True)
    scores: list[float | None]


def encode_sample(frames: Tensor, prompt: str, format: Format, fps: float) -> dict[str, Any]:
    """Make the JSON of one sample: a picture (F = 1) as a PNG, a clip as an MP4 or as PNGs.

    Args:
        frames: (F, 3, Y, X) in [0, 1], rounded to 8 bits here.
        prompt: its prompt.
        format: of a clip.
        fps: of an MP4.
    """
    if format == "png" or len(frames) == 1:
        return {"prompt": prompt, "frames": [encode_png(frame) for frame in frames]}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, frames, fps)
        return {"prompt": prompt, "video": base64.b64encode(path.read_bytes()).decode(), "fps": fps}


def encode_png(picture: Tensor) -> str:
    """One picture (3, Y, X) in [0, 1] as the base64 text of a PNG."""
    stream = io.BytesIO()
    to_image(picture).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def decode_sample(sample: Sample, max_pixels: int) -> Tensor:
    """Read a sample's frames (F, 3, Y, X) in [0, 1], decoding nothing beyond `max_pixels` = F * Y * X.

    Raises:
        TooLargeError: there are more pixels.
        ValueError: not base64, not a PNG or MP4, damaged, or frames of several sizes.
    """
    if sample.video is not None:
        return _decode_mp4(_bytes("video", sample.video), max_pixels)
    pictures: list[Tensor] = []
    for i, text in enumerate(sample.frames or []):
        pictures.append(_decode_png(f"frames.{i}", _bytes(f"frames.{i}", text), max_pixels))
        max_pixels -= pictures[-1][0].numel()
        if pictures[-1].shape != pictures[0].shape:
            sizes = " and ".join(f"{p.shape[2]}x{p.shape[1]}" for p in (pictures[0], pictures[-1]))
            raise ValueError(f"frames.{i}: the frames of one sample have several sizes ({sizes}), expected one")
    return torch.stack(pictures)


def _bytes(key: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"{key}: not base64: {error}") from error


def _decode_png(key: str, content: bytes, max_pixels: int) -> Tensor:
    if not content.startswith(_PNG) or len(content) < 24:
        raise ValueError(f"{key}: not a PNG file")
    width, height = struct.unpack(">II", content[16:24])  # the first chunk, which the format wants to be IHDR
    if width * height > max_pixels:
        raise TooLargeError(f"{key}: {width}x{height} is more than the {max_pixels} pixels left of this request")
    return _decode(key, content, "png", 1)[0]


def _decode_mp4(content: bytes, max_pixels: int) -> Tensor:
    if content[4:8] != b"ftyp":  # FFmpeg would also open play lists, which name other files and addresses
        raise ValueError("video: not an MP4 file")
    try:
        with av.open(io.BytesIO(content), format="mp4") as container:
            stream = container.streams.video[0] if container.streams.video else None
            area = stream.width * stream.height if stream else 0
    except av.FFmpegError as error:
        raise ValueError(f"video: not readable: {error.strerror or error}") from error
    if not area:
        raise ValueError("video: holds no video stream")
    most = max_pixels // area
    frames = _decode("video", content, "mp4", most + 1) if most else torch.empty(1)
    if len(frames) > most:
        raise TooLargeError(f"video: more than the {max_pixels} pixels left of this request")
    return frames


def _decode(key: str, content: bytes, suffix: str, max_frames: int) -> Tensor:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"sample.{suffix}"
        path.write_bytes(content)
        try:
            return read_frames(path, max_frames)
        except ValueError as error:  # which begins with a path that means nothing to the one who asked
            raise ValueError(f"{key}: {str(error).removeprefix(f'{path}: ')}") from error
