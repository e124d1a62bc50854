"""Files: written so that nobody reads half of one, and read only where and as what they may be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def require_safetensors(what: str, folder: Path) -> None:
    """Raise ValueError for a folder whose weights are only in a format that can run code when it is loaded.

    The flag that the message names makes them be read with weights_only, which builds tensors alone.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    unsafe = [path.name for path in files if path.suffix in _UNSAFE]
    if unsafe and not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(
            f"{what}: {folder} has weights as {unsafe[0]} only, which could run code when loaded; convert what you "
            "trust with `python tools/to_safetensors.py IN OUT` of the source tree (docs/models.md); vipo train, check "
            "and eval read tensors of a .bin of a pipeline or backbone with --allow-pickle"
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


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that what was renamed in it stays renamed after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line which file of a run could not be written, why (disk full, read-only), and how to go on.

    Raises:
        OSError: anything in the block that is one, or is safetensors' own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise OSError(
            f"cannot write {path}: {reason}; mend that, then go on from the last good checkpoint with --resume"
        ) from error
