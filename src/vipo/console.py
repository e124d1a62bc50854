"""What commands show on the terminal while they work, and the demo's table after it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any


def progress_bars(console: Any) -> Any:
    """Bars of stages on a console of rich."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
        console=console,
    )


def reporter(bars: Any) -> Callable[[str, int, int, str], None]:
    """(stage, done, total, remark) -> the bar of that stage."""
    tasks: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int, remark: str) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, remark="")
        bars.update(tasks[stage], completed=done, remark=remark)

    return progress


def demo_table(summary: dict[str, Any], methods: dict[str, str]) -> Any:
    """Held-out means with 95 % intervals, and ViPO's paired difference to GRPO."""
    from rich.table import Table

    table = Table(title=f"{summary['evaluation']['prompts']} held-out prompts, mean [95 % interval]")
    for heading in ("metric", "base", *methods.values(), "ViPO - GRPO"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")

    def cell(entry: dict[str, Any]) -> str:
        return "-" if entry["mean"] is None else f"{entry['mean']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"

    for metric in summary["metrics"]:
        arrow = "higher is better" if metric["higher_is_better"] else "lower is better"
        rows = [summary["evaluation"][name][metric["name"]] for name in ("base", *methods)]
        difference = summary["differences"]["vipo-grpo"][metric["name"]]
        table.add_row(f"{metric['label']} ({arrow})", *map(cell, rows), cell(difference))
    return table


def typed_command(arguments: Sequence[str]) -> str:
    """The command as it was typed, less the place of its output, which a repetition is free to choose."""
    kept = list(arguments)
    for name in ("-o", "--output"):
        if name in kept:
            del kept[kept.index(name) : kept.index(name) + 2]
    return shlex.join(["vipo", *(text for text in kept if not text.startswith("--output="))])
