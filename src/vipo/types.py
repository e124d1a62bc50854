"""The records that travel between the parts, and the one legend of shapes.

Shape legend (used in every docstring and by `check_shape`):

    N = B * G   samples: B prompts, G samples per prompt (a group); samples of a group are adjacent
    K           denoising steps (`num_inference_steps`)
    C           latent channels
    T H W       latent grid: latent frames (1 for images), rows, columns; p = (t, h, w) is a latent position
    F           pixel frames (1 for images)
    Y X         pixel rows and columns
    D           feature channels of the vision backbone
    h w         patch grid of the vision backbone

Latents are (N, C, T, H, W) even for images. Pixels ("frames") are (N, F, 3, Y, X), float32 in [0, 1].
Allocation maps are (N, T, H, W), float32, >= 0. Rewards and advantages are (N,), float32.
sigma is in (0, 1], 1 = pure noise. Log-probs are float32 and in nats.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, shape: str, sizes: dict[str, int] | None = None) -> dict[str, int]:
    """Check a tensor against a shape written in the legend's letters.

    Args:
        name: what to call the tensor in the error.
        tensor: any tensor.
        shape: letters or integers separated by blanks, e.g. "N F 3 Y X".
        sizes: letters already bound, so that one letter means one size across several calls; updated in place.

    Returns:
        The sizes bound so far, by letter.

    Raises:
        ValueError: the rank differs, an integer differs, or a letter is already bound to another size.
    """
    sizes = {} if sizes is None else sizes
    letters = shape.split()
    got = tuple(tensor.shape)
    if len(letters) != len(got):
        raise ValueError(f"{name}: expected shape ({', '.join(letters)}), got {got}: wrong number of dimensions")
    for letter, size in zip(letters, got, strict=True):
        expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
        if expected != size:
            raise ValueError(f"{name}: expected shape ({', '.join(letters)}) with {letter} = {expected}, got {got}")
    return sizes


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise ValueError, with the nearest allowed value, if `value` is not one of `allowed`."""
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}{hint}")


def find_device(name: str | torch.device | None, key: str = "device") -> torch.device:
    """Return a torch device that this machine has; None = cuda where there is one, else cpu.

    Raises:
        ValueError: no such device, or none that holds values.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        present = device.type != "meta" and torch.empty(0, device=device).numel() == 0
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):  # AssertionError: a torch without CUDA
        present = False
    if not present:
        found = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise ValueError(f"{key}: {str(name)!r} is not to be had by this torch here; expected one of {found}")
    return device


@dataclass(frozen=True)
class Prompt:
    """One entry of a prompt file.

    Attributes:
        text: the prompt.
        call: further keywords of the pipeline's call for this prompt: images, sizes, a negative prompt.
        key: equal for two entries with the same call, which may then share a batch.
        category: of a published prompt set, where it has one; nothing that the pipeline sees.
    """

    text: str
    call: dict[str, Any] = field(default_factory=dict)
    key: str = "{}"
    category: str = ""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one iteration, already repeated per group.

    Attributes:
        prompts: N prompts; the G prompts of a group are adjacent and equal.
        indices: N positions of the prompts in the prompt file.
        seeds: N noise seeds, one per sample.
        initial_seeds: N seeds of the initial noise; equal within a group that starts from the same noise.
        group_size: G.
        entries: N entries of the prompt file, with the keywords of each prompt's own.
    """

    prompts: list[str]
    indices: list[int]
    seeds: list[int]
    initial_seeds: list[int]
    group_size: int
    entries: list[Prompt]

    def take(self, rows: slice) -> Self:
        """Return the batch of the samples `rows`; its first and last group may be cut."""
        lists = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "group_size"}
        return type(self)(**lists, group_size=self.group_size)


@dataclass
class StepRecord:
    """One recorded denoising step of N samples, in the pipeline's own (possibly packed) layout.

    Attributes:
        latents: x_k, what the denoiser saw.
        next_latents: x_{k+1}, the sampled value after the cast to the dtype the denoiser will see.
        log_probs: float32 log-density of `next_latents` per element, nats; None where the step is
            deterministic, or no trained denoiser ran.
        reference_mean: float32 mean of the same step under the reference weights, where it was asked for.
    """

    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor | None
    reference_mean: Tensor | None = None

    def take(self, rows: Tensor) -> Self:
        """Return the record of the samples `rows` (n,)."""
        taken: Self = _each_tensor(self, lambda tensor: tensor[rows])
        return taken


