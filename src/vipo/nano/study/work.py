"""Which runs are there, and the workers that make the others."""

from __future__ import annotations

import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from ...console import progress_bars
from ...files import write_atomically
from ...versions import versions
from .arms import (
    FIRST,
    REST,
    Arm,
    Budget,
    Job,
    again_jobs,
    arm_jobs,
    best,
    clip_jobs,
    epoch_jobs,
    in_domain,
    redness_jobs,
    sweep_jobs,
)
from .runs import base_metrics, run_job, signal_record

SIGNALS = {"nano": (*FIRST, REST[0]), "redness": (FIRST[0], FIRST[2], FIRST[3], FIRST[4], FIRST[5], REST[0])}
"""Rewards and arms of the signal table; ones per position has scalar GRPO's gradient."""
Records = dict[str, Any]


def read_records(file: Path) -> Records:
    """Records by key; {} where there is no file."""
    records: Records = json.loads(file.read_text()) if file.is_file() else {}
    return records


def add_record(file: Path, key: str, record: Mapping[str, Any]) -> None:
    """Add one record under a lock, so that several processes may."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = {**read_records(file), key: dict(record)}
        lines = [f"{json.dumps(name)}: {json.dumps(records[name])}" for name in sorted(records)]
        write_atomically(file, "{\n" + ",\n".join(lines) + "\n}\n")
    finally:
        os.close(lock)


def one_job(job: Job, budget: Budget, file: Path) -> None:
    """Run and record one job, in a worker."""
    add_record(file, job.key, {**run_job(job, budget), "torch": versions()["versions"]["torch"]})


def one_base(modality: str, budget: Budget, file: Path) -> None:
    """Evaluate and record the base model, in a worker."""
    add_record(file, f"base/{modality}", {"prompts": budget.prompts, "metrics": base_metrics(modality, budget)})


def one_signal(reward: str, budget: Budget, file: Path) -> None:
    """Measure and record the signal of one reward, in a worker."""
    arms: tuple[Arm, ...] = SIGNALS[reward]
    add_record(file, f"signal/{reward}", {"asked": budget.groups, **signal_record(reward, arms, budget)})


class Study:
    """The runs that are there and the workers that make the others.

    Args:
        output: folder of the records.
        budget: how much.
        workers: processes.
    """

    def __init__(self, output: Path, budget: Budget, workers: int) -> None:
        self.output, self.budget = output, budget
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))

    def file(self, table: str) -> Path:
        """Records of a table."""
        return self.output / f"{table}.json"

    def done(self, job: Job) -> bool:
        """Whether a job is recorded with this budget."""
        record = read_records(self.file(job.table)).get(job.key)
        wanted = {**job.arm.changes, **job.changes}
        return (
            record is not None
            and record["changes"] == wanted
            and record["iterations"] == self.budget.iterations[job.modality]
            and (job.tuning or record["prompts"] == self.budget.prompts)
        )

    def run(self, title: str, tasks: Iterable[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Give tasks to the workers and wait for all; the first error stops the study."""
        waiting = [self.pool.submit(function, *arguments) for function, arguments in tasks]
        with progress_bars(Console()) as bars:
            task = bars.add_task(title, total=len(waiting), remark="")
            for future in as_completed(waiting):
                future.result()
                bars.advance(task)

    def jobs(self, title: str, jobs: Iterable[Job]) -> None:
        """Run what is not recorded."""
        self.run(title, [(one_job, (job, self.budget, self.file(job.table))) for job in jobs if not self.done(job)])

    def best(self, table: str, modality: str, setting: str) -> dict[str, float]:
        """By arm, the setting with the highest in-domain score over the tuning seeds."""
        scores: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for key, record in read_records(self.file(table)).items():
            if key.split("/")[1] == modality:
                scores[record["arm"]][record["changes"][setting]].append(in_domain(record["metrics"]))
        return {arm: best(found) for arm, found in scores.items()}

    def all(self, modalities: Iterable[str]) -> None:
        """Run everything, settings first."""
        for modality in modalities:
            base = read_records(self.file("arms")).get(f"base/{modality}")
            if base is None or base["prompts"] != self.budget.prompts:
                self.run(f"base {modality}", [(one_base, (modality, self.budget, self.file("arms")))])
            self.jobs(f"{modality}: learning rates", sweep_jobs(modality, self.budget))
            rates = self.best("sweep", modality, "optimizer.learning_rate")
            self.jobs(f"{modality}: arms", arm_jobs(modality, rates, self.budget))
            self.jobs(f"{modality}: again", again_jobs(modality, rates, self.budget))
            if modality == "image":
                self.jobs("image: clip ranges", clip_jobs(rates, self.budget))
                clips = self.best("clips", "image", "loss.clip_range")
                self.jobs("image: two epochs", epoch_jobs(rates, clips, self.budget))
                self.jobs("image: redness", redness_jobs(rates, self.budget))
                known = read_records(self.file("signal"))
                missing = [
                    r
                    for r in [*SIGNALS][: self.budget.most]
                    if known.get(f"signal/{r}", {}).get("asked") != self.budget.groups
                ]
                self.run("image: signal", [(one_signal, (r, self.budget, self.file("signal"))) for r in missing])
