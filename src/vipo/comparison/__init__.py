"""`vipo eval`: a model before and after training, on the same prompts and seeds, by rewards it did and did not see.

    prompts x seeds -> samples of both sides (8 bits, on disk) -> rewards, diversity, drift -> eval.json, report.html

Read sides.py (what is compared), samples.py (what is made), record.py (what is reported), then `compare` here; the
statistics are in vipo/evaluation.py, diversity and drift in vipo/measures.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation import Values
from ..files import write_atomically
from ..maps import MapSource
from ..measures import drift, mean_pairwise_distance
from ..media import write_animation, write_image
from ..offload import Offload, visiting
from ..pictures import overlay_clips
from ..prompts import read_prompts, spread, unique_prompts
from ..report import render_report
from ..rewards import Reward, load_rewards, score, sharing
from ..runlog import CLIP_FPS, CONFIG
from ..types import Prompt, find_device
from .record import EvalOptions, Measured, make_record, prompt_means, regression
from .samples import SampleStore
from .sides import Contest

EVAL, PAIRS, SAMPLES = "eval.json", "pairs", "samples"
SHOWN = 24
"""Pairs of pictures on the page, worst first."""
CELL = 8
"""Pixels per side of a cell of the map that drift is weighed by, as of most latent grids."""
Progress = Callable[[str, int, int, str], None]
"""(stage, done, total, remark)"""


def compare(
    contest: Contest,
    options: EvalOptions,
    output: Path,
    *,
    progress: Progress = lambda stage, done, total, remark: None,
) -> dict[str, Any]:
    """Sample both sides, measure them, and write eval.json and report.html.

    Args:
        contest: the two sides.
        options: prompts and seeds.
        output: folder; samples that an earlier call left there are used again where nothing about them has changed.
        progress: told how far each stage is.

    Returns:
        What eval.json holds.

    Raises:
        ValueError: something named is not there or does not fit; nothing but whole samples has been written then.
    """
    check_output(output)
    prompts, repeated = _choose(contest, options)
    config = contest.config
    scored_on = find_device(config.reward.device or config.model.device, "reward.device or model.device")
    seen_on = find_device(config.map.device or config.model.device, "map.device or model.device")
    named = config.reward
    rewards = load_rewards(list(named.weights), _waits(scored_on, config.reward_offload), named.paths, named.options)
    plain = config.map.model_copy(update={"source": "psm", "path": None, "control": None})
    source = MapSource(plain, _waits(seen_on, config.map_offload), allow_pickle=config.model.allow_pickle)
    store = SampleStore(output / SAMPLES, prompts, options.seeds, config, seed=options.seed)

    def tell(stage: str) -> Callable[[int], None]:
        return lambda done: progress(stage, done, len(store.entries), "")

    for side in (contest.trained, contest.base):  # an adapter that does not fit is found before a sample is written
        store.make(side, tell(f"sample {side.name}"))
    scores: dict[str, dict[str, Values]] = {}
    for names in sharing(rewards):
        group = {name: rewards[name] for name in names}
        with visiting(group.values(), scored_on, config.reward_offload):
            scores |= _scores(store, contest, group, scored_on, tell(", ".join(names)))
    scores = {name: scores[name] for name in rewards}
    with visiting([source.backbone], seen_on, config.map_offload):
        diversity, changes = _looks(store, contest, source, seen_on, tell("diversity, drift"))
    record = make_record(contest, options, prompts, repeated, Measured(scores, diversity, changes))
    record["pairs"] = _save_pairs(output, store, contest, source, record)
    write_atomically(output / EVAL, json.dumps(record, indent=1, allow_nan=False) + "\n")
    render_report(output)
    return record


def _waits(device: torch.device, offload: Offload) -> torch.device:
    """Where a model is between two uses."""
    return device if offload == "none" else torch.device("cpu")


def check_output(folder: Path) -> None:
    """Make sure that an evaluation may be written to `folder`, a new one or an earlier one. Writes nothing.

    Raises:
        ValueError: the folder is a file, a run, or holds something else.
    """
    if folder.is_file():
        raise ValueError(f"-o: {folder} is a file, expected a folder")
    if (folder / CONFIG).is_file():
        raise ValueError(f"-o: {folder} is a run directory; give another folder, such as {folder / 'eval'}")
    known = {EVAL, PAIRS, SAMPLES, "report.html"}
    foreign = (
        [p.name for p in folder.iterdir() if p.name.removesuffix(".partial") not in known] if folder.exists() else []
    )
    if foreign:
        raise ValueError(
            f"-o: {folder} holds {sorted(foreign)[0]}, which is no part of an evaluation; give another one"
        )


def _choose(contest: Contest, options: EvalOptions) -> tuple[list[Prompt], int]:
    """The prompts to evaluate, each once, and how many repetitions were left out."""
    path = options.prompts or contest.trained_on
    if path is None:
        raise ValueError("--prompts: expected a file; what was trained on is not known with --model")
    if options.seeds < 1 or options.seed < 0 or (options.limit is not None and options.limit < 1):
        raise ValueError("expected --seeds and --limit of at least 1 and --seed of at least 0")
    read = read_prompts(path)
    prompts = unique_prompts(read)
    return spread(prompts, options.limit or len(prompts)), len(read) - len(prompts)


def _scores(
    store: SampleStore,
    contest: Contest,
    rewards: Mapping[str, Reward],
    device: torch.device,
    on_done: Callable[[int], None],
) -> dict[str, dict[str, Values]]:
    """Rewards of both sides, by name, (P, S) each; NaN or infinite where one failed."""
    values: dict[str, dict[str, list[Tensor]]] = {name: {"base": [], "trained": []} for name in rewards}
    done = 0
    for batch in store.batches:
        texts = [store.entries[position].text for position in batch]
        for side in (contest.base, contest.trained):
            frames = store.read(side, batch).to(device)
            for name, reward in rewards.items():
                values[name][side.name].append(score(reward, frames, texts, name).rewards.cpu())
        done += len(batch)
        on_done(done)
    return {
        name: {side: torch.cat(parts).double().numpy().reshape(-1, store.seeds) for side, parts in found.items()}
        for name, found in values.items()
    }


def _looks(
    store: SampleStore, contest: Contest, source: MapSource, device: torch.device, on_done: Callable[[int], None]
) -> tuple[dict[str, Values], dict[str, Values]]:
    """Diversity (P,) of both sides by the backbone's mean feature, and drift (P,) by the base samples' maps."""
    pooled: dict[str, list[Tensor]] = {"base": [], "trained": []}
    changes: dict[str, list[Tensor]] = {"inside": [], "outside": [], "whole": []}
    done = 0
    for batch in store.batches:
        base, trained = (store.read(side, batch).to(device) for side in (contest.base, contest.trained))
        for name, frames in (("base", base), ("trained", trained)):
            pooled[name].append(source.backbone(frames).float().mean((1, 2, 3)).cpu())
        for name, values in drift(base, trained, _maps(store, source, base, batch)).items():
            changes[name].append(values.cpu())
        done += len(batch)
        on_done(done)
    diversity = {
        name: mean_pairwise_distance(torch.cat(parts).unflatten(0, (-1, store.seeds))).numpy()
        for name, parts in pooled.items()
    }
    return diversity, {
        name: prompt_means(torch.cat(parts).numpy().reshape(-1, store.seeds)) for name, parts in changes.items()
    }


def _maps(store: SampleStore, source: MapSource, frames: Tensor, batch: Sequence[int]) -> Tensor:
    """Allocation maps (n, F, h, w) of samples, a map per frame and CELL pixels per cell."""
    grid = (frames.shape[1], max(1, frames.shape[3] // CELL), max(1, frames.shape[4] // CELL))
    return source(frames, [store.entries[position].text for position in batch], grid)


@torch.no_grad()
def _save_pairs(
    output: Path, store: SampleStore, contest: Contest, source: MapSource, record: dict[str, Any]
) -> list[dict[str, Any]]:
    """Save base, trained and the base sample's map of the prompts that have fared worst, their worst seed each."""
    rows = record["per_prompt"]
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["regression"] is None, rows[i]["regression"] or 0.0))
    differences = {
        name: np.array(sides["trained"], dtype=float) - np.array(sides["base"], dtype=float)
        for name, sides in record["samples"].items()
    }
    harm = regression({name: values.ravel() for name, values in differences.items()}).reshape(-1, store.seeds)
    shutil.rmtree(output / PAIRS, ignore_errors=True)
    pairs = []
    for rank, i in enumerate(order[:SHOWN]):
        worst = int(np.argmin(np.where(np.isnan(harm[i]), np.inf, harm[i])))
        batch = [i * store.seeds + worst]
        base, trained = (store.read(side, batch) for side in (contest.base, contest.trained))
        shown = {"base": base, "trained": trained, "map": overlay_clips(base, _maps(store, source, base, batch))}
        pair: dict[str, Any] = {"prompt": i, "sample": worst}
        for name, frames in shown.items():
            pair[name] = f"{PAIRS}/{rank:03d}_{name}.{'png' if frames.shape[1] == 1 else 'webp'}"
            if frames.shape[1] == 1:
                write_image(output / pair[name], frames[0, 0])
            else:
                write_animation(output / pair[name], frames[0], CLIP_FPS)
        pair["rewards"] = {
            name: {side: sides[side][i][worst] for side in ("base", "trained")}
            for name, sides in record["samples"].items()
        }
        pairs.append(pair)
    return pairs
