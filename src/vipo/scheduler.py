"""The step kernels as two `diffusers` schedulers. They are the only stochastic part of a policy.

A scheduler is put into an unmodified pipeline. At every step it computes the step's Gaussian from the model output
and hands it to its `transition`, which either draws and records the next latents (`Recording`: rollout) or returns the
recorded ones and scores them (`Scoring`: replay). One `step` serves both, so sampling and training cannot drift apart.
The last step is always deterministic: its noise would reach the image but no later denoising.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from .kernels import FLOW_KERNELS, Gaussian, ddim, gaussian_log_prob
from .types import StepRecord

_STEP_SEED = 0x5EED
"""Offset between a sample's initial-noise seed and its step-noise seed, so that the two streams differ."""


class Transition(Protocol):
    """What a scheduler does with a step's Gaussian.

    Attributes:
        order: steps to run, ascending; or a slice of them.
    """

    @property
    def order(self) -> Sequence[int] | slice: ...

    def __call__(self, k: int, step: Gaussian, latents: Tensor) -> Tensor:
        """Return x_{k+1} in the dtype of `latents`: what the denoiser will see."""


class Recording:
    """Draw x_{k+1} with one generator per sample, and record the step with the log-prob of that very value.

    Args:
        seeds: N, one per sample.
        order: which steps to run.
    """

    def __init__(self, seeds: Sequence[int], order: slice = slice(None)) -> None:
        self.generators = [torch.Generator().manual_seed(seed ^ (_STEP_SEED << 20)) for seed in seeds]
        self.order = order
        self.records: dict[int, StepRecord] = {}

    def __call__(self, k: int, step: Gaussian, latents: Tensor) -> Tensor:
        if len(latents) != len(self.generators):
            raise ValueError(f"latents: expected {len(self.generators)} samples, one per seed, got {len(latents)}")
        log_probs = None
        following = step.mean
        if step.std > 0:
            noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in self.generators])
            following = step.mean + step.std * noise.to(latents.device, non_blocking=True)
        following = following.to(latents.dtype)
        if step.std > 0:
            log_probs = gaussian_log_prob(following, step)
        self.records[k] = StepRecord(latents, following, log_probs)
        return following

    @property
    def coming(self) -> int:
        """The step that comes next."""
        return (self.order.start or 0) + len(self.records)


class Scoring:
    """Return the recorded x_{k+1} and hand the step's Gaussian, with its graph, to `on_step`."""

    def __init__(
        self, records: Mapping[int, StepRecord], order: Sequence[int], on_step: Callable[[int, Gaussian], None]
    ) -> None:
        self.records, self.order, self.on_step = records, order, on_step

    def __call__(self, k: int, step: Gaussian, latents: Tensor) -> Tensor:
        self.on_step(k, step)
        later = [i for i in self.order if i > k]
        return self.records[later[0]].latents if later else self.records[k].next_latents


@dataclass(frozen=True)
class SamplerSettings:
    """How steps are made stochastic.

    Attributes:
        kernel: flow_grpo, dance_grpo or flow_cps for flow matching; ddim for epsilon- and v-prediction.
        eta: noise scale; 0 is the deterministic sampler.
        stochastic_steps: steps with noise (MixGRPO's window); None for all. The last step never has any.
        shift: of a flow schedule, sigma <- shift sigma / (1 + (shift - 1) sigma), instead of the pipeline's own.
    """

    kernel: str
    eta: float
    stochastic_steps: tuple[int, ...] | None = None
    shift: float | None = None

    def eta_at(self, k: int, num_steps: int) -> float:
        chosen = self.stochastic_steps is None or k in self.stochastic_steps
        return self.eta if chosen and k < num_steps - 1 else 0.0

    @property
    def prefix(self) -> int:
        """How many steps before the first stochastic one; 0 where none is stochastic."""
        return min(self.stochastic_steps, default=0) if self.stochastic_steps and self.eta > 0 else 0


class FlowStochasticScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow-matching scheduler with a stochastic step; the schedule of sigmas is the parent's, or `replaced`'s.

    Attributes:
        replaced: the multistep solver (UniPC, DPM-Solver) whose sigmas and timesteps to keep; None for the parent's.
    """

    settings: SamplerSettings
    transition: Transition
    pending: Iterator[int]
    replaced: Any = None

    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)  # pipelines inspect this signature for `sigmas`
    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None, **kwargs: Any
    ) -> None:
        super().set_timesteps(num_inference_steps, device, **kwargs)
        if self.replaced is not None and kwargs.get("sigmas") is None and kwargs.get("timesteps") is None:
            shift = {"mu": kwargs["mu"]} if self.replaced.config.get("use_dynamic_shifting") else {}
            self.replaced.set_timesteps(num_inference_steps, device=device, **shift)
            self.sigmas, self.timesteps = self.replaced.sigmas, self.replaced.timesteps
        # Mochi counts sigma from the picture: 0 is noise and the network predicts x0 - noise
        self._sign = -1 if self.config.invert_sigmas else 1
        sigmas = self.sigmas.tolist()  # once per call, so that no step waits for the device
        self._levels = [1 - sigma for sigma in sigmas] if self.config.invert_sigmas else sigmas
        self.pending = _cut_timesteps(self)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """Take one step of the kernel in float32; see the parent for the arguments."""
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps: this pipeline gives every token its own noise level; not supported")
        k = next(self.pending)
        gaussian = FLOW_KERNELS[self.settings.kernel](
            sample.float(),
            self._sign * model_output.float(),
            sigma=self._levels[k],
            sigma_next=self._levels[k + 1],
            eta=self.settings.eta_at(k, len(self._levels) - 1),
            sigma_max=self._levels[1],
        )
        following = self.transition(k, gaussian, sample)
        return FlowMatchEulerDiscreteSchedulerOutput(following) if return_dict else (following,)


class DDIMStochasticScheduler(DDIMScheduler):
    """DDIM scheduler with eta of its own; the schedule of alphas is the parent's."""

    settings: SamplerSettings
    transition: Transition
    pending: Iterator[int]

    @functools.wraps(DDIMScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        stride = self.config.num_train_timesteps // self.num_inference_steps
        alphas, final = self.alphas_cumprod.tolist(), float(self.final_alpha_cumprod)
        times = self.timesteps.tolist()
        self._levels = [(alphas[t], alphas[t - stride] if t >= stride else final) for t in times]
        self.pending = _cut_timesteps(self)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor]:
        """Take one DDIM(eta) step in float32; see the parent for the arguments."""
        k = next(self.pending)
        alpha, alpha_next = self._levels[k]
        gaussian = ddim(
            sample.float(),
            model_output.float(),
            alpha=alpha,
            alpha_next=alpha_next,
            eta=self.settings.eta_at(k, len(self._levels)),
            prediction_type=self.config.prediction_type,
            clip_sample_range=self.config.clip_sample_range if self.config.clip_sample else None,
        )
        following = self.transition(k, gaussian, sample)
        return DDIMSchedulerOutput(following) if return_dict else (following,)


def _cut_timesteps(scheduler: Any) -> Iterator[int]:
    """Leave only the timesteps of the transition's order in the scheduler; return the step numbers to come."""
    order = scheduler.transition.order
    order = range(len(scheduler.timesteps))[order] if isinstance(order, slice) else order
    order = list(order)
    scheduler.timesteps = scheduler.timesteps[order]
    return iter(order)


StochasticScheduler = FlowStochasticScheduler | DDIMStochasticScheduler


def require_all_steps(scheduler: StochasticScheduler, pipeline: str) -> None:
    """Raise ValueError if a call of the pipeline has ended before the schedule: its steps were then not these."""
    left = len(list(scheduler.pending))
    if left:
        raise ValueError(
            f"pipeline: {pipeline} leaves out {left} steps of its schedule (image-to-image strength, denoising_end): "
            "cannot drive it so"
        )


def is_flow(scheduler: Any) -> bool:
    """Whether a pipeline's scheduler integrates a flow (velocity prediction) rather than a diffusion."""
    config = scheduler.config
    return (
        isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        or "FlowMatch" in type(scheduler).__name__
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def stochastic_scheduler(original: Any, settings: SamplerSettings) -> StochasticScheduler:
    """Make our scheduler from a pipeline's own, keeping its schedule.

    Raises:
        ValueError: the kernel does not fit the pipeline, or the pipeline's schedule has no Gaussian step.
    """
    name = type(original).__name__
    flow_kernels = ", ".join(FLOW_KERNELS)
    # from_config would put our class's default for every setting that the original left at its own default
    config = {key: value for key, value in original.config.items() if key != "_use_default_values"}
    if is_flow(original):
        if settings.kernel not in FLOW_KERNELS:
            raise ValueError(
                f"kernel: {name} is a flow scheduler; expected one of {flow_kernels}, got {settings.kernel!r}"
            )
        config["stochastic_sampling"] = False
        if settings.shift is not None:
            config |= {"shift": settings.shift, "use_dynamic_shifting": False}
            config.pop("flow_shift", None)
        flow = FlowStochasticScheduler.from_config(config)
        if "flow_shift" in config:  # UniPC and DPM-Solver (Wan, Sana) shift and space the sigmas in their own way
            flow.replaced = copy.deepcopy(original)
        made: StochasticScheduler = flow
    elif "beta_schedule" in original.config:
        if settings.shift is not None:
            raise ValueError(f"shift: {name} is a diffusion scheduler, which has none; leave it out")
        if settings.kernel != "ddim":
            raise ValueError(f"kernel: {name} is a diffusion scheduler; expected ddim, got {settings.kernel!r}")
        config.setdefault("clip_sample", False)
        if config.get("thresholding"):
            raise ValueError(
                f"scheduler: {name} uses dynamic thresholding, whose steps are not Gaussian; not supported"
            )
        if name.startswith("CogVideoX"):
            config["clip_sample"] = False  # its classes read the setting and never clip
        if "DDIM" not in name and config.get("timestep_spacing") == "linspace":
            config["timestep_spacing"] = "trailing"  # DDIM's own linspace skips noise levels: arXiv 2305.08891, Table 2
        made = DDIMStochasticScheduler.from_config(config)
        made.alphas_cumprod = original.alphas_cumprod  # CogVideoX shifts its signal-to-noise ratio
        if not made.config.set_alpha_to_one:
            made.final_alpha_cumprod = made.alphas_cumprod[0]
    else:
        raise ValueError(f"scheduler: cannot drive {name}; expected a flow-matching or a beta-schedule scheduler")
    made.settings = settings
    return made
