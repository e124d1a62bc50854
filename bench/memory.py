"""What GPU memory and how many FLOPs each shipped recipe needs, computed without a GPU and without any weights.

    python bench/memory.py      the table of docs/models.md, and docs/memory.json; ten minutes on one core

The networks are built in their published sizes on the meta device, whose tensors have a shape and a dtype but no
content. One replayed step runs forward and backward on them, and `Live` adds up the storages that are alive.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
import transformers as T
from diffusers import AutoencoderKL, ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from published import MODELS, Call, Model, Part
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vipo import Config
from vipo.files import write_atomically
from vipo.maps import CONTENT_FREE
from vipo.trainable import LORA_TARGETS

BEGIN, END = "<!-- bench/memory.py: begin -->", "<!-- bench/memory.py: end -->"
ROOT = Path(__file__).parents[1]
RECIPES = {
    path.stem: path
    for path in sorted((ROOT / "src" / "vipo" / "recipes").glob("*.yaml"))
    if not path.stem.startswith("nano")
}
_DINOV2_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
BACKBONES: dict[str, Part] = {
    "facebook/dinov2-base": (T.Dinov2Model, {"image_size": 518, "patch_size": 14}),
    "facebook/dinov2-large": (T.Dinov2Model, {**_DINOV2_LARGE, "image_size": 518, "patch_size": 14}),
}
SUSTAINED = 250e12  # FLOP/s for the column of hours: about a quarter of an H100's dense bfloat16 rate
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_ATTENTION_FLOPS: dict[Any, Callable[..., int]] = {
    _FLASH: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v),
    _FLASH_BACKWARD: lambda grad, q, k, v, *rest, **more: sdpa_backward_flop_count(grad, q, k, v),
}
_LOWER = {functional.linear, functional.conv2d, functional.scaled_dot_product_attention}
_FLOAT32 = {functional.group_norm, functional.layer_norm}


class Live(TorchDispatchMode):
    """Adds up the bytes of the storages that were made since it began and are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator; what goes in was there before, what comes out may be made by it."""
        self._meet((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, made=True)
        return out

    def _meet(self, values: Any, made: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and (key := (storage := value.untyped_storage())._cdata) not in self._sizes:
                self._sizes[key] = storage.nbytes() if made else 0
                self.now += self._sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class Kernels(TorchFunctionMode):
    """What CUDA does and the meta device does not: fused attention, and autocast.

    Fused attention keeps queries, keys, values, output and one number per query, not the matrix of weights. Autocast
    runs linear maps, convolutions and attention in its dtype, normalisations in float32.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        if self.autocast and func in _LOWER | _FLOAT32:
            dtype = self.autocast if func in _LOWER else torch.float32
            args, kwargs = tree_map(lambda value: _cast(value, dtype), (args, kwargs))
        return (fused_attention if func is functional.scaled_dot_product_attention else func)(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention by the one fused kernel that every device has."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    output: Tensor = _FLASH(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


def build(part: Part, dtype: torch.dtype) -> nn.Module:
    """Build a part on the meta device, frozen, with the dtypes that from_pretrained gives it."""
    made, config = part
    diffusers = issubclass(made, ModelMixin)
    with torch.device("meta"):
        module: nn.Module = made(**config) if diffusers else made(made.config_class(**config))
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


def use_checkpointing(denoiser: Any, autocast: torch.dtype | None = None) -> None:
    """Recompute blocks in the backward pass, with `Kernels` there too."""

    def recomputed(block: Callable[..., Any], *args: Any) -> Any:
        both = contextlib.nullcontext(), Kernels(autocast)
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: both)

    denoiser.enable_gradient_checkpointing(recomputed)


def replayed_step(
    denoiser: nn.Module, inputs: dict[str, Any], *, calls: int = 1, autocast: torch.dtype | None = None
) -> tuple[int, int]:
    """Run one step forward and backward.

    Returns:
        Bytes alive after the forward pass (what the graph keeps) and at the peak of both.
    """
    with Live() as live:
        with Kernels(autocast):
            outputs = [denoiser(**inputs, return_dict=False)[0] for _ in range(calls)]
        kept = live.now
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    return kept, live.peak


def step_flops(
    denoiser: nn.Module, inputs: dict[str, Any], *, calls: int = 1, autocast: torch.dtype | None = None
) -> tuple[int, int]:
    """Count the FLOPs of one step without and with gradients (forward, recomputation, backward)."""
    found = []
    for with_gradients in (False, True):
        counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS)
        with counter, torch.set_grad_enabled(with_gradients):
            with Kernels(autocast):
                output = denoiser(**inputs, return_dict=False)[0]
            if with_gradients:
                torch.autograd.backward(output, torch.empty_like(output))
        found.append(calls * counter.get_total_flops())
    return found[0], found[1]


def decode_peak(vae: Any, latents: Tensor) -> int:
    """Bytes alive at the peak of decoding latents (N, C, T, H, W)."""
    with torch.no_grad(), Live() as live, Kernels():
        vae.decode(latents[:, :, 0] if isinstance(vae, AutoencoderKL) else latents, return_dict=False)
    return live.peak


def size(module: nn.Module, trained: bool = False) -> int:
    """Bytes of the frozen weights and the buffers, or of the trained weights."""
    weights = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad == trained)
    return weights if trained else weights + sum(buffer.nbytes for buffer in module.buffers())


