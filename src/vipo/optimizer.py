"""AdamW over the trained weights, its two moments in float32, or in 8 bits by bitsandbytes.

In 8 bits (Dettmers et al., arXiv 2110.02861) a moment is a code of a table of 256 values, times the largest value of
its block of 256 elements. Everything that the next step needs is in the plain tensors of `optimizer.state`, so that a
checkpoint is as exact as with float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .config import OptimizerConfig

SMALLEST, BLOCK = 4096, 256
"""bitsandbytes keeps float32 moments of tensors with fewer elements; and the elements that share a largest value."""


def make_optimizer(
    parameters: list[nn.Parameter], settings: OptimizerConfig, *, sharded: bool = False
) -> torch.optim.Optimizer:
    """Build the optimizer of a config.

    Args:
        parameters: the trained weights, float32.
        settings: learning rate, weight decay, and the state's precision.
        sharded: whether they are shards of FSDP2.

    Raises:
        ValueError: 8 bits of shards, or without bitsandbytes.
    """
    if settings.state == "float32":
        return torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    if sharded:
        raise ValueError(
            "optimizer.state: 8bit was not tried on sharded weights, got parallel.shard=true; set "
            "optimizer.state=float32 (its moments are spread over the ranks) or parallel.shard=false"
        )
    try:
        package: Any = import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            f'optimizer.state=8bit: {error}; pip install "vipo[8bit]" or set optimizer.state=float32'
        ) from error
    made: torch.optim.Optimizer = package.optim.AdamW8bit(
        parameters, settings.learning_rate, weight_decay=settings.weight_decay
    )
    return made


def moment_bytes(parameters: Iterable[Tensor], state: str) -> int:
    """Bytes of AdamW's two moments: 8 per element, in 8 bits 2 and 8 per block; tables are not counted."""
    return sum(
        2 * (p.numel() + 4 * -(-p.numel() // BLOCK)) if state == "8bit" and p.numel() >= SMALLEST else 8 * p.numel()
        for p in parameters
    )


def saved_moments(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a checkpoint holds of one parameter's state besides its step count; no two tensors share memory."""
    shared = {key for key in entry if key.startswith("qmap")}  # one table for all parameters
    return {key: value.clone() if key in shared else value for key, value in entry.items() if key != "step"}


def restored_state(optimizer: torch.optim.Optimizer, steps: float, moments: Mapping[str, Tensor]) -> dict[str, Any]:
    """Make one parameter's state of what a checkpoint holds.

    Args:
        optimizer: that goes on with it.
        steps: taken so far.
        moments: as `saved_moments` gave them, on the parameter's device.

    Raises:
        ValueError: the moments are of the other kind.
    """
    theirs = "float32" if "exp_avg" in moments else "8bit"
    ours = "float32" if isinstance(optimizer, torch.optim.AdamW) else "8bit"
    if theirs != ours:
        raise ValueError(
            f"--resume: optimizer.state: the checkpoint's moments are {theirs}, got {ours}; set "
            f"optimizer.state={theirs}"
        )
    return {"step": torch.tensor(steps) if ours == "float32" else int(steps), **moments}
