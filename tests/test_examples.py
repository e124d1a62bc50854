"""examples/minimal.py runs as a reader would run it, stays short, and learns."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal.py"


def test_minimal_example_learns():
    assert len(EXAMPLE.read_text().splitlines()) <= 150
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after = re.search(r"reward (-[\d.]+) -> (-[\d.]+)\n$", done.stdout).groups()
    assert float(after) > float(before) + 0.004, done.stdout
