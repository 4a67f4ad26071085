"""Where a key is in a TOML text, which the standard library's parser does not say."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgesmith.compiler.errors import BuildFileError

Key = tuple[str | int, ...]


def dotted(key: Iterable[str | int]) -> str:
    """``("target", 0, "name")`` as ``target.0.name``."""
    return ".".join(str(part) for part in key)


def shown(file: Path) -> str:
    """The path as a user would type it: relative where it is below the working folder."""
    absolute, here = file.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def place(file: Path, text: str, key: Key) -> str:
    """``edgesmith.toml:12: budget.latency_ms``; the line is that of the longest part of ``key`` that is in ``text``."""
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
