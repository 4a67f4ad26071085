"""Whose line raised: the user's own file, or ours."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from edgesmith.compiler.toml_places import shown

_OURS = Path(__file__).resolve().parents[1]
_ROOMS = tuple((_OURS / room).resolve() for room in ("compiler", "kernels", "passes", "targets"))
USER_MODULE = "edgesmith_user_"
"""How the names of modules begin that were loaded from a user's file."""


def describe(error: BaseException) -> str:
    """The type and the first line of an exception."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def line_below(error: BaseException, folder: Path) -> str:
    """``net.py:12 in function()``: the innermost line of a file below ``folder`` that ``error`` passed; empty if it passed none."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_relative_to(folder):
        return f"{shown(Path(error.filename))}:{error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_below(frame.filename, folder) and not _is_ours(frame.filename):
            inside = "" if frame.name == "<module>" else f" in {frame.name}()"
            return f"{shown(Path(frame.filename))}:{frame.lineno}{inside}"
    return ""


def users_line(error: BaseException) -> str:
    """Where in a user's file ``error`` came from; empty if our code was between that file and the error, or no user's file was loaded."""
    for folder in _user_folders():
        if isinstance(error, SyntaxError) and line_below(error, folder):
            return line_below(error, folder)
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if _is_ours(frame.filename):
                break
            if _is_below(frame.filename, folder):
                return line_below(error, folder)
    return ""


def _user_folders() -> set[Path]:
    files = [getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith(USER_MODULE)]
    return {Path(file).parent for file in files if file}


def _is_below(filename: str, folder: Path) -> bool:
    file = Path(filename)
    return file.is_relative_to(folder) and "site-packages" not in file.parts


def _is_ours(filename: str) -> bool:
    file = Path(filename).resolve()
    return any(file.is_relative_to(room) for room in _ROOMS)
