"""The policy that a config describes."""

from __future__ import annotations

import functools

import torch
from peft import LoraConfig

from .config import Config
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
        shard=functools.partial(shard, cpu_offload=config.parallel.cpu_offload)
        if config.parallel.shard and ranks is not None
        else None,
        allow_pickle=model.allow_pickle,
    )
    vae = {"tiling": model.vae_tiling, "slicing": model.vae_slicing, "channels_last": model.vae_channels_last}
    enable_vae(policy.pipeline, **vae)
    if model.compile:
        compile_blocks(policy.denoisers)
    return policy
