"""What the families of `diffusers` pipelines need beyond the general code: one table, and how layouts are found.

docs/models.md lists the families tried and the results.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .types import StepRecord

DENOISERS = ("unet", "transformer", "transformer_2")
"""Components that denoise, in the order of their use; Wan 2.2 A14B has two transformers."""
CONDITIONING = ("encode_prompt", "encode_image", "prepare_image_latents")
"""Methods whose outputs a rollout records and a replay reuses. What else a pipeline encodes is encoded anew."""
_DIGIT = 32  # layout probes are written in base 32: small integers survive bfloat16 and the pipeline's affine scaling


@dataclass(frozen=True)
class Particulars:
    """What one pipeline class needs.

    Attributes:
        per_sample: keywords of the call whose single value must be given once per prompt.
        by_loop_index: keywords that change what a step does by its place in the loop, with their harmless values. A
            replay runs chosen steps only, whose places differ, so other values are refused.
        refused: why it cannot be driven.
        no_checkpointing: why its denoiser cannot recompute its blocks.
    """

    per_sample: tuple[str, ...] = ()
    by_loop_index: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    no_checkpointing: str = ""


_LTX = "it steps only the frames after the first, in a layout of their own"
PARTICULARS: dict[str, Particulars] = {
    "ChromaPipeline": Particulars(no_checkpointing="diffusers 0.42 drops its attention mask there"),
    "CogVideoXImageToVideoPipeline": Particulars(per_sample=("image",)),
    "LTXConditionPipeline": Particulars(refused=_LTX),
    "LTXImageToVideoPipeline": Particulars(refused=_LTX),
    "Lumina2Pipeline": Particulars(by_loop_index={"cfg_trunc_ratio": 1.0}),
    "QwenImageEditPipeline": Particulars(per_sample=("image",)),
    "StableDiffusion3Pipeline": Particulars(by_loop_index={"skip_guidance_layers": None}),
}
"""By the name of the pipeline's class; a class that is not here needs nothing."""


def particulars_of(pipeline: DiffusionPipeline) -> Particulars:
    """The table's entry for a pipeline."""
    return PARTICULARS.get(type(pipeline).__name__, Particulars())


def find_denoisers(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return a pipeline's denoisers by component name; raise ValueError if the pipeline cannot be driven."""
    components, name = pipeline.components, type(pipeline).__name__
    found = {key: components[key] for key in DENOISERS if isinstance(components.get(key), nn.Module)}
    if not found or components.get("vae") is None:
        raise ValueError(f"pipeline: {name} has no transformer or unet, or no vae: cannot drive it")
    refused = particulars_of(pipeline).refused
    if "strength" in inspect.signature(type(pipeline).__call__).parameters:
        refused = "it starts in the middle of its schedule (strength)"
    if refused:
        raise ValueError(f"pipeline: cannot drive {name}: {refused}")
    if "prepare_latents" not in dir(pipeline):
        raise ValueError(f"pipeline: {name} has no prepare_latents to resume from: cannot replay it")
    if "__wrapped__" not in vars(type(pipeline).__call__):
        raise ValueError(f"pipeline: {name}.__call__ is not wrapped in torch.no_grad as expected: cannot replay it")
    return found


def complete_call(pipeline: DiffusionPipeline, call: dict[str, Any], samples: int) -> dict[str, Any]:
    """Check the keywords of a call on N samples, and repeat single values where the pipeline wants one per sample.

    Raises:
        ValueError: a keyword that the pipeline does not take, or whose effect cannot be replayed.
    """
    name, particulars = type(pipeline).__name__, particulars_of(pipeline)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    unknown = sorted(set(call) - set(parameters))
    if unknown and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(f"call: {name} takes no keyword {unknown[0]!r}; see its __call__")
    for keyword, harmless in particulars.by_loop_index.items():
        if call.get(keyword, harmless) != harmless:
            raise ValueError(
                f"call: {keyword}={call[keyword]!r} makes a step of {name} depend on its place in the loop, so it "
                f"cannot be replayed alone; leave it at {harmless!r}"
            )
    repeated = {
        keyword: [value] * samples
        for keyword, value in call.items()
        if (keyword in particulars.per_sample and not isinstance(value, list | tuple))
        or (keyword.startswith("negative_prompt") and isinstance(value, str))
    }
    return {**call, **repeated}


def conditioning(pipeline: DiffusionPipeline) -> list[str]:
    """The methods of `CONDITIONING` that a pipeline has."""
    return [name for name in CONDITIONING if name in dir(pipeline)]


def remember(
    function: Callable[..., Any], outputs: list[Any], change: Callable[[Any], Any] = lambda output: output
) -> Callable[..., Any]:
    """Wrap a function so that its outputs, after `change`, are kept, in the order of its calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs.append(change(function(*args, **kwargs)))
        return outputs[-1]

    return call


def with_latents(prepared: Any, latents: Tensor) -> Any:
    """Put other latents into what `prepare_latents` returned, in its dtype: Mochi steps in float32."""
    latents = latents.to(_latents_of(prepared).dtype)
    return (latents, *prepared[1:]) if isinstance(prepared, tuple) else latents


def recorded(pipeline: DiffusionPipeline, encoded: list[Any], prepared: Any, latents: Tensor) -> dict[str, Any]:
    """Return stand-ins for a pipeline's methods that give recorded conditioning, in order, and recorded latents."""
    queue = iter(encoded)
    ready = with_latents(prepared, latents)
    stand_ins: dict[str, Any] = {name: lambda *a, **k: next(queue) for name in conditioning(pipeline)}
    return {**stand_ins, "prepare_latents": lambda *a, **k: ready}


def _latents_of(prepared: Any) -> Tensor:
    """The latents in what `prepare_latents` returned: it, or the first of a tuple."""
    latents: Tensor = prepared[0] if isinstance(prepared, tuple) else prepared
    return latents


def check_replayable(pipeline: DiffusionPipeline, prepared: list[Any], steps: Mapping[int, StepRecord]) -> None:
    """Raise ValueError if a recorded call did not hand the latents of `prepare_latents` on from step to step."""
    name = type(pipeline).__name__
    if len(prepared) != 1 or not steps:
        raise ValueError(f"pipeline: {name} does not call prepare_latents once and scheduler.step: cannot replay it")
    first = _latents_of(prepared[0])
    before = first
    for k, record in steps.items():
        now = record.latents
        # most pipelines hand the very tensor on; a comparison would wait for the device at every step
        handed_on = before is now or (
            before.shape == now.shape
            and torch.allclose(before.to(first.dtype), now.to(first.dtype), rtol=0, atol=0, equal_nan=True)
        )
        if not handed_on:
            raise ValueError(f"pipeline: {name} changes the latents before step {k}: cannot replay it")
        before = record.next_latents


def gradient_of_first(forward: Callable[..., Any], calls: list[None]) -> Callable[..., Any]:
    """Wrap a denoiser's forward so that of the calls of one step only the first, the conditional one, has gradients.

    Every pipeline of diffusers that computes the branches of guidance apart computes the conditional one first.

    Args:
        forward: the denoiser's.
        calls: filled here; emptied by the caller at every step.
    """

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and len(calls) == 1):
            return forward(*args, **kwargs)

    return call


