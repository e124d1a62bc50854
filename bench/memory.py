"""What GPU memory and how many FLOPs each shipped recipe needs, computed without a GPU and without any weights.

    python bench/memory.py             the tables of docs/models.md and docs/scaling.md, and docs/memory.json; ten
                                       minutes on one core
    python bench/memory.py --scaling   docs/scaling.md and docs/scaling.json alone, from docs/memory.json

The numbers are `vipo.memory`'s, which `vipo check --memory` shows of any config. GPUs here each run the recipe's own
iteration: weak scaling.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from vipo import Config
from vipo.files import write_atomically
from vipo.memory import add_adapter, blocks, build, find_model, measure, per_rank, plan, traffic

BEGIN, END = "<!-- bench/memory.py: begin -->", "<!-- bench/memory.py: end -->"
ROOT = Path(__file__).parents[1]
RECIPES = {
    path.stem: path
    for path in sorted((ROOT / "src" / "vipo" / "recipes").glob("*.yaml"))
    if not path.stem.startswith("nano")
}
SUSTAINED = 250e12  # FLOP/s for the column of hours: about a quarter of an H100's dense bfloat16 rate
LINKS = {8: 300e9, 64: 40e9}
"""Bytes per second that a GPU sends in a ring, by the number of GPUs: one node's NVLink (450e9 on paper), and beyond
it one 400 Gb/s adapter per GPU (50e9 on paper)."""


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


def units(config: Config) -> dict[str, int]:
    """Bytes of what FSDP2 gathers of a recipe's denoiser, of all its parameters, and its calls per step."""
    model = find_model(config)
    denoiser, vae = (build(part, getattr(torch, config.model.dtype)) for part in (model.denoiser, model.vae))
    add_adapter(denoiser, config)
    calls = plan(model, config, model.latents(config, vae).grid)[1]
    return {**blocks(denoiser), "parameters": sum(p.nbytes for p in denoiser.parameters()), "calls": calls}


def scaling(found: dict[str, dict[str, Any]], gathered: dict[str, dict[str, int]]) -> str:
    """Markdown: memory per rank and bytes per optimizer step; then iterations of 1, 8 and 64 GPUs."""
    lines = [
        "| recipe | replicated | FSDP2, 8 | FSDP2, 64 | idle parts off: replicated | FSDP2, 8 | FSDP2, 64 |"
        " replicas send per step | FSDP2 sends per step | by 8 |",
        "|---" * 10 + "|",
    ]
    speed = [
        "| recipe | 1 GPU, s | replicated, 8 | replicated, 64 | FSDP2, 8 | FSDP2, 64 | FSDP2 by 8, 64 |",
        "|---" * 7 + "|",
    ]
    for name, recipe in found.items():
        config, unit = Config.from_yaml(RECIPES[name]), gathered[name]
        trained = recipe["bytes"]["trained"]["weights"]
        cells = [name]
        for offload in (False, True):
            for size, part in ((1, None), (8, unit), (64, unit)):
                cells.append(gib(per_rank(recipe["bytes"], part, size, offload=offload)["total"]))
        alone = recipe["flops"]["iteration"] / SUSTAINED
        sides: dict[tuple[int, int | None], dict[str, int]] = {
            (ranks, size): traffic(config, unit["parameters"], trained, unit["calls"], ranks, size=size)
            for ranks, size in ((8, None), (64, None), (8, 8), (64, 64), (64, 8))
        }
        waits = {key: sent["iteration"] / LINKS[key[0]] for key, sent in sides.items()}
        inside = sides[8, 8]["iteration"]  # of a node; what goes beyond it is the rest
        waits[64, 8] = inside / LINKS[8] + (sides[64, 8]["iteration"] - inside) / LINKS[64]
        times = [f"{alone + wait:.0f} ({alone / (alone + wait):.0%})" for wait in waits.values()]
        cells += [f"{sides[64, size]['optimizer step'] / 1e9:,.1f} GB" for size in (None, 64, 8)]
        lines.append("| " + " | ".join(cells) + " |")
        speed.append("| " + " | ".join([name, f"{alone:.0f}", *times]) + " |")
    return "\n".join([*lines, "", "Seconds per iteration of the same work on every GPU, and efficiency:", "", *speed])


def write_between(page: Path, text: str) -> None:
    """Write generated text between its markers in a page."""
    if page.exists():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        text = f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"
    write_atomically(page, text)


def main() -> None:
    """Read the command line, compute, print, and write the pages and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--scaling", action="store_true", help="reckon with docs/memory.json as it is")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.scaling:
        found = json.loads((ROOT / "docs" / "memory.json").read_text(encoding="utf-8"))
    else:
        found = {}
        for name, path in RECIPES.items():
            config = Config.from_yaml(path)
            found[name] = measure(config, find_model(config))
            print(table({name: found[name]}).splitlines()[-1], flush=True)
        write_between(options.output / "models.md", table(found))
        write_atomically(options.output / "memory.json", json.dumps(found, indent=1) + "\n")
    gathered = {name: units(Config.from_yaml(path)) for name, path in RECIPES.items()}
    write_between(options.output / "scaling.md", scaling(found, gathered))
    write_atomically(options.output / "scaling.json", json.dumps(gathered, indent=1) + "\n")


if __name__ == "__main__":
    main()
