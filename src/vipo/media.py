"""Picture and video files <-> frames (F, 3, Y, X), float32 RGB in [0, 1].

Pictures go through Pillow, videos through PyAV (FFmpeg's libraries). A file is read whole or refused: a broken or cut
off one is a ValueError of one line that names it. Colour profiles are not applied; HDR transfer curves neither.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from .files import write_atomically
from .types import check_shape

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".gif", ".mp4", ".webm", ".mov", ".mkv", ".avi")
_PILLOW_SUFFIXES = (*IMAGE_SUFFIXES, ".gif")
_SEQUENCES = ("GIF", "WEBP", "PNG", "TIFF")  # not MPO: a phone's JPEG hides its depth map or its twin in there
_BT709 = 1  # FFmpeg's number for the matrix, the primaries and the transfer curve of HD video
_LIMITED = 1  # FFmpeg's number for luma in 16..235
LOSSLESS_SIDE = 256
"""Pixels of the longer side up to which an animation is written without loss."""
_CONTAINERS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"}
"""FFmpeg goes by a file's content: a play list called clip.mp4 would make it read the files that the list names."""
_DURATION = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
Result = TypeVar("Result")
# What Pillow's decoders raise on damaged files; SyntaxError is what its PNG and TIFF readers call a broken header.
_PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error)


def read_frames(path: Path, max_frames: int | None = None) -> Tensor:
    """Read a picture (one frame), or an animation or video in the order of presentation.

    EXIF orientation and a video's rotation are applied, transparency is laid on white, 16 bits of grey are kept.

    Args:
        path: a file with one of IMAGE_SUFFIXES or VIDEO_SUFFIXES, in any case.
        max_frames: stop after so many; None reads all.

    Returns:
        (F, 3, Y, X), float32 RGB in [0, 1].

    Raises:
        ValueError: no such file, an unknown suffix, an empty, damaged or truncated file, or frames of several sizes.
    """
    suffix = path.suffix.lower()
    if suffix not in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
        known = " ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
        raise ValueError(f"{path}: not a picture or video by its name, expected one of {known}")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames: expected at least 1, got {max_frames}")
    _check_file(path)
    pictures = (_read_pillow if suffix in _PILLOW_SUFFIXES else _read_video)(path, max_frames)
    if not pictures:
        raise ValueError(f"{path}: holds no frame")
    sizes = {picture.shape for picture in pictures}
    if len(sizes) > 1:
        named = ", ".join(f"{width}x{height}" for height, width, _ in sorted(sizes))
        raise ValueError(f"{path}: its frames have several sizes ({named}), expected one")
    height, width, _ = pictures[0].shape
    frames = torch.empty(len(pictures), 3, height, width)
    for i, picture in enumerate(pictures):
        values = torch.from_numpy(picture).movedim(-1, 0)
        frames[i] = values.float() / 255 if picture.dtype == np.uint8 else values
    return frames


def read_fps(path: Path) -> float | None:
    """Frames per second of an animation or video, as its file states them; None for a picture or where none is stated.

    Raises:
        ValueError: no such file, or it is damaged.
    """
    _check_file(path)
    if path.suffix.lower() in _PILLOW_SUFFIXES:
        duration = _with_pillow(path, _first_duration)
        return 1000 / float(duration) if duration else None
    try:
        with av.open(str(path), options=_CONTAINERS) as container:
            rate = container.streams.video[0].average_rate if container.streams.video else None
    except av.FFmpegError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    return float(rate) if rate else None


def to_image(picture: Tensor) -> Image.Image:
    """One picture (3, Y, X) in [0, 1] as a PIL image."""
    return Image.fromarray((picture.float().clamp(0, 1).cpu() * 255).round().to(torch.uint8).movedim(0, -1).numpy())


def write_image(path: Path, picture: Tensor | Image.Image) -> None:
    """Write one picture, (3, Y, X) in [0, 1] or a PIL image, so that a reader sees the old or the new file.

    The suffix, one of IMAGE_SUFFIXES, names the format. Missing folders are made.
    """
    if isinstance(picture, Tensor):
        check_shape("picture", picture, "3 Y X")
    image = to_image(picture) if isinstance(picture, Tensor) else picture
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: expected a name ending in one of {' '.join(IMAGE_SUFFIXES)}")
    write_atomically(
        path, lambda partial: image.save(partial, format=Image.registered_extensions()[path.suffix.lower()])
    )


