"""How an artifact is measured. Everything that times an artifact calls ``measure``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from edgesmith.compiler import registry
from edgesmith.compiler.budget import Budget, Verdict
from edgesmith.compiler.data import Array
from edgesmith.compiler.errors import UserError
from edgesmith.compiler.profile import devices
from edgesmith.compiler.profile.memory import measure_memory
from edgesmith.compiler.profile.memory_types import Memory
from edgesmith.compiler.profile.session import RunnerSession, open_session
from edgesmith.compiler.profile.types import Port, Profile
from edgesmith.compiler.profile.verdicts import judge
from edgesmith.compiler.target import Artifact, Target

PROCESSES = 2
BLOCKS = 10
"""Blocks timed in every process before the verdict is first looked at."""
BLOCK_S = 0.1
BLOCK_CALLS = 4
WARM_UP_CALLS = 10
WARM_UP_CHANGE = 0.02
WARM_UP_SHARE = 0.1
"""Warm-up takes at most this share of the limit, in each process."""
SAMPLES = 8

Opener = Callable[..., AbstractContextManager[RunnerSession]]


def measure(
    artifact: Artifact | Path | str,
    *,
    target: Target | None = None,
    device: str = "host",
    threads: int = 1,
    samples: Sequence[Array] | None = None,
    budget: Budget | None = None,
    limit_s: float = 20.0,
) -> Profile:
    """Time ``artifact`` and count its memory, in fresh processes pinned to ``threads`` cores.

    Each of two processes loads the file, calls it until the median of ten calls changes by less than 2 %, and is then timed in
    blocks of at least a tenth of a second. While the verdict on ``budget`` is undecided the number of blocks is doubled (so
    that the verdict is looked at a few times only), until ``limit_s`` seconds of calls are spent. ``samples`` (one array of N samples per
    input) are what it is called with, in turn; without them normal floats, and integers 0 or 1.

    Raises:
        UserError: an unknown device; a file that is missing, of no known kind, or does not load and is not ours.
        DataError: ``samples`` are not what the artifact takes.
        MissingExtraError: the runtime is not installed.
        RunnerError: the runtime died, hung or refused its own artifact.
    """
    devices.device(device)
    path = artifact.path if isinstance(artifact, Artifact) else Path(artifact)
    chosen = target or (registry.target(artifact.target) if isinstance(artifact, Artifact) else registry.target_for(path))
    opener = partial(open_session, path, chosen.runner, threads, extra=chosen.extra, foreign=not isinstance(artifact, Artifact))
    environment = devices.environment()
    environment["inputs"] = "given samples" if samples is not None else "random"
    if samples is None:
        with opener() as session:
            samples = random_samples(session.loaded.inputs)
    found = _Measurement(limit_s)
    for number in range(1, PROCESSES + 1):
        with opener(samples=[array[:SAMPLES] for array in samples]) as session:
            found.measure_process(session, limit_s * number / PROCESSES)
            while number == PROCESSES and found.seconds < limit_s and _undecided(budget, found.profile(device, threads, environment)):
                found.add_blocks(session, len(found.blocks), limit_s)
    found.memory = measure_memory(path, chosen, threads, [array[:SAMPLES] for array in samples])
    return found.profile(device, threads, environment)


def random_samples(ports: Sequence[Port], count: int = SAMPLES) -> tuple[Array, ...]:
    """``count`` samples of inputs nobody described: normal floats, integers 0 or 1 (valid as ids and as masks).

    Raises:
        UserError: an input is of a dtype that has no such values.
    """
    rng = np.random.default_rng(0)
    made: list[Array] = []
    for port in ports:
        shape, dtype = (count, *port.shape[1:]), np.dtype(port.dtype)
        if dtype.kind not in "fiub":
            raise UserError(f"input {port.name} is {port.dtype}, for which no values can be made up", hint="give samples")
        made.append((rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)).astype(dtype))
    return tuple(made)


def _undecided(budget: Budget | None, profile: Profile) -> bool:
    findings = judge(budget or Budget(), profile, None, device=profile.device)
    return any(finding.verdict is Verdict.UNKNOWN for finding in findings if finding.budget == "latency_ms")


@dataclass
class _Measurement:
    """What has been seen so far. ``seconds`` is the time spent in calls, warm-up included."""

    limit_s: float
    seconds: float = 0.0
    blocks: list[npt.NDArray[np.int64]] = field(default_factory=list)
    loads_ms: list[float] = field(default_factory=list)
    memory: Memory | None = None
    runtime_version: str = ""
    cores: tuple[int, ...] = ()

    def measure_process(self, session: RunnerSession, until_s: float) -> None:
        """Warm ``session`` up, time its first blocks."""
        self.runtime_version, self.cores = session.loaded.runtime_version, session.loaded.cores
        self.loads_ms.append(session.loaded.load_ms)
        self._warm_up(session)
        self.add_blocks(session, BLOCKS, until_s)

    def _warm_up(self, session: RunnerSession) -> None:
        end_s = self.seconds + WARM_UP_SHARE * self.limit_s
        last = median(self._calls(session, 0.0, 1))
        least = WARM_UP_CALLS if last * WARM_UP_CALLS < 1e9 * WARM_UP_SHARE * self.limit_s else 1
        while self.seconds < end_s:
            now = median(self._calls(session, 0.0, least))
            if abs(now - last) <= WARM_UP_CHANGE * last:
                return
            last = now

    def add_blocks(self, session: RunnerSession, count: int, until_s: float) -> None:
        """Time ``count`` blocks, or fewer when ``until_s`` seconds have been spent in all; at least one."""
        for _ in range(count):
            self.blocks.append(self._calls(session, BLOCK_S, BLOCK_CALLS))
            if self.seconds >= until_s:
                return

    def _calls(self, session: RunnerSession, seconds: float, least: int) -> npt.NDArray[np.int64]:
        began = time.monotonic()
        nanoseconds = session.time(seconds, least)
        self.seconds += time.monotonic() - began
        return nanoseconds

    def profile(self, device: str, threads: int, environment: dict[str, str]) -> Profile:
        """Everything seen, as one Profile."""
        return Profile(
            device=device,
            threads=threads,
            runtime_version=self.runtime_version,
            samples_ns=np.concatenate(self.blocks),
            block_sizes=tuple(len(block) for block in self.blocks),
            load_ms=median(self.loads_ms),
            memory=self.memory,
            environment={**environment, "pinned_cores": " ".join(map(str, self.cores)) or "none"},
        )
