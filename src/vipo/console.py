"""What commands show on the terminal while they work."""

from __future__ import annotations

import os
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


def typed_command(arguments: Sequence[str]) -> str:
    """The command as it was typed, less the place of its output, which a repetition is free to choose."""
    kept = list(arguments)
    for name in ("-o", "--output"):
        if name in kept:
            del kept[kept.index(name) : kept.index(name) + 2]
    return shlex.join(["vipo", *(text for text in kept if not text.startswith("--output="))])


def how_to_go_on(arguments: Sequence[str]) -> str:
    """The command that continues a run of vipo train which was started by these arguments, maybe under torchrun."""
    once = ("--resume", "--overwrite", "--allow-changes")
    begin, command = "to go on: ", ["vipo"]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        command = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m", "vipo"]
        if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
            begin = "to go on, on every machine and with torchrun's --nnodes and --rdzv options as before: "
    return begin + shlex.join([*command, *(text for text in arguments if text not in once), "--resume"])
