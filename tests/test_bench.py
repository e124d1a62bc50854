"""bench/psm.py runs as a reader would run it, and finds that both sides make the same maps of the same features."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "psm.py"
TIMINGS = [
    *(f"{side}_{part}" for side in ("ours", "released") for part in ("whole", "forward", "beyond")),
    *("ours_beyond_prepare", "ours_beyond_allocate", "released_full_beyond"),
]
RATIOS = ["ratio_whole", "ratio_beyond", "ratio_full_beyond", "ours_beyond_percent_of_forward", "target_percent"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The JSON of one quick run."""
    path = tmp_path_factory.mktemp("bench") / "psm.json"
    command = [sys.executable, BENCH, "--quick", "--repetitions", "2", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ours beyond" in done.stdout and not list(path.parent.glob("*.partial"))
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["image", "video"])
def test_the_same_features_give_the_released_maps(report, name):
    workload = report["workloads"][name]
    assert workload["maps_same_features_max_abs"] <= 1e-3
    assert workload["maps_subspace_vs_exact_max_abs"] <= 1e-3
    assert workload["maps_end_to_end_max_abs"] <= (0.05 if name == "image" else 1)  # uint8 and PIL; clips: also time


@pytest.mark.parametrize("name", ["image", "video"])
def test_every_timing_and_ratio_is_there(report, name):
    workload = report["workloads"][name]
    for timing in (workload[key] for key in TIMINGS):
        assert 0 < timing["min"] <= timing["median"] <= timing["max"] and timing["repetitions"] >= 1
    assert all(workload[key] > 0 for key in RATIOS)
    assert workload["ours_forward"]["median"] < workload["ours_whole"]["median"]


def test_a_clip_is_encoded_chunk_by_chunk(report):
    growth = report["scaling"]
    assert [column["most_frames_per_forward"] for column in growth["frames"].values()] == [7, 13, 27, growth["chunk"]]
    assert math.isfinite(growth["whole_power_of_frames"]) and math.isfinite(growth["beyond_power_of_frames"])


def test_bfloat16_changes_the_maps_a_little(report):
    assert 0 < report["autocast"]["maps_max_abs"] < 0.1
    assert report["autocast"]["maps_correlation"] > 0.99
