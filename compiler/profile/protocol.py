"""How artifacts are measured. Everything that times an artifact calls ``measure`` or ``compare``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from edgesmith.compiler import registry
from edgesmith.compiler.budget import Budget, Verdict
from edgesmith.compiler.data import Array
from edgesmith.compiler.errors import UserError
from edgesmith.compiler.profile import devices
from edgesmith.compiler.profile.comparison import Comparison
from edgesmith.compiler.profile.memory import measure_memory
from edgesmith.compiler.profile.memory_types import Memory
from edgesmith.compiler.profile.recording import LEAST_KEPT, Block, Recording
from edgesmith.compiler.profile.session import RunnerSession, calls_of, open_session
from edgesmith.compiler.profile.types import Port, Profile
from edgesmith.compiler.profile.verdicts import judge
from edgesmith.compiler.target import Artifact, Target

ROUNDS = 5
"""Fresh processes of every artifact before anything is looked at."""
MORE_ROUNDS = 1.5
ROUND_S = 0.3
"""Timed calls of an artifact in a round."""
BLOCK_S, PAIRED_BLOCK_S = 0.025, 0.005
"""Timed calls in a row, of one artifact alone and of several in turn: the shorter, the less the machine changes from one to the next."""
PAIRED_TURNS = 24
"""ABBA turns of a round, where the limit allows: the median over fewer says less of a pair of processes than the next pair costs."""
SETTLE_S, LONG_CALL_S = 0.0015, 0.05
"""Untimed calls after another artifact had the core, in seconds; one at least, but none of calls that are longer."""
REPEATS = 3
"""How often a block that does not count is measured again."""
PATIENCE_SHARE = 0.005
"""How long a block of one artifact waits for the machine to be as fast as it can be, as a share of the limit."""
WARM_UP_CALLS = 10
WARM_UP_CHANGE = 0.02
ROUND_SHARE = 0.15
"""A round's timed calls take at most this share of the limit, its warm-up half as much."""
PRECISION = {50: 0.02, 90: 0.1}
"""How well percentiles shall be known where no budget says which matters."""
RATIO_PRECISION = 0.01
SAMPLES = 8
OFFICIAL_QUERIES, OFFICIAL_S, OFFICIAL_MOST_S = 1024, 60.0, 600.0
OFFICIAL_BLOCK_S = 0.1


def measure(  # noqa: PLR0913 - all but the first are by name
    artifact: Artifact | Path | str,
    *,
    target: Target | None = None,
    device: str = "host",
    threads: int = 1,
    samples: Sequence[Array] | None = None,
    budget: Budget | None = None,
    limit_s: float = 20.0,
    official: bool = False,
    memory: bool = True,
) -> Profile:
    """Time ``artifact`` and, if ``memory``, count its memory, in fresh processes pinned to ``threads`` cores.

    Each of at least five processes loads the file, calls it until the median of ten calls changes by less than 2 %, and is timed in blocks with a
    canary (a fixed piece of work) before and after each. A block waits a moment for a canary that takes at most 10 % longer than the fastest of
    all, and counts if both its canaries do, or else is timed again; a call during which the kernel gave the core to another process does not count.
    Processes are added until the verdict on ``budget``'s latency is decided (where it names none, until the 95 % interval of the median is within 2
    % and that of the 90th percentile within 10 %), or ``limit_s`` seconds are spent.
    ``samples`` (one array of N samples per input) are run in turn; without them the inputs are random. With ``official``, the MLPerf
    Mobile single-stream scenario instead: one process, one query after the other, at least 1 024 of them and 60 s, every one shown.

    Raises:
        UserError: no such file, device or target; or a file that edgesmith did not write does not load.
        DataError: ``samples`` are not what the artifact takes.
        MissingExtraError: the runtime is not installed.
        RunnerError: the runtime died, hung or refused its own artifact.
    """
    trial = _Trial((_entrant(artifact, target),), device, threads, samples, limit_s)
    if official:
        trial.stream()
    else:
        trial.run(lambda: _settled(trial.profile(0), budget))
    profile = trial.profile(0, 1.0 if official else LEAST_KEPT)
    return replace(profile, memory=trial.memory(0)) if memory else profile


def compare(
    artifacts: Sequence[Artifact | Path | str],
    *,
    target: Target | None = None,
    device: str = "host",
    threads: int = 1,
    samples: Sequence[Array] | None = None,
    limit_s: float = 60.0,
    precision: float = RATIO_PRECISION,
) -> Comparison:
    """Time ``artifacts`` against each other, in one run.

    As ``measure``, with a process of every artifact alive in each round, all on the same cores, and short blocks interleaved in the order ABBA, 24
    times or more where the limit allows. No block waits; one whose canaries differ by more than 30 % is timed again; a machine that is slow for all
    of them alike is as good as a fast one. Rounds are added until the 95 % interval of every ratio to the first is within ``precision``, or
    ``limit_s`` seconds are spent, two rounds at least. Without ``samples`` every artifact gets the same random inputs.

    Raises:
        UserError: fewer than two artifacts; and as of ``measure``.
        DataError, MissingExtraError, RunnerError: as of ``measure``.
    """
    if len(artifacts) < 2:
        raise UserError("a comparison needs two artifacts or more")
    trial = _Trial(tuple(_entrant(artifact, target) for artifact in artifacts), device, threads, samples, limit_s)
    trial.run(lambda: trial.comparison().within(precision))
    return trial.comparison()


