"""Any `diffusers` pipeline as a policy: rollout, exact replay with gradients, decode. No code per model family.

The pipeline itself is never changed. For the length of one call, our scheduler and, in a replay, the recorded prompt
embeddings and latents are put in front of its own attributes (`pipelines.patched`); then its own `__call__` runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from . import pipelines
from .distributed import exchanged, local, plain_class, reshard, whole_state
from .kernels import Gaussian, gaussian_log_prob
from .loading import load_pipeline, save_lora, save_pipeline
from .losses import reference_kl
from .offload import IdleParts, Offload
from .scheduler import Recording, SamplerSettings, Scoring, Transition, require_all_steps, stochastic_scheduler
from .trainable import Training, prepare_training
from .types import Trajectory, find_device, require_finite_steps

OnStep = Callable[..., None]


class _LatentsReached(Exception):
    """Ends a pipeline call as soon as the latents have reached the VAE."""


class DiffusersPolicy:
    """A `diffusers` pipeline whose denoising steps are a stochastic policy.

    Args:
        pipeline: "nano", a hub id, a folder, or a DiffusionPipeline object.
        kernel: flow_grpo, dance_grpo, flow_cps (flow matching) or ddim.
        eta: noise scale of the kernel; 0 is the pipeline's own deterministic sampler.
        stochastic_steps: steps with noise; None for all but the last, which never has any.
        shift: of a flow schedule towards noise; None for the pipeline's own.
        train: "lora" (rank 16), a peft LoraConfig, "full" for all weights of the denoiser, or "none". A pipeline with
            two denoisers (Wan 2.2 A14B) trains both so; {"transformer_2": "lora"} trains the named ones only.
        unconditional: "frozen" lets no gradient through the unconditional branch of guidance, where the pipeline
            computes it in a denoiser call of its own; "trained" is the gradient of what is sampled.
        dtype: of the frozen weights; trained weights stay float32.
        autocast: dtype of an autocast around the pipeline's networks; None for none.
        offload: of encoders and VAE: "none", "idle" or "sequential", see `vipo.offload.IdleParts`.
        device: default: cuda where there is one, else cpu.
        shard: spreads a denoiser over several processes; None keeps it whole.
        allow_pickle: see `load_pipeline`.

    Attributes:
        pipeline: the pipeline.
        denoisers: the trained denoisers by component name (all of them if none is trained).
        denoiser: the first of them, a transformer or U-Net.

    Raises:
        ValueError: the pipeline cannot be loaded or cannot be driven; the message says why.
    """

    def __init__(
        self,
        pipeline: str | Path | DiffusionPipeline,
        *,
        kernel: str = "flow_grpo",
        eta: float = 0.7,
        stochastic_steps: Sequence[int] | None = None,
        shift: float | None = None,
        train: Training | Mapping[str, Training] = "lora",
        unconditional: Literal["trained", "frozen"] = "trained",
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        offload: Offload = "none",
        device: str | torch.device | None = None,
        shard: Callable[[nn.Module, torch.device], None] | None = None,
        allow_pickle: bool = False,
    ) -> None:
        self.device = find_device(device)
        self.call_defaults: dict[str, Any] = {}
        if isinstance(pipeline, DiffusionPipeline):
            self.pipeline = pipeline
        else:
            self.pipeline, self.call_defaults = load_pipeline(pipeline, dtype, allow_pickle=allow_pickle)
        denoisers = pipelines.find_denoisers(self.pipeline)
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        self.autocast, self.unconditional = autocast, unconditional
        self.settings = SamplerSettings(
            kernel, eta, None if stochastic_steps is None else tuple(stochastic_steps), shift
        )
        stochastic_scheduler(self.pipeline.scheduler, self.settings)  # refuse a wrong kernel now
        trained, self.lora = prepare_training(self.pipeline, denoisers, train)
        if shard is not None:
            for denoiser in denoisers.values():
                shard(denoiser, self.device)
        self.idle = IdleParts(self.pipeline, denoisers, self.device, offload)
        self.denoisers: dict[str, nn.Module] = trained or denoisers
        self.denoiser_name, self.denoiser = next(iter(self.denoisers.items()))
        self._several = len(denoisers) > 1
        self._reference: list[Tensor] = []
        self._layouts: dict[str, tuple[Tensor, tuple[int, int, int, int]]] = {}

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The trained weights by name; the component's name comes first where the pipeline has several denoisers."""
        for denoiser in self.denoisers.values():
            reshard(denoiser)  # a rollout leaves some of them whole: other tensors, that no optimizer knows
        return {
            f"{component}.{name}" if self._several else name: p
            for component, denoiser in self.denoisers.items()
            for name, p in denoiser.named_parameters()
            if p.requires_grad
        }

    def saved_weights(self, folder: Path) -> dict[str, Tensor]:
        """Read what `save` wrote of fully trained denoisers, named as in `trainable_parameters`."""
        return {
            f"{component}.{name}" if self._several else name: tensor
            for component, denoiser in self.denoisers.items()
            for name, tensor in plain_class(denoiser).from_pretrained(folder / component).state_dict().items()  # type: ignore[attr-defined]
        }

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the denoisers' blocks in the backward pass instead of keeping their activations."""
        reason = pipelines.particulars_of(self.pipeline).no_checkpointing
        if reason:
            raise ValueError(f"gradient_checkpointing: not with {type(self.pipeline).__name__}: {reason}")
        for denoiser in self.denoisers.values():
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]

    @torch.no_grad()
    def rollout(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        initial_seeds: Sequence[int] | None = None,
        num_inference_steps: int,
        share_prefix: bool = True,
        **call: Any,
    ) -> Trajectory:
        """Sample one batch and record every step.

        Samples of one prompt and one initial seed are the same up to the first stochastic step: with `share_prefix`
        these steps are computed once for all of them.

        Args:
            prompts: N prompts (a group's prompt repeated G times).
            seeds: N seeds; a sample's noise depends on its own seed only, not on its batch.
            initial_seeds: N seeds of the initial noise; default `seeds`. Equal seeds start from equal noise.
            num_inference_steps: K.
            share_prefix: False computes the deterministic first steps for every sample.
            call: any further keyword of the pipeline's call (guidance_scale, height, width, ...).

        Returns:
            The trajectory, without gradients.
        """
        initial_seeds = seeds if initial_seeds is None else initial_seeds
        if not len(prompts) == len(seeds) == len(initial_seeds):
            raise ValueError(
                f"seeds: expected one per prompt ({len(prompts)}), got {len(seeds)} and {len(initial_seeds)}"
            )
        call = {**self.call_defaults, **call, "num_inference_steps": num_inference_steps}
        outside = [k for k in self.settings.stochastic_steps or () if not 0 <= k < num_inference_steps]
        if outside:
            raise ValueError(f"stochastic_steps: {outside[0]} is not one of {num_inference_steps} steps, from 0 on")
        starts = list(zip(prompts, initial_seeds, strict=True))
        unique = list(dict.fromkeys(starts))
        per_sample = any(isinstance(v, list | tuple | Tensor) and len(v) == len(prompts) for v in call.values())
        prefix = self.settings.prefix if share_prefix and not per_sample else 0
        if prefix == 0 or len(unique) == len(starts):
            traj = self._record(prompts, seeds, initial_seeds, call)
        else:
            lead_prompts, lead_seeds = zip(*unique, strict=True)
            lead = self._record(lead_prompts, lead_seeds, lead_seeds, call, slice(prefix))
            rows = torch.tensor([unique.index(start) for start in starts], device=lead.final.device)
            traj = self._record(prompts, seeds, initial_seeds, call, slice(prefix, None), lead.final[rows])
            traj.steps = {k: record.take(rows) for k, record in lead.steps.items()} | traj.steps
        require_finite_steps(traj.steps, prompts)  # not before the end: other ranks may wait for all denoiser calls
        traj.layout, traj.latent_shape = self._layout(traj)
        return traj

    def _record(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        initial_seeds: Sequence[int],
        call: dict[str, Any],
        order: slice = slice(None),
        start: Tensor | None = None,
    ) -> Trajectory:
        """Run the steps of `order` from `start`, by default from the pipeline's own noise; the layout is not known."""
        recording = Recording(seeds, order)
        encoded: list[Any] = []
        prepared: list[Any] = []
        begin = (lambda made: made) if start is None else functools.partial(pipelines.with_latents, latents=start)
        in_front = {"prepare_latents": pipelines.remember(self.pipeline.prepare_latents, prepared, begin)}
        for name in pipelines.conditioning(self.pipeline):
            in_front[name] = pipelines.remember(getattr(self.pipeline, name), encoded)
        generators = [torch.Generator().manual_seed(seed) for seed in initial_seeds]
        ran: list[int] = []  # the step of every call of a trained denoiser
        with contextlib.ExitStack() as hooks:
            for denoiser in self.denoisers.values():
                hook = denoiser.register_forward_pre_hook(lambda *a: ran.append(recording.coming))
                hooks.callback(hook.remove)
            self._call(prompts, call, recording, in_front, generator=generators, output_type="latent")
        if self.unconditional == "frozen" and ran and len(ran) == len(set(ran)):
            raise ValueError(
                f"unconditional: {type(self.pipeline).__name__} calls its denoiser once per step (no guidance, or both "
                "branches in one batch), so there is no branch to freeze; use trained"
            )
        for k in set(recording.records) - set(ran):  # of an expert that is not trained: no gradient
            recording.records[k].log_probs = None
        pipelines.check_replayable(self.pipeline, prepared, recording.records)
        final = list(recording.records.values())[-1].next_latents
        unknown = torch.empty(0), (0, 0, 0, 0)
        return Trajectory(list(prompts), list(seeds), call, recording.records, final, encoded, prepared[0], *unknown)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], *, seeds: Sequence[int], num_inference_steps: int, **call: Any
    ) -> Tensor:
        """Sample without step noise: the pipeline's own deterministic sampler, under the current weights.

        Args:
            prompts: N prompts.
            seeds: N seeds of the initial noise.
            num_inference_steps: K.
            call: any further keyword of the pipeline's call.

        Returns:
            Frames (N, F, 3, Y, X), float32 in [0, 1].
        """
        call = {**self.call_defaults, **call, "num_inference_steps": num_inference_steps}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        plain = replace(self.settings, eta=0.0)
        call = {**call, "generator": generators, "output_type": "pt"}
        return _frames(self._call(prompts, call, Recording(seeds), {}, settings=plain))

    def replay(
        self, traj: Trajectory, *, steps: Sequence[int] | None = None, on_step: OnStep, with_kl: bool = False
    ) -> None:
        """Re-score recorded steps under the current weights, one denoiser call per step, with gradients.

        Args:
            traj: of a rollout with the same pipeline.
            steps: which of `traj.stochastic_steps`, ascending; None for all of them.
            on_step: called as on_step(k, log_probs, old_log_probs), both (N, C, T, H, W), nats, per element. It should
                call backward at once, so that only one step's graph is in memory.
            with_kl: call on_step(k, log_probs, old_log_probs, kl) instead, with the KL per element to the reference
                weights; needs `add_reference` first.
        """
        steps = traj.stochastic_steps if steps is None else list(steps)

        def score(k: int, gaussian: Gaussian) -> None:
            record = traj.steps[k]
            assert record.log_probs is not None
            log_probs = to_grid(gaussian_log_prob(record.next_latents, gaussian), traj)
            arguments = [log_probs, to_grid(record.log_probs, traj)]
            if with_kl:
                if record.reference_mean is None:
                    raise ValueError(f"with_kl: step {k} has no reference; call add_reference first")
                arguments.append(to_grid(reference_kl(gaussian.mean, record.reference_mean, gaussian.std), traj))
            on_step(k, *arguments)

        self._rescore(traj, steps, score)

    @torch.no_grad()
    def add_reference(self, *rollout: Trajectory, steps: Sequence[int] | None = None) -> None:
        """Record the step means under the reference weights: adapter off, or the copy of `keep_reference`."""
        with self._reference_weights():
            for traj in rollout:

                def store(k: int, gaussian: Gaussian, traj: Trajectory = traj) -> None:
                    traj.steps[k].reference_mean = gaussian.mean.to(traj.final.device)

                self._rescore(traj.to(self.device), traj.stochastic_steps if steps is None else steps, store)

    def keep_reference(self, device: str | None = None) -> None:
        """Keep a copy of fully trained weights, of sharded ones this rank's part, as the KL's reference.

        An adapter needs none. The copy waits on `device` (None: that of the weights) and takes turns with them.
        """
        if not self.lora:
            own = [local(p.detach()) for p in self.trainable_parameters().values()]
            self._reference = [p.to(device, copy=True) for p in own]

    @contextlib.contextmanager
    def _reference_weights(self) -> Iterator[None]:
        if self.lora:
            for denoiser in self.denoisers.values():
                denoiser.disable_adapters()  # type: ignore[operator]
            try:
                yield
            finally:
                for denoiser in self.denoisers.values():
                    denoiser.enable_adapters()  # type: ignore[operator]
        elif not self._reference:
            raise ValueError("reference: call keep_reference() before training all weights with a KL term")
        else:
            with exchanged(self.trainable_parameters().values(), self._reference, self.denoisers.values()):
                yield

    def _rescore(self, traj: Trajectory, steps: Sequence[int], on_step: Callable[[int, Gaussian], None]) -> None:
        wrong = sorted(set(steps) - set(traj.stochastic_steps))
        if wrong or list(steps) != sorted(set(steps)):
            raise ValueError(
                f"steps: expected ascending steps out of {traj.stochastic_steps} (the others are deterministic), "
                f"got {list(steps)}"
            )
        if not steps:
            return
        calls: list[None] = []  # of the denoisers since the last step

        def score(k: int, gaussian: Gaussian) -> None:
            calls.clear()
            on_step(k, gaussian)

        with contextlib.ExitStack() as frozen:
            if self.unconditional == "frozen":
                for denoiser in self.denoisers.values():
                    first_only = pipelines.gradient_of_first(denoiser.forward, calls)
                    frozen.enter_context(pipelines.patched(denoiser, {"forward": first_only}))
            self._resume(traj, Scoring(traj.steps, steps, score), traj.steps[steps[0]].latents, output_type="latent")

    @torch.no_grad()
    def decode(self, traj: Trajectory) -> Tensor:
        """Decode the final latents through the pipeline's own tail.

        Returns:
            Frames (N, F, 3, Y, X), float32 in [0, 1]; F = 1 for images.
        """
        nothing = Scoring({}, [], lambda k, gaussian: None)
        return _frames(self._resume(traj, nothing, traj.final, output_type="pt", autocast=False))

    def _resume(self, traj: Trajectory, transition: Transition, latents: Tensor, **call: Any) -> Any:
        """Call the pipeline, without its no_grad, on recorded embeddings from given latents."""
        in_front = pipelines.recorded(self.pipeline, traj.encoded, traj.prepared, latents)
        generators = [torch.Generator().manual_seed(seed) for seed in traj.seeds]  # some tails (LTX) add noise
        return self._call(traj.prompts, traj.call, transition, in_front, generator=generators, **call)

    def _call(
        self,
        prompts: Sequence[str],
        call: dict[str, Any],
        transition: Transition,
        in_front: dict[str, Any],
        *,
        autocast: bool = True,
        settings: SamplerSettings | None = None,
        **more: Any,
    ) -> Any:
        """Run the pipeline's own call with our scheduler, and whatever else is given, in front of its attributes."""
        scheduler = stochastic_scheduler(self.pipeline.scheduler, settings or self.settings)
        scheduler.transition = transition
        in_front = {**in_front, **self.idle.in_front, "scheduler": scheduler, "_progress_bar_config": {"disable": True}}
        call = pipelines.complete_call(self.pipeline, call, len(prompts))
        enabled = autocast and self.autocast is not None
        undecorated: Any = type(self.pipeline).__call__.__wrapped__  # type: ignore[attr-defined]  # without no_grad
        with contextlib.ExitStack() as stack:
            for denoiser in self.denoisers.values():  # what has encoded goes before the denoising begins
                stack.callback(denoiser.register_forward_pre_hook(lambda *a: self.idle.release()).remove)
            stack.callback(self.idle.release)
            stack.enter_context(pipelines.patched(self.pipeline, in_front))
            stack.enter_context(torch.autocast(self.device.type, self.autocast, enabled=enabled))
            output = undecorated(self.pipeline, prompt=list(prompts), **call, **more)
        require_all_steps(scheduler, type(self.pipeline).__name__)
        return output

    def _layout(self, traj: Trajectory) -> tuple[Tensor, tuple[int, int, int, int]]:
        """Where the VAE's latents come from: probe the pipeline's tail with index-coded latents, once per shape.

        Returns:
            Positions (C*T*H*W,) in one flattened sample of the pipeline's own layout, and (C, T, H, W).

        Raises:
            ValueError: the tail is not a permutation with an affine map.
        """
        # one packed shape may stand for several pictures (48x64 and 64x48): what reaches the VAE tells them apart
        like = traj.final
        reached = self._latents_at_vae(traj, torch.zeros_like(like))
        key = repr((tuple(like.shape[1:]), tuple(reached.shape[1:])))
        if key not in self._layouts:

            def reach(values: Tensor) -> Tensor:
                sample = values.to(like).expand(like.shape[0], -1).reshape(like.shape)
                return self._latents_at_vae(traj, sample)[0].float()

            found = pipelines.probe_layout(reach, like[0])
            if found is None:
                raise ValueError(
                    f"pipeline: {type(self.pipeline).__name__} does not hand its latents to the VAE as a permutation "
                    "of the denoiser's; its latent grid is unknown, cannot place a map on it"
                )
            self._layouts[key] = found
        return self._layouts[key]

    def _latents_at_vae(self, traj: Trajectory, latents: Tensor) -> Tensor:
        """Run the pipeline's tail on `latents` up to the VAE and return what the VAE would decode."""
        caught: list[Tensor] = []

        def catch(z: Tensor, *args: Any, **kwargs: Any) -> None:
            caught.append(z)
            raise _LatentsReached

        nothing = Scoring({}, [], lambda k, gaussian: None)
        with pipelines.patched(self.pipeline.vae, {"decode": catch}), contextlib.suppress(_LatentsReached):
            self._resume(traj, nothing, latents, autocast=False, output_type="pt")
        if not caught:
            raise ValueError(f"pipeline: {type(self.pipeline).__name__} never calls vae.decode: cannot drive it")
        return caught[0]

    def save(self, folder: Path | None) -> None:
        """Write the trained weights as `diffusers` reads them: a LoRA folder (`save_lora`), or the whole pipeline.

        All ranks must call it where weights are sharded; those that do not write give no folder.
        """
        states = {  # of sharded denoisers
            name: whole_state(denoiser, adapters=self.lora)
            for name, denoiser in self.denoisers.items()
            if plain_class(denoiser) is not type(denoiser)
        }
        if folder is None:
            return
        if self.lora:
            save_lora(self.pipeline, self.denoisers, folder, states)
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.idle.whole())
            for name, state in states.items():
                stack.enter_context(
                    pipelines.patched(self.denoisers[name], {"state_dict": functools.partial(dict, state)})
                )
            save_pipeline(self.pipeline, folder, self.call_defaults)


def to_grid(values: Tensor, traj: Trajectory) -> Tensor:
    """Put per-element values from the pipeline's own layout onto the latent grid: (N, C, T, H, W)."""
    return values.flatten(1)[:, traj.layout].view(-1, *traj.latent_shape)


def _frames(output: Any) -> Tensor:
    """A pipeline's output as frames (N, F, 3, Y, X), float32 in [0, 1]."""
    images: Tensor = output[0]
    return (images if images.ndim == 5 else images[:, None]).float().clamp(0, 1)
