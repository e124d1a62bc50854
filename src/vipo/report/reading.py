"""Read a run directory into plain records: nothing here draws, words or guesses.

A file that is absent is an empty record (the page says "not recorded"); a file that is there and wrong is a ValueError
that names the file, what was expected and how to fix it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

JsonObject = Mapping[str, object]
SHEET_NAME = re.compile(r"iteration_(\d+)\.png")


@dataclass(frozen=True)
class Sheet:
    """One contact sheet of a training run.

    Attributes:
        iteration: the iteration after which it was drawn; 0 is the model before training.
        path: the PNG file; of clips, a film strip.
        animation: the WebP file beside it in which the clips play, None for stills.
    """

    iteration: int
    path: Path
    animation: Path | None


@dataclass(frozen=True)
class TrainRun:
    """What `vipo train` left behind.

    Attributes:
        path: the run directory.
        config_text: config.yaml as written, or None.
        records: one object per iteration, in order of iteration.
        summary: summary.json, empty when the run wrote none.
        samples: contact sheets in order of iteration.
        maps: the same sheets with their allocation maps overlaid.
        remarks: what the reader of the page must know about these files (a truncated line, repeated iterations).
        base: the record of iteration 0, the model before training, empty when it was not evaluated.
        watch: watch.json, empty when the run wrote none.
    """

    path: Path
    config_text: str | None
    records: tuple[JsonObject, ...]
    summary: JsonObject
    samples: tuple[Sheet, ...]
    maps: tuple[Sheet, ...]
    remarks: tuple[str, ...]
    base: JsonObject = field(default_factory=dict)
    watch: JsonObject = field(default_factory=dict)

    def column(self, key: str) -> NDArray[np.float64]:
        """Return one measurement over the iterations, NaN where it was not recorded."""
        values = [number(record.get(key)) for record in self.records]
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    def measurements(self) -> list[str]:
        """List the measurements with at least one finite value, in order of first appearance."""
        found = {key: None for record in self.records for key, value in record.items() if number(value) is not None}
        return list(found)


@dataclass(frozen=True)
class DemoRun:
    """What `vipo demo` left behind: a summary and the two training runs it compares."""

    path: Path
    config_text: str | None
    summary: JsonObject
    grpo: TrainRun | None
    vipo: TrainRun | None


@dataclass(frozen=True)
class EvalRun:
    """What `vipo eval` left behind: eval.json, and the pairs of pictures that it names."""

    path: Path
    record: JsonObject


@dataclass(frozen=True)
class Metric:
    """One held-out metric.

    Attributes:
        name: key in the evaluation.
        label: what the page calls it.
        higher_is_better: None when the summary does not say; its differences are then never called better or worse.
        in_domain: True for the reward trained on, False for metrics the training never saw, None when not said.
        description: one sentence, may be empty.
    """

    name: str
    label: str
    higher_is_better: bool | None
    in_domain: bool | None
    description: str


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; None where not recorded. `win_rate` is set for paired differences only."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    win_rate: float | None = None


def number(value: object) -> float | None:
    """Return a finite float, or None for null, NaN, infinities, booleans and anything that is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def text(value: object) -> str:
    """Return a JSON scalar as text; null becomes the empty string."""
    return "" if value is None else str(value)


def mapping_at(parent: JsonObject, key: str) -> JsonObject:
    """Return the mapping under `key`, empty when absent or null.

    Raises:
        ValueError: something else than a mapping stands there.
    """
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"summary.json: '{key}' must be a mapping, got {type(value).__name__}; write it as {{name: value}}"
        )
    return value


def list_at(parent: JsonObject, key: str) -> list[object]:
    """Return the list under `key`, empty when absent or null.

    Raises:
        ValueError: something else than a list stands there.
    """
    value = parent.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"summary.json: '{key}' must be a list, got {type(value).__name__}; write it as [...]")
    return value


