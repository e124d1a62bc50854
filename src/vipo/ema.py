"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """e <- d e + (1 - d) w after every optimizer step, from e = w; training itself never reads it.

    Args:
        parameters: w, the trained weights, float32.
        decay: d in (0, 1).

    Attributes:
        values: e, in the order of the parameters.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters = list(parameters)
        self.values = [parameter.detach().clone() for parameter in parameters]
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Move towards the present weights."""
        self._average(self.values, self.parameters, None)

    @torch.no_grad()
    def restart(self, values: Sequence[Tensor]) -> None:
        """Set the average, and go on from there."""
        for mine, value in zip(self.values, values, strict=True):
            mine.copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange weights and average for the length of a block, without a copy."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data, self.values[i] = self.values[i], parameter.data
