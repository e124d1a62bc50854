"""A folder that knows what is in it: manifest.json lists every file with its size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from .files import sync_folder

MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """List everything in a folder in its manifest, the last file written, and flush files and folders to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    listed = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"files": listed}, indent=1) + "\n", encoding="utf-8")
    for path in (*files, folder / MANIFEST):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_folder(path)


def fault(folder: Path) -> str:
    """Say what is wrong with a sealed folder, or nothing if every byte is as it was written.

    Sizes are compared first, so that a truncated file is found before gigabytes are read.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {folder / name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"no {MANIFEST}: half-written, or of a version of vipo that wrote none"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    for path, (size, _) in expected.items():
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, expected {size:,}"
    for path, (_, sha256) in expected.items():
        try:
            found = _sha256(path)
        except OSError as error:
            return f"{path.relative_to(folder).as_posix()} cannot be read: {error.strerror}"
        if found != sha256:
            return f"{path.relative_to(folder).as_posix()} is damaged: its SHA-256 is not the one written"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
