"""Checkpoints that are whole or are not there, and what an exact resume needs. Nothing is pickled.

checkpoints/step_000050/
    weights/            a diffusers LoRA folder, or a whole save_pretrained pipeline
    weights_ema/        the same of the averaged weights, with optimizer.ema
    state.safetensors   trained weights and their average (adapters), optimizer moments, states of torch's generators
    state.json          iteration, optimizer step counts, score, other generators, prompts, versions
    config.yaml         the resolved config
    manifest.json       size and SHA-256 of every file; written last

It is written as partial_000050, flushed to the disk and renamed: a step_* folder was complete when it got its name.
Prompts, seeds, learning rate and metrics have no state of their own: each is a function of config and iteration.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import Config, RunConfig
from .distributed import shard_like, whole
from .ema import WeightAverage
from .files import sync_folder, writing
from .manifest import fault, seal
from .optimizer import restored_state, saved_moments
from .policy import DiffusersPolicy
from .rng import rng_state, set_rng_state
from .runlog import CONFIG
from .versions import versions

log = logging.getLogger(__name__)
STATE, TENSORS = "state.json", "state.safetensors"


def save_checkpoint(
    folder: Path,
    iteration: int,
    policy: DiffusersPolicy,
    optimizer: torch.optim.Optimizer,
    *,
    config: Config,
    ema: WeightAverage | None = None,
    facts: Mapping[str, Any],
) -> Path:
    """Write a checkpoint, then remove all but the newest `run.keep` and, with `run.keep_best`, the best.

    Args:
        folder: of the checkpoints.
        iteration: finished iterations.
        policy: whose trained weights are saved.
        optimizer: of them.
        config: of the run.
        ema: their average.
        facts: further entries of state.json; "score" decides which checkpoint is the best, the highest.

    Raises:
        OSError: it cannot be written; nothing of it is left, and the checkpoints before are as they were.
    """
    final, partial = folder / f"step_{iteration:06d}", folder / f"partial_{iteration:06d}"
    try:
        with writing(final):
            _remove_partial(folder)
            partial.mkdir(parents=True)
            _write(partial, iteration, policy, optimizer, config, ema, facts)
            seal(partial)
            _remove(final)
            partial.rename(final)
            sync_folder(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _remove_surplus(folder, config.run)
    return final


def _write(
    folder: Path,
    iteration: int,
    policy: DiffusersPolicy,
    optimizer: torch.optim.Optimizer,
    config: Config,
    ema: WeightAverage | None,
    facts: Mapping[str, Any],
) -> None:
    (folder / "weights").mkdir()
    policy.save(folder / "weights")
    if ema is not None:
        (folder / "weights_ema").mkdir()
        with ema.in_place():
            policy.save(folder / "weights_ema")
    generators, tensors = rng_state(policy.device)
    counts: dict[str, float] = {}
    for i, (name, parameter) in enumerate(policy.trainable_parameters().items()):
        if policy.lora:  # fully trained weights are in weights/ already
            tensors[f"weight.{name}"] = whole(parameter.detach()).contiguous()
            if ema is not None:
                tensors[f"ema.{name}"] = whole(ema.values[i]).contiguous()
        entry = optimizer.state.get(parameter, {})
        if entry:
            counts[name] = float(whole(entry["step"]))
        for key, value in saved_moments(entry).items():
            tensors[f"optimizer.{key}.{name}"] = whole(value).contiguous()
    save_file(tensors, folder / TENSORS)
    state = {"iteration": iteration, "optimizer_steps": counts, "generators": generators, **facts, **versions()}
    (folder / STATE).write_text(json.dumps(state, allow_nan=False) + "\n", encoding="utf-8")
    (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")


def gather_state(policy: DiffusersPolicy, optimizer: torch.optim.Optimizer, ema: WeightAverage | None = None) -> None:
    """Do a rank's part in a checkpoint of sharded weights that rank 0 writes: join the same tensors in its order."""
    policy.save(None)
    if ema is not None:
        with ema.in_place():
            policy.save(None)
    for i, parameter in enumerate(policy.trainable_parameters().values()):
        if policy.lora:
            whole(parameter.detach())
            if ema is not None:
                whole(ema.values[i])
        for value in optimizer.state.get(parameter, {}).values():
            whole(value)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that no half of it ever has a checkpoint's name."""
    if checkpoint.exists():
        going = checkpoint.with_name(checkpoint.name.replace("step_", "partial_old_"))
        checkpoint.rename(going)
        shutil.rmtree(going)


