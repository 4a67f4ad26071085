"""Keys of a TOML file: where they are in its text, which the standard library's parser does not say, and settings that override them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from edgesmith.compiler.errors import BuildFileError
from edgesmith.compiler.suggest import did_you_mean

Key = tuple[str | int, ...]


def dotted(key: Iterable[str | int]) -> str:
    """``("target", 0, "name")`` as ``target.0.name``."""
    return ".".join(str(part) for part in key)


def shown(file: Path) -> str:
    """The path as a user would type it: relative where it is below the working folder."""
    absolute, here = file.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def place(file: Path | None, text: str, key: Key, overridden: Collection[Key] = ()) -> str:
    """``edgesmith.toml:12: budget.latency_ms``, or ``--set budget.latency_ms`` for one of the ``overridden`` keys.

    The line is that of the longest part of ``key`` that is in ``text``; without a file the place is the key alone.
    """
    if any(key[: len(done)] == done or done[: len(key)] == key for done in overridden):
        return f"--set {dotted(key)}"
    if file is None:
        return dotted(key)
    line = nearest_line(text, key)
    at = f"{shown(file)}:{line}" if line else shown(file)
    return f"{at}: {dotted(key)}" if key else at


def nearest_line(text: str, key: Key) -> int:
    """The line of the longest part of ``key`` that is in ``text``; 0 if none is."""
    for length in range(len(key), 0, -1):
        if line := line_of(text, key[:length]):
            return line
    return 0


def line_of(text: str, key: Key) -> int | None:
    """The line (from 1) on which ``key`` begins in a valid TOML text; None if it is not there.

    A value is complete on the first line where the text up to it parses and has the key, and begins after the last
    earlier line where the text parsed.
    """
    lines = text.splitlines(keepends=True)
    begin = 1
    for count in range(1, len(lines) + 1):
        try:
            partial = tomllib.loads("".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue
        if _has(partial, key):
            return begin
        begin = count + 1
    return None


def _has(value: Any, key: Key) -> bool:
    for part in key:
        inside = part < len(value) if isinstance(part, int) and isinstance(value, list) else isinstance(value, Mapping) and part in value
        if not inside:
            return False
        value = value[part]
    return True


def parse(file: Path, text: str) -> dict[str, Any]:
    """The parsed ``text`` of ``file``.

    Raises:
        BuildFileError: it is not TOML; with the line and what is on it.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, lines = str(error), text.splitlines() or [""]
        found = re.search(r"\s*\(at (?:line (\d+), column \d+|end of document)\)", message)
        line = min(int(found[1]), len(lines)) if found and found[1] else len(lines)
        reason = message[: found.start()] if found else message
        raise BuildFileError("not valid TOML", where=f"{shown(file)}:{line}", why=f"{reason}, in {lines[line - 1].strip()!r}") from error


def override(raw: dict[str, Any], assignment: str) -> Key:
    """Put ``KEY=VALUE`` into ``raw``; the key that was set."""
    name, equals, value = (part.strip() for part in assignment.partition("="))
    if not equals or not name:
        raise BuildFileError(f"{assignment!r} is not KEY=VALUE", where="--set", hint="such as --set budget.latency_ms=5")
    key: list[str | int] = []
    table: Any = raw
    *path, last = name.split(".")
    for part in path:
        key.append(_index(table, part, name))
        if isinstance(table, dict):
            table.setdefault(part, {})
        table = table[key[-1]]
        if not isinstance(table, (dict, list)):
            raise BuildFileError(f"{dotted(key)} is not a table", where=f"--set {name}")
    key.append(_index(table, last, name))
    table[key[-1]] = _toml_value(value)
    return tuple(key)


def _index(table: Any, part: str, name: str) -> str | int:
    """``part`` as an index where ``table`` is a list: a number, or the ``name`` of an entry."""
    if not isinstance(table, list):
        return part
    names = [str(entry.get("name", "")) for entry in table if isinstance(entry, dict)]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(table):
        return int(part)
    raise BuildFileError(f"there is no entry {part!r}", where=f"--set {name}", hint=did_you_mean(part, names or map(str, range(len(table)))))


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
