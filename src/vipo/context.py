"""Sequence parallelism: ranks that share the tokens of one sample, through `diffusers`' own context parallelism.

Each rank of a group runs the denoiser on its part of the tokens; attention exchanges tokens for heads (Ulysses, Jacobs
et al. 2023, arXiv 2309.14509) and the last layer's output is gathered. All of a group compute the same loss of it. As
the gather hands each rank back the gradient of its own tokens only, a parameter's gradient is the sum over the group.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from diffusers import ContextParallelConfig
from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook
from diffusers.models._modeling_parallel import ContextParallelInput, ParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from .distributed import Ranks, groups

TRIED = ("Flux2Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel")
"""Denoisers whose log-probs and gradients were compared with those of one process."""


def share_tokens(module: nn.Module, device: torch.device, *, ranks: Ranks) -> None:
    """Let the ranks of a context group share the tokens of every call of a denoiser; before it is sharded.

    What `enable_parallelism` of `diffusers` does, which needs an accelerator and asserts where this says what is wrong.

    Args:
        module: a denoiser of `diffusers`.
        device: where it computes.
        ranks: all processes; `ranks.context` neighbours are a group.

    Raises:
        ValueError: the denoiser was not tried, its heads cannot be shared, or attention is not torch's own.
    """
    denoiser: Any = module
    name, context = type(module).__name__, ranks.context
    if name not in TRIED:
        raise ValueError(
            f"parallel.context: {name} cannot share its tokens, or was not tried; expected {', '.join(TRIED[:-1])} or "
            f"{TRIED[-1]}; set parallel.context=1"
        )
    heads = denoiser.config.num_attention_heads
    if heads % context:
        raise ValueError(
            f"parallel.context: expected a divisor of the {heads} attention heads of {name}, got {context}"
        )
    backend, _ = _AttentionBackendRegistry.get_active_backend()
    if backend is not AttentionBackendName.NATIVE:
        raise ValueError(
            f"parallel.context: DIFFUSERS_ATTN_BACKEND={backend.value} was not tried; expected native; unset it"
        )
    names = ("data", "ring", "ulysses")
    mesh = groups(device.type, (ranks.data_world, 1, context), names, ranks.timeout)
    shared = ContextParallelConfig(ulysses_degree=context, mesh=mesh)
    denoiser._parallel_config = ParallelConfig(context_parallel_config=shared)
    denoiser._parallel_config.setup(ranks.rank, ranks.world, device, mesh=mesh)
    shared._flattened_mesh.get_group().set_timeout(timedelta(seconds=ranks.timeout))
    for part in module.modules():
        if (processor := getattr(part, "processor", None)) is not None:
            processor._parallel_config = denoiser._parallel_config
    for path, plan in denoiser._cp_plan.items():
        hook = _Split(plan, shared) if isinstance(plan, dict) else ContextParallelGatherHook([plan], shared)
        HookRegistry.check_if_exists_or_initialize(module.get_submodule(path)).register_hook(hook, f"context:{path}")


class _Split(ContextParallelSplitHook):  # type: ignore[misc]
    """Takes this rank's tokens, and says in words where they cannot be shared."""

    def _prepare_cp_input(self, x: Tensor, cp_input: ContextParallelInput) -> Tensor:
        ranks: int = self.parallel_config.ulysses_degree
        if cp_input.expected_dims in (None, x.ndim) and x.shape[cp_input.split_dim] % ranks:
            raise ValueError(
                f"parallel.context: {x.shape[cp_input.split_dim]} tokens cannot be shared evenly by {ranks} ranks; "
                "change sampling.height, sampling.width, num_frames or max_sequence_length in sampling.call, or "
                "parallel.context"
            )
        part: Tensor = super()._prepare_cp_input(x, cp_input)
        return part
