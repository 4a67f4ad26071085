"""What a user sees while something takes long: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

LINE_EVERY_S = 10.0
"""Plain lines about the same step come at most this often."""


class Progress(Protocol):
    """Told what goes on. ``update`` fits ``PassContext.progress``."""

    def step(self, name: str) -> None:
        """A new step begins; what ran before is done."""

    def update(self, done: int, total: int, text: str) -> None:
        """``done`` of ``total`` parts of the step are done (a total of 0 is not known); ``text`` says what runs."""


class _Silent:
    def step(self, name: str) -> None:
        pass

    def update(self, done: int, total: int, text: str) -> None:
        pass


def silent() -> Progress:
    """A progress that says nothing."""
    return _Silent()


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """A bar where ``stream`` (standard error if not given) is a terminal and ``CI`` is not set, else plain lines.

    It keeps a descriptor of its own, so that what ``quiet()`` sends to a log file does not take it along.
    """
    stream = stream or sys.stderr
    own = _own(stream)
    try:
        if own.isatty() and not os.environ.get("CI"):
            with _bar(own) as bar:
                yield bar
        else:
            lines = Lines(own)
            yield lines
            lines.close()
    finally:
        if own is not stream:
            own.close()


def _own(stream: TextIO) -> TextIO:
    try:
        return os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding or "utf-8", errors="replace")
    except OSError:  # a stream in memory has no descriptor
        return stream


class Lines:
    """One line when a step begins, one every ten seconds while it lasts, one when it took long."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._name = ""
        self._began = self._said = time.monotonic()

    def step(self, name: str) -> None:
        """Say that ``name`` begins."""
        self.close()
        self._name, self._began = name, time.monotonic()
        self._say(name)

    def update(self, done: int, total: int, text: str) -> None:
        """Say how far it is, if nothing was said for a while."""
        if time.monotonic() - self._said >= LINE_EVERY_S:
            part = f"{done}/{total} " if total else ""
            self._say(f"{self._name}: {part}{text}".rstrip())

    def close(self) -> None:
        """Say how long the step took, if it took long."""
        seconds = time.monotonic() - self._began
        if self._name and seconds >= LINE_EVERY_S:
            self._say(f"{self._name}: done in {seconds:.0f} s")
        self._name = ""

    def _say(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()
        self._said = time.monotonic()


@contextmanager
def _bar(stream: TextIO) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("[dim]{task.fields[text]}"), TimeElapsedColumn())
    display = RichProgress(*columns, console=Console(file=stream), redirect_stdout=False, redirect_stderr=False)

    class Bar:
        """One row for each step; the last one moves."""

        def __init__(self) -> None:
            self._task: TaskID | None = None

        def step(self, name: str) -> None:
            """The row before is full; a new one begins."""
            self.finish()
            self._task = display.add_task(name, total=None, text="")

        def update(self, done: int, total: int, text: str) -> None:
            """Move the last row."""
            if self._task is not None:
                display.update(self._task, completed=done, total=total or None, text=text)

        def finish(self) -> None:
            """Fill the last row and stop its clock."""
            if self._task is not None:
                display.update(self._task, total=1, completed=1, text="")
                display.stop_task(self._task)

    with display:
        bar = Bar()
        yield bar
        bar.finish()
