"""Make the nano assets again: `python -m vipo.nano.pretrain {prompts,vae,t2i,backbone,scorer} --output DIR`.

Each model's subcommand writes `save_pretrained` folders (safetensors) and a model card with data, steps, time, metrics.
The shipped models in vipo/nano/assets were made by these commands; their cards say with which options.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import world

log = logging.getLogger("vipo.nano.pretrain")


def fit(
    modules: list[nn.Module],
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    average: float = 0.0,
    checkpoint: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Minimise `loss_at(step)` with AdamW, warm-up and a cosine schedule; leave averaged weights if `average` > 0.

    Args:
        modules: trained jointly, all their parameters that require gradients.
        loss_at: step -> scalar loss.
        steps: optimizer steps.
        learning_rate: peak.
        weight_decay: AdamW's.
        average: decay of the exponential moving average of the weights; 0 keeps the last weights.
        checkpoint: called every tenth of the run with the step, with the averaged weights in place.

    Returns:
        steps, seconds and the smoothed final loss.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    mean = [p.detach().clone() for p in parameters]

    def swap() -> None:
        for p, m in zip(parameters, mean, strict=True):
            p.data, m.data = m.data, p.data

    smoothed, started = float("nan"), time.perf_counter()
    warm_up = max(1, min(200, steps // 10))
    for step in range(1, steps + 1):
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / warm_up) * max(0.02, cosine)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(average, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(mean, [p.detach() for p in parameters], 1 - decay)
        smoothed = loss.item() if step == 1 else 0.98 * smoothed + 0.02 * loss.item()
        if step % 100 == 0 or step == steps:
            log.info("step %d/%d  loss %.4f  %.0f s", step, steps, smoothed, time.perf_counter() - started)
        if checkpoint and step % max(1, steps // 10) == 0:
            swap()
            checkpoint(step)
            swap()
    swap()
    return {"steps": steps, "seconds": round(time.perf_counter() - started, 1), "final_loss": round(smoothed, 4)}


def render_pool(count: int, seed: int, defect_share: float) -> tuple[Tensor, list[str], Tensor]:
    """Render `count` pictures in chunks: images uint8 (count, 3, 64, 64), prompts, and scenes (count, 7)."""
    generator = torch.Generator().manual_seed(seed)
    images, scenes = [], []
    for start in range(0, count, 512):
        rows = world.sample_scenes(min(512, count - start), generator)
        defects = torch.randint(1, len(world.DEFECTS), (len(rows),), generator=generator)
        defects = defects * (torch.rand(len(rows), generator=generator) < defect_share).long()
        images.append((world.render(rows, generator, defects).images * 255).round().to(torch.uint8))
        scenes.append(rows)
    rows = torch.cat(scenes)
    return torch.cat(images), world.describe(rows), rows


def write_prompts(output: Path, *, seed: int = 2026) -> None:
    """Write 768 training prompts and 256 held-out ones, all different."""
    scenes = world.sample_scenes(1200, torch.Generator().manual_seed(seed))
    prompts = list(dict.fromkeys(world.describe(scenes)))
    output.mkdir(parents=True, exist_ok=True)
    (output / "prompts_held_out.txt").write_text("\n".join(prompts[:256]) + "\n")
    (output / "prompts_train.txt").write_text("\n".join(prompts[256:1024]) + "\n")


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return images.float() / 255


def batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled batches of indices."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch].split(batch)


def write_card(folder: Path, title: str, facts: dict[str, Any]) -> None:
    """Write the model card: README.md for people, training.json for programs."""
    facts = {
        **facts,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items())
    (folder / "README.md").write_text(f"# {title}\n\n| fact | value |\n|---|---|\n{rows}\n")


def parameter_count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vipo.nano.pretrain", description=__doc__)
    parser.add_argument("model", choices=("prompts", "vae", "t2i", "backbone", "scorer"))
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained models")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the model's own)")
    parser.add_argument("--pool", type=int, help="rendered pictures (default: the model's own)")
    parser.add_argument("--generator", type=Path, help="scorer only: output folder of t2i, whose samples are scored")
    parser.add_argument("--initial", type=Path, help="scorer only: a scorer to continue")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.model == "prompts":
        write_prompts(options.output)
        return
    from . import pretrain_backbone, pretrain_scorer, pretrain_t2i

    train = {
        "vae": pretrain_t2i.train_vae,
        "t2i": pretrain_t2i.train,
        "backbone": pretrain_backbone.train,
        "scorer": pretrain_scorer.train,
    }[options.model]
    given = {
        key: getattr(options, key)
        for key in ("steps", "pool", "generator", "initial")
        if getattr(options, key) is not None
    }
    train(options.output, seed=options.seed, **given)


if __name__ == "__main__":
    main()
