"""Which weights of a pipeline are trained: an adapter or all, of one denoiser or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import nn

Training: TypeAlias = "Literal['lora', 'full', 'none'] | LoraConfig"
LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("to_qkv_mlp_proj", "to_q_t", "to_k_t", "to_v_t"),  # FLUX.2's single-stream blocks; HiDream's text stream
]
"""Attention projections of diffusers' transformers and U-Nets; the names that a model lacks match nothing."""


def prepare_training(
    pipeline: DiffusionPipeline, denoisers: dict[str, nn.Module], train: Training | Mapping[str, Training]
) -> tuple[dict[str, nn.Module], bool]:
    """Attach adapters to, or free the weights of, the chosen denoisers; trained weights become float32.

    Args:
        pipeline: whose they are; nothing of it may have a gradient yet.
        denoisers: by component name.
        train: for all of them, or by name.

    Returns:
        The trained denoisers, and whether what is trained are adapters.

    Raises:
        ValueError: an unknown name or kind, an adapter where diffusers has none, or a mixture of both kinds.
    """
    plan = dict(train) if isinstance(train, Mapping) else dict.fromkeys(denoisers, train)
    if not set(plan) <= set(denoisers):
        raise ValueError(f"train: expected names out of {', '.join(denoisers)}, got {', '.join(plan)}")
    kinds = {name: _prepare(pipeline, denoisers[name], kind) for name, kind in plan.items()}
    if {"full", "lora"} <= set(kinds.values()):
        raise ValueError("train: expected an adapter for every trained denoiser or all weights of each, not both")
    trained = {name: module for name, module in denoisers.items() if kinds.get(name, "none") != "none"}
    return trained, "lora" in kinds.values()


def _prepare(pipeline: DiffusionPipeline, denoiser: nn.Module, train: Training) -> Literal["lora", "full", "none"]:
    if train == "full" or train == "none":
        denoiser.requires_grad_(train == "full")
    else:
        if train == "lora":
            train = LoraConfig(r=16, lora_alpha=32, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
        if not isinstance(train, LoraConfig):
            raise ValueError(f"train: expected lora, full, none or a peft LoraConfig, got {train!r}")
        for owner, method in ((denoiser, "add_adapter"), (pipeline, "save_lora_weights")):
            if method not in dir(owner):
                raise ValueError(f"train: diffusers has no LoRA here ({type(owner).__name__}: {method}); use full")
        try:
            denoiser.add_adapter(train)  # type: ignore[operator]
        except ValueError as error:  # no layer of that name
            raise ValueError(f"model.lora_targets: {error}") from None
    cast_training_params(denoiser, dtype=torch.float32)
    return "lora" if isinstance(train, LoraConfig) else train
