"""The text form of a pass: ``prune{ratio=0.3,exclude=[head,blocks.0.*]}`` <-> a dataclass."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

from edgesmith.compiler import registry
from edgesmith.compiler.errors import SpecError
from edgesmith.compiler.passbase import Pass
from edgesmith.compiler.suggest import did_you_mean

_SPEC = re.compile(r"\s*(?P<name>[^{},\s][^{},]*?)\s*(?:\{(?P<options>.*)\})?\s*", re.DOTALL)


def parse_pass(text: str, folder: Path | None = None) -> Pass:
    """The pass that ``text`` spells. ``file.py:Class{...}`` is a user's own pass, found relative to ``folder``.

    Raises:
        SpecError: an unknown pass or option, or an option of the wrong type.
    """
    match = _SPEC.fullmatch(text)
    if match is None:
        raise SpecError("not a pass specification", where=repr(text), hint="write name or name{option=value,...}")
    cls = _class(match["name"], folder)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    options: dict[str, Any] = {}
    for part in split_top(match["options"] or ""):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in fields:
            hint = did_you_mean(key, fields) if fields else "it has no options"
            raise SpecError(f"pass {match['name']!r} has no option {key!r}", where=repr(text), hint=hint)
        if not equals:
            raise SpecError(f"option {key!r} has no value", where=repr(text), hint=f"write {key}=...")
        options[key] = _value(value, hints[key], f"{text!r}, option {key!r}")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise SpecError(f"pass {match['name']!r} refuses its options", where=repr(text), why=str(error)) from error


def format_pass(step: Pass) -> str:
    """The shortest text that ``parse_pass`` reads as ``step``: options at their defaults are left out."""
    options = []
    for field in dataclasses.fields(step):  # type: ignore[arg-type]
        value = getattr(step, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if value != default:
            options.append(f"{field.name}={_text(value)}")
    return step.name + (f"{{{','.join(options)}}}" if options else "")


def split_top(text: str) -> list[str]:
    """Split at commas that are outside brackets: ``"a{x=1,y=2},b"`` -> ``["a{x=1,y=2}", "b"]``.

    Raises:
        SpecError: brackets do not match.
    """
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if depth < 0:
            break
        if char == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    if depth != 0:
        raise SpecError("brackets do not match", where=repr(text))
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def load_file(path: Path) -> ModuleType:
    """Import a user's Python file as a module of its own; its folder is importable while it loads.

    Raises:
        SpecError: the file does not exist.
    """
    if not path.is_file():
        raise SpecError("there is no such file", where=str(path))
    resolved = path.resolve()
    name = f"edgesmith_user_{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}_{resolved.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(resolved.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(resolved.parent))
    return module


def _class(name: str, folder: Path | None) -> type[Pass]:
    file, colon, attribute = name.rpartition(":")
    if not (colon and file.endswith(".py")):
        return registry.pass_class(name)
    found = getattr(load_file((folder or Path()) / file), attribute, None)
    if not (isinstance(found, type) and issubclass(found, Pass)) or not hasattr(found, "__dataclass_fields__"):
        raise SpecError(f"{file} has no pass {attribute!r}", hint="a pass is a frozen dataclass that derives from edgesmith.Pass")
    return found


def _value(text: str, kind: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in arguments:
        return None if text.lower() == "none" else _value(text, next(a for a in arguments if a is not type(None)), where)
    if origin is tuple:
        inner = text[1:-1] if text.startswith(("[", "(")) else text
        return tuple(_value(part, arguments[0], where) for part in split_top(inner))
    if kind is bool:
        if text.lower() not in {"true", "false"}:
            raise SpecError(f"{text!r} is not true or false", where=where)
        return text.lower() == "true"
    if kind in {int, float}:
        try:
            return kind(text)
        except ValueError as error:
            raise SpecError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}", where=where) from error
    if kind is str:
        return text.strip("'\"")
    raise SpecError(f"options of type {kind} have no text form", where=where, hint="use bool, int, float, str, a tuple of one of these, or X | None")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(_text, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
