"""The embedded default: miniature models that load through the same classes as their big counterparts."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def resolve(name: str, part: str) -> str:
    """Return the embedded folder of `part` (t2i, backbone, scorer) for the name "nano", else the name itself."""
    return str(assets_path(part)) if name == "nano" else name


def assets_path(part: str) -> Path:
    """Folder of an embedded model: t2i, backbone, scorer; for clips t2v, scorer_vq, scorer_mq."""
    return ASSETS / part