def enable_vae(pipeline: DiffusionPipeline, *, tiling: bool, slicing: bool, channels_last: bool = False) -> None:
    """Decode in tiles (of space, and of time where the VAE can), or one sample at a time: less memory.

    Channels-last weights make the convolutions faster and round otherwise (docs/performance.md).
    """
    for wanted, method in ((tiling, "enable_tiling"), (slicing, "enable_slicing")):
        if wanted and method not in dir(pipeline.vae):
            raise ValueError(f"vae: {type(pipeline.vae).__name__} has no {method}; leave it off")
        if wanted:
            getattr(pipeline.vae, method)()
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    for weight in pipeline.vae.parameters():
        if channels_last and weight.is_meta:
            raise ValueError(
                "vae_channels_last: offload=sequential brings the weights in their own order; leave it off"
            )
        if weight.ndim in formats:
            weight.data = weight.data.to(memory_format=formats[weight.ndim])


def compile_blocks(denoisers: Mapping[str, nn.Module], **options: Any) -> None:
    """Compile the repeated blocks of denoisers; `options` are torch.compile's."""
    for denoiser in denoisers.values():
        if not getattr(denoiser, "_repeated_blocks", None):
            raise ValueError(f"compile: {type(denoiser).__name__} names no repeated blocks; leave it off")
        denoiser.compile_repeated_blocks(**options)  # type: ignore[operator]


def probe_layout(reach: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, tuple[int, int, int, int]] | None:
    """Find where the elements of the VAE's latents lie in the pipeline's own layout, with index-coded latents.

    Args:
        reach: what reaches the VAE, (C, H, W) or (C, T, H, W), from the values of one flattened sample.
        like: one sample in the pipeline's own layout.

    Returns:
        Positions (C*T*H*W,) in one flattened sample, and (C, T, H, W); None where it is not a permutation.
    """
    index = torch.arange(like.numel(), device=like.device)
    zero, one = reach(torch.zeros_like(index)), reach(torch.ones_like(index))
    scale = one - zero
    if scale.numel() != index.numel() or not bool((scale != 0).all()):
        return None
    position = torch.zeros_like(zero, dtype=torch.long)
    place = 1
    while place < index.numel():
        position += ((reach(index // place % _DIGIT) - zero) / scale).round().long() * place
        place *= _DIGIT
    if not torch.equal(position.flatten().sort().values, index):
        return None
    c, *grid = position.shape
    t, h, w = grid if len(grid) == 3 else (1, *grid)
    return position.flatten(), (c, t, h, w)


@contextlib.contextmanager
def patched(target: Any, attributes: dict[str, Any]) -> Iterator[None]:
    """Put attributes in front of an object's own for the length of a block. The project's only patching."""
    before = {name: target.__dict__[name] for name in attributes if name in target.__dict__}
    target.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del target.__dict__[name]
        target.__dict__.update(before)