@dataclass
class Trajectory:
    """What a rollout leaves behind: enough to replay any of its steps exactly.

    Attributes:
        prompts: N prompts.
        seeds: N noise seeds.
        call: keyword arguments of the pipeline's call, without prompts and generators.
        steps: records by step number: all K, or those that `keep` has left.
        final: x_K, what the VAE will decode, in the pipeline's own layout.
        encoded: outputs of what the pipeline encodes its prompts and pictures with, in the order of its calls.
        prepared: output of the pipeline's `prepare_latents`: the latents, in a tuple with whatever else it returns.
        layout: (C*T*H*W,) positions of the latent grid's elements in one flattened sample of the pipeline's own layout.
        latent_shape: (C, T, H, W).
    """

    prompts: list[str]
    seeds: list[int]
    call: dict[str, Any]
    steps: dict[int, StepRecord]
    final: Tensor
    encoded: list[Any]
    prepared: Any
    layout: Tensor
    latent_shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def stochastic_steps(self) -> list[int]:
        """Steps whose transition has a density (std > 0), ascending."""
        return [k for k, record in self.steps.items() if record.log_probs is not None]

    def keep(self, steps: Collection[int]) -> None:
        """Forget all steps but these: only what will be trained stays in memory."""
        self.steps = {k: record for k, record in self.steps.items() if k in steps}

    def to(self, device: torch.device | str) -> Self:
        """Return the trajectory with every tensor on a device."""
        moved: Self = _each_tensor(self, lambda tensor: tensor.to(device))
        return moved


class Bucket(NamedTuple):
    """Neighbouring samples of one shape: frames (n, F, 3, Y, X), their prompts, their latent grid (T, H, W)."""

    frames: Tensor
    prompts: list[str]
    grid: tuple[int, int, int]


class Experience(NamedTuple):
    """Sampled and scored groups.

    Attributes:
        trajectories: of this rank's micro-batches, with the trained steps only.
        plan: the trained steps of every optimizer step.
        buckets: this rank's decoded samples.
        credits: what the reward returned beside its scores, per bucket.
        rewards: (R, N), of all ranks, as the next two.
        kept: (N,) bool, false in groups where a reward has failed.
        advantages: (N,), 0 where not kept.
        terms: w_r A_i^r, (R, N), whose sum over r the advantages are; None where all rewards have one map.
        own: which of the N samples are this rank's.
        maps: per bucket, where they were made beside the rollout (`reward.async`); else None.
    """

    trajectories: list[Trajectory]
    plan: list[list[int]]
    buckets: list[Bucket]
    credits: list[Tensor | None]
    rewards: Tensor
    kept: Tensor
    advantages: Tensor
    terms: Tensor | None = None
    own: slice = slice(None)
    maps: list[Tensor] | None = None


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors in a record, list, tuple or dict; what else it holds stays as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, StepRecord | Trajectory):
        return type(value)(**{f.name: _each_tensor(getattr(value, f.name), change) for f in fields(value)})
    if isinstance(value, dict):
        entries = {key: _each_tensor(entry, change) for key, entry in value.items()}
        return entries if type(value) is dict else type(value)(**entries)  # such as transformers' ModelOutput
    if isinstance(value, list | tuple):
        parts = [_each_tensor(entry, change) for entry in value]
        plain = type(value) in (list, tuple)
        return type(value)(parts) if plain else type(value)(*parts)  # a NamedTuple
    return value


class NonFiniteError(FloatingPointError):
    """A tensor with NaN or infinite elements; the message is one line.

    Attributes:
        name: of the first bad tensor.
        tensor: it, detached.
        evidence: what was being worked on, by name: whoever knows more adds to it as the error passes.
    """

    def __init__(self, message: str, name: str, tensor: Tensor) -> None:
        super().__init__(message)
        self.name, self.tensor = name, tensor.detach()
        self.evidence: dict[str, Any] = {}


def require_finite(name: str, tensor: Tensor, prompts: Sequence[str] | None = None) -> None:
    """Raise NonFiniteError if any element is NaN or infinite.

    Args:
        name: what to call the tensor in the error.
        tensor: any tensor.
        prompts: of its rows, if these are samples: the error then names the first bad one's.
    """
    finite = torch.isfinite(tensor.detach())
    if not bool(finite.all()):
        bad = (~finite).nonzero()[0].tolist()
        whose = f", prompt {prompts[bad[0]]!r}" if prompts else ""
        message = f"{name} is not finite: first bad element at index {bad} of shape {tuple(tensor.shape)}{whose}"
        raise NonFiniteError(message, name, tensor)


def require_finite_steps(steps: Mapping[int, StepRecord], prompts: Sequence[str]) -> None:
    """Raise NonFiniteError at the first recorded step whose sampled latents or log-probs are not finite.

    Args:
        steps: of a rollout of N samples.
        prompts: N.
    """
    values = [t for r in steps.values() for t in (r.next_latents, r.log_probs) if t is not None]
    if not values or bool(torch.stack([torch.isfinite(value).all() for value in values]).all()):  # one host sync
        return
    for k, record in steps.items():
        try:
            require_finite(f"latents after step {k} of the rollout", record.next_latents, prompts)
            if record.log_probs is not None:
                require_finite(f"log-prob of step {k} of the rollout", record.log_probs, prompts)
        except NonFiniteError as error:
            error.evidence.update(step=k, record=record, prompts=list(prompts))
            raise