def random_samples(ports: Sequence[Port], count: int = SAMPLES) -> tuple[Array, ...]:
    """``count`` samples of inputs nobody described: normal floats, integers 0 or 1 (valid as ids and as masks).

    Raises:
        UserError: an input is of a dtype that has no such values, or of a shape that is not fixed.
    """
    rng = np.random.default_rng(0)
    made: list[Array] = []
    for port in ports:
        shape = [size for size in port.sample_shape if size is not None]
        if len(shape) < len(port.sample_shape):
            raise UserError(
                f"input {port.name} has dimensions of no fixed size, {port.shape}", hint="fix them in the file, or give samples to measure() in Python"
            )
        kind = np.dtype(port.dtype).kind if port.dtype in np.sctypeDict else ""
        if kind not in {"f", "i", "u", "b"}:
            raise UserError(f"input {port.name} is {port.dtype}, for which no values can be made up", hint="give samples to measure() in Python")
        made.append((rng.standard_normal((count, *shape)) if kind == "f" else rng.integers(0, 2, (count, *shape))).astype(port.dtype))
    return tuple(made)


def _settled(profile: Profile, budget: Budget | None) -> bool:
    if budget is not None and budget.latency_ms is not None:
        return all(
            finding.verdict is not Verdict.UNKNOWN for finding in judge(Budget(budget.latency_ms, budget.percentile), profile, None, device=profile.device)
        )
    known = {percentile: profile.latency_ms(percentile) for percentile in PRECISION}
    return all(found.high - found.low <= 2 * PRECISION[percentile] * found.value for percentile, found in known.items())


@dataclass(frozen=True)
class _Entrant:
    """A file to be timed. ``foreign``: edgesmith did not write it."""

    path: Path
    target: Target
    foreign: bool


def _entrant(artifact: Artifact | Path | str, target: Target | None = None) -> _Entrant:
    if isinstance(artifact, Artifact):
        return _Entrant(artifact.path, target or registry.target(artifact.target), foreign=False)
    return _Entrant(Path(artifact), target or registry.target_for(Path(artifact)), foreign=True)


@dataclass
class _Seen:
    """What the processes of one entrant said."""

    loads_ms: list[float] = field(default_factory=list)
    inputs: tuple[Port, ...] = ()
    runtime_version: str = ""
    cores: tuple[int, ...] = ()


