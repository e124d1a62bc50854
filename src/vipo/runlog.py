"""The run directory: config.yaml, metrics.jsonl, TensorBoard events, samples and maps as pictures, summary.json."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from .files import write_atomically, writing
from .lock import LOCK
from .media import write_animation, write_image
from .pictures import clip_grid, film_strip, overlay, overlay_clips, sheet, small_clips
from .psm.latent_grid import frame_groups, spread_time

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
BUNDLES = "debug"
"""Folder of debug bundles (`vipo.safety`); alone it is no run, and a new run removes it."""
CLIP_FPS = 8.0
"""Of the animations of samples and maps, whose own rate no tensor states."""


def check_output(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Make sure that a run may be written to `folder`. Writes and removes nothing.

    Raises:
        ValueError: the folder holds a run already, holds something else, or holds no run to resume.
    """
    holds_run, began = (folder / CONFIG).is_file(), (folder / LOCK).is_file()
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ValueError(f"run.output: {parent} is a file, expected a folder")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite: give one of them")
    if resume and not (holds_run or began):
        raise ValueError(f"--resume: {folder} holds no run (no {CONFIG})")
    if holds_run and not (resume or overwrite):
        raise ValueError(
            f"run.output: {folder} already holds a run; give --resume, --overwrite or another --run.output"
        )
    foreign = folder.is_dir() and any(entry.name != BUNDLES for entry in folder.iterdir())
    if foreign and not (holds_run or began):
        raise ValueError(f"run.output: {folder} is not empty and holds no run; give another --run.output")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"run.output: cannot write to {parent}; give another --run.output")


class RunLog:
    """Writes one run directory.

    Args:
        folder: the run directory, made if missing; with `keep_until` 0 an earlier run in it is removed.
        config: resolved config as YAML text; another one of before is kept as config_NNNNNN.yaml, NNNNNN being the
            iteration until which it held.
        keep_until: when resuming, the last iteration to keep in the metrics; later lines are redone.
        tensorboard: write TensorBoard events.
    """

    def __init__(self, folder: Path, config: str, *, keep_until: int = 0, tensorboard: bool = True) -> None:
        self.folder = folder
        with writing(folder):
            if keep_until == 0:
                _remove_run(folder)
            for name in ("samples", "maps", "checkpoints"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            earlier = folder / f"config_{keep_until:06d}.yaml"
            if (folder / CONFIG).is_file() and (folder / CONFIG).read_text("utf-8") != config and not earlier.exists():
                (folder / CONFIG).rename(earlier)
            write_atomically(folder / CONFIG, config)
            (folder / SUMMARY).unlink(missing_ok=True)  # of a session that had ended
            kept = [line for line in read_metrics(folder) if line["iteration"] <= keep_until]
            write_atomically(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = (folder / METRICS).open("ab", buffering=0)  # nothing is left to be written when it is closed
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_until + 1) if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        if self._events is not None:
            self._events.close()

    def metrics(self, iteration: int, values: dict[str, Any]) -> None:
        """Append one iteration's numbers, and flush them to the disk: a checkpoint that follows may count on them."""
        line = (json.dumps({"iteration": iteration, **values}) + "\n").encode()
        with writing(self.folder / METRICS):
            while line:
                line = line[self._metrics.write(line) :]
            os.fsync(self._metrics.fileno())
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._events.add_scalar(name, value, iteration)

    def pictures(self, iteration: int, frames: Tensor, maps: Tensor) -> None:
        """Save a sheet of samples and one with the maps laid over them: of clips a film strip and an animation each.

        Args:
            iteration: 1-based.
            frames: (N, F, 3, Y, X), in [0, 1].
            maps: (N, T, H, W), >= 0; a frame is shown with the map of its latent frame.
        """
        name, count = f"iteration_{iteration:06d}", frames.shape[1]
        if count == 1:
            sheets = {"samples": sheet(frames[:, 0]), "maps": sheet(overlay(frames[:, 0], maps[:, 0]))}
        else:
            clips = small_clips(frames)
            compression, alone = frame_groups(count, maps.shape[1])
            spread = spread_time(maps[: len(clips)], compression, first_frame_alone=alone)
            shown = {"samples": clips, "maps": overlay_clips(clips, spread)}
            for folder, moving in shown.items():
                write_animation(self.folder / folder / f"{name}.webp", clip_grid(moving), CLIP_FPS)
            sheets = {folder: film_strip(moving) for folder, moving in shown.items()}
        for folder, picture in sheets.items():
            write_image(self.folder / folder / f"{name}.png", picture)
        if self._events is not None:
            self._events.add_image("samples", np.asarray(sheets["samples"]), iteration, dataformats="HWC")


def _remove_run(folder: Path) -> None:
    """Remove an earlier run but its lock, the checkpoints at one stroke: none of them may ever be resumed."""
    discarded = folder / "discarded"
    if (folder / "checkpoints").is_dir():
        (folder / "checkpoints").rename(discarded)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


class PhaseClock:
    """Wall-clock seconds by phase; at its end waits for the device, not for rewards in a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times, self.started = device, {}, time.perf_counter()

    times: dict[str, float]

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.times[f"seconds_{phase}"] = round(time.perf_counter() - started, 4)

    def seconds(self) -> dict[str, float]:
        return {**self.times, "seconds": round(time.perf_counter() - self.started, 4)}


def write_summary(folder: Path, values: dict[str, Any]) -> None:
    """Write summary.json."""
    write_atomically(folder / SUMMARY, json.dumps(values, indent=1) + "\n")


def mean_reward(folder: Path, iterations: int) -> float | None:
    """Mean reward of the last iterations in metrics.jsonl, as many as there are; None where all were skipped."""
    rewards = [line["reward_mean"] for line in read_metrics(folder)[-iterations:] if "reward_mean" in line]
    return float(np.mean(rewards)) if rewards else None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a truncated last line, as a killed run leaves it, is dropped."""
    file = folder / METRICS
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
