"""The user's own Python files: functions found by name, and what they raise reported with their file and line."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from edgesmith.compiler.blame import describe, line_below
from edgesmith.compiler.buildfile import Source
from edgesmith.compiler.errors import EdgesmithError, SourceError, UserError
from edgesmith.compiler.files import refusal
from edgesmith.compiler.spec import load_file
from edgesmith.compiler.suggest import did_you_mean
from edgesmith.compiler.toml_places import shown


def call(source: Source, error: type[UserError] = SourceError) -> Any:
    """What the function ``source`` returns when called without arguments.

    Raises:
        UserError: (of type ``error``) the file has no such function, it needs arguments, or it raised; with file and line.
    """
    function = load_function(source, error)
    with Running(source.path, error):
        needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}]
        if needed:
            raise error(
                f"{source.function}() needs arguments: {', '.join(needed)}", where=shown(source.path), hint="it is called without any; give them defaults"
            )
        return function()


def load_function(source: Source, error: type[UserError] = SourceError) -> Callable[..., Any]:
    """The function that ``source`` names; its file is imported once.

    Raises:
        UserError: (of type ``error``) the file cannot be imported, or has no such function.
    """
    assert source.function is not None
    with Running(source.path, error):
        module = load_file(source.path)
    found = getattr(module, source.function, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        what = f"{source.function!r} is not a function" if found is not None else f"there is no function {source.function!r}"
        raise error(what, where=shown(source.path), hint=did_you_mean(source.function, names) if names else "the file defines none")
    return found  # type: ignore[no-any-return]


class Running:
    """While open, code of a user's ``file`` runs: its folder is importable, and whatever it raises becomes an ``error`` with its line.

    A user's code may raise anything, so that this border takes every exception, edgesmith's own left alone; the original is its cause.
    """

    def __init__(self, file: Path, error: type[UserError] = SourceError) -> None:
        self._file = file.resolve()
        self._error = error

    def __enter__(self) -> None:
        folder = self._file.parent
        sys.path.insert(0, str(folder))
        _imported_from.add(folder)
        for name, module in list(sys.modules.items()):
            if _is_namesake(module, name, folder):
                del sys.modules[name]

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, tb: TracebackType | None) -> None:
        sys.path.remove(str(self._file.parent))
        if isinstance(raised, EdgesmithError) or not isinstance(raised, (Exception, SystemExit)):
            return
        refused = refusal(raised) if isinstance(raised, OSError) else None
        if refused is not None:
            raise refused from raised
        raise self._error(describe(raised), where=line_below(raised, self._file.parent) or shown(self._file), hint=_hint(raised)) from raised


_imported_from: set[Path] = set()


def _is_namesake(module: ModuleType, name: str, folder: Path) -> bool:
    """Whether ``module`` is a top-level one from another user's folder that hides a file of the same name in ``folder``."""
    file = getattr(module, "__file__", None)
    if "." in name or not isinstance(file, str):
        return False
    home = Path(file).parent
    return home != folder and home in _imported_from and (folder / f"{name}.py").is_file()


def _hint(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"install {error.name}, or put it beside the file"
    return ""
