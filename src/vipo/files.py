"""Writing files so that nobody reads half of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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
