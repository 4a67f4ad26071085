"""The worker process, and the line of JSON to it and back."""

from __future__ import annotations

import json
import os
import select
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from edgesmith.compiler.errors import EdgesmithError, MissingExtraError, RunnerError, UnsupportedError

WORKER = Path(__file__).with_name("worker.py")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
LOG_LINES = 12
QUIT_S = 5.0
READ_BYTES = 1 << 16


def _environment(threads: int, variables: Mapping[str, str]) -> dict[str, str]:
    """That of this process, but for what decides how the runtime's threads run and wait, and how it allocates; and ``variables``.

    OpenBLAS computes the canary, on one thread.
    """
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY" and not name.startswith("MALLOC_")}
    return {**kept, **dict.fromkeys(THREAD_VARIABLES, str(threads)), "OPENBLAS_NUM_THREADS": "1", **variables}


class WorkerProcess:
    """A fresh process of worker.py, in a process group of its own; a context manager that leaves no process behind.

    It is pinned to ``cores``, or to the ``threads`` idlest ones. ``log`` gets the process's standard error appended. ``extra`` is the extra of
    the distribution that brings the runtime. ``variables`` are added to its environment.
    """

    def __init__(  # noqa: PLR0913 - all but the first three are by name
        self,
        artifact: Path,
        runner: Path,
        threads: int,
        *,
        log: Path,
        timeout_s: float,
        extra: str = "",
        cores: Sequence[int] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.artifact = artifact
        self.log = log
        self.timeout_s = timeout_s
        self.extra = extra
        self._unread = b""
        # As -I, except that packages of the user's own site stay visible where this process sees them.
        isolated = ["-E", "-P"] if site.ENABLE_USER_SITE else ["-I"]
        command = [sys.executable, *isolated, "-X", "faulthandler", str(WORKER), str(runner.resolve()), str(artifact.resolve()), str(threads)]
        command += map(str, cores)
        with log.open("ab") as stderr:
            self._log_start = stderr.tell()
            self._popen = subprocess.Popen(  # noqa: S603 - this interpreter, with files that our caller named
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(threads, variables or {}),
                cwd=tempfile.gettempdir(),
                start_new_session=True,
            )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._requests, self._replies = self._popen.stdin, self._popen.stdout

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._quit()
        self._kill()
        for pipe in (self._requests, self._replies):
            with suppress(BrokenPipeError):  # It died with a request unread.
                pipe.close()

    def ask(self, do: str, *, extra_s: float = 0.0, **arguments: object) -> dict[str, Any]:
        """Send one request and wait for its answer, ``extra_s`` longer than usual. Raises as ``receive``."""
        with suppress(BrokenPipeError):  # It is dead; receive() finds its last words.
            self._send({"do": do, **arguments})
        return self.receive(do, extra_s=extra_s)

    def receive(self, doing: str, *, extra_s: float = 0.0) -> dict[str, Any]:
        """The next answer.

        Raises:
            RunnerError: none came in time, the process ended, or the answer is an error.
            UnsupportedError: the runner cannot do that with this file, and raised NotImplementedError.
            MissingExtraError: a module was missing and ``extra`` is known.
        """
        limit_s = self.timeout_s + extra_s
        line = self._line(time.monotonic() + limit_s)
        if line is None:
            self._kill()
            raise self._failed(doing, f"no answer within {limit_s:g} s, so it was stopped")
        if not line:
            code = self._popen.wait()
            raise self._failed(doing, f"it ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._refused(doing, answer)
        return answer

    def _send(self, request: dict[str, object]) -> None:
        self._requests.write(json.dumps(request).encode() + b"\n")
        self._requests.flush()

    def _line(self, deadline: float) -> bytes | None:
        """The next line; empty at the end of the pipe, None when the deadline passed."""
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            read = os.read(self._replies.fileno(), READ_BYTES)
            if not read:
                return b""
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _refused(self, doing: str, answer: dict[str, Any]) -> EdgesmithError:
        if answer["error"] == "ModuleNotFoundError" and self.extra:
            return MissingExtraError(answer["module"], self.extra)
        if answer["error"] == "NotImplementedError":
            return UnsupportedError(f"the runner of {self.artifact.name} cannot {doing} it", why=answer["message"])
        return RunnerError(f"the runner of {self.artifact.name} failed to {doing}", why=f"{answer['error']}: {answer['message']}")

    def _failed(self, doing: str, why: str) -> RunnerError:
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            said = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()][-LOG_LINES:]
        if said:
            why += "; its last lines:" + "".join(f"\n    {line}" for line in said)
        return RunnerError(f"the runner of {self.artifact.name} failed to {doing}", why=why)

    def _quit(self) -> None:
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):  # What does not leave is killed.
            self._send({"do": "quit"})
            self._popen.wait(QUIT_S)

    def _kill(self) -> None:
        if self._popen.poll() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()
