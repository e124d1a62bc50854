"""What a run names: YAML files and users' functions, found or refused in one line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml


def import_function(key: str, name: str, signature: str) -> Callable[..., Any]:
    """Import a user's "package.module:function" that a config names.

    Args:
        key: of the config, for the error.
        name: "package.module:function".
        signature: what it should be, for the error.

    Raises:
        ValueError: no such module or function, or not callable.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ValueError(f"{key}: cannot import {module!r} for {name!r}: {error}; is it on PYTHONPATH?") from error
    except AttributeError:
        raise ValueError(f"{key}: module {module!r} has no {function!r}") from None
    if not callable(found):
        raise ValueError(f"{key}: {name!r} is not callable; expected a function {signature}")
    imported: Callable[..., Any] = found
    return imported


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; ValueError says what is wrong with the file."""
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config: no such file: {path}") from None
    except IsADirectoryError:
        raise ValueError(f"config: {path} is a folder, expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from None
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
            target[parts[-1]] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{key}: not a YAML value: {text}") from error
    return mapping
