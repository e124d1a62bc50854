"""Render a run directory to `report.html`: choose the page, fill the template, write the file in one move."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from vipo.files import write_atomically
from vipo.report import wording
from vipo.report.demo_page import demo_context
from vipo.report.eval_page import eval_context
from vipo.report.reading import DemoRun, EvalRun, read_run
from vipo.report.train_page import train_context

REPORT_NAME = "report.html"


def render_report(run_dir: Path) -> Path:
    """Write the page of a run, reading nothing outside its directory.

    Args:
        run_dir: what `vipo train`, `vipo demo` or `vipo eval` wrote.

    Returns:
        The path of the page, `run_dir/report.html`: one file that opens offline. The same files give the same bytes.

    Raises:
        ValueError: the directory is no run, a file in it is corrupt, or a path in it leads outside.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    if isinstance(run, EvalRun):
        page = _render("eval.html.j2", eval_context(run))
    elif isinstance(run, DemoRun):
        page = _render("demo.html.j2", demo_context(run))
    else:
        page = _render("train.html.j2", train_context(run))
    write_atomically(run_dir / REPORT_NAME, page)
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
