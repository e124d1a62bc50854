"""Estimates from a Gram matrix of independent gradients: signal fraction, cosine, interval. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .types import check_shape


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def signal_fraction(gram: Tensor) -> Tensor:
    """Estimate ||E g||^2 / E ||g||^2 from m independent gradients (docs/equations.md S1).

        U = sum_{i != j} <g_i, g_j> / (m (m - 1)),   f = U / (sum_i <g_i, g_i> / m)

    Numerator and denominator are unbiased; U, and so f, may be negative where E g is small.

    Args:
        gram: (m, m), <g_i, g_j>, m >= 2.

    Returns:
        0-dim, of the Gram matrix's dtype.
    """
    check_shape("gram", gram, "m m")
    return _off_diagonal_mean(gram) / gram.diagonal().mean()


def leave_one_out(gram: Tensor) -> Tensor:
    """Compute `signal_fraction` without each gradient in turn: (m, m), m >= 3 -> (m,)."""
    m = check_shape("gram", gram, "m m")["m"]
    squares = gram.diagonal()
    off = gram.sum() - squares.sum() - (gram.sum(0) + gram.sum(1) - 2 * squares)
    return off / ((m - 1) * (m - 2)) / ((squares.sum() - squares) / (m - 1))


def jackknife(value: Tensor, left_out: Tensor) -> Estimate:
    """Give an estimate its 95 % interval (Efron and Stein 1981; docs/equations.md S2).

        se^2 = (m - 1)/m sum_i (f_(i) - mean f_(.))^2,   f +- t se, t of Student's t with m - 1 degrees of freedom

    The jackknife's variance is not too small on average; where E g is near 0 it is up to twice too large. It needs no
    random numbers, and of a difference of two maps it leaves the same group out of both: the interval is paired.

    Args:
        value: 0-dim.
        left_out: (m,), the same estimate without each group.
    """
    m = check_shape("left_out", left_out, "m")["m"]
    error = float(((m - 1) * left_out.var(correction=0)).sqrt()) * _student(m - 1)
    return Estimate(float(value), float(value) - error, float(value) + error)


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t by Cornish and Fisher's expansion: 3.6 % low at 3 degrees, 0.1 % from 9 on."""
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def signal_cosine(cross: Tensor, own: Tensor, other: Tensor) -> float | None:
    """Estimate the cosine of E g_a and E g_b from the same m groups (docs/equations.md S3).

        <E g_a, E g_b> / sqrt(||E g_a||^2 ||E g_b||^2), each of the three by its sum over i != j

    Args:
        cross: (m, m), <a_i, b_j>.
        own: (m, m), <a_i, a_j>.
        other: (m, m), <b_i, b_j>.

    Returns:
        The cosine, which may leave [-1, 1]; None where the estimate of a squared norm is not positive.
    """
    sizes = check_shape("cross", cross, "m m")
    check_shape("own", own, "m m", sizes)
    check_shape("other", other, "m m", sizes)
    squares = _off_diagonal_mean(own), _off_diagonal_mean(other)
    if min(squares) <= 0:
        return None
    return float(_off_diagonal_mean(cross) / (squares[0] * squares[1]).sqrt())


def _off_diagonal_mean(gram: Tensor) -> Tensor:
    m = len(gram)
    return (gram.sum() - gram.diagonal().sum()) / (m * (m - 1))


def gram_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Take the inner products of the rows of (m, P) and (m, P): (m, m) float64."""
    check_shape("b", b, "m P", check_shape("a", a, "m P"))
    pieces = zip(a.split(2**18, 1), b.split(2**18, 1), strict=True)
    return torch.stack([x.double() @ y.double().T for x, y in pieces]).sum(0)


def count_sketch(values: Tensor, size: int, seed: int) -> Tensor:
    """Compress a vector so that inner products stay unbiased (Charikar et al. 2002; Weinberger et al. 2009).

        sketch[h(p)] += s(p) values[p], with a random place h(p) and a random sign s(p)

    The error of an inner product has a standard deviation of about |a| |b| / sqrt(size).

    Args:
        values: (P,), on the CPU.
        size: of the sketch.
        seed: of places and signs; sketches of one seed compare.

    Returns:
        (size,) float32.
    """
    check_shape("values", values, "P")
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.zeros(size)
    for part in values.float().split(2**22):
        places = torch.randint(size, part.shape, generator=generator)
        signs = torch.randint(2, part.shape, generator=generator) * 2 - 1
        sketch.index_add_(0, places, part * signs)
    return sketch
