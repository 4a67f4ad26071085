"""The outermost border: whatever ends a command becomes one message, one exit code and, where the fault is ours, a crash report."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from edgesmith.compiler.blame import describe, users_line
from edgesmith.compiler.errors import EdgesmithError, SourceError, UserError
from edgesmith.compiler.files import refusal

INTERRUPTED = 130
BROKEN_PIPE = 141
_SHOWN_VERSIONS = (
    "edgesmith",
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "litert-torch",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "executorch",
    "transformers",
)


def guarded(command: Callable[[], int], arguments: Sequence[str]) -> int:
    """The exit code of ``command``: its own, or that of the error which ended it, told on standard error without a traceback.

    This is the one place that takes every exception: nothing may reach the user as a traceback, and what nobody foresaw
    is a defect of ours (exit code 70) whose crash report says how to make it happen again.
    """
    try:
        return command()
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this one was", file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:  # noqa: BLE001
        return _ended_by(error, arguments)


def _ended_by(error: Exception, arguments: Sequence[str]) -> int:
    known = translate(error)
    if known is not None and known.exit_code != EdgesmithError.exit_code:
        print(f"error: {known}", file=sys.stderr)  # noqa: T201
        return known.exit_code
    report = write_crash_report(error, arguments)
    print(f"error: {known or describe(error)}\n  this is a defect of edgesmith; {report} says how to make it happen again", file=sys.stderr)  # noqa: T201
    return EdgesmithError.exit_code


def translate(error: Exception) -> EdgesmithError | None:
    """``error`` as one of ours; None if nobody foresaw it."""
    if isinstance(error, EdgesmithError):
        return error
    if isinstance(error, OSError):
        refused = refusal(error)
        if refused is not None:
            return refused
    if isinstance(error, PermissionError):
        return UserError("permission denied", where=str(error.filename or ""))
    line = users_line(error)
    return SourceError(describe(error), where=line) if line else None


def write_crash_report(error: BaseException, arguments: Sequence[str]) -> str:
    """Write what is needed to see ``error`` again: command, versions, build file, traceback. Where it lies, or why it could not be written."""
    text = crash_report(error, arguments)
    name = f"edgesmith-crash-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}.txt"
    for folder in filter(None, (_working_folder(), Path(tempfile.gettempdir()))):
        try:
            (folder / name).write_text(text, encoding="utf-8")
        except OSError:
            continue
        return str(folder / name)
    sys.stderr.write(text)
    return "the text above"


def crash_report(error: BaseException, arguments: Sequence[str]) -> str:
    """Command, versions, build file and traceback as text."""
    parts = [
        f"command: edgesmith {shlex.join(arguments)}",
        f"folder: {_working_folder() or 'removed while the command ran'}",
        f"python: {platform.python_version()} on {platform.platform()}",
        *(f"{name}: {version}" for name, version in _versions()),
    ]
    for file in (Path(argument) for argument in arguments if argument.endswith(".toml")):
        if file.is_file():
            parts += ["", f"--- {file}", file.read_text(encoding="utf-8", errors="replace").rstrip()]
    return "\n".join([*parts, "", "--- traceback", *traceback.format_exception(error)])


def _working_folder() -> Path | None:
    """None if it was removed while the command ran."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def _versions() -> list[tuple[str, str]]:
    from importlib import metadata

    found = []
    for name in _SHOWN_VERSIONS:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    return found
