"""What GPU memory and how many FLOPs a run needs: its networks built on the meta device, from configs alone.

Tensors there have a shape and a dtype but no content. One replayed step runs forward and backward on them, and
`vipo.memory.live.Live` adds up the storages that are alive.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import nn

from ..config import Config
from ..maps import CONTENT_FREE
from ..optimizer import moment_bytes
from ..trainable import LORA_TARGETS
from .live import decode_peak, replayed_step, step_flops, use_checkpointing
from .published import Call, Latents, Model, Part


def build(part: Part, dtype: torch.dtype) -> nn.Module:
    """Build a part on the meta device, frozen, with the dtypes that from_pretrained gives it."""
    made, config = part
    diffusers = issubclass(made, ModelMixin)
    with torch.device("meta"):
        module: nn.Module = made.from_config(config) if diffusers else made(made.config_class(**config))
    kept = (made._keep_in_fp32_modules or []) if diffusers else []
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if set(kept) & set(name.split(".")) else dtype)
    return module.eval().requires_grad_(False)


def add_adapter(denoiser: Any, config: Config) -> None:
    """Make a denoiser trainable as `vipo.policy` does, with gradients as a first micro-batch leaves them."""
    if config.model.train == "lora":
        targets = config.model.lora_targets or LORA_TARGETS
        with torch.device("meta"):
            denoiser.add_adapter(LoraConfig(r=config.model.lora_rank, target_modules=targets))
    else:
        denoiser.requires_grad_(True)
    cast_training_params(denoiser, dtype=torch.float32)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)


def size(module: nn.Module, trained: bool = False) -> int:
    """Bytes of the frozen weights and the buffers, or of the trained weights."""
    weights: int = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad == trained)
    return weights if trained else weights + sum(buffer.nbytes for buffer in module.buffers())


def micro_batch(config: Config) -> int:
    """Samples per rollout and replay."""
    return config.sampling.given_micro_batch or config.num_samples


def plan(model: Model, config: Config, grid: tuple[int, int, int]) -> tuple[Call, int]:
    """The denoiser's call in a replayed step, and how often it is made."""
    sampling, family = config.sampling, model.family
    scale = sampling.call.get("true_cfg_scale") or sampling.guidance_scale or 1.0
    guided = scale > 1 and family.guidance != "embedded"
    samples = micro_batch(config) * (2 if guided and family.guidance == "doubled" else 1)
    call = Call(samples, grid, model.tokens, getattr(torch, config.model.dtype))
    return call, 2 if guided and family.guidance == "two calls" else 1


def recorded(config: Config, model: Model, latents: Latents, inputs: dict[str, Any], calls: int) -> int:
    """Bytes that the trajectories of an iteration hold, and the frames of it and of the previous one.

    The micro-batch that is being sampled holds all of its steps, the others the trained ones at most.
    """
    sampling, n, steps = config.sampling, config.num_samples, config.trained_steps
    t, h, w = latents.grid
    elements = latents.channels * t * h * w
    first, end = sampling.reach
    sampled, waiting = micro_batch(config), n - micro_batch(config)
    all_latents = sampling.num_inference_steps + 1
    kept = sampled * all_latents + waiting * min(2 * steps + 2, all_latents)
    itemsize: int = 4 if model.family.float32_latents else getattr(torch, config.model.dtype).itemsize
    log_probs = elements * (sampled * (sampling.window or end - first) + waiting * steps) * 4
    reference = elements * n * steps * 4 if config.loss.kl_beta > 0 else 0
    embeddings: int = sum(
        inputs[name].nbytes for name in ("encoder_hidden_states", "pooled_projections") if name in inputs
    )
    frames = n * 3 * latents.pixels * 4
    return (
        elements * kept * itemsize
        + log_probs
        + reference
        + embeddings * calls * -(-n // micro_batch(config))
        + 2 * frames
    )


def measure(config: Config, model: Model) -> dict[str, Any]:
    """Compute parameters, bytes and FLOPs of a run of `config` with `model`.

    Raises:
        ValueError: `sampling.micro_batch` is "auto", which needs the weights.
    """
    if config.sampling.micro_batch == "auto":
        raise ValueError("sampling.micro_batch: auto is found with the weights loaded; give a number")
    dtype = getattr(torch, config.model.dtype)
    autocast = getattr(torch, config.model.autocast) if config.model.autocast else None
    denoiser, vae = build(model.denoiser, dtype), build(model.vae, dtype)
    encoders = {name: build(part, dtype) for name, part in model.text_encoders.items()}
    others = {name: build(part, dtype) for name, part in model.more.items()} | {"VAE": vae}
    if config.map.control not in CONTENT_FREE:
        others |= {name: build(part, torch.float32) for name, part in model.backbones.items()}
    parts = {"denoiser": denoiser, **encoders, **others}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    add_adapter(denoiser, config)
    if config.model.gradient_checkpointing:
        use_checkpointing(denoiser, autocast)
    sample = model.latents(config, vae)
    call, calls = plan(model, config, sample.grid)
    with torch.device("meta"):
        inputs = model.family.inputs(denoiser.config, call)
        latents = torch.empty(micro_batch(config), sample.channels, *call.grid, dtype=dtype)
    kept, activations = replayed_step(denoiser, inputs, calls=calls, autocast=autocast)
    forward, update = step_flops(denoiser, inputs, calls=calls, autocast=autocast)
    steps, kl = config.trained_steps, config.loss.kl_beta > 0
    trained = size(denoiser, trained=True)
    moments = moment_bytes([p for p in denoiser.parameters() if p.requires_grad], config.optimizer.state)
    reference = trained if kl and config.model.train == "full" else 0  # its copy; an adapter needs none
    found = {
        "denoiser": size(denoiser) + reference,
        "idle": {"text encoders": sum(map(size, encoders.values()))} | {name: size(p) for name, p in others.items()},
        "trained": {"weights": trained, "gradients": trained, "adamw": moments},
        "recorded": recorded(config, model, sample, inputs, calls),
        "update": {"kept": kept, "peak": activations},
        "decode": decode_peak(vae, latents),
    }
    iteration = -(-config.num_samples // micro_batch(config)) * (
        config.sampling.num_inference_steps * forward + steps * (update + (forward if kl else 0))
    )
    return {
        "parameters": parameters | {"trained": trained // 4},
        "bytes": found,
        "peak": peaks(found),
        "flops": {"forward": forward, "update": update, "iteration": iteration},
        "iterations": config.run.iterations,
    }


def peaks(found: dict[str, Any]) -> dict[str, int]:
    """The largest sum of bytes with every part resident, and with each idle part resident only while it works."""
    idle, update, decode = found["idle"], found["update"]["peak"], found["decode"]
    always = found["denoiser"] + sum(found["trained"].values()) + found["recorded"]
    visits = [weights + (decode if name == "VAE" else 0) for name, weights in idle.items()]
    return {
        "all resident": always + sum(idle.values()) + max(update, decode),
        "idle parts off": always + max(update, *visits),
    }
