"""Step kernels against float64 NumPy, against diffusers' own samplers, and against the marginals they must keep."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from vipo.kernels import FLOW_KERNELS, Gaussian, ddim, flow_cps, gaussian_log_prob

SIGMAS = [(1.0, 0.86), (0.86, 0.5), (0.5, 0.125), (0.125, 0.0)]


def oracle(name, x, v, s, n, eta, s_max):
    """Mean and std as PAPER.md section 2 writes them, in float64."""
    d = n - s
    if name == "dance_grpo":
        x0 = x - s * v
        score = -(x - (1 - s) * x0) / s**2
        return x + v * d - 0.5 * eta**2 * score * d, eta * np.sqrt(-d)
    if name == "flow_grpo":
        st = eta * np.sqrt(s / (1 - (s_max if s == 1 else s)))
        return x + (v + st**2 / (2 * s) * (x + (1 - s) * v)) * d, st * np.sqrt(-d)
    x0, noise = x - s * v, x + (1 - s) * v
    return (1 - n) * x0 + n * np.cos(eta * np.pi / 2) * noise, n * np.sin(eta * np.pi / 2)


@pytest.mark.parametrize("name", FLOW_KERNELS)
@pytest.mark.parametrize(("sigma", "sigma_next"), SIGMAS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9])
def test_flow_kernels_match_the_float64_oracle(name, sigma, sigma_next, eta):
    x, v = (torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    step = FLOW_KERNELS[name](x, v, sigma=sigma, sigma_next=sigma_next, eta=eta, sigma_max=0.86)
    mean, std = oracle(name, x.numpy(), v.numpy(), sigma, sigma_next, eta, 0.86)
    np.testing.assert_allclose(step.mean.numpy(), mean, rtol=1e-12)
    assert step.std == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize("name", FLOW_KERNELS)
def test_flow_kernels_without_noise_are_the_euler_step_of_diffusers(name):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for k, t in enumerate(scheduler.timesteps):
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
        s, n = scheduler.sigmas[k].item(), scheduler.sigmas[k + 1].item()
        ours = FLOW_KERNELS[name](x, v, sigma=s, sigma_next=n, eta=0.0, sigma_max=0.9)
        theirs = scheduler.step(v, t, x).prev_sample
        torch.testing.assert_close(ours.mean, theirs, rtol=1e-5, atol=1e-6)
        assert ours.std == 0
        x = theirs


@pytest.mark.parametrize("name", ["flow_grpo", "dance_grpo"])  # flow_cps keeps coefficients instead: below
def test_flow_kernels_keep_the_marginal_variance(name):
    """For Gaussian data the exact velocity is linear in x; a step of size d must keep the variance to O(d^2)."""

    def error(d):
        s = 0.6
        n = s - d
        variance = (1 - s) ** 2 + s**2
        x = torch.ones((), dtype=torch.float64)
        v = x * (s - (1 - s)) / variance  # E[noise - x0 | x]
        step = FLOW_KERNELS[name](x, v, sigma=s, sigma_next=n, eta=0.6, sigma_max=0.9)
        return abs(float(step.mean) ** 2 * variance + step.std**2 - ((1 - n) ** 2 + n**2))

    assert error(0.01) < 1e-3
    assert error(0.005) < error(0.01) / 3.5  # second order: halving d divides the error by 4


def test_cps_keeps_the_coefficients():
    """Given the true x0 and noise, x_next = (1 - n) x0 + n * (unit noise): cos^2 + sin^2 = 1."""
    x0, noise = torch.tensor([2.0]), torch.tensor([-1.0])
    s, n, eta = 0.7, 0.4, 0.8
    step = flow_cps((1 - s) * x0 + s * noise, noise - x0, sigma=s, sigma_next=n, eta=eta, sigma_max=0.9)
    assert step.mean.item() == pytest.approx((1 - n) * 2 - n * math.cos(eta * math.pi / 2), abs=1e-6)
    assert (n * math.cos(eta * math.pi / 2)) ** 2 + step.std**2 == pytest.approx(n**2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddim_matches_diffusers(prediction_type, eta, clip):
    scheduler = DDIMScheduler(
        prediction_type=prediction_type, clip_sample=clip is not None, clip_sample_range=clip or 1.0, steps_offset=1
    )
    scheduler.set_timesteps(5)
    x, out = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    for t in scheduler.timesteps.tolist():
        previous = t - 200
        a = scheduler.alphas_cumprod[t].item()
        b = scheduler.alphas_cumprod[previous].item() if previous >= 0 else float(scheduler.final_alpha_cumprod)
        ours = ddim(x, out, alpha=a, alpha_next=b, eta=eta, prediction_type=prediction_type, clip_sample_range=clip)
        one = scheduler.step(out, t, x, eta=eta, variance_noise=torch.ones_like(x)).prev_sample
        torch.testing.assert_close(ours.mean + ours.std, one, rtol=1e-4, atol=1e-5)  # theirs rounds alphas in float32


def test_ddim_refuses_an_unknown_prediction():
    with pytest.raises(ValueError, match="prediction_type: expected epsilon"):
        ddim(torch.zeros(1), torch.zeros(1), alpha=0.5, alpha_next=0.7, eta=0.0, prediction_type="flow")


def test_log_prob_matches_the_normal_density():
    value, mean = torch.tensor([0.3, -1.0]), torch.tensor([0.1, 0.5], requires_grad=True)
    log_prob = gaussian_log_prob(value, Gaussian(mean, 0.4))
    expected = -((value.double() - mean.double()) ** 2) / (2 * 0.16) - math.log(0.4 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-6, atol=1e-6)
    log_prob.sum().backward()
    torch.testing.assert_close(mean.grad, (value - mean.detach()) / 0.16)  # score in the mean


def test_log_prob_of_a_deterministic_step_is_refused():
    with pytest.raises(ValueError, match="deterministic step has no density"):
        gaussian_log_prob(torch.zeros(1), Gaussian(torch.zeros(1), 0.0))
