"""Run the study: `python -m vipo.nano.study`. Hours on two cores; stopped and started again, it goes on.

Every run is one process with one thread; its numbers go into OUTPUT/TABLE.json as soon as it is done, and a run that
is recorded there with the same changes and the same budget is not made again. At the end OUTPUT.md is written.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

from .arms import FULL, QUICK
from .page import write_page
from .work import Study


def main() -> None:
    """Read the command line, run, write the page."""
    parser = argparse.ArgumentParser(prog="python -m vipo.nano.study", description=__doc__)
    parser.add_argument(
        "-o", "--output", type=Path, help="records (default: docs/evidence, with --quick runs/study_quick)"
    )
    parser.add_argument("--only", choices=("image", "video"), help="one kind only")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="some runs of every table, one iteration each: a minute or two; proves nothing",
    )
    parser.add_argument("--page", action="store_true", help="only write the page from the records there are")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.filterwarnings("ignore", category=UserWarning)
    budget = QUICK if options.quick else FULL
    output = options.output or Path("runs/study_quick" if options.quick else "docs/evidence")
    if not options.page:
        Study(output, budget, options.workers).all([options.only] if options.only else ["image", "video"])
    write_page(output.with_suffix(".md"), output)


if __name__ == "__main__":
    main()
