"""Records of the study -> the tables of docs/evidence.md."""

from __future__ import annotations

from pathlib import Path


def write_page(page: Path, records: Path) -> None:
    """Write the tables between the marks of the page."""
