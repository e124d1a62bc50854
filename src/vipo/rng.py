"""The global random number generators: Python's, NumPy's, torch's on the CPU and on the device.

Prompts, noise, trained steps and random maps do not come from these but from generators of their own, made from the
run's seed and the iteration (`vipo.prompts.prompt_batch`); these are for what a user's reward or map may draw.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed all of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state of all of them: Python's and NumPy's for JSON, torch's as uint8 tensors."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    tensors = {"rng.torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["rng.device"] = torch.cuda.get_rng_state(device)
    return {"python": random.getstate(), "numpy": numpy}, tensors


def set_rng_state(state: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    """Set the state of all of them; the device's own only where the state is of such a device."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(tensors["rng.torch"])
    if device.type == "cuda" and "rng.device" in tensors:
        torch.cuda.set_rng_state(tensors["rng.device"], device)