def objects_at(parent: JsonObject, key: str) -> list[JsonObject]:
    """Return the list of mappings under `key`, empty when absent or null.

    Raises:
        ValueError: it is no list, or an entry is no mapping.
    """
    entries: list[JsonObject] = []
    for position, entry in enumerate(list_at(parent, key)):
        if not isinstance(entry, Mapping):
            raise ValueError(f"summary.json: '{key}[{position}]' must be a mapping, got {type(entry).__name__}")
        entries.append(entry)
    return entries


def inside(run_dir: Path, relative: str) -> Path:
    """Return the path of a file of the run, refusing every way out of the run directory.

    Raises:
        ValueError: the path is absolute, holds `..` or a backslash, or is a link that leads outside.
    """
    parts = PurePosixPath(relative)
    path = run_dir / parts
    outside = parts.is_absolute() or ".." in parts.parts or "\\" in relative or "\0" in relative
    if outside or not path.resolve().is_relative_to(run_dir.resolve()):
        raise ValueError(
            f"{relative!r} leaves the run directory {run_dir}: expected a path relative to it, without '..'; "
            "a report shows only files of its own run, so copy the file into the run directory"
        )
    return path


def read_metrics(path: Path) -> tuple[tuple[JsonObject, ...], tuple[str, ...]]:
    """Read metrics.jsonl.

    A last line without a newline that does not parse is what a killed run leaves: it is skipped, with a remark. Of an
    iteration recorded twice (a resumed run) the later record counts, with a remark.

    Returns:
        The records in order of iteration, and the remarks.

    Raises:
        ValueError: any other line is not a JSON object with an integer "iteration"; names file and line.
    """
    if not path.exists():
        return (), ()
    remarks: list[str] = []
    by_iteration: dict[int, JsonObject] = {}
    repeated = 0
    lines = path.read_bytes().split(b"\n")
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            iteration, record = _parse_record(line)
        except ValueError as error:
            if line_number == len(lines):
                remarks.append(
                    f"The last line of {path.name} (line {line_number}) is cut off, as a run that was stopped while "
                    "writing leaves it; it is not shown."
                )
                continue
            raise ValueError(
                f"{path}:{line_number}: {error}; expected one JSON object per line with an integer 'iteration'. "
                "Delete or repair that line and render again."
            ) from error
        repeated += iteration in by_iteration
        by_iteration[iteration] = record
    if repeated:
        remarks.append(
            f"{repeated} line(s) of {path.name} repeat an earlier iteration (a resumed run); the later one is shown."
        )
    return tuple(by_iteration[iteration] for iteration in sorted(by_iteration)), tuple(remarks)


def _parse_record(line: bytes) -> tuple[int, JsonObject]:
    """Return (iteration, record) of one line, or raise a ValueError that says what is wrong with it."""
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"got a {type(record).__name__}")
    iteration = number(record.get("iteration"))
    if iteration is None or iteration != int(iteration):
        raise ValueError(f"got 'iteration' = {record.get('iteration')!r}")
    return int(iteration), record


