"""Count the memory and FLOPs of tensors: on the meta device without content, or of real ones.

`Live` adds up the storages that are alive; `Kernels` puts CUDA's fused attention and autocast in front of torch.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

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
        super().__init__()  # type: ignore[no-untyped-call]
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
    live = Live()
    with torch.no_grad(), live, Kernels():
        vae.decode(latents[:, :, 0] if isinstance(vae, AutoencoderKL) else latents, return_dict=False)
    return live.peak