class _Trial:
    """Entrants, and all that was seen of them so far."""

    def __init__(self, entrants: tuple[_Entrant, ...], device: str, threads: int, samples: Sequence[Array] | None, limit_s: float) -> None:
        devices.device(device)
        self.entrants, self.device, self.threads = entrants, device, threads
        self.environment = {**devices.environment(), "inputs": "given samples" if samples is not None else "random"}
        self.samples: list[Sequence[Array] | None] = [None if samples is None else [array[:SAMPLES] for array in samples]] * len(entrants)
        self.limit_s, self.end_s = limit_s, time.monotonic() + limit_s
        self.recording = Recording()
        alone = len(entrants) == 1
        self.block_s, self.least_rounds, self.patience_s = (BLOCK_S, 1, PATIENCE_SHARE * limit_s) if alone else (PAIRED_BLOCK_S, 2, 0.0)
        self.seen = tuple(_Seen() for _ in entrants)

    def run(self, enough: Callable[[], bool]) -> None:
        """Rounds until ``enough`` says so, or the time is over; it is asked rarely, because every look is a chance to be wrong."""
        done, planned = 0, ROUNDS
        while True:
            while done < planned and (done < self.least_rounds or time.monotonic() < self.end_s):
                self._round(done)
                done += 1
            if done < planned or enough():
                return
            planned = math.ceil(MORE_ROUNDS * planned)

    def stream(self) -> None:
        """One process, one query after the other, as MLPerf Mobile's single-stream scenario (MLPerf Inference rules, "Scenarios")."""
        with self._sessions(0) as (session,):
            self._warm_up(session, 1.0)
            began, queries, turn = time.monotonic(), 0, 0
            while (queries < OFFICIAL_QUERIES or time.monotonic() - began < OFFICIAL_S) and time.monotonic() - began < OFFICIAL_MOST_S:
                timed = session.time(OFFICIAL_BLOCK_S, 1)
                self.recording.add(Block(0, 0, turn, timed))
                queries, turn = queries + len(timed.ns), turn + 1

    @contextmanager
    def _sessions(self, number: int) -> Iterator[list[RunnerSession]]:
        """A fresh process of every entrant, all on the same cores; who is opened first changes from round to round."""
        places = list(range(len(self.entrants)))
        opened: dict[int, RunnerSession] = {}
        cores: tuple[int, ...] = ()
        with ExitStack() as stack:
            for place in places if number % 2 == 0 else reversed(places):
                session = stack.enter_context(self._open(place, cores))
                opened[place], cores = session, session.loaded.cores
                seen = self.seen[place]
                seen.runtime_version, seen.cores, seen.inputs = session.loaded.runtime_version, cores, session.loaded.inputs
                seen.loads_ms.append(session.loaded.load_ms)
            yield [opened[place] for place in places]

    def _open(self, place: int, cores: Sequence[int] = ()) -> AbstractContextManager[RunnerSession]:
        entrant = self.entrants[place]
        opener = partial(open_session, entrant.path, entrant.target.runner, self.threads, extra=entrant.target.extra, foreign=entrant.foreign)
        samples = self.samples[place]
        if samples is None:
            with opener() as session:
                samples = self.samples[place] = random_samples(session.loaded.inputs)
        return opener(cores=cores, samples=samples)

    def _round(self, number: int) -> None:
        with self._sessions(number) as sessions:
            places = list(range(len(sessions)))
            call_s = max(self._warm_up(session, ROUND_SHARE / 2 / len(sessions) * self.limit_s) for session in sessions)
            calls = max(1, round(self.block_s / call_s))
            turn_s = 2 * calls * call_s
            wanted_s = max(ROUND_S, PAIRED_TURNS * turn_s) if len(sessions) > 1 else ROUND_S
            turns = max(1, int(min(wanted_s, ROUND_SHARE * self.limit_s / len(sessions)) / turn_s))
            settle = math.ceil(SETTLE_S / call_s) if len(sessions) > 1 and call_s < LONG_CALL_S else 0
            for turn in range(turns):
                order = places if turn % 2 == 0 else places[::-1]
                for place in (*order, *order[::-1]):
                    self._block(sessions[place], (place, number, turn), calls, settle)
                if number >= self.least_rounds and time.monotonic() > self.end_s:
                    break

    def _block(self, session: RunnerSession, slot: tuple[int, int, int], calls: int, settle: int) -> None:
        """Time a block in ``slot`` (place, round, turn), as many calls of every artifact: the first ones after a change of processes are the slower ones."""
        for _ in range(REPEATS):
            block = Block(*slot, session.time(0.0, calls, settle, self.recording.quiet_ns, self.patience_s))
            self.recording.add(block)
            if self._counts(block) or time.monotonic() > self.end_s:
                return

    def _counts(self, block: Block) -> bool:
        """Ratios need a machine that is the same for all, times of one artifact one that is as fast as it can be."""
        return block.steady if len(self.entrants) > 1 else self.recording.unloaded(block)

    def _warm_up(self, session: RunnerSession, limit_s: float) -> float:
        """Call until the running median is stable or ``limit_s`` is spent; seconds of one call."""
        end_s = time.monotonic() + limit_s
        last = float(np.median(session.time(0.0, 1).ns))
        least = WARM_UP_CALLS if last * WARM_UP_CALLS < 1e9 * limit_s else 1
        while time.monotonic() < end_s:
            now = float(np.median(session.time(0.0, least).ns))
            if abs(now - last) <= WARM_UP_CHANGE * last:
                return now / 1e9
            last = now
        return last / 1e9

    def memory(self, place: int) -> Memory | None:
        """What the kernel counts for one entrant."""
        samples, entrant = self.samples[place], self.entrants[place]
        assert samples is not None
        return measure_memory(entrant.path, entrant.target, self.threads, calls_of(samples, self.seen[place].inputs))

    def comparison(self) -> Comparison:
        """Everything seen, of all entrants."""
        return Comparison(tuple(self.profile(place) for place in range(len(self.entrants))), self.recording)

    def profile(self, place: int, least_kept: float = LEAST_KEPT) -> Profile:
        """Everything seen of one entrant: the calls that count, or all of them if these are fewer than ``least_kept``."""
        seen = self.seen[place]
        rounds, calls, kept = self.recording.kept(place, least_kept)
        return Profile(
            device=self.device,
            threads=self.threads,
            runtime_version=seen.runtime_version,
            samples_ns=np.concatenate(calls),
            block_sizes=tuple(map(len, calls)),
            rounds=tuple(rounds),
            kept=kept,
            load_ms=median(seen.loads_ms),
            memory=None,
            environment={**self.environment, "pinned_cores": " ".join(map(str, seen.cores)) or "none"},
        )
