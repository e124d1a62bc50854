"""Files: written so that nobody reads half of one, and read only where and as what they may be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def require_safetensors(what: str, folder: Path) -> None:
    """Raise ValueError for a folder whose weights are only in a format that can run code when it is loaded."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    unsafe = [path.name for path in files if path.suffix in _UNSAFE]
    if unsafe and not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(
            f"{what}: {folder} has weights as {unsafe[0]} only, which could run code when loaded; convert what you "
            "trust with `python tools/to_safetensors.py IN OUT` of the source tree (docs/models.md)"
        )


def path_below(folder: Path, name: str) -> Path:
    """Return the path of a file that a data file in `folder` names, which may come from somebody else.

    What counts is where it ends: "..", absolute names and links are fine as long as they stay below the folder.

    Raises:
        ValueError: it is outside, or no name of a file.
    """
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        raise ValueError(f"{name!r} is no name of a file: {error}") from None
    if not inside:
        raise ValueError(f"{name!r} leads out of {folder}; put the file into the folder of the file that names it")
    return path


def write_atomically(path: Path, content: str | Callable[[Path], None]) -> None:
    """Write a .partial file, flush it to the disk, and rename it: a reader sees the old file or the new one.

    Missing folders are made; nothing is left of a failed attempt.

    Args:
        path: of the file.
        content: its text, written as UTF-8, or a function that writes the file whose path it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_text(content, encoding="utf-8", newline="\n")
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
