"""maps.json, which `vipo maps` leaves behind: whose a folder is, the numbers over all inputs, the terminal's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from vipo.evaluation import bootstrap_mean, paired_difference
from vipo.psm import CONTROLS
from vipo.psm.agreement import METRICS

MAPS = "maps.json"
FILES = ("map.npy", "overlay.png", "overlay.mp4", "components.png", "components.mp4", "sheet.png")
"""What the folder of an input may hold."""
STATISTICS = ("entropy", "border_to_centre", "flicker")
"""What the terminal shows of the statistics."""


def check_output(output: Path, *, overwrite: bool) -> None:
    """Make sure that maps may be written to `output`; writes and removes nothing.

    Raises:
        ValueError: it is a file, holds something else, or holds an inspection that is not to be overwritten.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: {output} is a file, expected a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if _earlier(output) is None:
        raise ValueError(f"--output: {output} is not empty and holds no {MAPS} of vipo maps; give another folder")
    if not overwrite:
        raise ValueError(f"--output: {output} already holds maps; give --overwrite or another folder")


def remove_earlier(output: Path) -> None:
    """Remove the files that an earlier inspection's maps.json names, and folders that this leaves empty."""
    for folder in sorted(_earlier(output) or [], reverse=True):  # below before above
        place = output / folder
        if not place.resolve().is_relative_to(output.resolve()):
            continue
        for name in FILES:
            (place / name).unlink(missing_ok=True)
        while place != output and place.is_dir() and not any(place.iterdir()):
            place.rmdir()
            place = place.parent
    (output / MAPS).unlink(missing_ok=True)


def _earlier(output: Path) -> list[str] | None:
    """The folders of an earlier inspection in `output`; None where there is none."""
    try:
        content = json.loads((output / MAPS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("kind") != "maps":
        return None
    folders = content.get("folders")
    return [str(folder) for folder in folders] if isinstance(folders, list) else None


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the inputs with 95 % bootstrap intervals, and the map's paired difference to each control."""

    def means(entries: list[dict[str, float]]) -> dict[str, Any]:
        return {name: bootstrap_mean(np.array([entry[name] for entry in entries])) for name in entries[0]}

    if not results:
        return {"inputs": 0, "measured": 0}
    summary: dict[str, Any] = {"inputs": len(results), "statistics": means([r["statistics"] for r in results])}
    measured = [r["agreement"] for r in results if r["agreement"] is not None]
    summary["measured"] = len(measured)
    if not measured:
        return summary
    columns = {kind: [m["controls"][kind] for m in measured] for kind in CONTROLS}
    summary["map"] = means([m["map"] for m in measured])
    summary["controls"] = {kind: means(entries) for kind, entries in columns.items()}
    summary["rules"] = {
        name: {rule: means([m["rules"][name][rule] for m in measured]) for rule in rules}
        for name, rules in measured[0]["rules"].items()
    }
    summary["map_minus_control"] = {
        kind: {
            name: paired_difference(
                np.array([m["map"][name] for m in measured]),
                np.array([entry[name] for entry in entries]),
                higher_is_better=name != "KL",
            )
            for name in METRICS
        }
        for kind, entries in columns.items()
    }
    return summary


def tables(results: list[dict[str, Any]], overall: dict[str, Any], limit: int = 20) -> list[Table]:
    """What the terminal shows: the inputs (the first `limit`), and how the map, its controls and the rules agree."""
    measured = bool(overall.get("measured"))
    inputs = Table(title=f"allocation maps of {len(results)} inputs")
    for heading in ("folder", "size", "frames", *(name.replace("_", " ") for name in STATISTICS)):
        inputs.add_column(heading, justify="left" if heading == "folder" else "right")
    for name in METRICS if measured else ():
        inputs.add_column(name, justify="right")
    for entry in results[:limit]:
        numbers = [f"{entry['statistics'][name]:.3f}" for name in STATISTICS]
        found = entry["agreement"] and entry["agreement"]["map"]
        agreement = [f"{found[name]:.3f}" if found else "-" for name in METRICS] if measured else []
        size = f"{entry['width']} x {entry['height']}"
        inputs.add_row(escape(entry["folder"]), size, str(entry["frames"]), *numbers, *agreement)
    remarks = [f"{entry['folder']}: {note}" for entry in results[:limit] for note in entry["notes"]]
    if len(results) > limit:
        remarks.append(f"and {len(results) - limit} more, all in {MAPS}")
    inputs.caption = escape("\n".join(remarks)) or None
    return [inputs, _agreement_table(overall)] if measured else [inputs]


def _agreement_table(summary: dict[str, Any]) -> Table:
    count = summary["measured"]
    interval = ", mean over 95 % interval" if count > 1 else ""
    table = Table(title=f"agreement with {count} mask{'s' * (count > 1)}{interval}; KL is better low")
    for heading in ("", *METRICS, "map wins"):
        table.add_column(heading, justify="right" if heading else "left")

    def cells(entry: dict[str, Any]) -> list[str]:
        estimates = [entry[name] for name in METRICS]
        between = [f"\n{e['low']:.3f}..{e['high']:.3f}" if count > 1 else "" for e in estimates]
        return [f"{e['mean']:.3f}{part}" for e, part in zip(estimates, between, strict=True)]

    table.caption = "map wins: in how many inputs its AUC is above the control's"
    table.add_row("the map", *cells(summary["map"]), "", style="bold", end_section=True)
    for kind, entry in summary["controls"].items():
        wins = summary["map_minus_control"][kind]["AUC"]["win_rate"]
        table.add_row(f"control: {kind}", *cells(entry), f"{wins:.0%}")
    for name, rules in summary["rules"].items():
        table.add_section()
        for rule, entry in rules.items():
            table.add_row(escape(f"{name}: {rule}"), *cells(entry), "")
    return table
