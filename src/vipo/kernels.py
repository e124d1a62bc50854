"""Step kernels: one stochastic denoising step as a Gaussian, and its log-probability per element. Pure functions.

Notation: x_k is `latents`; sigma in (0, 1] with 1 = noise; x = (1 - sigma) x0 + sigma * noise; the network predicts the
velocity v = noise - x0; d = sigma_next - sigma < 0. Every kernel returns the mean (same shape and dtype as `latents`)
and the standard deviation (a float) of p(x_{k+1} | x_k). With eta = 0 each is the deterministic sampler of `diffusers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Gaussian(NamedTuple):
    """Isotropic step distribution N(mean, std^2 I): mean shaped like the latents, std a float >= 0."""

    mean: Tensor
    std: float


def flow_grpo(
    latents: Tensor, velocity: Tensor, *, sigma: float, sigma_next: float, eta: float, sigma_max: float
) -> Gaussian:
    """Step the flow SDE of Flow-GRPO (arXiv 2505.05470; docs/equations.md K1).

        s_t = eta sqrt(sigma / (1 - sigma))
        mean = x + [v + s_t^2 / (2 sigma) (x + (1 - sigma) v)] d;  std = s_t sqrt(-d)

    Args:
        latents: x_k, any shape.
        velocity: model output v, same shape.
        sigma: noise level of x_k, in (0, 1].
        sigma_next: noise level of x_{k+1}, in [0, sigma).
        eta: noise scale >= 0 (the paper's a; 0.7 for SD3.5).
        sigma_max: stands for sigma in 1 - sigma where sigma = 1 and s_t would be infinite: the schedule's second sigma.

    Returns:
        The step's Gaussian.
    """
    d = sigma_next - sigma
    scale = eta * math.sqrt(sigma / (1 - (sigma_max if sigma >= 1 else sigma))) if eta > 0 else 0.0
    drift = velocity + (scale**2 / (2 * sigma)) * (latents + (1 - sigma) * velocity)
    return Gaussian(latents + drift * d, scale * math.sqrt(-d))


def dance_grpo(
    latents: Tensor, velocity: Tensor, *, sigma: float, sigma_next: float, eta: float, sigma_max: float
) -> Gaussian:
    """Step the flow SDE of DanceGRPO (arXiv 2505.07818; docs/equations.md K2), the one the ViPO paper uses.

        x0 = x - sigma v;  score = -(x - (1 - sigma) x0) / sigma^2
        mean = x + v d - eta^2 / 2 score d;  std = eta sqrt(-d)

    Args and returns as `flow_grpo`; `sigma_max` is not used.
    """
    d = sigma_next - sigma
    x0 = latents - sigma * velocity
    score = -(latents - (1 - sigma) * x0) / sigma**2
    return Gaussian(latents + velocity * d - 0.5 * eta**2 * score * d, eta * math.sqrt(-d))


def flow_cps(
    latents: Tensor, velocity: Tensor, *, sigma: float, sigma_next: float, eta: float, sigma_max: float
) -> Gaussian:
    """Step with coefficients preserved, Flow-CPS (arXiv 2509.05952; docs/equations.md K3).

        mean = (1 - sigma_next) x0 + sigma_next cos(eta pi / 2) noise_hat;  std = sigma_next sin(eta pi / 2)

    with x0 = x - sigma v and noise_hat = x + (1 - sigma) v. Args and returns as `flow_grpo`, eta in [0, 1];
    `sigma_max` is not used.
    """
    x0 = latents - sigma * velocity
    noise = latents + (1 - sigma) * velocity
    angle = eta * math.pi / 2
    return Gaussian((1 - sigma_next) * x0 + sigma_next * math.cos(angle) * noise, sigma_next * math.sin(angle))


FlowKernel = Callable[..., Gaussian]
FLOW_KERNELS: dict[str, FlowKernel] = {"flow_grpo": flow_grpo, "dance_grpo": dance_grpo, "flow_cps": flow_cps}
"""Kernels for flow-matching pipelines, by the name used in configs."""


def ddim(
    latents: Tensor,
    model_output: Tensor,
    *,
    alpha: float,
    alpha_next: float,
    eta: float,
    prediction_type: str = "epsilon",
    clip_sample_range: float | None = None,
) -> Gaussian:
    """Step DDIM(eta) (arXiv 2010.02502, Eq. 12 and 16; docs/equations.md K4).

        std = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a');  mean = sqrt(a') x0 + sqrt(1 - a' - std^2) epsilon

    Args:
        latents: x_k, any shape.
        model_output: the network's output, same shape.
        alpha: cumulative product a of x_k, in (0, 1].
        alpha_next: a' of x_{k+1}, in (alpha, 1].
        eta: noise scale; 1 is DDPM-like.
        prediction_type: what the network predicts: epsilon, v_prediction or sample.
        clip_sample_range: clamp x0 to plus or minus this value, where the scheduler's config asks for it.

    Raises:
        ValueError: an unknown prediction type.
    """
    a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
    if prediction_type == "epsilon":
        x0, epsilon = (latents - b * model_output) / a, model_output
    elif prediction_type == "v_prediction":
        x0, epsilon = a * latents - b * model_output, a * model_output + b * latents
    elif prediction_type == "sample":
        x0, epsilon = model_output, (latents - a * model_output) / b
    else:
        raise ValueError(f"prediction_type: expected epsilon, v_prediction or sample, got {prediction_type!r}")
    if clip_sample_range is not None:
        x0 = x0.clamp(-clip_sample_range, clip_sample_range)
    variance = max(0.0, (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
    std = eta * math.sqrt(variance)
    return Gaussian(math.sqrt(alpha_next) * x0 + math.sqrt(max(0.0, 1 - alpha_next - std**2)) * epsilon, std)


def gaussian_log_prob(value: Tensor, step: Gaussian) -> Tensor:
    """Log-density of every element under the step's Gaussian (docs/equations.md L1).

        log p = -(value - mean)^2 / (2 std^2) - log std - log sqrt(2 pi)

    Args:
        value: any shape; detached by the caller where it is a sample.
        step: mean of the same shape, std > 0.

    Returns:
        float32 tensor of the same shape, nats; differentiable in the mean.
    """
    if step.std <= 0:
        raise ValueError(f"std: expected > 0, got {step.std}: a deterministic step has no density")
    residual = (value.to(torch.float32) - step.mean.to(torch.float32)) / step.std
    return -0.5 * residual.square() - (math.log(step.std) + _LOG_SQRT_2PI)
