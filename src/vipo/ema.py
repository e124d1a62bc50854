"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .distributed import exchanged, local, shard_like


class WeightAverage:
    """e <- d e + (1 - d) w after every optimizer step, from e = w; training itself never reads it.

    Args:
        parameters: w, the trained weights, float32; of sharded ones each rank averages its part.
        decay: d in (0, 1).

    Attributes:
        values: e, in the order of the parameters, and sharded as they are.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters = list(parameters)
        self.values = [parameter.detach().clone() for parameter in parameters]
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Move towards the present weights."""
        # of sharded weights this rank's parts: what is done to each element needs no other rank
        self._average([local(value) for value in self.values], [local(p.detach()) for p in self.parameters], None)

    @torch.no_grad()
    def restart(self, values: Sequence[Tensor]) -> None:
        """Set the average to whole tensors, and go on from there."""
        for mine, value in zip(self.values, values, strict=True):
            mine.copy_(shard_like(value, mine))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange weights and average for the length of a block."""
        with exchanged(self.parameters, self.values):
            yield
