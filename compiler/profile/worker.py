"""The process that runs one artifact: ``python worker.py RUNNER.py ARTIFACT THREADS``.

It needs the standard library, numpy and whatever RUNNER.py needs, so that the same file serves every device. RUNNER.py
defines one class, and where the runtime can time its operators a second::

    class Session:
        def __init__(self, path: str, threads: int) -> None: ...    # loads the file
        runtime_version: str
        inputs: list[dict]                                          # [{"name": ..., "shape": [...], "dtype": "float32"}]
        outputs: list[dict]
        def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]: ...

    class Profiler:
        method = "instrumented"                                     # or what it does instead, for instance "truncated graphs"
        resolution_ns = 1                                           # the step of its times, 1 where it has none: they are rounded to steps of it
        def __init__(self, path: str, threads: int) -> None: ...    # loads the file with the runtime's own instrumentation switched on
        def run(self, inputs: list[np.ndarray]) -> None: ...        # one inference
        def operators(self) -> list[dict]: ...                      # ends profiling; one entry per executed operator, in order of execution:
            # {"name": the runtime's own, "kind": operator type as the runtime names it, "ns": [one per run],
            #  "sources": [paths of source modules, several when fused, none when unknown], "delegate": what ran it, or "",
            #  "dtype": numpy's name of its first result's, where the runtime says it}

One JSON object a line comes in, one goes out; the first line out is a greeting. Requests, by their ``do``:

    samples  path                 read the samples (.npz: arrays "0", "1" ... of N samples) that ``time`` rotates over
    load                          load the artifact; its ports, its version, the time it took, memory before and after
    run      inputs, outputs      one sample after the other from one .npz into another
    time     seconds, least       time calls one by one until both are reached; nanoseconds of each call
    memory                        what the kernel counts for this process
    profile  seconds, least, most  as ``time``, ``most`` times at most, with a Profiler, which the first such request makes
    operators                     end profiling: the method, the resolution and the operators of all these runs
    quit

Whatever the runner raises ends the process; its last line is then ``{"error": class name, "message": ..., "module": ...}``.
What the runtime prints goes to standard error.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeAlias

import numpy as np

SessionClass: TypeAlias = Callable[[str, int], Any]
ProfilerClass: TypeAlias = Any
Array: TypeAlias = np.ndarray[Any, Any]

IDLE_PROBE_S = 0.05
STAT = Path("/proc/stat")
MEMORY_FILES = (Path("/proc/self/status"), Path("/proc/self/smaps_rollup"))
MEMORY_KEYS = {"VmRSS": "rss", "VmHWM": "peak", "Private_Dirty": "private_dirty", "Private_Clean": "private_clean"}
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
PR_SET_PDEATHSIG, SIGKILL = 1, 9


def private_channel() -> tuple[TextIO, TextIO]:
    """The original standard input and output as our own; the runtime is left an empty input and standard error."""
    requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends, also while a runtime hangs. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)


def idle_ticks() -> dict[int, int]:
    """Clock ticks that each core has been idle since boot; empty where /proc/stat is not to be had."""
    if not STAT.exists():
        return {}
    rows = [line.split() for line in STAT.read_text(encoding="ascii").splitlines() if line.startswith("cpu") and line[3].isdigit()]
    return {int(row[0][3:]): int(row[4]) for row in rows}


def pin(threads: int) -> list[int]:
    """Keep this process on the ``threads`` idlest cores that it may use; the cores, or none where that cannot be done."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        return []
    before = idle_ticks()
    time.sleep(IDLE_PROBE_S)
    after = idle_ticks()
    chosen = sorted(sorted(allowed, key=lambda core: before.get(core, 0) - after.get(core, 0))[:threads])
    os.sched_setaffinity(0, chosen)
    return chosen


def memory() -> dict[str, int]:
    """Bytes that the kernel counts for this process (proc(5)); empty where it does not say.

    ``rss`` and ``peak`` (of rss since ``reset_peak``), and of the pages that are this process's alone ``private_dirty``
    and ``private_clean``.
    """
    found = {}
    for path in MEMORY_FILES:
        if path.exists():
            for line in path.read_text(encoding="ascii", errors="replace").splitlines():
                key, _, rest = line.partition(":")
                if key in MEMORY_KEYS:
                    found[MEMORY_KEYS[key]] = int(rest.split()[0]) * 1024
    return found


def reset_peak() -> bool:
    """Give memory that is free back to the kernel and start the peak anew; False where the kernel cannot."""
    gc.collect()
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def read_samples(path: str) -> list[Array]:
    """The arrays "0", "1" ... of an .npz."""
    with np.load(path, allow_pickle=False) as file:
        return [file[str(i)] for i in range(len(file.files))]


def feeds(arrays: list[Array]) -> Iterator[list[Array]]:
    """One batch of one after the other."""
    for i in range(len(arrays[0])):
        yield [np.ascontiguousarray(array[i : i + 1]) for array in arrays]


