"""`vipo check --memory`: the memory of a run, from configs alone. docs/models.md says what counts."""

from __future__ import annotations

from typing import Any

from ..config import Config
from .folder import find_model
from .ranks import blocks, per_rank, traffic
from .recipe import add_adapter, build, measure, plan


def report(config: Config, ranks: int = 1, *, shard: bool = False) -> Any:
    """Make a table (of rich) of the bytes on each rank.

    Args:
        config: of what one rank samples.
        ranks: N, GPUs.
        shard: also a column for a denoiser sharded by FSDP2, over groups of `parallel.shard_size` ranks.

    Raises:
        ValueError: what the config names cannot be sized without its weights; too few ranks to shard, or no groups.
    """
    import torch
    from rich.table import Table

    if ranks < 1 or shard and ranks < 2:
        raise ValueError(f"--ranks: expected at least {2 if shard else 1}, got {ranks}")
    size = config.parallel.shard_size or ranks
    if shard and ranks % size:
        raise ValueError(f"--ranks: expected a multiple of parallel.shard_size={size}, got {ranks}")
    model = find_model(config)
    found = measure(config, model)
    denoiser = build(model.denoiser, getattr(torch, config.model.dtype))
    add_adapter(denoiser, config)
    held, trained = found["bytes"], found["bytes"]["trained"]["weights"]
    sharded = "sharded" if size == ranks else f"sharded by {size}"
    columns = {"replicated" if ranks > 1 else "one GPU": None, **({sharded: blocks(denoiser)} if shard else {})}
    table = Table("GiB per rank", *columns, title=f"{config.model.path}, {ranks} rank{'s' * (ranks > 1)}")
    offload = config.model.offload != "none"
    sides = {name: per_rank(held, units, size, offload=offload) for name, units in columns.items()}
    for kind in next(reversed(sides.values())):
        label = f"map's backbone {kind}" if kind in model.backbones else kind
        table.add_row(label, *(gib(side.get(kind, 0)) for side in sides.values()), style="bold" * (kind == "total"))
    parameters = sum(p.nbytes for p in denoiser.parameters())
    sample = model.latents(config, build(model.vae, torch.float32))
    calls = plan(model, config, sample.grid)[1]
    for kind in ("optimizer step", "iteration"):
        sent = [
            traffic(config, parameters, trained, calls, ranks, size=size if units else None)
            for units in columns.values()
        ]
        if ranks > 1:
            table.add_row(f"sent per {kind}", *(gib(side[kind]) for side in sent))
    table.caption = (
        f"not counted: rewards ({', '.join(config.reward.weights)}), the CUDA context, fragmentation, activations of "
        "encoders and backbone; tiling and slicing of the VAE only lower it"
        + ("; parallel.context: activations are those of all tokens" if config.parallel.context > 1 else "")
        + (f"; counted though map.device puts it on {config.map.device}: the backbone" if config.map.device else "")
    )
    return table


def gib(number: int) -> str:
    """Bytes as GiB, to three digits."""
    return f"{number / 2**30:.3g}"
