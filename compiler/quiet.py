"""Keep the chatter of converters and runtimes out of the user's terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from pathlib import Path

_log: ContextVar[Path | None] = ContextVar("edgesmith_log", default=None)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """While open, ``quiet()`` sends what it catches to the end of ``path``."""
    token = _log.set(path)
    try:
        yield
    finally:
        _log.reset(token)


def current_log() -> Path | None:
    """Where chatter goes at present; None where it is thrown away."""
    return _log.get()


@contextmanager
def quiet() -> Iterator[None]:
    """While open, everything written to standard output and error, native code included, goes to the current log.

    Python's own streams are replaced too: in a notebook they are not the process's.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    target = os.open(_log.get() or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    kept = os.dup(1), os.dup(2)
    disabled = logging.root.manager.disable
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), os.fdopen(os.dup(target), "w", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
            warnings.simplefilter("ignore")
            yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        logging.disable(disabled)
        for number, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, number)
            os.close(saved)
        os.close(target)
