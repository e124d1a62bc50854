"""vipo.inspection.record: whose a folder is, means over inputs, and tables that say what the numbers say."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from vipo.evaluation import bootstrap_mean
from vipo.inspection.record import FILES, MAPS, check_output, remove_earlier, summarise, tables
from vipo.psm import CONTROLS
from vipo.psm.agreement import METRICS


def entry(folder: str, area: float | None, note: str = "") -> dict[str, Any]:
    """One input whose map has this AUC; every control has .6, every other metric 1."""

    def numbers(auc: float) -> dict[str, float]:
        return {name: auc if name == "AUC" else 1.0 for name in METRICS}

    measured = area is not None and {
        "map": numbers(area),
        "controls": {kind: numbers(0.6) for kind in CONTROLS},
        "rules": {"nano": {"energy": numbers(area), "library": numbers(1 - area)}},
    }
    return {
        "folder": folder,
        "width": 64,
        "height": 32,
        "frames": 1,
        "statistics": {"entropy": 0.25, "border_to_centre": 0.5, "mean": 1.0, "max": 3.0, "flicker": 0.125},
        "agreement": measured or None,
        "notes": [note] if note else [],
    }


def leave(output: Path, *folders: str) -> None:
    """Leave what an inspection of these inputs leaves."""
    for folder in folders:
        (output / folder).mkdir(parents=True)
        for name in FILES:
            (output / folder / name).touch()
    (output / MAPS).write_text(json.dumps({"kind": "maps", "folders": folders}))


def shown(results: list[dict[str, Any]], **options: int) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables(results, summarise(results), **options):
        console.print(table)
    text = console.file.getvalue()
    assert isinstance(text, str)
    return text


def test_means_and_differences() -> None:
    results = [entry("a", 0.9), entry("b", 0.5), entry("c", None), entry("d", 1.0)]
    summary = summarise(results)
    areas = np.array([0.9, 0.5, 1.0])
    assert summary["inputs"] == 4 and summary["measured"] == 3
    assert summary["map"]["AUC"] == bootstrap_mean(areas)
    assert summary["rules"]["nano"]["library"]["AUC"] == bootstrap_mean(1 - areas)
    assert summary["controls"]["centre"]["AUC"]["mean"] == pytest.approx(0.6)
    difference = summary["map_minus_control"]["centre"]["AUC"]
    assert difference["mean"] == pytest.approx(areas.mean() - 0.6) and difference["win_rate"] == pytest.approx(2 / 3)
    assert summary["map_minus_control"]["ones"]["KL"]["win_rate"] == 0.5  # ties
    assert summary["statistics"]["entropy"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert set(summarise([entry("c", None)])) == {"inputs", "measured", "statistics"}
    assert summarise([]) == {"inputs": 0, "measured": 0}


def test_low_kl_wins() -> None:
    result = entry("a", 0.9)
    result["agreement"]["map"]["KL"] = 0.5
    assert summarise([result])["map_minus_control"]["ones"]["KL"]["win_rate"] == 1


def test_tables() -> None:
    text = shown([entry("a", 0.9, "mask resized"), entry("b", 0.5)])
    for expected in ("64 x 32", "0.250", "0.125", "0.900", "a: mask resized", "the map", "control: centre", "50%"):
        assert expected in text, expected
    assert "nano: library" in text and "0.500..0.900" in text and "with 2 masks" in text
    alone = shown([entry("a", 0.9)])
    assert "0.900" in alone and "[0.900" not in alone and "with 1 mask;" in alone  # one input has no interval
    assert "a[red]b" in shown([entry("a[red]b", None)])  # rich's markup is not for file names
    unmeasured = shown([entry(f"input{i}", None) for i in range(5)], limit=3)
    assert "masks" not in unmeasured and "input2" in unmeasured and "input3" not in unmeasured
    assert f"and 2 more, all in {MAPS}" in unmeasured
    assert "of 0 inputs" in shown([])


def test_an_output_of_others_is_refused(tmp_path: Path) -> None:
    for overwrite in (False, True):
        check_output(tmp_path / "new", overwrite=overwrite)
        check_output(tmp_path, overwrite=overwrite)  # empty
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, expected a folder"):
        check_output(tmp_path / "file", overwrite=True)
    for content in (None, "not JSON", "[]", '{"kind": "demo"}'):
        if content is not None:
            (tmp_path / MAPS).write_text(content)
        with pytest.raises(ValueError, match=r"is not empty and holds no maps.json of vipo maps"):
            check_output(tmp_path, overwrite=True)
    leave(tmp_path / "ours", "a")
    check_output(tmp_path / "ours", overwrite=True)
    with pytest.raises(ValueError, match="already holds maps; give --overwrite or another folder"):
        check_output(tmp_path / "ours", overwrite=False)


def test_only_our_own_files_are_removed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    leave(output, "a", "more/b", "more/b/c", "../outside", "kept")
    (output / "kept" / "notes.txt").touch()
    (output / "other").mkdir()
    (output / "other" / "map.npy").touch()
    remove_earlier(output)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"out/kept/notes.txt", "out/other/map.npy", *(f"outside/{name}" for name in FILES)}
    assert sorted(path.name for path in output.iterdir()) == ["kept", "other"]