def write_video(path: Path, frames: Tensor, fps: float) -> None:
    """Write an mp4 (H.264, yuv420p, BT.709) that browsers play; a reader sees the old or the new file.

    Odd sizes are made even by repeating the last row or column: the format halves its colour planes.

    Args:
        path: ending in .mp4; missing folders are made.
        frames: (F, 3, Y, X), in [0, 1], F >= 1.
        fps: frames per second, > 0.

    Raises:
        ValueError: wrong shape, no frame, another suffix, or an fps that is not positive.
    """
    sizes = check_shape("frames", frames, "F 3 Y X")
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path}: expected a name ending in .mp4")
    if not 0.01 <= fps < math.inf or frames.numel() == 0:
        raise ValueError(f"expected fps >= 0.01 and at least one frame, got fps {fps} and shape {tuple(frames.shape)}")
    padding = (0, sizes["X"] % 2, 0, sizes["Y"] % 2)
    padded = F.pad(frames.float().cpu(), padding, mode="replicate") if any(padding) else frames
    write_atomically(path, lambda partial: _encode(partial, padded, Fraction(fps).limit_denominator(1001)))


def write_animation(path: Path, frames: Tensor, fps: float) -> None:
    """Write a WebP that browsers play over and over in an <img>; a reader sees the old or the new file.

    Without loss up to LOSSLESS_SIDE pixels a side, at quality 90 above. The format keeps no two equal frames in a row:
    the first is shown for longer, and the file then has fewer frames; where all are equal it is a picture.

    Args:
        path: ending in .webp; missing folders are made.
        frames: (F, 3, Y, X), in [0, 1], F >= 1.
        fps: frames per second, in (0, 1000]; the format rounds the time of a frame to milliseconds.

    Raises:
        ValueError: wrong shape, no frame, another suffix, or an fps out of range.
    """
    check_shape("frames", frames, "F 3 Y X")
    if path.suffix.lower() != ".webp":
        raise ValueError(f"{path}: expected a name ending in .webp")
    if not 0 < fps <= 1000 or frames.numel() == 0:
        raise ValueError(
            f"expected fps in (0, 1000] and at least one frame, got fps {fps} and shape {tuple(frames.shape)}"
        )
    first, *others = [to_image(frame) for frame in frames]

    def save(partial: Path) -> None:
        first.save(
            partial,
            format="WEBP",
            save_all=True,
            append_images=others,
            duration=round(1000 / fps),
            loop=0,
            lossless=max(first.size) <= LOSSLESS_SIDE,
            quality=90,
        )

    write_atomically(path, save)


def find_media(inputs: Sequence[Path]) -> list[Path]:
    """List the pictures and videos that inputs name: files as given, folders walked.

    A folder gives the files with a known suffix in it and below, sorted by path; hidden files and folders (.name) are
    skipped. A file that comes up twice is listed once.

    Raises:
        ValueError: an input does not exist, or nothing was found.
    """
    found: dict[Path, None] = {}
    for entry in inputs:
        if not entry.exists():
            raise ValueError(f"no such file or folder: {entry}")
        below = sorted(entry.rglob("*")) if entry.is_dir() else []
        known = [path for path in below if path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)]
        seen = [path for path in known if not any(part.startswith(".") for part in path.relative_to(entry).parts)]
        found.update(dict.fromkeys([path for path in seen if path.is_file()] if entry.is_dir() else [entry]))
    if not found:
        known_suffixes = " ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
        named = ", ".join(map(str, inputs)) or "no input"
        raise ValueError(f"{named}: no picture or video there; expected files ending in {known_suffixes}")
    return list(found)


