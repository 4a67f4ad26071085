"""The output folder: one build at a time in it, and nothing in it half written."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgesmith.compiler.files import translated


@contextmanager
def workspace(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Make ``folder`` and hold it for this process; another build into it waits (``waiting`` is called once). A killed process lets go.

    Raises:
        OutputError: the folder cannot be written.
    """
    with translated(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(handle)
