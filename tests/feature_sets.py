"""Feature sets with a known structure, for the tests of the PCA and of what follows it."""

import torch
from torch import Tensor

GRID = (2, 6, 7)
POSITIONS = 2 * 6 * 7


def clear_spectrum(seed: int, batch: int = 3, positions: int = POSITIONS, channels: int = 24) -> Tensor:
    """Features (B, P, D) in float64 whose singular values are 1, 1/2, 1/4, ... plus a mean and a little noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(draw(batch, positions, 6)).Q, torch.linalg.qr(draw(batch, channels, 6)).Q
    scales = 30 * 0.5 ** torch.arange(6, dtype=torch.float64)
    return (left * scales) @ right.mT + draw(batch, 1, channels) + 1e-3 * draw(batch, positions, channels)
