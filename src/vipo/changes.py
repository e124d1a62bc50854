"""A resumed run whose config is not the one it began with: what differs, and what may."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from .config import Config
from .watch_config import WatchConfig

REFUSED = {
    **dict.fromkeys(
        ("model.path", "model.train", "model.denoisers", "model.lora_rank", "model.lora_alpha", "model.lora_targets"),
        "the saved weights are of another model",
    ),
    "prompts.group_size": "what was learned so far was learned in groups of another size",
    "run.seed": "prompts and noise would follow another seed than the generators that were saved",
}
"""Keys that may not change, and why."""
FREE = {
    *("run.output", "run.save_every", "run.keep", "run.keep_best", "run.sample_every", "run.tensorboard"),
    *("run.iterations", "prompts.path", "parallel.shard", "parallel.cpu_offload", "parallel.timeout"),
    *("parallel.shard_size", "parallel.context", "model.allow_pickle"),
    *(f"watch.{key}" for key in WatchConfig.model_fields),
}
"""Keys that change nothing of what an iteration computes; of prompts.path the content is compared instead, of watch
what the base was evaluated with (`vipo.held_out`)."""


def check_changes(old: Mapping[str, Any], new: Config, *, allow: bool) -> list[str]:
    """Compare the config that a checkpoint was made with to the one that the run would go on with.

    Args:
        old: as `Config.to_yaml` wrote it.
        new: what is asked for now.
        allow: go on with changes that are not wrong (--allow-changes).

    Returns:
        A line for each change that is let through.

    Raises:
        ValueError: a line per change that cannot be let through, or that needs --allow-changes.
    """
    before, after = _flat(old), _flat(yaml.safe_load(new.to_yaml()))
    ends = new.optimizer.schedule != "constant"  # with the run: then its length is not free
    free = FREE - {"run.iterations"} if ends else FREE
    allowed, refused = [], []
    for key in dict.fromkeys((*before, *after)):
        if before.get(key) == after.get(key) or key in free:
            continue
        change = f"{key}: {before.get(key, '(none)')} -> {after.get(key, '(none)')}"
        if key in REFUSED:
            refused.append(f"--resume: {change}: refused, {REFUSED[key]}; put it back or start another run")
        elif allow:
            allowed.append(change)
        else:
            refused.append(f"--resume: {change}: put it back, or give --allow-changes")
    if refused:
        raise ValueError("\n".join(refused))
    return allowed


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, entries in config.items() for key, value in entries.items()}
