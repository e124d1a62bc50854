"""What a run names: YAML files and users' functions, found or refused in one line."""

from __future__ import annotations

import contextlib
import importlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a user's code raises when it is wrong; ImportError is told apart."""


class _Loader(yaml.SafeLoader):
    """YAML in which no key comes twice, where the last would win, and no alias multiplies what was written once."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.line + 1}: aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value!r} is there twice; keep one")
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse YAML; ValueError says in one line what is wrong with it."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("nested too deep; expected sections of keys and values") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that is none
        raise ValueError(" ".join(str(error).split())) from None


@contextlib.contextmanager
def calling(what: str) -> Iterator[None]:
    """Say in one line what a user's code raised, and where: ValueError, whose cause is the error itself."""
    try:
        yield
    except _FAILURES as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())
        where = f"{Path(place.filename).name} line {place.lineno}"
        raise ValueError(f"{what} raised {type(error).__name__}: {reason} ({where}); mend it there") from error


def import_function(key: str, name: str, signature: str) -> Callable[..., Any]:
    """Import a user's "package.module:function" that a config names.

    Args:
        key: of the config, for the error.
        name: "package.module:function".
        signature: what it should be, for the error.

    Raises:
        ValueError: no such module or function, one that fails when imported, or not callable.
    """
    path, _, function = name.partition(":")
    try:
        with calling(f"{key}: the import of {path!r} for {name!r}"):
            module = importlib.import_module(path)
    except ImportError as error:
        raise ValueError(f"{key}: cannot import {path!r} for {name!r}: {error}; is it on PYTHONPATH?") from error
    try:
        found = getattr(module, function)
    except AttributeError:
        near = get_close_matches(function, dir(module), 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"expected a function {signature}"
        raise ValueError(f"{key}: module {path!r} has no {function!r}; {hint}") from None
    if not callable(found):
        raise ValueError(f"{key}: {name!r} is not callable; expected a function {signature}")
    imported: Callable[..., Any] = found
    return imported


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; ValueError says what is wrong with the file."""
    try:
        mapping = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config: no such file: {path}") from None
    except IsADirectoryError:
        raise ValueError(f"config: {path} is a folder, expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(f"config: {path} is not YAML: {error}") from None
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ValueError(f"config: {path}: expected sections (model:, prompts:, ...), got {type(mapping).__name__}")
    return {key: {} if value is None else value for key, value in mapping.items()}


def apply_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set keys of a nested mapping, in place, from texts like "--loss.level=sample".

    Raises:
        ValueError: a text of another form, a key below something that is no section, or a value that is not YAML.
    """
    for override in overrides:
        key, separator, text = override.removeprefix("--").partition("=")
        parts = key.split(".")
        if not override.startswith("--") or not separator or len(parts) < 2:
            raise ValueError(f"{override}: expected --section.key=value, e.g. --prompts.group_size=4")
        target = mapping
        for part in parts[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ValueError(f"{key}: {part} is not a section")
        try:
            target[parts[-1]] = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"{key}: not a YAML value: {error}") from None
    return mapping
