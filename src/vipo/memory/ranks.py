"""Memory of one rank, replicated or sharded by FSDP2, and what ranks send each other (docs/scaling.md)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import Config
from .recipe import micro_batch


def blocks(denoiser: nn.Module) -> dict[str, int]:
    """Bytes of the units that FSDP2 gathers: the outermost modules of `_no_split_modules`, and the rest.

    Returns:
        `largest`: parameters of the largest block; `largest_trained`: of its trained ones alone; `outside`: of no
        block, which stay gathered.

    Raises:
        ValueError: the denoiser names no blocks.
    """
    names = getattr(denoiser, "_no_split_modules", None)
    if not names:
        raise ValueError(f"--shard: {type(denoiser).__name__} names no blocks (_no_split_modules), so none is gathered")
    found: dict[str, nn.Module] = {}
    for name, module in denoiser.named_modules():  # a parent comes before its children
        if type(module).__name__ in names and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    sizes = [sum(p.nbytes for p in module.parameters()) for module in found.values()]
    trained = [sum(p.nbytes for p in module.parameters() if p.requires_grad) for module in found.values()]
    whole = sum(p.nbytes for p in denoiser.parameters())
    return {"largest": max(sizes), "largest_trained": max(trained), "outside": whole - sum(sizes)}


def per_rank(held: dict[str, Any], units: dict[str, int] | None, size: int, *, offload: bool) -> dict[str, int]:
    """Bytes by kind on one of many ranks, each of which samples as much as `held` does.

        replicated:  every kind as on one GPU
        sharded:     (weights + gradients + AdamW) / S + parameters outside blocks + 2 blocks + a block's gradients

    FSDP2 gathers the next block while one computes, hence two. Buffers count as weights. VAE, encoders and backbone
    are on every rank.

    Args:
        held: `bytes` of `vipo.memory.measure`.
        units: of `blocks`, for a sharded denoiser; None for a replicated one.
        size: S, ranks that hold a sharded denoiser between them.
        offload: idle parts are on the GPU only while they work.

    Returns:
        By kind; `total` is the peak, which is less than their sum: step and decode do not meet.
    """
    trained, idle = held["trained"], held["idle"]
    share = 1 if units is None else size
    found = {
        "denoiser, frozen": -(-held["denoiser"] // share),
        **{name: -(-trained[key] // share) for name, key in _TRAINED.items()},
    }
    if units:
        found["gathered blocks"] = units["outside"] + 2 * units["largest"] + units["largest_trained"]
    found |= {"recorded trajectories": held["recorded"], "activations of a step": held["update"]["peak"]}
    always = sum(found.values()) - found["activations of a step"]
    decode = {"VAE": held["decode"]}
    work = max(found["activations of a step"], held["decode"])
    visits = [size + decode.get(name, 0) for name, size in idle.items()]
    total = always + (max(found["activations of a step"], *visits) if offload else sum(idle.values()) + work)
    result: dict[str, int] = found | idle | {"VAE, decoding": held["decode"], "total": total}
    return result


_TRAINED = {"trained weights": "weights", "gradients": "gradients", "AdamW": "adamw"}


def traffic(
    config: Config, parameters: int, trained: int, calls: int, ranks: int, *, size: int | None
) -> dict[str, int]:
    """Bytes that one of N ranks sends, as much as it receives, in ring collectives.

        replicated:  2 (N-1)/N T                                   one all-reduce of the gradients
        sharded:     (S-1)/S (2 P c + T) per replayed micro-batch  all-gather forward and backward, reduce-scatter
                     2 (R-1)/R T/S per replayed micro-batch        all-reduce, of R = N/S such groups
                     (S-1)/S P c per sampled micro-batch and step  all-gather, in the rollout

    A KL term's reference is one more forward pass per replayed micro-batch. What is outside blocks counts in P, though
    it is gathered once per pass.

    Args:
        config: of what every rank samples.
        parameters: P, bytes of the denoiser, trained weights included.
        trained: T, bytes of the trained weights, and of their gradients.
        calls: c, denoiser calls per step.
        ranks: N.
        size: S, ranks that hold a sharded denoiser between them; None: every rank holds it.

    Returns:
        Bytes per `optimizer step` and per `iteration`.
    """
    settings = config.optimizer
    steps = config.trained_steps
    updates = min(settings.updates_per_rollout, steps) * settings.epochs
    if size is None:
        step: int = 2 * (ranks - 1) * trained // ranks
        return {"optimizer step": step, "iteration": updates * step}
    batches = -(-config.num_samples // micro_batch(config))
    replays = batches * steps * settings.epochs
    passes = 2 + (config.loss.kl_beta > 0)
    groups = ranks // size
    update = replays * (size - 1) * (passes * parameters * calls + trained) // size
    update += replays * 2 * (groups - 1) * trained // ranks  # (R-1)/R T/S, and R S = N
    rollout = batches * config.sampling.num_inference_steps * (size - 1) * parameters * calls // size
    return {"optimizer step": update // updates, "iteration": update + rollout}
