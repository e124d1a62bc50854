"""Published prompt sets, read from the files that their authors publish; told apart by content and columns.

kind          file                                what is read
hpdv2         anime.json, paintings.json, ...     a JSON list of texts; the category is the file's name
vbench        VBench_full_info.json, ...          a JSON list of {"prompt_en", "dimension"}
geneval       evaluation_metadata.jsonl           JSON lines of {"tag", "include", "prompt"}; the rest is metadata
partiprompts  PartiPrompts.tsv                    columns Prompt, Category, Challenge, Note; quotes are plain text
drawbench     DrawBench .csv or .tsv              columns Prompts, Category
vidprom       VidProM .csv                        columns uuid, prompt, ...
t2icompbench  color_val.txt, ...                  one prompt per line, what follows a tab is left out
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .types import Prompt, check_choice

TABLES = {
    "drawbench": ("prompts", ("prompts", "category")),
    "partiprompts": ("prompt", ("prompt", "category", "challenge")),
    "vidprom": ("prompt", ("uuid", "prompt")),
}
"""Kind -> the column of the prompt, and the columns that tell the kind, in lower case."""


def read_text(file: Path) -> str:
    """Read a prompt file.

    Raises:
        ValueError: it is missing, a folder, or not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"prompts.path: no such file: {file}") from None
    except IsADirectoryError:
        raise ValueError(f"prompts.path: {file} is a folder, expected a text file with one prompt per line") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompts.path: {file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None


def read_prompt_set(path: str | Path, kind: str | None = None) -> list[Prompt]:
    """Read a published prompt set.

    Args:
        path: of the file.
        kind: one of the kinds above; None tells it by content and columns.

    Returns:
        The prompts, stripped, in the order of the file; a set's category, where it has one, in `category`.

    Raises:
        ValueError: no such file, not of that kind or of any, or without a prompt.
    """
    file = Path(path)
    text = read_text(file)
    found = kind_of(file, text) if kind is None else kind
    if found is None:
        raise ValueError(f"prompts.path: {file} is none of the prompt sets known: {', '.join(READERS)}")
    check_choice("kind", found, tuple(READERS))
    prompts = [prompt for prompt in READERS[found](file, text) if prompt.text]
    if not prompts:
        raise ValueError(f"prompts.path: {file} is empty; expected the prompts of {found}")
    return prompts


def kind_of(file: Path, text: str) -> str | None:
    """Tell which published set a file is, by its suffix and what it begins with; None for none of them."""
    suffix = file.suffix.lower()
    if suffix == ".json":
        entries = _parse(file, text)
        first = entries[0] if isinstance(entries, list) and entries else None
        return "hpdv2" if isinstance(first, str) else "vbench" if isinstance(first, dict) else None
    if suffix == ".jsonl":
        first = next((line for line in text.splitlines() if line.strip()), "")
        return "geneval" if first.lstrip().startswith("{") and {"tag", "include"} <= set(_fields(first)) else None
    if suffix in (".csv", ".tsv"):
        columns = _columns(text.split("\n", 1)[0])
        return next((kind for kind, (_, needed) in TABLES.items() if set(needed) <= set(columns)), None)
    return "t2icompbench" if suffix == ".txt" else None


def _fields(line: str) -> Sequence[str]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return ()
    return list(entry) if isinstance(entry, dict) else ()


def _parse(file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts.path: {file} is not JSON: {error}") from None


def _columns(header: str) -> list[str]:
    """Names of a table's columns, in lower case; a tab in the header means that tabs divide."""
    cells = next(csv.reader([header.strip("\r")], delimiter=_delimiter(header)), [])
    return [cell.strip().lower() for cell in cells]


def _delimiter(header: str) -> str:
    return "\t" if "\t" in header else ","


def _read_hpdv2(file: Path, text: str) -> list[Prompt]:
    entries = _parse(file, text)
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"prompts.path: {file}: expected a JSON list of texts")
    return [Prompt(entry.strip(), category=file.stem) for entry in entries]


def _read_vbench(file: Path, text: str) -> list[Prompt]:
    entries = _parse(file, text)
    prompts = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt_en"), str):
            raise ValueError(f'prompts.path: {file} entry {number}: expected {{"prompt_en": ..., "dimension": ...}}')
        dimension = entry.get("dimension") or []
        named = [dimension] if isinstance(dimension, str) else list(map(str, dimension))
        prompts.append(Prompt(entry["prompt_en"].strip(), category=", ".join(named)))
    return prompts


def _read_geneval(file: Path, text: str) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        entry = _parse(Path(f"{file} line {number}"), line)
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(f'prompts.path: {file} line {number}: expected {{"prompt": ..., "tag": ...}}')
        prompts.append(Prompt(entry["prompt"].strip(), category=str(entry.get("tag", ""))))
    return prompts


def _table_reader(kind: str) -> Callable[[Path, str], list[Prompt]]:
    def read(file: Path, text: str) -> list[Prompt]:
        column, needed = TABLES[kind]
        header = text.split("\n", 1)[0]
        names, tabs = _columns(header), _delimiter(header) == "\t"
        if not set(needed) <= set(names):
            raise ValueError(
                f"prompts.path: {file}: {kind} has the columns {', '.join(needed)}, got {', '.join(names)}"
            )
        # PartiPrompts has plain quotes in its tab-separated prompts; only where commas divide are they brackets
        if tabs:
            rows = csv.reader(text.replace("\r\n", "\n").split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            rows = csv.reader(text.splitlines(keepends=True))
        place, label = names.index(column), names.index("category") if "category" in names else None
        prompts = []
        try:
            next(rows)
            for row in rows:
                if row and len(row) <= place:
                    raise ValueError(f"prompts.path: {file} line {rows.line_num}: has no column {column}")
                if row:
                    category = row[label].strip() if label is not None and label < len(row) else ""
                    prompts.append(Prompt(row[place].strip(), category=category))
        except csv.Error as error:
            raise ValueError(f"prompts.path: {file} line {rows.line_num}: {error}") from None
        return prompts

    return read


def _read_lines(file: Path, text: str) -> list[Prompt]:
    """One prompt per line; what follows a tab and commas left at the end are no part of it."""
    return [Prompt(line.split("\t")[0].strip().rstrip(",;").rstrip()) for line in text.splitlines()]


READERS: dict[str, Callable[[Path, str], list[Prompt]]] = {
    "hpdv2": _read_hpdv2,
    "vbench": _read_vbench,
    "geneval": _read_geneval,
    **{kind: _table_reader(kind) for kind in TABLES},
    "t2icompbench": _read_lines,
}
