"""The embedded default: miniature models that load through the same classes as their big counterparts."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


_CLIPS = {"nano_video": "t2v", "nano_vq": "scorer_vq", "nano_mq": "scorer_mq"}


def resolve(name: str, part: str) -> str:
    """Return the embedded folder of `part` (t2i, backbone, scorer) for the name "nano", and those for clips by their own
    names (nano_video, nano_vq, nano_mq); any other name is returned as it is."""
    part = _CLIPS.get(name, part)
    return str(assets_path(part)) if name == "nano" or name in _CLIPS else name


def assets_path(part: str) -> Path:
    """Folder of an embedded model: t2i, backbone, scorer; for clips t2v, scorer_vq, scorer_mq."""
    return ASSETS / part