def name_media(
    inputs: Sequence[Path], *, skipped: Sequence[Path] = (), reserved: Sequence[str] = ()
) -> dict[str, tuple[Path, Path]]:
    """Find the pictures and videos that inputs name, each once, and give each a name for what is made of it.

    Args:
        inputs: see `find_media`.
        skipped: folders or files that are no inputs although they lie below one.
        reserved: names not to be given, at any depth.

    Returns:
        Name -> (file, its path without suffix relative to the input that named it); names are unique, also where
        upper and lower case are the same.

    Raises:
        ValueError: an input does not exist or holds nothing, or everything is skipped.
    """
    found: dict[str, tuple[Path, Path]] = {}
    seen: set[Path] = set()
    taken: set[str] = set()
    kept_free = {name.casefold() for name in reserved}
    for entry in inputs:
        base = entry if entry.is_dir() else entry.parent
        for path in find_media([entry]):
            place = path.resolve()
            below = any(
                place.is_relative_to(folder.resolve()) and not base.resolve().is_relative_to(folder.resolve())
                for folder in skipped
            )
            if place in seen or below:
                continue
            seen.add(place)
            relative = path.relative_to(base).with_suffix("")
            name, number = relative.as_posix(), 1
            while name.casefold() in taken or name.rpartition("/")[2].casefold() in kept_free:
                number += 1
                name = f"{relative.as_posix()}-{number}"
            taken.add(name.casefold())
            found[name] = (path, relative)
    if not found:
        raise ValueError(f"{', '.join(map(str, inputs))}: nothing there beside {', '.join(map(str, skipped))}")
    return found


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")


def _unreadable(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: not readable: {' '.join(reason.split())}; is the file complete?")


def _with_pillow(path: Path, read: Callable[[Image.Image], Result]) -> Result:
    """Open a picture and read something from it; whatever Pillow raises becomes one line."""
    try:
        with Image.open(path) as image:
            return read(image)
    except UnidentifiedImageError as error:
        raise _unreadable(path, "no picture format that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: refused: {error}") from error
    except _PILLOW_ERRORS as error:
        raise _unreadable(path, str(error) or type(error).__name__) from error


def _first_duration(image: Image.Image) -> Any:
    image.load()  # only then WebP states it
    return image.info.get("duration")


def _read_pillow(path: Path, max_frames: int | None) -> list[NDArray[Any]]:
    def read(image: Image.Image) -> list[NDArray[Any]]:
        limit = max_frames if image.format in _SEQUENCES else 1
        return [_rgb(frame) for frame in islice(ImageSequence.Iterator(image), limit)]

    return _with_pillow(path, read)


def _rgb(image: Image.Image) -> NDArray[Any]:
    """One decoded picture of any mode as (Y, X, 3), uint8, or float32 in [0, 1] where it has more than 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        grey = np.asarray(image).astype(np.float32) / np.float32(1 if image.mode == "F" else 65535)
        if not 0 <= grey.min() <= grey.max() <= 1:  # also NaN
            expected = "0 to 1" if image.mode == "F" else "0 to 65535"
            raise ValueError(f"pixels of mode {image.mode} outside {expected}")
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _read_video(path: Path, max_frames: int | None) -> list[NDArray[Any]]:
    pictures: list[NDArray[Any]] = []
    try:
        with av.open(str(path), options=_CONTAINERS) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            end = 0.0
            for packet in container.demux(stream):
                for frame in packet.decode():
                    if packet.is_corrupt or frame.is_corrupt:
                        raise ValueError(f"{path}: damaged or truncated at frame {len(pictures)}")
                    turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    pictures.append(np.ascontiguousarray(turned))
                    end = max(end, float(((frame.pts or 0) + frame.duration) * (frame.time_base or 0)))
                    if len(pictures) == max_frames:
                        return pictures
            _check_complete(path, stream, len(pictures), end)
    except av.FFmpegError as error:
        reason = error.strerror or str(error)
        raise _unreadable(path, f"{reason} after {len(pictures)} frames" if pictures else reason) from error
    return pictures


def _check_complete(path: Path, stream: av.VideoStream, frames: int, end: float) -> None:
    """Raise ValueError if a video ends before its file says so: FFmpeg itself takes the end of a file for the end.

    An index (mp4, mov, avi) must not point beyond the file, and the duration that Matroska and WebM state per stream
    must be reached, to within two frames, by the `end` of the last frame, in seconds.
    """
    pointed = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    present = path.stat().st_size
    if pointed > present:
        raise ValueError(
            f"{path}: truncated: its index points to byte {pointed}, it has {present}; {frames} frames read"
        )
    match = _DURATION.match(stream.metadata.get("DURATION", ""))
    hours, minutes, seconds = map(float, match.groups()) if match else (0.0, 0.0, 0.0)
    stated = 3600 * hours + 60 * minutes + seconds
    if stated > end + 2 * float(1 / stream.average_rate if stream.average_rate else 0.25):
        raise ValueError(f"{path}: truncated: states {stated:.2f} s, ends after {end:.2f} s and {frames} frames")


def _encode(path: Path, frames: Tensor, rate: Fraction) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "medium"})
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.asarray(to_image(frame)))
            picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
