"""Signal fraction, cosine, interval and sketch against NumPy, literal numbers and simulated gradients."""

import math

import numpy as np
import pytest
import torch
from torch import tensor

from vipo.estimators import count_sketch, gram_matrix, jackknife, leave_one_out, signal_cosine, signal_fraction


def gradients(m, size, mean=0.3, seed=0):
    draws = torch.randn(m, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + draws * torch.linspace(0.2, 2, size, dtype=torch.float64)


def oracle_fraction(rows):
    """Sums over pairs, in NumPy's float64."""
    m = len(rows)
    pairs = sum(rows[i] @ rows[j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return pairs / np.mean([row @ row for row in rows])


def test_matches_the_float64_oracle():
    for seed, (m, size) in enumerate([(2, 3), (5, 17), (24, 100)]):
        rows = gradients(m, size, seed=seed)
        found = signal_fraction(gram_matrix(rows, rows))
        assert float(found) == pytest.approx(oracle_fraction(rows.numpy()), rel=1e-12)


def test_literal_numbers():
    rows = tensor([[1.0, 2.0], [3.0, 0.0]])  # <g1, g2> = 3, squares 5 and 9
    gram = gram_matrix(rows, rows)
    assert gram.tolist() == [[5, 3], [3, 9]] and gram.dtype == torch.float64
    assert float(signal_fraction(gram)) == pytest.approx(3 / 7)
    same, opposite = torch.ones(2, 2), tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert float(signal_fraction(same)) == 1 and float(signal_fraction(opposite)) == -1
    three = tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 3.0], [0.0, 3.0, 4.0]])
    assert leave_one_out(three).tolist() == pytest.approx([3 / 3, 0 / 3, 1 / 2])


def test_unbiased_over_many_draws():
    size, m, draws = 20, 6, 4000
    rows = gradients(m * draws, size, seed=5).view(draws, m, size)
    squared_mean = size * 0.3**2
    spread = float(torch.linspace(0.2, 2, size, dtype=torch.float64).square().sum())
    grams = [gram_matrix(part, part) for part in rows]
    pairs = torch.stack([(gram.sum() - gram.trace()) / (m * (m - 1)) for gram in grams])
    error = float(pairs.std() / math.sqrt(draws))
    assert abs(float(pairs.mean()) - squared_mean) < 3 * error and error < 0.05 * squared_mean
    fractions = torch.stack([signal_fraction(gram) for gram in grams])
    true = squared_mean / (squared_mean + spread)
    assert float(fractions.mean()) == pytest.approx(true, abs=0.005) and true > 0.05  # 4 standard errors
    plain = torch.stack([part.mean(0).square().sum() for part in rows]) / (squared_mean + spread)
    assert float(plain.mean()) > true + 0.1  # the norm of the mean gradient is not unbiased


def test_leave_one_out_is_the_estimate_without_each():
    rows = gradients(7, 30)
    without = [oracle_fraction(np.delete(rows.numpy(), i, axis=0)) for i in range(7)]
    left_out = leave_one_out(gram_matrix(rows, rows))
    assert left_out.tolist() == pytest.approx(without, rel=1e-10)
    found = jackknife(tensor(0.5), left_out)
    error = math.sqrt(6 / 7 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert found.value == 0.5
    assert found.high - 0.5 == pytest.approx(2.4469 * error, rel=0.01)  # Student's t with 6 degrees of freedom
    assert 0.5 - found.low == pytest.approx(found.high - 0.5)
    assert str(jackknife(tensor(0.25), tensor([0.0, 0.0, 0.0]))) == "0.2500 [0.2500, 0.2500]"


@pytest.mark.parametrize(("m", "mean"), [(4, 0.3), (24, 0.0), (24, 0.3)])
def test_interval_covers(m, mean):
    """Of 400 simulated measurements at least 93 % have the truth in the interval (95 % less 2 standard errors)."""
    size = 30
    spread = float(torch.linspace(0.2, 2, size, dtype=torch.float64).square().sum())
    true = size * mean**2 / (size * mean**2 + spread)
    covered = 0
    for seed in range(400):
        rows = gradients(m, size, mean, seed=1000 + seed)
        gram = gram_matrix(rows, rows)
        found = jackknife(signal_fraction(gram), leave_one_out(gram))
        covered += found.low <= true <= found.high
    assert covered >= 0.93 * 400


def test_cosine():
    a = gradients(10, 40, mean=1.0)
    own = gram_matrix(a, a)
    assert signal_cosine(own, own, own) == pytest.approx(1, abs=1e-12)
    assert signal_cosine(gram_matrix(3 * a, a), gram_matrix(3 * a, 3 * a), own) == pytest.approx(1, abs=1e-12)
    assert signal_cosine(gram_matrix(-a, a), own, own) == pytest.approx(-1, abs=1e-12)
    hidden = tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert signal_cosine(hidden, hidden, torch.ones(2, 2)) is None
    many = gradients(4000, 40, seed=1)
    other = gradients(4000, 40, seed=2)
    other[:, :20] = -other[:, :20]  # E b is +.3 on one half and -.3 on the other
    cross, grams = gram_matrix(many, other), (gram_matrix(many, many), gram_matrix(other, other))
    assert signal_cosine(cross, *grams) == pytest.approx(0, abs=0.05)


def test_cosine_is_debiased():
    """Noise of its own in either gradient shrinks the cosine of the means, not the estimate."""
    clean = torch.ones(200, 50, dtype=torch.float64)
    a, b = clean + gradients(200, 50, 0, seed=1) * 5, clean + gradients(200, 50, 0, seed=2) * 5
    cross, own, other = gram_matrix(a, b), gram_matrix(a, a), gram_matrix(b, b)
    means = float(cross.sum() / (own.sum() * other.sum()).sqrt())
    found = signal_cosine(cross, own, other)
    assert means < 0.9 and found == pytest.approx(1, abs=0.05)


def test_sketch_keeps_inner_products_on_average():
    a, b = gradients(2, 60).float()
    exact = float(a @ b)
    found = torch.tensor([float(count_sketch(a, 16, s) @ count_sketch(b, 16, s)) for s in range(4000)])
    error = float(found.std()) / math.sqrt(4000)
    assert abs(float(found.mean()) - exact) < 3 * error
    assert error < 0.05 * abs(exact)
    assert torch.equal(count_sketch(a, 16, 7), count_sketch(a, 16, 7))
    assert float(count_sketch(a, 16, 7).square().sum()) != pytest.approx(float(a @ a))  # a sketch, not a copy


def test_wrong_shapes():
    with pytest.raises(ValueError, match="gram: expected shape"):
        signal_fraction(torch.ones(2, 3))
    with pytest.raises(ValueError, match="b: expected shape"):
        gram_matrix(torch.ones(2, 3), torch.ones(2, 4))
