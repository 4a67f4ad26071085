"""Name -> pass or target. Built-ins and plugins are alike: a table of import paths, and the entry points of installed packages."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

from edgesmith.compiler.errors import SpecError, UserError
from edgesmith.compiler.suggest import did_you_mean

if TYPE_CHECKING:
    from edgesmith.compiler.passbase import Pass
    from edgesmith.compiler.target import Target


def _paths(kind: str) -> dict[str, str]:
    table: dict[str, str] = dict(importlib.import_module(f"edgesmith.{kind}").BUILTIN)
    for entry in importlib.metadata.entry_points(group=f"edgesmith.{kind}"):
        if entry.name in table and table[entry.name] != entry.value:
            raise UserError(f"two installed packages offer {kind} {entry.name!r}", why=f"{table[entry.name]} and {entry.value}", hint="uninstall one of them")
        table[entry.name] = entry.value
    return table


def _load(path: str) -> object:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _named(kind: str, name: str) -> object:
    paths = _paths(kind)
    if name not in paths:
        raise SpecError(f"there is no {kind.removesuffix('es') if kind == 'passes' else 'target'} {name!r}", hint=did_you_mean(name, paths))
    return _load(paths[name])


def pass_names() -> tuple[str, ...]:
    """The names of all registered passes."""
    return tuple(sorted(_paths("passes")))


def target_names() -> tuple[str, ...]:
    """The names of all registered targets."""
    return tuple(sorted(_paths("targets")))


def pass_class(name: str) -> type[Pass]:
    """The registered pass ``name``.

    Raises:
        SpecError: there is none of that name.
    """
    return _named("passes", name)  # type: ignore[return-value]


def target(name: str) -> Target:
    """An instance of the registered target ``name``.

    Raises:
        SpecError: there is none of that name.
    """
    return _named("targets", name)()  # type: ignore[operator,no-any-return]


def target_for(path: Path) -> Target:
    """The target whose files have the suffix of ``path``.

    Raises:
        UserError: no target has it.
    """
    found = [t for t in map(target, target_names()) if t.suffix == path.suffix]
    if not found:
        suffixes = ", ".join(sorted(target(name).suffix for name in target_names()))
        raise UserError("not an artifact that any target writes", where=str(path), hint=f"known suffixes: {suffixes}")
    return found[0]