def read_summary(path: Path) -> JsonObject:
    """Read a file of one JSON object (summary.json, watch.json), empty when absent.

    Raises:
        ValueError: the file is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_bytes().decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete the file or write it again") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(summary).__name__}; write it again")
    return summary


def read_train(run_dir: Path) -> TrainRun:
    """Read the directory of one training run; absent files become empty records."""
    records, remarks = read_metrics(inside(run_dir, "metrics.jsonl"))
    return TrainRun(
        path=run_dir,
        config_text=_read_config(run_dir),
        records=tuple(record for record in records if record["iteration"] != 0),
        summary=read_summary(inside(run_dir, "summary.json")),
        samples=_read_sheets(run_dir, "samples"),
        maps=_read_sheets(run_dir, "maps"),
        remarks=remarks,
        base=next((record for record in records if record["iteration"] == 0), {}),
        watch=read_summary(inside(run_dir, "watch.json")),
    )


def read_run(run_dir: Path) -> TrainRun | DemoRun | EvalRun:
    """Read a run directory of any kind.

    Raises:
        ValueError: the directory is missing or is no run, or one of its files is wrong.
    """
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a directory: give the folder that `vipo train` or `vipo demo` wrote")
    if (run_dir / "eval.json").is_file():
        return EvalRun(run_dir, read_summary(inside(run_dir, "eval.json")))
    summary = read_summary(inside(run_dir, "summary.json"))
    if summary.get("kind") == "demo":
        grpo, vipo = (
            read_train(inside(run_dir, name)) if (run_dir / name).is_dir() else None for name in ("grpo", "vipo")
        )
        return DemoRun(run_dir, _read_config(run_dir), summary, grpo, vipo)
    if not (run_dir / "metrics.jsonl").exists():
        raise ValueError(
            f"{run_dir} is not a run directory: found neither metrics.jsonl (written by `vipo train`) nor a "
            'summary.json with "kind": "demo" (written by `vipo demo`); give the folder of a run that has started'
        )
    return read_train(run_dir)


def read_evaluation(
    summary: JsonObject,
) -> tuple[list[Metric], dict[str, dict[str, Estimate]], dict[str, dict[str, Estimate]]]:
    """Read the held-out evaluation of a demo summary.

    Returns:
        (metrics, means by arm and metric, paired differences by pair and metric). Metrics that have values but no
        description are appended under their own name, with no direction.
    """
    metrics = [
        Metric(
            name=text(entry.get("name")),
            label=text(entry.get("label")) or text(entry.get("name")),
            higher_is_better=flag(entry.get("higher_is_better")),
            in_domain=flag(entry.get("in_domain")),
            description=text(entry.get("description")),
        )
        for entry in objects_at(summary, "metrics")
    ]
    means = _read_estimates({k: v for k, v in mapping_at(summary, "evaluation").items() if k != "prompts"})
    differences = _read_estimates(mapping_at(summary, "differences"))
    known = {metric.name for metric in metrics}
    for group in (*means.values(), *differences.values()):
        for name in group:
            if name not in known:
                known.add(name)
                metrics.append(Metric(name, name, None, None, ""))
    return metrics, means, differences


def _read_estimates(groups: JsonObject) -> dict[str, dict[str, Estimate]]:
    """Read {group: {metric: {mean, low, high, win_rate}}}."""
    return {
        group: {name: read_estimate(mapping_at(groups, group), name) for name in mapping_at(groups, group)}
        for group in groups
    }


def read_estimate(parent: JsonObject, key: str) -> Estimate:
    """Read {mean, low, high, win_rate} below a key; what is absent is None."""
    entry = mapping_at(parent, key)
    mean, low, high, win_rate = (number(entry.get(name)) for name in ("mean", "low", "high", "win_rate"))
    return Estimate(mean, low, high, win_rate)


def flag(value: object) -> bool | None:
    """Return a JSON boolean, or None for anything else."""
    return value if isinstance(value, bool) else None


def _read_config(run_dir: Path) -> str | None:
    """Return config.yaml as text, or None when absent."""
    path = inside(run_dir, "config.yaml")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None


def _read_sheets(run_dir: Path, folder: str) -> tuple[Sheet, ...]:
    """List the contact sheets of one folder in order of iteration."""
    matches = ((SHEET_NAME.fullmatch(path.name), path) for path in inside(run_dir, folder).glob("*.png"))
    sheets = []
    for match, path in matches:
        if match is not None:
            animation = inside(run_dir, f"{folder}/{path.stem}.webp")
            strip = inside(run_dir, f"{folder}/{path.name}")
            sheets.append(Sheet(int(match[1]), strip, animation if animation.is_file() else None))
    return tuple(sorted(sheets, key=lambda sheet: sheet.iteration))
