"""The policy that a config describes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig
from torch import nn

from .config import Config
from .context import share_tokens
from .distributed import Ranks, shard
from .pipelines import compile_blocks, enable_vae
from .policy import DiffusersPolicy
from .trainable import LORA_TARGETS, Training


def make_policy(config: Config, *, trainable: bool = True, ranks: Ranks | None = None) -> DiffusersPolicy:
    """Build the policy of a config; without adapter and gradients where it is not `trainable`, sharded over ranks."""
    model = config.model
    lora = LoraConfig(
        r=model.lora_rank,
        lora_alpha=model.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=model.lora_targets or LORA_TARGETS,
    )
    train: Training = lora if model.train == "lora" else "full"
    chosen = train if model.denoisers is None else dict.fromkeys(model.denoisers, train)
    policy = DiffusersPolicy(
        model.path,
        kernel=config.sampling.kernel,
        eta=config.sampling.eta,
        shift=config.sampling.shift,
        unconditional=config.sampling.unconditional,
        offload=model.offload,
        train=chosen if trainable else "none",
        dtype=getattr(torch, model.dtype),
        autocast=getattr(torch, model.autocast) if model.autocast else None,
        device=(ranks or Ranks()).device(model.device),
        shard=_spread(config, ranks) if ranks is not None and config.parallel.in_step else None,
        allow_pickle=model.allow_pickle,
    )
    vae = {"tiling": model.vae_tiling, "slicing": model.vae_slicing, "channels_last": model.vae_channels_last}
    enable_vae(policy.pipeline, **vae)
    if model.compile:
        compile_blocks(policy.denoisers)
    return policy


def _spread(config: Config, ranks: Ranks) -> Callable[[nn.Module, torch.device], None]:
    """How the ranks share the work of a denoiser, and then its weights."""
    parallel = config.parallel

    def spread(denoiser: nn.Module, device: torch.device) -> None:
        if parallel.context > 1:
            share_tokens(denoiser, device, ranks=ranks)
        if parallel.shard:
            shard(denoiser, device, ranks=ranks, size=parallel.shard_size, cpu_offload=parallel.cpu_offload)

    return spread
