"""vipo.schedule and vipo.ema: literal numbers, and the identities that hold where they are off."""

import pytest
import torch

from vipo.config import OptimizerConfig
from vipo.ema import WeightAverage
from vipo.schedule import learning_rate


def rates(iterations, **settings):
    found = OptimizerConfig(learning_rate=0.8, **settings)
    return [learning_rate(found, i, iterations) for i in range(iterations)]


def test_rates_are_those_of_the_equation():
    assert rates(5) == [0.8] * 5  # exactly: a default run must not change
    assert rates(4, warmup=4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates(6, warmup=2, schedule="linear") == pytest.approx([0.4, 0.8, 0.8, 0.6, 0.4, 0.2])
    assert rates(4, schedule="cosine") == pytest.approx([0.8, 0.4 + 0.4 * 0.5**0.5, 0.4, 0.4 - 0.4 * 0.5**0.5])
    assert rates(2, warmup=4, schedule="cosine") == pytest.approx([0.2, 0.4])  # a run that ends while warming up


def test_the_average_is_the_recursion_and_gives_way():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.rand(n, generator=generator)) for n in (3, 5)]
    average = WeightAverage(weights, 0.75)
    expected = [w.detach().double().clone() for w in weights]
    for _ in range(3):
        for w, e in zip(weights, expected, strict=True):
            w.data = torch.rand(w.shape, generator=generator)
            e.mul_(0.75).add_(0.25 * w.detach().double())
        average.update()
    for mine, e in zip(average.values, expected, strict=True):
        torch.testing.assert_close(mine.double(), e, rtol=1e-6, atol=0)
    before, kept = [w.detach().clone() for w in weights], [v.clone() for v in average.values]
    with pytest.raises(KeyError), average.in_place():
        assert all(torch.equal(w, v) for w, v in zip(weights, kept, strict=True))
        raise KeyError
    assert all(torch.equal(w, v) for w, v in zip(weights, before, strict=True))
    assert all(torch.equal(w, v) for w, v in zip(average.values, kept, strict=True))
