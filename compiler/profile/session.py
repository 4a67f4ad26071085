"""An artifact running in a fresh process of its own, as an object here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesmith.compiler.data import Array
from edgesmith.compiler.errors import DataError, RunnerError, UserError
from edgesmith.compiler.files import translated
from edgesmith.compiler.profile.transport import WorkerProcess
from edgesmith.compiler.profile.types import Port
from edgesmith.compiler.quiet import current_log

TIMEOUT_S = 120.0
CHUNK_BYTES = 64_000_000
CHUNK_S = 2.0


@dataclass(frozen=True)
class Loaded:
    """What a runner says once it has loaded its artifact. ``load_ms`` is the time of that; ``cores`` is empty where it is not pinned."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    runtime_version: str
    load_ms: float
    cores: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Timed:
    """``ns``: nanoseconds of each call; ``lost``: whether the kernel gave the core to another process meanwhile; ``canary_ns``: of a fixed piece of
    work right before and right after.
    """

    ns: npt.NDArray[np.int64]
    lost: npt.NDArray[np.bool_]
    canary_ns: tuple[int, int]


@dataclass(frozen=True)
class RunnerSession:
    """A loaded artifact in its process; made by ``open_session``. Inputs and outputs are arrays of N samples."""

    loaded: Loaded
    _process: WorkerProcess
    _scratch: Path

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Every sample once, one by one: the outputs, first dimension the sample.

        Raises:
            DataError: the arrays are not what the artifact takes.
            RunnerError: the runner died or hung.
        """
        calls = calls_of(inputs, self.loaded.inputs)
        count = len(calls[0])
        most = max(1, CHUNK_BYTES * count // max(1, sum(array.nbytes for array in calls)))
        parts: list[tuple[Array, ...]] = []
        start, size = 0, 1
        while start < count:
            began = time.monotonic()
            parts.append(self._run_chunk([array[start : start + size] for array in calls]))
            start += size
            if time.monotonic() - began < CHUNK_S:
                size = min(2 * size, most)
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _run_chunk(self, calls: Sequence[Array]) -> tuple[Array, ...]:
        source, result = self._scratch / "inputs.npz", self._scratch / "outputs.npz"
        _write(source, calls)
        self._process.ask("run", inputs=str(source), outputs=str(result))
        with np.load(result, allow_pickle=False) as file:
            return tuple(file[str(i)] for i in range(len(file.files)))

    def time(self, seconds: float, least: int = 1, settle: int = 0, quiet_ns: int = 0, patience_s: float = 0.0) -> Timed:
        """Calls made one after the other for ``seconds``, at least ``least`` of them, over the samples given to ``open_session``.

        ``settle`` untimed ones go before, and before these a wait for a canary of ``quiet_ns`` at most, but no longer than ``patience_s``.
        """
        answer = self._process.ask("time", extra_s=seconds + patience_s, seconds=seconds, least=least, settle=settle, quiet_ns=quiet_ns, patience_s=patience_s)
        return Timed(np.asarray(answer["ns"], dtype=np.int64), np.asarray(answer["lost"]) > 0, tuple(answer["canary_ns"]))


@contextmanager
def open_session(  # noqa: PLR0913 - all but the first three are by name
    artifact: Path,
    runner: Path,
    threads: int = 1,
    *,
    cores: Sequence[int] = (),
    samples: Sequence[Array] = (),
    log: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    extra: str = "",
    foreign: bool = False,
) -> Iterator[RunnerSession]:
    """Load ``artifact`` with ``runner`` (a target's runner file) in a fresh process, gone when left, pinned to ``cores`` or to the ``threads`` idlest.

    ``samples`` (arrays of N samples each) are what ``RunnerSession.time`` rotates over. The runtime's own output is appended to
    ``log`` (when None, to the current log of ``quiet.logging_to``, if any). A request that takes longer than ``timeout_s`` is a hang: the
    process is killed. ``extra`` is the extra that brings the runtime. ``foreign``: edgesmith did not write the file, so that one which does
    not load is the user's to mend.

    Raises:
        RunnerError: the runner died, hung or could not load the artifact; with the last lines of its log.
        UserError: the file is missing; or it is foreign and does not load.
        DataError: ``samples`` are not what the artifact takes.
        MissingExtraError: the runtime is not installed and ``extra`` is known.
    """
    if not artifact.exists():
        raise UserError(f"{artifact} does not exist")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="edgesmith-run-")))
        log = log or current_log() or scratch / "log"
        process = stack.enter_context(WorkerProcess(artifact, runner, threads, log=log, timeout_s=timeout_s, extra=extra, cores=cores))
        pinned = tuple(process.receive("start")["cores"])
        answer = _load(process, artifact, foreign)
        session = RunnerSession(_loaded(answer, pinned), process, scratch)
        if samples:
            give_calls(process, scratch, calls_of(samples, session.loaded.inputs))
        yield session


def give_calls(process: WorkerProcess, scratch: Path, calls: Sequence[Array]) -> None:
    """Hand ``process`` what its timed calls rotate over (see ``calls_of``), by way of a file in ``scratch``."""
    source = scratch / "samples.npz"
    _write(source, calls)
    process.ask("samples", path=str(source))
    source.unlink()


def calls_of(inputs: Sequence[Array], ports: Sequence[Port]) -> list[Array]:
    """N samples per input -> what N calls take, (N, *shape of a call) per input.

    Raises:
        DataError: they are none, or not of the number, shapes and dtypes of ``ports``.
    """
    if len(inputs) != len(ports):
        raise DataError(f"the artifact takes {len(ports)} inputs but {len(inputs)} were given")
    counts = {len(array) if array.ndim else 0 for array in inputs}
    if len(counts) != 1 or counts == {0}:
        raise DataError("inputs need the same number of samples, at least one", why=f"shapes are {[array.shape for array in inputs]}")
    for array, port in zip(inputs, ports, strict=True):
        given, wanted = array.shape[1:], port.sample_shape
        fits = len(given) == len(wanted) and all(want in (None, got) for want, got in zip(wanted, given, strict=True))
        if not fits or array.dtype.name != port.dtype:
            said = " x ".join("any" if size is None else str(size) for size in wanted)
            raise DataError(f"input {port.name} takes samples of {port.dtype}[{said}] but was given {array.dtype.name}[{' x '.join(map(str, given))}]")
    return [array[:, None] if port.one_by_one else array for array, port in zip(inputs, ports, strict=True)]


def _write(path: Path, arrays: Sequence[Array]) -> None:
    with translated(path):
        np.savez(path, allow_pickle=False, **{str(i): array for i, array in enumerate(arrays)})


def _load(process: WorkerProcess, artifact: Path, foreign: bool) -> dict[str, Any]:
    try:
        return process.ask("load")
    except RunnerError as error:
        if not foreign:
            raise
        raise UserError(f"{artifact} cannot be loaded", why=error.why, hint="is the file whole, and made for this runtime and its version?") from error


def _loaded(answer: dict[str, Any], cores: tuple[int, ...]) -> Loaded:
    return Loaded(
        inputs=_ports(answer["inputs"]),
        outputs=_ports(answer["outputs"]),
        runtime_version=answer["runtime_version"],
        load_ms=answer["load_ns"] / 1e6,
        cores=cores,
    )


def _ports(rows: list[dict[str, Any]]) -> tuple[Port, ...]:
    return tuple(Port(row["name"], tuple(row["shape"]), row["dtype"]) for row in rows)
