"""What is wrong with a config, in one line: the key, what was expected, what was got, and the nearest right key."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from typing import Any


def describe(error: Any, keys: Sequence[str]) -> str:
    """Put one error of pydantic into a line.

    Args:
        error: an entry of `ValidationError.errors()`.
        keys: all right keys, "section.name".
    """
    location = [str(part) for part in error["loc"]]
    while len(location) > 2:  # unions and lists add their own parts; the key is section.name
        location.pop()
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggest(location, keys)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    named = error["type"] == "value_error" and message.startswith(f"{key}.")  # a section's own check names its key
    return (
        message
        if not key or named
        else f"{key}: {message.replace('input should be', 'expected')}, got {reprlib.repr(error['input'])}"
    )


def _suggest(location: list[str], keys: Sequence[str]) -> str:
    """Name the nearest right key, wherever it is."""
    sections = list(dict.fromkeys(key.split(".")[0] for key in keys))
    if len(location) == 1:
        near = [key for key in keys if key.split(".")[1] == location[0]]
        near = near or difflib.get_close_matches(location[0], sections, 1, 0.5)
        return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(sections)}"
    same = [key for key in keys if key.split(".")[1] == location[1]]
    near = difflib.get_close_matches(
        location[1], [k.split(".")[1] for k in keys if k.startswith(location[0] + ".")], 1, 0.5
    )
    if near:
        return f"; did you mean {location[0]}.{near[0]}?"
    return f"; did you mean {same[0]}?" if same else f"; see vipo train --help for the keys of {location[0]}"