def joined(samples: list[Array]) -> Array:
    """Outputs of single samples as one array, first dimension the sample."""
    return np.concatenate(samples) if samples[0].shape[:1] == (1,) else np.stack(samples)


def timed(run: Callable[[list[Array]], object], samples: list[list[Array]], seconds: float, least: int, most: float = math.inf, *, start: int = 0) -> list[int]:
    """Nanoseconds of calls made one after the other, over ``samples`` in turn from number ``start`` on, for ``seconds`` and ``least`` times, but ``most``."""
    clock, count = time.perf_counter_ns, start
    nanoseconds: list[int] = []
    gc.collect()
    gc.disable()
    end = clock() + int(seconds * 1e9)
    stop = 0
    while (stop < end or len(nanoseconds) < least) and len(nanoseconds) < most:
        feed = samples[count % len(samples)]
        began = clock()
        run(feed)
        stop = clock()
        nanoseconds.append(stop - began)
        count += 1
    gc.enable()
    return nanoseconds


class Worker:
    """What the requests do."""

    def __init__(self, session_class: SessionClass, profiler_class: ProfilerClass, artifact: str, threads: int) -> None:
        self.session_class = session_class
        self.profiler_class = profiler_class
        self.artifact = artifact
        self.threads = threads
        self.session: Any = None
        self.profiler: Any = None
        self.feeds: list[list[Array]] = []
        self.calls = 0

    def samples(self, path: str) -> dict[str, Any]:
        self.feeds = list(feeds(read_samples(path)))
        return {"count": len(self.feeds)}

    def load(self) -> dict[str, Any]:
        peak_is_own = reset_peak()
        before = memory()
        start = time.perf_counter_ns()
        self.session = self.session_class(self.artifact, self.threads)
        load_ns = time.perf_counter_ns() - start
        return {
            "load_ns": load_ns,
            "before": before,
            "after": memory(),
            "peak_is_own": peak_is_own,
            "runtime_version": str(self.session.runtime_version),
            "inputs": list(self.session.inputs),
            "outputs": list(self.session.outputs),
        }

    def run(self, inputs: str, outputs: str) -> dict[str, Any]:
        # Copies, because a runtime may hand out views of memory that its next call writes.
        rows = [[np.array(output) for output in self.session.run(feed)] for feed in feeds(read_samples(inputs))]
        np.savez(outputs, allow_pickle=False, **{str(i): joined([row[i] for row in rows]) for i in range(len(rows[0]))})
        return {"count": len(rows)}

    def time(self, seconds: float, least: int) -> dict[str, Any]:
        nanoseconds = timed(self.session.run, self.feeds, seconds, least, start=self.calls)
        self.calls += len(nanoseconds)
        return {"ns": nanoseconds}

    def memory(self) -> dict[str, Any]:
        return dict(memory())

    def profile(self, seconds: float, least: int, most: int) -> dict[str, Any]:
        if self.profiler is None:
            self.profiler = self.profiler_class(self.artifact, self.threads)
        return {"ns": timed(self.profiler.run, self.feeds, seconds, least, most)}

    def operators(self) -> dict[str, Any]:
        profiler, self.profiler = self.profiler, None
        return {"method": profiler.method, "resolution_ns": getattr(profiler, "resolution_ns", 1), "operators": profiler.operators()}


def import_runtime(runner: Path) -> None:
    """Import what the runner file imports inside its functions, so that loading an artifact counts the artifact alone."""
    names = []
    for function in (node for node in ast.walk(ast.parse(runner.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for name in names:
        with contextlib.suppress(ImportError):  # It is no module; or it is missing, and reported when the session is made.
            importlib.import_module(name)


def classes(runner: Path) -> tuple[SessionClass, ProfilerClass | None]:
    """``Session`` and, where there is one, ``Profiler`` of the runner file, whose runtime is imported."""
    spec = importlib.util.spec_from_file_location("edgesmith_runner", runner)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    import_runtime(runner)
    return module.Session, getattr(module, "Profiler", None)


def main(runner: str, artifact: str, threads: int) -> None:
    """Greet, then answer requests until ``quit`` or the end of input."""
    requests, replies = private_channel()
    die_with_parent()

    def reply(answer: dict[str, Any]) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    def last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        reply({"error": kind.__name__, "message": str(error), "module": getattr(error, "name", None)})

    sys.excepthook = last_words
    cores = pin(threads)
    worker = Worker(*classes(Path(runner)), artifact, threads)
    reply({"cores": cores, "python": sys.version.split()[0], "times_operators": worker.profiler_class is not None})
    handlers: dict[str, Callable[..., dict[str, Any]]] = {
        "samples": worker.samples,
        "load": worker.load,
        "run": worker.run,
        "time": worker.time,
        "memory": worker.memory,
        "profile": worker.profile,
        "operators": worker.operators,
    }
    for line in requests:
        request = json.loads(line)
        wanted = request.pop("do")
        if wanted == "quit":
            break
        reply(handlers[wanted](**request))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
