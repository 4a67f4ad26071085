"""The process that runs one artifact: ``python worker.py RUNNER.py ARTIFACT THREADS [CORE]...``.

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
        def __init__(self, path: str, threads: int) -> None: ...    # loads the file with the runtime's own instrumentation switched on
        def run(self, inputs: list[np.ndarray]) -> None: ...        # one inference
        def operators(self) -> list[dict]: ...                      # ends profiling; one entry per executed operator, in order of execution:
            # {"name": the runtime's own, "kind": operator type as the runtime names it, "ns": [one per run],
            #  "sources": [paths of source modules, several when fused, none when unknown], "delegate": what ran it, or "",
            #  "dtype": numpy's name of its first result's, where the runtime says it}

One JSON object a line comes in, one goes out; the first line out is a greeting. Requests, by their ``do``:

    samples  path                 read the inputs that ``time`` rotates over (.npz: arrays "0", "1" ... one per input, first dimension the call)
    load                          load the artifact; its ports, its version, the time it took
    run      inputs, outputs      one call after the other from one such .npz into another
    time     seconds, least, settle, quiet_ns, patience_s  wait, ``patience_s`` at most, for a canary of ``quiet_ns`` at most; then time calls one by one
                                  until ``seconds`` and ``least`` are reached, after ``settle`` untimed ones; nanoseconds of each call, how often a
                                  core was taken away during it, and the canary before and after
    count memory  runs, seconds   load and run the artifact twice; what the kernel counts for this process before, and in between, the second time
    profile  seconds, least, most  as ``time``, ``most`` times at most, with a Profiler, which the first such request makes
    operators                     end profiling: the method and the operators of all these runs
    quit

Whatever the runner raises (NotImplementedError for what it cannot do with this file) ends the process; its last line is then
``{"error": class name, "message": ..., "module": ...}``.
What the runtime prints goes to standard error. OpenBLAS has one thread, which computes the canary.
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
import resource
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
CANARY_TIMES = 5
STAT = Path("/proc/stat")
STATUS, SMAPS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/smaps"), Path("/proc/self/clear_refs")
OF_NO_FILE = frozenset({"Private_Dirty", "Swap"})
OF_FILES = {"Rss": 1, "Anonymous": -1, "Swap": 0}
"""What counts as dirty in mappings of no file, and in those of files (but Rss); there, by how much it counts as mapped."""
RESET_PEAK = "5"
LEAST_RUNS = 3
PR_SET_THP_DISABLE = 41
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


def pin(threads: int, wanted: list[int]) -> list[int]:
    """Keep this process on the cores ``wanted``, or on the ``threads`` idlest that it may use; the cores, or none where that cannot be done."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    if wanted:
        os.sched_setaffinity(0, wanted)
        return wanted
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        return []
    before = idle_ticks()
    time.sleep(IDLE_PROBE_S)
    after = idle_ticks()
    chosen = sorted(sorted(allowed, key=lambda core: before.get(core, 0) - after.get(core, 0))[:threads])
    os.sched_setaffinity(0, chosen)
    return chosen


def memory(artifact: str) -> dict[str, int]:
    """Bytes that the kernel counts for this process (proc(5)); empty where it does not say.

    Resident memory and its peak since ``reset_peak``; ``dirty_bytes``: private pages that were written; ``mapped_bytes``: pages of files
    as they are in the file; ``artifact_bytes``: those of ``artifact`` among them. Private_Dirty alone would count pages of a file that was
    written a moment ago, which the kernel has yet to bring to its disk.
    """
    if not SMAPS.exists():
        return {}
    counted = {"rss_bytes": 0, "dirty_bytes": 0, "mapped_bytes": 0, "artifact_bytes": 0}
    place = ""
    for line in SMAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        key, _, rest = line.partition(":")
        if " " in key:
            place = line.split(maxsplit=5)[-1]
            continue
        counted["rss_bytes"] += int(rest.split()[0]) * 1024 if key == "Rss" else 0
        if place.startswith("/") and key in OF_FILES:
            size = int(rest.split()[0]) * 1024
            counted["dirty_bytes"] += size if key != "Rss" else 0
            counted["mapped_bytes"] += OF_FILES[key] * size
            counted["artifact_bytes"] += OF_FILES[key] * size if place == artifact else 0
        elif not place.startswith("/") and key in OF_NO_FILE:
            counted["dirty_bytes"] += int(rest.split()[0]) * 1024
    (peak,) = (line.split()[1] for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines() if line.startswith("VmHWM:"))
    return {**counted, "peak_rss_bytes": int(peak) * 1024}


def give_back() -> None:
    """Return memory that is free to the kernel."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def reset_peak() -> None:
    """Start the peak of resident memory anew, where the kernel can."""
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")


def without_huge_pages() -> None:
    """Count the pages that are touched, not the huge ones that the kernel may make of them. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def read_samples(path: str) -> list[Array]:
    """The arrays "0", "1" ... of an .npz."""
    with np.load(path, allow_pickle=False) as file:
        return [file[str(i)] for i in range(len(file.files))]


def feeds(arrays: list[Array]) -> Iterator[list[Array]]:
    """What one call takes after the other."""
    for i in range(len(arrays[0])):
        yield [np.asarray(array[i]) for array in arrays]


def joined(samples: list[Array]) -> Array:
    """Outputs of single samples as one array, first dimension the sample."""
    return np.concatenate(samples) if samples[0].shape[:1] == (1,) else np.stack(samples)


