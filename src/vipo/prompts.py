"""Prompt files -> groups of G samples, in a seeded order that any iteration can be started from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .files import path_below
from .media import read_frames, to_image
from .nano import ASSETS
from .prompt_sets import kind_of, read_prompt_set, read_text
from .types import Prompt, PromptBatch

_OWN = Path(__file__).parent / "prompt_files"
EMBEDDED = {
    "nano": ASSETS / "prompts_train.txt",
    "nano_video": ASSETS / "prompts_video_train.txt",
    "nano_held_out": ASSETS / "prompts_held_out.txt",
    "nano_video_held_out": ASSETS / "prompts_video_held_out.txt",
    "general": _OWN / "general.txt",
    "motion": _OWN / "motion.txt",
}
"""Prompt files of the package by name."""
LONGEST = 20_000
"""Characters of a prompt; no text encoder reads as many."""
_SEED_RANGE = 2**31 - 1
_RESERVED = ("num_inference_steps", "generator", "latents", "output_type", "num_images_per_prompt")


def read_prompts(path: str) -> list[Prompt]:
    """Read a prompt file, or an embedded one by its name in EMBEDDED; blank lines are skipped.

    A text file has one prompt per line. A .jsonl file has one JSON object per line: `prompt`, and any keywords of the
    pipeline's call for this prompt (`negative_prompt`, `height`, `num_frames`, ...). What a key ending in image or
    video names is a file below the prompt file's folder, its path relative to it, and is handed to the pipeline as
    pictures; `images`, a list of files, becomes the keyword `image`. A .json, .csv or .tsv file, and a .jsonl file of
    GenEval, is a published prompt set: see `prompt_sets`.

    Raises:
        ValueError: the file is missing, empty, not UTF-8, not JSON lines, or names pictures that cannot be read.
    """
    file = EMBEDDED.get(path, Path(path))
    prompts = _read(file)
    for number, prompt in enumerate(prompts, 1):
        problem = _problem(prompt.text)
        if problem:
            raise ValueError(f"prompts.path: {file}: prompt {number} {problem}")
    return prompts


def _problem(text: str) -> str:
    """What makes a text no prompt, or nothing."""
    if len(text) > LONGEST:
        return f"has {len(text)} characters, expected at most {LONGEST}; is this a file of prompts?"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "holds half a character (a surrogate), which UTF-8 cannot write; mend it"
    return ""


def _read(file: Path) -> list[Prompt]:
    """Read a prompt file of any kind."""
    if file.suffix.lower() in (".json", ".csv", ".tsv"):
        return read_prompt_set(file)
    text = read_text(file)
    if kind_of(file, text) == "geneval":
        return read_prompt_set(file)
    numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not numbered:
        raise ValueError(f"prompts.path: {file} is empty; expected one prompt per line")
    if file.suffix == ".jsonl":
        return [_entry(file, number, line) for number, line in numbered]
    return [Prompt(line.split("\t")[0].strip()) for _, line in numbered]


def _entry(file: Path, number: int, line: str) -> Prompt:
    """Read one line of a .jsonl prompt file."""
    place = f"prompts.path: {file} line {number}"
    try:
        entry: Any = json.loads(line)
    except RecursionError:
        raise ValueError(f"{place} is not JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ValueError(f'{place}: expected {{"prompt": "...", further keywords}}, got {line[:80]}')
    call = {key: value for key, value in entry.items() if key != "prompt"}
    reserved = [key for key in _RESERVED if key in call]
    if reserved:
        raise ValueError(f"{place}: {reserved[0]} is set by the run, not by a prompt; leave it out")
    if "image" in call and "images" in call:
        raise ValueError(f"{place}: image and images are the same keyword of the pipeline; give one of them")
    loaded = {}
    for key, value in call.items():
        if not key.endswith(("image", "images", "video")):
            loaded[key] = value
            continue
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{place}: {key}: expected a file name or a list of them, got {value!r}")
        try:
            pictures = [[to_image(frame) for frame in read_frames(path_below(file.parent, name))] for name in names]
        except ValueError as error:
            raise ValueError(f"{place}: {key}: {error}") from None
        if key.endswith("video"):
            loaded[key] = pictures[0]
        else:
            stills = [frames[0] for frames in pictures]
            loaded["image" if key == "images" else key] = stills if isinstance(value, list) else stills[0]
    return Prompt(entry["prompt"].strip(), loaded, json.dumps(call, sort_keys=True))


def unique_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each prompt once, in the order of first appearance; other keywords make another prompt."""
    found: dict[tuple[str, str], Prompt] = {}
    for prompt in prompts:
        found.setdefault((prompt.text, prompt.key), prompt)
    return list(found.values())


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Choose at most `count` prompts, evenly spread over all."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def noise_seed(prompt: Prompt, number: int, seed: int) -> int:
    """Seed of a prompt's sample `number`: from its own words, so that it stays when the prompt file changes."""
    digest = hashlib.sha256(f"{seed} {number} {prompt.text}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def split_batches(entries: Sequence[Prompt], size: int) -> list[list[int]]:
    """Split samples into batches of neighbours whose pipeline calls are equal, of at most `size`: their positions."""
    batches: list[list[int]] = []
    for i, entry in enumerate(entries):
        if not batches or len(batches[-1]) == size or entries[batches[-1][-1]].key != entry.key:
            batches.append([])
        batches[-1].append(i)
    return batches


def denoiser_work(call: Mapping[str, Any]) -> str:
    """What of a pipeline's call may decide how often it calls its denoiser: numbers but sizes, and what is given."""
    kept = {key: value for key, value in call.items() if key not in ("height", "width", "num_frames")}
    return repr({k: v if isinstance(v, int | float | None) else type(v) for k, v in sorted(kept.items())})


def prompt_batch(
    prompts: Sequence[Prompt],
    iteration: int,
    *,
    per_iteration: int,
    group_size: int,
    seed: int,
    same_initial_noise: bool = True,
) -> PromptBatch:
    """Choose the prompts and seeds of one iteration; a function of (seed, iteration) alone, so a run can resume.

    Args:
        prompts: all prompts; each epoch is a new permutation of them.
        iteration: 0-based.
        per_iteration: B.
        group_size: G.
        seed: of the run.
        same_initial_noise: give the samples of a group one initial noise.

    Returns:
        N = B * G prompts with their seeds.
    """
    first = iteration * per_iteration
    chosen: list[int] = []
    for position in range(first, first + per_iteration):
        epoch, place = divmod(position, len(prompts))
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen.append(int(order[place]))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) ^ 0x9E3779B9)
    seeds = torch.randint(0, _SEED_RANGE, (per_iteration, group_size), generator=generator)
    initial = seeds[:, :1].expand_as(seeds) if same_initial_noise else seeds
    indices = [index for index in chosen for _ in range(group_size)]
    entries = [prompts[index] for index in indices]
    texts = [entry.text for entry in entries]
    return PromptBatch(texts, indices, seeds.flatten().tolist(), initial.flatten().tolist(), group_size, entries)
