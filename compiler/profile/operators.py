"""How long each operator of an artifact takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from edgesmith.compiler.profile.session import TIMEOUT_S, give_samples, open_session
from edgesmith.compiler.profile.transport import WorkerProcess
from edgesmith.compiler.quiet import current_log
from edgesmith.compiler.target import Artifact, Target

ROUNDS = 3
WARM_UP_SHARE = 0.2
LEAST, MOST = 5, 200
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

    In each of a few rounds the whole run is timed without instrumentation, and then with it, in another process; the first fifth of a round's runs is
    warm-up. ``limit_s`` seconds of calls are spent in all, more where a single run is longer. ``samples`` are as in ``measure``.

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
    whole: list[npt.NDArray[np.int64]] = []
    rounds: list[dict[str, Any]] = []
    with opener(samples=samples) as session, _profiling(path, chosen, threads, samples) as process:
        for _ in range(ROUNDS):
            whole.append(_steady(session.time(seconds, LEAST)))
            rounds.append(process.ask("operators", extra_s=seconds, seconds=seconds, least=LEAST, most=MOST))
        version = session.loaded.runtime_version
    executed, ms = _pooled(path, rounds)
    total = sum(ms)
    placements = chosen.place(executed)
    return OperatorProfile(
        method=rounds[0]["method"],
        whole_ms=float(np.median(np.concatenate(whole))) / NS_PER_MS,
        instrumented_ms=float(np.median(np.concatenate([_steady(r["ns"]) for r in rounds]))) / NS_PER_MS,
        runs=sum(len(_steady(r["ns"])) for r in rounds),
        threads=threads,
        runtime_version=version,
        operators=tuple(
            OperatorTime(o.name, o.kind, o.sources, o.delegate, took, took / total if total else 0.0, place.category, place.advice)
            for o, took, place in zip(executed, ms, placements, strict=True)
        ),
        environment=devices.environment(),
    )


@contextmanager
def _profiling(path: Path, target: Target, threads: int, samples: Sequence[Array]) -> Iterator[WorkerProcess]:
    """A process that holds ``samples`` and nothing else yet.

    Raises:
        UnsupportedError: the runner has no ``Profiler``.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="edgesmith-operators-")))
        log = current_log() or scratch / "log"
        process = stack.enter_context(WorkerProcess(path, target.runner, threads, log=log, timeout_s=TIMEOUT_S, extra=target.extra))
        if not process.receive("start")["times_operators"]:
            raise UnsupportedError(f"target {target.name!r} cannot time operators", why=f"{target.runner.name} has no Profiler")
        give_samples(process, scratch, samples)
        yield process


def _steady(nanoseconds: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Without the warm-up."""
    found = np.asarray(nanoseconds, dtype=np.int64)
    return found[int(np.ceil(WARM_UP_SHARE * len(found))) :]


def _pooled(path: Path, rounds: Sequence[dict[str, Any]]) -> tuple[tuple[Executed, ...], list[float]]:
    """The operators, which every round must have executed alike, and the median milliseconds of each over all rounds."""
    first = rounds[0]["operators"]
    executed = tuple(Executed(row["name"], row["kind"], tuple(row["sources"]), row["delegate"]) for row in first)
    for number, found in enumerate(rounds):
        names, runs = [row["name"] for row in found["operators"]], len(found["ns"])
        if names != [operator.name for operator in executed]:
            raise RunnerError(f"the profiles of {path.name} do not name the same operators each time it is loaded")
        odd = next((row["name"] for row in found["operators"] if len(row["ns"]) != runs), None)
        if odd is not None:
            raise RunnerError(f"the profile of {path.name} does not have one time a run for operator {odd}", why=f"{runs} runs in round {number + 1}")
    columns = ([_steady(found["operators"][i]["ns"]) for found in rounds] for i in range(len(executed)))
    return executed, [float(np.median(np.concatenate(column))) / NS_PER_MS for column in columns]
