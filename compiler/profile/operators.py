"""How long each operator of an artifact takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
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

ROUND_S = 0.06
"""Of each of the two that take turns: short, because what others do to this machine comes and goes."""
LEAST_ROUNDS = 8
WARM_UP_ROUNDS = 1
ENOUGH_RUNS = 20
SETTLE = 2
LEAST, MOST = 2, 16
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
    ``limit_s`` seconds are spent in all, more where eight rounds of two runs take longer. ``samples`` are as in ``measure``.

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
    whole, instrumented = _Runs(), _Runs()
    with opener(samples=samples) as session, _profiling(path, chosen, threads, session.loaded.cores) as (process, scratch):
        give_calls(process, scratch, calls_of(samples, session.loaded.inputs))
        end = time.monotonic() + limit_s
        while len(whole.ns) < LEAST_ROUNDS or time.monotonic() < end:
            found = session.time(ROUND_S, LEAST, SETTLE)
            whole.add(found.ns, found.lost)
            answer = process.ask("profile", extra_s=ROUND_S, seconds=ROUND_S, least=LEAST, most=MOST)
            instrumented.add(answer["ns"], np.asarray(answer["lost"]) > 0)
        profile, version = process.ask("operators"), session.loaded.runtime_version
    executed, ms = _operators(path, profile["operators"], whole, instrumented)
    total = sum(ms)
    return OperatorProfile(
        method=profile["method"],
        whole_ms=whole.median_ns() / NS_PER_MS,
        instrumented_ms=instrumented.median_ns() / NS_PER_MS,
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

    def median_ns(self) -> float:
        """Of the runs that count."""
        return float(np.median(np.concatenate(self.ns)[self.kept()]))

    def rounds_ns(self) -> npt.NDArray[np.float64]:
        """The midmean of every round: of its runs that kept their cores, if any did."""
        return np.array([_midmean(ns if lost.all() else ns[~lost]) for ns, lost in zip(self.ns, self.lost, strict=True)])


def _midmean(values: npt.NDArray[Any]) -> Any:
    """The mean of the middle half along the last axis: as little moved by outliers as need be, and as fine as the mean where a clock is coarse."""
    from scipy import stats

    return stats.trim_mean(values, 0.25, axis=-1)


def _operators(path: Path, rows: Sequence[dict[str, Any]], whole: _Runs, instrumented: _Runs) -> tuple[tuple[Executed, ...], list[float]]:
    """What was executed, and the milliseconds of each in a run that takes the median of ``whole``.

    A machine that others use is now fast, now slow. So what an operator takes is set against the whole runs of the same round. What comes out below
    zero, which is what taking off the cost of instrumentation may leave of an operator that does next to nothing, is zero.
    """
    kept = instrumented.kept()
    odd = next((row for row in rows if len(row["ns"]) != len(kept)), None)
    if odd is not None:
        raise RunnerError(f"the profile of {path.name} has {len(odd['ns'])} times of operator {odd['name']} for {len(kept)} runs")
    executed = tuple(Executed(row["name"], row["kind"], tuple(row["sources"]), row["delegate"], row.get("dtype", "")) for row in rows)
    in_whole_runs = 1 / np.repeat(whole.rounds_ns(), [len(ns) for ns in instrumented.ns])[kept]
    shares = [max(0.0, float(_midmean(np.asarray(row["ns"])[kept] * in_whole_runs))) for row in rows]
    return executed, [share * whole.median_ns() / NS_PER_MS for share in shares]