def timed(
    run: Callable[[list[Array]], object], samples: list[list[Array]], seconds: float, least: int, most: float = math.inf, *, start: int = 0
) -> tuple[list[int], list[int]]:
    """Calls made one after the other, over ``samples`` in turn from number ``start`` on, for ``seconds`` and ``least`` times, but ``most``.

    Returns the nanoseconds of each, and how often the kernel took a core away from this process meanwhile.
    """
    clock, count = time.perf_counter_ns, start
    nanoseconds: list[int] = []
    lost: list[int] = []
    gc.disable()
    end = clock() + int(seconds * 1e9)
    stop, switches = 0, lost_cores()
    while (stop < end or len(nanoseconds) < least) and len(nanoseconds) < most:
        feed = samples[count % len(samples)]
        began = clock()
        run(feed)
        stop = clock()
        nanoseconds.append(stop - began)
        seen = lost_cores()
        lost.append(seen - switches)
        switches = seen
        count += 1
    gc.enable()
    return nanoseconds, lost


def lost_cores() -> int:
    """How often the kernel has taken a core from a thread of this process that wanted to go on (involuntary context switches, getrusage(2))."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


CANARY = np.linspace(-1.0, 1.0, 192 * 192, dtype=np.float32).reshape(192, 192)
CANARY_OUT = np.empty_like(CANARY)


def canary() -> int:
    """Nanoseconds of a product of matrices that fit the second-level cache, the median of five: a millisecond in all.

    It slows down about as a model does when the core's clock does, and when a neighbour takes a share of the core's units or of its cache.
    """
    clock, times = time.perf_counter_ns, []
    for _ in range(CANARY_TIMES):
        start = clock()
        np.matmul(CANARY, CANARY, out=CANARY_OUT)
        times.append(clock() - start)
    return sorted(times)[CANARY_TIMES // 2]


def quiet_canary(quiet_ns: int, patience_s: float) -> int:
    """The first canary of ``quiet_ns`` at most, or the last one when ``patience_s`` are over."""
    end = time.monotonic() + patience_s
    seen = canary()
    while seen > quiet_ns and time.monotonic() < end:
        seen = canary()
    return seen


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
        start = time.perf_counter_ns()
        self.session = self.session_class(self.artifact, self.threads)
        load_ns = time.perf_counter_ns() - start
        return {
            "load_ns": load_ns,
            "runtime_version": str(self.session.runtime_version),
            "inputs": list(self.session.inputs),
            "outputs": list(self.session.outputs),
        }

    def run(self, inputs: str, outputs: str) -> dict[str, Any]:
        # Copies, because a runtime may hand out views of memory that its next call writes.
        rows = [[np.array(output) for output in self.session.run(feed)] for feed in feeds(read_samples(inputs))]
        np.savez(outputs, allow_pickle=False, **{str(i): joined([row[i] for row in rows]) for i in range(len(rows[0]))})
        return {"count": len(rows)}

    def time(self, seconds: float, least: int, settle: int, quiet_ns: int, patience_s: float) -> dict[str, Any]:
        before = quiet_canary(quiet_ns, patience_s)
        timed(self.session.run, self.feeds, 0.0, settle, start=self.calls)
        nanoseconds, lost = timed(self.session.run, self.feeds, seconds, least, start=self.calls + settle)
        self.calls += settle + len(nanoseconds)
        return {"ns": nanoseconds, "lost": lost, "canary_ns": [before, canary()]}

    def memory(self, runs: int, seconds: float) -> dict[str, Any]:
        without_huge_pages()
        self._loaded_and_run(runs, seconds)
        self._read()  # What the runtime, and reading itself, need the first time is not the model's.
        readings = [self._read()]
        reset_peak()
        session = self.session_class(self.artifact, self.threads)
        readings.append(self._read())
        for calls in (1, runs):
            self._run(session, calls, seconds)
            readings.append(self._read())
        return {"readings": readings if all(readings) else []}

    def _loaded_and_run(self, runs: int, seconds: float) -> None:
        self._run(self.session_class(self.artifact, self.threads), runs, seconds)

    def _run(self, session: Any, runs: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        for number in range(runs):
            if number >= LEAST_RUNS and time.monotonic() > end:
                return
            session.run(self.feeds[number % len(self.feeds)])

    def _read(self) -> dict[str, int]:
        give_back()
        return memory(self.artifact)

    def profile(self, seconds: float, least: int, most: int) -> dict[str, Any]:
        if self.profiler is None:
            self.profiler = self.profiler_class(self.artifact, self.threads)
        nanoseconds, lost = timed(self.profiler.run, self.feeds, seconds, least, most)
        return {"ns": nanoseconds, "lost": lost}

    def operators(self) -> dict[str, Any]:
        profiler, self.profiler = self.profiler, None
        return {"method": profiler.method, "operators": profiler.operators()}


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


def main(runner: str, artifact: str, threads: int, wanted_cores: list[int]) -> None:
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
    cores = pin(threads, wanted_cores)
    worker = Worker(*classes(Path(runner)), artifact, threads)
    gc.freeze()  # The runtime's own objects, which no collection need look at again.
    reply({"cores": cores, "python": sys.version.split()[0], "times_operators": worker.profiler_class is not None})
    handlers: dict[str, Callable[..., dict[str, Any]]] = {
        "samples": worker.samples,
        "load": worker.load,
        "run": worker.run,
        "time": worker.time,
        "count memory": worker.memory,
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
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(core) for core in sys.argv[4:]])
