"""vipo: fine-grained reinforcement-learning post-training of image and video generators (ViPO, arXiv 2511.18719)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .advantages import constant_groups, group_advantages, pixel_advantages
    from .config import Config
    from .losses import policy_loss, reference_kl
    from .policy import DiffusersPolicy
    from .psm import PerceptualStructuring
    from .trainer import Trainer

_HOME = {
    "constant_groups": "advantages",
    "group_advantages": "advantages",
    "pixel_advantages": "advantages",
    "Config": "config",
    "policy_loss": "losses",
    "reference_kl": "losses",
    "DiffusersPolicy": "policy",
    "PerceptualStructuring": "psm",
    "Trainer": "trainer",
}

__all__ = [
    "Config",
    "DiffusersPolicy",
    "PerceptualStructuring",
    "Trainer",
    "constant_groups",
    "group_advantages",
    "pixel_advantages",
    "policy_loss",
    "reference_kl",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `vipo --help` does not wait for torch."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