def latent_grid(config: Config) -> tuple[int, int, int]:
    """(T, H, W): every model here has 8 x 8 pixels, and four frames after the first, per latent position."""
    frames = config.sampling.call.get("num_frames", 1)
    return (frames - 1) // 4 + 1, (config.sampling.height or 0) // 8, (config.sampling.width or 0) // 8


def micro_batch(config: Config) -> int:
    """Samples per rollout and replay."""
    return config.sampling.micro_batch or config.num_samples


def plan(model: Model, config: Config) -> tuple[Call, int]:
    """The denoiser's call in a replayed step, and how often it is made."""
    sampling = config.sampling
    scale = sampling.call.get("true_cfg_scale") or sampling.guidance_scale or 1.0
    guided = scale > 1 and model.guidance != "embedded"
    samples = micro_batch(config) * (2 if guided and model.guidance == "doubled" else 1)
    call = Call(samples, latent_grid(config), model.tokens, getattr(torch, config.model.dtype))
    return call, 2 if guided and model.guidance == "two calls" else 1


def recorded(config: Config, model: Model, inputs: dict[str, Any], calls: int) -> int:
    """Bytes that the trajectories of an iteration hold, and the frames of it and of the previous one.

    The micro-batch that is being sampled holds all of its steps, the others the trained ones at most.
    """
    sampling, n, steps = config.sampling, config.num_samples, config.trained_steps
    t, h, w = latent_grid(config)
    elements = model.latent_channels * t * h * w
    first, end = sampling.reach
    sampled, waiting = micro_batch(config), n - micro_batch(config)
    all_latents = sampling.num_inference_steps + 1
    latents = sampled * all_latents + waiting * min(2 * steps + 2, all_latents)
    latents = elements * latents * (4 if model.float32_latents else 2)
    log_probs = elements * (sampled * (sampling.window or end - first) + waiting * steps) * 4
    reference = elements * n * steps * 4 if config.loss.kl_beta > 0 else 0
    embeddings = sum(inputs[name].nbytes for name in ("encoder_hidden_states", "pooled_projections") if name in inputs)
    frames = n * sampling.call.get("num_frames", 1) * 3 * 8 * h * 8 * w * 4
    return latents + log_probs + reference + embeddings * calls * -(-n // micro_batch(config)) + 2 * frames


def measure(config: Config) -> dict[str, Any]:
    """Compute parameters, bytes and FLOPs of one recipe."""
    model, dtype = MODELS[config.model.path], getattr(torch, config.model.dtype)
    autocast = getattr(torch, config.model.autocast) if config.model.autocast else None
    denoiser, vae = build(model.denoiser, dtype), build(model.vae, dtype)
    encoders = {name: build(part, dtype) for name, part in model.text_encoders.items()}
    others = {name: build(part, dtype) for name, part in model.more.items()} | {"VAE": vae}
    if config.map.control not in CONTENT_FREE:
        others[config.map.backbone] = build(BACKBONES[config.map.backbone], torch.float32)
    parts = {"denoiser": denoiser, **encoders, **others}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    add_adapter(denoiser, config)
    if config.model.gradient_checkpointing:
        use_checkpointing(denoiser, autocast)
    call, calls = plan(model, config)
    with torch.device("meta"):
        inputs = model.inputs(denoiser.config, call)
        latents = torch.empty(micro_batch(config), model.latent_channels, *call.grid, dtype=dtype)
    kept, activations = replayed_step(denoiser, inputs, calls=calls, autocast=autocast)
    forward, update = step_flops(denoiser, inputs, calls=calls, autocast=autocast)
    steps, kl = config.trained_steps, config.loss.kl_beta > 0
    trained = size(denoiser, trained=True)
    found = {
        "denoiser": size(denoiser),
        "idle": {"text encoders": sum(map(size, encoders.values()))} | {name: size(p) for name, p in others.items()},
        "trained": {"weights": trained, "gradients": trained, "adamw": 2 * trained},
        "recorded": recorded(config, model, inputs, calls),
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


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: one recipe per row, GiB; then what an iteration computes."""
    columns = ["recipe", "denoiser", "text encoders", "VAE and others", "trained", "recorded", "step: kept, peak"]
    columns += ["decode", "**all resident**", "**idle parts off**", "PFLOP per iteration", "hours"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, recipe in found.items():
        held, peak, flops = recipe["bytes"], recipe["peak"], recipe["flops"]["iteration"]
        text, others = held["idle"]["text encoders"], sum(held["idle"].values()) - held["idle"]["text encoders"]
        step = f"{gib(held['update']['kept'])}, {gib(held['update']['peak'])}"
        cells = [name, gib(held["denoiser"]), gib(text), gib(others), gib(sum(held["trained"].values()))]
        cells += [gib(held["recorded"]), step, gib(held["decode"])]
        cells += [f"**{gib(peak['all resident'])}**", f"**{gib(peak['idle parts off'])}**"]
        cells += [f"{flops / 1e15:.1f}", f"{recipe['iterations'] * flops / SUSTAINED / 3600:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gib(number: int) -> str:
    """Bytes as GiB."""
    return f"{number / 2**30:.1f}"


def main() -> None:
    """Read the command line, compute, print, and write the page and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    found = {}
    for name, path in RECIPES.items():
        found[name] = measure(Config.from_yaml(path))
        print(table({name: found[name]}).splitlines()[-1], flush=True)
    page = options.output / "models.md"
    text = table(found)
    if page.exists():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        text = f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(page, text)
    write_atomically(options.output / "memory.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
