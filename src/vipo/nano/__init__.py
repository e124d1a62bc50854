"""The embedded default: miniature models that load through the same classes as their big counterparts."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


_CLIPS = {"nano_video": "t2v", "nano_vq": "scorer_vq", "nano_mq": "scorer_mq"}


def resolve(name: str, part: str) -> str:
    """Return the embedded folder that a name means, or the name itself.

    "nano" means the folder of `part` (t2i, backbone, scorer); nano_video, nano_vq and nano_mq have one each.
    """
    part = _CLIPS.get(name, part)
    return str(assets_path(part)) if name == "nano" or name in _CLIPS else name


def assets_path(part: str) -> Path:
    """Folder of an embedded model: t2i, backbone, scorer; for clips t2v, scorer_vq, scorer_mq."""
    return ASSETS / part
