"""The README's Python block runs as printed, its YAML is a valid config, its tree names every part of the package."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from vipo import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = """
prompts: {per_iteration: 1, group_size: 2}
sampling: {num_inference_steps: 3}
run: {output: out, iterations: 1, tensorboard: false}
"""


def block(language):
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL).group(1)


def test_python_block_runs(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    done = subprocess.run([sys.executable, "-c", block("python")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "checkpoints" / "step_000001" / "weights" / "pytorch_lora_weights.safetensors").is_file()


def test_yaml_block_is_a_valid_config():
    assert Config.from_mapping(yaml.safe_load(block("yaml"))).prompts.group_size == 12


def test_tree_names_every_part():
    package = ROOT / "src" / "vipo"
    parts = {path.name for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    parts -= {"__init__.py", "__main__.py", "__pycache__"}
    for part in parts:
        assert re.search(rf"^  {re.escape(part)}/? ", README, re.MULTILINE), part


def test_claimed_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
