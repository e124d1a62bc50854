"""A run directory as one self-contained HTML page.

`render_report(run_dir)` reads only what the run wrote (config, metrics, sheets, summary) and writes one file,
`run_dir/report.html`. The read path: reading.py (files -> records) -> wording.py (records -> sentences) -> charts.py,
images.py (records -> SVG, data URIs) -> sections.py, demo_page.py, train_page.py (records for the templates) ->
page.py (template.html.j2 and its parts). Nothing here imports torch or the trainer.
"""

from vipo.report.page import render_report

__all__ = ["render_report"]
