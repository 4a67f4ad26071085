"""How the memory of an artifact is counted: in fresh processes of their own, because an allocator that makes readings repeat slows calls down."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from edgesmith.compiler.data import Array
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.profile.memory_types import PHASES, Memory, MemoryPlan, MemoryUse
from edgesmith.compiler.profile.session import TIMEOUT_S, give_calls
from edgesmith.compiler.profile.transport import WorkerProcess
from edgesmith.compiler.quiet import current_log
from edgesmith.compiler.target import Target

PROCESSES, MOST_PROCESSES = 2, 5
AGREED = 0.01
"""Where what two processes hold differs by more, there are more of them: of a small model, it matters where its pages happen to begin."""
RUNS = 8
SECONDS = 1.0
"""Steady is after ``RUNS`` calls, or fewer when a second has passed; three at least."""
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_TRIM_THRESHOLD_": str(128 << 10), "MALLOC_TOP_PAD_": "0"}
"""glibc's own defaults (mallopt(3)), fixed: by itself it raises its thresholds with every block that is freed, so that what it keeps depends on the past."""


def measure_memory(artifact: Path, target: Target, threads: int, calls: Sequence[Array]) -> Memory | None:
    """What the kernel counts for ``artifact`` in fresh processes, and the target's plan; None where the kernel does not count.

    Each process loads the model, runs and drops it: what the runtime needs for its first model is the runtime's and not the
    model's. Then it is read, loads the model again, and is read when loaded, after the first run and in steady state.
    ``calls`` are what N calls take, (N, *shape of a call) per input.

    Raises:
        RunnerError: the runner died, hung or refused the artifact.
        MissingExtraError: the runtime is not installed.
    """
    found: list[tuple[MemoryUse, ...]] = []
    while len(found) < PROCESSES or (len(found) < MOST_PROCESSES and not _agreed(found)):
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="edgesmith-memory-")))
            process = stack.enter_context(
                WorkerProcess(
                    artifact, target.runner, threads, log=current_log() or scratch / "log", timeout_s=TIMEOUT_S, extra=target.extra, variables=ALLOCATOR
                )
            )
            process.receive("start")
            give_calls(process, scratch, calls)
            readings = process.ask("count memory", runs=RUNS, seconds=SECONDS)["readings"]
        if not readings:
            return None
        found.append(tuple(MemoryUse(phase, **reading) for phase, reading in zip(PHASES, readings, strict=True)))
    return Memory(tuple(found), planned(artifact, target))


def _agreed(found: Sequence[tuple[MemoryUse, ...]]) -> bool:
    dirty = Memory(tuple(found)).dirty_bytes
    return dirty.high - dirty.low <= AGREED * dirty.low


def planned(artifact: Path, target: Target) -> MemoryPlan | None:
    """What ``target`` plans for ``artifact``; None where it makes no plans, or none for such a file."""
    try:
        return target.memory_plan(artifact)
    except UnsupportedError:
        return None
