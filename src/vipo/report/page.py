"""Render a run directory to `report.html`: choose the page, fill the template, write the file in one move."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from vipo.files import write_atomically
from vipo.report import wording
from vipo.report.demo_page import demo_context
from vipo.report.reading import DemoRun, read_run
from vipo.report.train_page import train_context

REPORT_NAME = "report.html"


def render_report(run_dir: Path) -> Path:
    """Write the page of a run, reading nothing outside its directory.

    Args:
        run_dir: what `vipo train` or `vipo demo` wrote.

    Returns:
        The path of the page, `run_dir/report.html`: one file that opens offline. The same files give the same bytes.

    Raises:
        ValueError: the directory is no run, a file in it is corrupt, or a path in it leads outside.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    context = demo_context(run) if isinstance(run, DemoRun) else train_context(run)
    template = "demo.html.j2" if isinstance(run, DemoRun) else "train.html.j2"
    write_atomically(run_dir / REPORT_NAME, _render(template, context))
    return run_dir / REPORT_NAME


def _render(template: str, context: Mapping[str, object]) -> str:
    """Fill a template of this package; every value is escaped unless it is Markup made by charts.py."""
    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        fixed=wording.fixed,
        compact=wording.compact,
        percent=wording.percent,
        duration=wording.duration,
    )
    return environment.get_template(template).render(
        **context, symbols=wording.VERDICT_SYMBOLS, words=wording.VERDICT_WORDS
    )


def _asset(name: str) -> str:
    """Return a template, style or script shipped beside this file."""
    return resources.files("vipo.report").joinpath(name).read_text(encoding="utf-8")
