"""How long each operator of an artifact takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median_grouped
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesmith.compiler import registry
from edgesmith.compiler.data import Array
from edgesmith.compiler.errors import RunnerError, UnsupportedError
from edgesmith.compiler.profile import devices
from edgesmith.compiler.profile.operator_types import Executed, OperatorProfile, OperatorTime
from edgesmith.compiler.profile.protocol import SAMPLES, random_samples
from edgesmith.compiler.profile.session import TIMEOUT_S, calls_of, give_calls, open_session
from edgesmith.compiler.profile.transport import WorkerProcess
from edgesmith.compiler.quiet import current_log
from edgesmith.compiler.target import Artifact, Target

ROUNDS = 8
WARM_UP_ROUNDS = 1
ENOUGH_RUNS = 20
SETTLE = 2
LEAST, MOST = 2, 50
"""Runs of one round; the runtimes keep a record for every operator of every run."""
NS_PER_MS = 1e6


def profile_operators(
    artifact: Artifact | Path | str,
    *,
    target: Target | None = None,
    device: str = "host",
    threads: int = 1,
    samples: Sequence[Array] | None = None,
    limit_s: float = 3.0,
) -> OperatorProfile:
    """Time every operator of ``artifact`` by its runtime's own instrumentation.

    Rounds of whole runs without instrumentation take turns with rounds of runs with it, in another process on the same cores; the first round of each is
    warm-up, and a run during which the kernel took the core away does not count.
    ``limit_s`` seconds of calls are spent in all, more where two runs a round take longer. ``samples`` are as in ``measure``.

    Raises:
        UserError: as of ``measure``.
        UnsupportedError: the target's runner cannot time operators.
        DataError: ``samples`` are not what the artifact takes.
        MissingExtraError: the runtime is not installed.
        RunnerError: the runtime died, hung or refused its own artifact.
    """
    devices.device(device)
    path = artifact.path if isinstance(artifact, Artifact) else Path(artifact)
    chosen = target or (registry.target(artifact.target) if isinstance(artifact, Artifact) else registry.target_for(path))
    opener = partial(open_session, path, chosen.runner, threads, extra=chosen.extra, foreign=not isinstance(artifact, Artifact))
    if samples is None:
        with opener() as session:
            samples = random_samples(session.loaded.inputs)
    samples = [array[:SAMPLES] for array in samples]
    seconds = limit_s / (2 * ROUNDS)
    whole, instrumented = _Runs(), _Runs()
    with opener(samples=samples) as session, _profiling(path, chosen, threads, session.loaded.cores) as (process, scratch):
        give_calls(process, scratch, calls_of(samples, session.loaded.inputs))
        for _ in range(ROUNDS):
            found = session.time(seconds, LEAST, SETTLE)
            whole.add(found.ns, found.lost)
            answer = process.ask("profile", extra_s=seconds, seconds=seconds, least=LEAST, most=MOST)
            instrumented.add(answer["ns"], np.asarray(answer["lost"]) > 0)
        profile, version = process.ask("operators"), session.loaded.runtime_version
    executed, ms = _operators(path, profile, instrumented.kept())
    total = sum(ms)
    return OperatorProfile(
        method=profile["method"],
        whole_ms=whole.median_ms(),
        instrumented_ms=instrumented.median_ms(),
        runs=int(instrumented.kept().sum()),
        threads=threads,
        runtime_version=version,
        operators=tuple(
            OperatorTime(o.name, o.kind, o.sources, o.delegate, took, took / total if total else 0.0, place.category, place.advice)
            for o, took, place in zip(executed, ms, chosen.place(executed), strict=True)
        ),
        environment=devices.environment(),
    )


@contextmanager
def _profiling(path: Path, target: Target, threads: int, cores: Sequence[int]) -> Iterator[tuple[WorkerProcess, Path]]:
    """A process on ``cores`` that holds nothing yet, and its folder for temporary files. What it leaves there goes with it.

    Raises:
        UnsupportedError: the runner has no ``Profiler``.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="edgesmith-operators-")))
        log = current_log() or scratch / "log"
        process = WorkerProcess(path, target.runner, threads, log=log, timeout_s=TIMEOUT_S, extra=target.extra, cores=cores, variables={"TMPDIR": str(scratch)})
        stack.enter_context(process)
        if not process.receive("start")["times_operators"]:
            raise UnsupportedError(f"target {target.name!r} cannot time operators", why=f"{target.runner.name} has no Profiler")
        yield process, scratch


@dataclass
class _Runs:
    """Nanoseconds of the runs of every round, and whether the kernel took a core away meanwhile."""

    ns: list[npt.NDArray[np.int64]] = field(default_factory=list)
    lost: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def add(self, nanoseconds: Sequence[int] | npt.NDArray[np.int64], lost: npt.NDArray[np.bool_]) -> None:
        """One more round."""
        self.ns.append(np.asarray(nanoseconds, dtype=np.int64))
        self.lost.append(lost)

    def kept(self) -> npt.NDArray[np.bool_]:
        """Which runs count: after warm-up, those that kept their cores; where these are too few, the faster half."""
        nanoseconds = np.concatenate(self.ns)
        warm = np.arange(len(nanoseconds)) >= sum(map(len, self.ns[:WARM_UP_ROUNDS]))
        own = warm & ~np.concatenate(self.lost)
        return own if own.sum() >= ENOUGH_RUNS else warm & (nanoseconds <= np.median(nanoseconds[warm]))

    def median_ms(self) -> float:
        """Of the runs that count."""
        return float(np.median(np.concatenate(self.ns)[self.kept()])) / NS_PER_MS


def _operators(path: Path, found: dict[str, Any], kept: npt.NDArray[np.bool_]) -> tuple[tuple[Executed, ...], list[float]]:
    """What was executed, and the median milliseconds of each over the runs that are ``kept``.

    Times of a coarse resolution are taken for evenly spread over its step (the median of grouped data). One below zero, which is what taking off the
    cost of instrumentation may leave of an operator that does next to nothing, is zero.
    """
    rows, step = found["operators"], found["resolution_ns"]
    odd = next((row for row in rows if len(row["ns"]) != len(kept)), None)
    if odd is not None:
        raise RunnerError(f"the profile of {path.name} has {len(odd['ns'])} times of operator {odd['name']} for {len(kept)} runs")
    executed = tuple(Executed(row["name"], row["kind"], tuple(row["sources"]), row["delegate"], row.get("dtype", "")) for row in rows)
    return executed, [max(0.0, median_grouped(np.asarray(row["ns"])[kept].tolist(), interval=step)) / NS_PER_MS for row in rows]
