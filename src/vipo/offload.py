"""Keep models off the accelerator while they are idle: encoders, VAE, the map's backbone, the reward."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook, remove_hook_from_module
from diffusers import DiffusionPipeline
from torch import nn
from torch.distributed.fsdp import FSDPModule

Offload = Literal["none", "idle", "sequential"]


class IdleParts:
    """The parts of a pipeline that only encode and decode: text and image encoders, VAE.

    With "idle" a part is moved to the accelerator when it is called, and back by `release`. With "sequential" it is
    moved layer by layer, which is slow and needs the least memory. With "none" everything stays where it is put.

    Args:
        pipeline: its parts get accelerate's hooks.
        busy: names of the components that stay on the accelerator: the denoisers.
        device: the accelerator.
        mode: none, idle or sequential.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, busy: Collection[str], device: torch.device, mode: Offload = "none"
    ) -> None:
        if mode not in ("none", "idle", "sequential"):
            raise ValueError(f"offload: expected none, idle or sequential, got {mode!r}")
        self.device, self.mode = device, mode
        modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        self.parts = {
            name: part for name, part in modules.items() if name not in busy and any(True for _ in part.parameters())
        }
        for name, module in modules.items():
            remove_hook_from_module(module, recurse=True)  # of an earlier policy on the same pipeline
            if (mode == "none" or name not in self.parts) and not isinstance(module, FSDPModule):
                module.to(device)
        # diffusers finds the accelerator by the hooks of what is not in this list
        self.in_front: dict[str, Any] = {} if mode == "none" else {"_exclude_from_cpu_offload": list(busy)}
        self._hooks: list[UserCpuOffloadHook] = []
        self._attach()

    def _attach(self) -> None:
        for part in self.parts.values():
            if self.mode == "idle":
                self._hooks.append(cpu_offload_with_hook(part, self.device)[1])
            elif self.mode == "sequential":
                cpu_offload(part, self.device, offload_buffers=len(part._parameters) > 0)

    def release(self) -> None:
        """Move every part that was called back to the CPU."""
        for hook in self._hooks:
            if next(hook.model.parameters()).device.type != "cpu":
                hook.offload()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Have plain modules with their weights for the length of a block, as saving needs them."""
        for part in self.parts.values():
            remove_hook_from_module(part, recurse=True)
        self._hooks.clear()
        try:
            yield
        finally:
            self._attach()


@contextlib.contextmanager
def visiting(parts: Iterable[Any], device: torch.device, mode: Offload) -> Iterator[None]:
    """Have rewards or a backbone on the accelerator for the length of a block, those that are modules."""
    modules = [part for part in parts if mode != "none" and isinstance(part, nn.Module)]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module in modules:
            module.to("cpu")
