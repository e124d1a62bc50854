"""Writing files so that nobody reads half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


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
