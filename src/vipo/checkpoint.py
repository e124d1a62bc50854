"""Atomic checkpoints: weights as `diffusers` reads them, and what an exact resume needs. Nothing is pickled.

checkpoints/step_000050/
    weights/            a diffusers LoRA folder, or a whole save_pretrained pipeline
    state.safetensors   trained weights (adapters), optimizer moments, torch's RNG state
    state.json          iteration, optimizer step counts, versions
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .policy import DiffusersPolicy

log = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path, iteration: int, policy: DiffusersPolicy, optimizer: torch.optim.Optimizer, *, keep: int
) -> Path:
    """Write a checkpoint under a temporary name, rename it, then remove all but the newest `keep`."""
    final = folder / f"step_{iteration:06d}"
    partial = folder / f"partial_{iteration:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "weights").mkdir(parents=True)
    policy.save(partial / "weights")
    names = list(policy.trainable_parameters())
    tensors: dict[str, Tensor] = {"rng.torch": torch.get_rng_state()}
    counts: dict[str, Any] = {}
    for name, parameter in policy.trainable_parameters().items():
        if policy.lora:  # fully trained weights are in weights/ already
            tensors[f"weight.{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            if key == "step":
                counts[name] = float(value)
            else:
                tensors[f"optimizer.{key}.{name}"] = value.contiguous()
    save_file(tensors, partial / "state.safetensors")
    state = {"iteration": iteration, "optimizer_steps": counts, "parameters": len(names), "torch": torch.__version__}
    (partial / "state.json").write_text(json.dumps(state))
    for file in [path for path in partial.rglob("*") if path.is_file()]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name))


def load_checkpoint(path: Path, policy: DiffusersPolicy, optimizer: torch.optim.Optimizer) -> int:
    """Restore trained weights, optimizer and RNG in place; return the iteration they belong to.

    Raises:
        ValueError: the checkpoint is of another model, or cannot be read.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"--resume: cannot read checkpoint {path}: {error}") from error
    parameters = policy.trainable_parameters()
    if policy.lora:
        weights = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
    else:
        weights = policy.saved_weights(path / "weights")
    missing = sorted(set(parameters) - set(weights))
    if missing or any(weights[name].shape != p.shape for name, p in parameters.items()):
        raise ValueError(
            f"--resume: checkpoint {path} is of another model or adapter (e.g. {(missing or ['shapes'])[0]})"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            if name in state["optimizer_steps"]:
                entry: dict[str, Tensor] = {"step": torch.tensor(state["optimizer_steps"][name])}
                for key in ("exp_avg", "exp_avg_sq"):
                    entry[key] = tensors[f"optimizer.{key}.{name}"].to(parameter.device)
                optimizer.state[parameter] = entry
    torch.set_rng_state(tensors["rng.torch"])
    return int(state["iteration"])
