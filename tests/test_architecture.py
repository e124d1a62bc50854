"""The design's rules about imports and sizes, checked on the source."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "vipo"
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = [
    {
        "types",
        "files",
        "windows",
        "named",
        "nano",
        "console",
        "config_errors",
        "distributed",
        "section",
        "watch_config",
        "parallel_config",
        "interrupt",
        "versions",
    },
    {
        "kernels",
        "advantages",
        "losses",
        "estimators",
        "psm",
        "config",
        "prompts",
        "prompt_sets",
        "loading",
        "measures",
        "media",
        "offload",
        "context",
        "trainable",
        "lock",
        "manifest",
        "rng",
        "ema",
        "schedule",
        "optimizer",
        "changes",
    },
    {"scheduler", "pipelines", "rewards", "maps", "reward_maps", "pictures"},
    {"policy", "memory"},
    {"build", "checkpoint", "runlog", "session", "evaluation", "report", "held_out", "watch"},
    {"safety", "fitting"},
    {"rollouts"},
    {"trainer"},
    {"preflight", "signal", "demo_kinds", "inspection", "comparison"},
    {"demo"},
    {"arguments"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
TRAINING_CODE = {p for p in FILES if p.stem.startswith("pretrain") or p.parent.name == "study"}  # imports anything


def part(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path):
    """Parts of the package that a file imports, anywhere in it."""
    package = path.relative_to(SOURCE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = (node.module or "").split(".") if node.module else []
            if node.level:
                base = list(package[: len(package) - node.level + 1])
                full = base + names
                yield from [full[0]] if full else [alias.name for alias in node.names]
            elif names and names[0] == "vipo":
                yield from names[1:2]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_only(path):
    if path in TRAINING_CODE or path.name == "__init__.py" and path.parent == SOURCE:
        return
    for name in imported_parts(path):
        if name in RANK and name != part(path):
            assert RANK[name] <= RANK[part(path)], f"{path.name} ({part(path)}) imports {name}"
            assert not (part(path) in ("report", "runlog", "checkpoint") and name == "trainer")


def test_every_part_has_a_place():
    parts = {part(path) for path in FILES} - {"__init__"}
    assert parts == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_sizes_and_exceptions(path):
    text = path.read_text()
    assert text.count("\n") <= 450, "STYLE.md's cap is 400 lines; an alarm rings there, this is the wall"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 100, f"{node.name} is too long"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and getattr(node.type, "id", "") not in ("Exception", "BaseException")


@pytest.mark.parametrize(
    "name",
    [
        "kernels",
        "advantages",
        "losses",
        "estimators",
        "psm/pca",
        "psm/allocation",
        "psm/controls",
        "psm/motion",
        "psm/agreement",
        "psm/latent_grid",
    ],
)
def test_the_pure_core_has_no_config_no_files_no_item(name):
    text = (SOURCE / f"{name}.py").read_text()
    for banned in (".item()", "open(", "Config", "accelerate", ".cuda(", "pickle"):
        assert banned not in text, f"{name}: {banned}"


def test_nothing_is_unpickled():
    for path in FILES:
        text = path.read_text()
        for call in ("import pickle", "pickle.load", "pickle.dump", "Unpickler(", "torch.save(", "weights_only=False"):
            assert call not in text, f"{path}: {call}"
        assert re.findall(r"from pickle import (.*)", text) in ([], ["UnpicklingError"]), path
        assert "torch.load" not in text, path