def _remove_surplus(folder: Path, run: RunConfig) -> None:
    saved = list_checkpoints(folder)
    kept = {*saved[-run.keep :], *([max(saved, key=_score)] if saved and run.keep_best else ())}
    for old in saved:
        if old not in kept:
            _remove(old)


def _remove_partial(folder: Path) -> None:
    for leftover in folder.glob("partial_*"):
        shutil.rmtree(leftover)


def _score(checkpoint: Path) -> tuple[float, str]:
    """What the best checkpoint has most of; of equals the newest."""
    try:
        return float(json.loads((checkpoint / STATE).read_bytes())["score"]), checkpoint.name
    except (OSError, ValueError, KeyError, TypeError):  # a damaged one is not the best
        return float("-inf"), checkpoint.name


def list_checkpoints(folder: Path) -> list[Path]:
    """Everything that has a checkpoint's name, oldest first; whether it is undamaged is not looked at."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name))


def require_whole(checkpoint: Path) -> Path:
    """Return a checkpoint, or raise ValueError saying what is wrong with it."""
    found = fault(checkpoint)
    if found:
        raise ValueError(f"{checkpoint}: {found}; use another checkpoint")
    return checkpoint


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest undamaged checkpoint; a warning names each damaged one that is passed over.

    Returns:
        Its folder, or None where there is no checkpoint at all.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    faults: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        found = fault(checkpoint)
        if not found:
            for line in faults:
                log.warning("skipped a damaged checkpoint: %s; going on with %s", line, checkpoint.name)
            return checkpoint
        faults.append(f"{checkpoint.name}: {found}")
    if faults:
        raise ValueError(f"{folder} has no undamaged checkpoint ({'; '.join(faults)}); start again with --overwrite")
    return None


def go_back_to(folder: Path, iteration: int, run: RunConfig) -> None:
    """Leave the folder as it was after an iteration: a killed session may not have come to the end of its tidying.

    Later checkpoints were passed over because they are damaged; they are renamed to damaged_*.
    """
    _remove_partial(folder)
    for checkpoint in list_checkpoints(folder):
        if int(checkpoint.name.removeprefix("step_")) > iteration:
            aside = checkpoint.with_name(checkpoint.name.replace("step_", "damaged_"))
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
    _remove_surplus(folder, run)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read state.json of an undamaged checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_bytes())
    return state


def load_checkpoint(
    checkpoint: Path,
    policy: DiffusersPolicy,
    optimizer: torch.optim.Optimizer,
    ema: WeightAverage | None = None,
) -> dict[str, Any]:
    """Restore trained weights, their average, optimizer and random generators in place; return state.json.

    Where the checkpoint has no average, a new one begins at its weights.

    Raises:
        ValueError: the checkpoint is of another model or adapter, or its moments of another precision.
    """
    state, tensors = read_state(checkpoint), load_file(checkpoint / TENSORS)
    parameters = policy.trainable_parameters()
    weights = _weights(checkpoint, "weights", "weight.", policy, tensors)
    missing = sorted(set(parameters) - set(weights))
    if missing or any(weights[name].shape != p.shape for name, p in parameters.items()):
        raise ValueError(
            f"--resume: checkpoint {checkpoint} is of another model or adapter (e.g. {(missing or ['shapes'])[0]})"
        )
    saved: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, moment, name = key.split(".", 2)
            saved[name][moment] = value
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(weights[name], parameter))
            if name in state["optimizer_steps"]:
                moments = {key: shard_like(value, parameter) for key, value in saved[name].items()}
                optimizer.state[parameter] = restored_state(optimizer, state["optimizer_steps"][name], moments)
    if ema is not None:
        averaged = (checkpoint / "weights_ema").is_dir()
        values = _weights(checkpoint, "weights_ema", "ema.", policy, tensors) if averaged else weights
        ema.restart([values[name] for name in parameters])
    set_rng_state(state["generators"], tensors, policy.device)
    return state


def _weights(
    checkpoint: Path, name: str, prefix: str, policy: DiffusersPolicy, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Saved values of the trained weights by name: adapters' from the state, all weights from their pipeline."""
    if policy.lora:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return policy.saved_weights(checkpoint / name)
