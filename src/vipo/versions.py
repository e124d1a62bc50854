"""What a run was made with."""

from __future__ import annotations

import platform
from typing import Any

import diffusers
import torch
import transformers

from . import __version__


def versions() -> dict[str, Any]:
    """Versions of vipo and of what it stands on, and the number of CPU threads: what exact numbers depend on."""
    return {
        "vipo_version": __version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
    }
