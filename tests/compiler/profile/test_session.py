"""A runner in its process: what comes back, and what is said and left when it misbehaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgesmith.compiler.errors import DataError, MissingExtraError, RunnerError, UserError
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.quiet import logging_to

RUNNERS = Path(__file__).with_name("runners")
MATMUL, SCRIPTED = RUNNERS / "matmul_runner.py", RUNNERS / "scripted_runner.py"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that temporary files go to in this test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def matrix(tmp_path: Path, rows: int = 5, columns: int = 3) -> tuple[Path, np.ndarray]:
    w = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    np.savez(tmp_path / "m.npz", w=w)
    return tmp_path / "m.npz", w


def script(tmp_path: Path, **what: object) -> Path:
    path = tmp_path / "script.json"
    path.write_text(json.dumps({"pid_file": str(tmp_path / "pid"), **what}))
    return path


def is_alive(tmp_path: Path) -> bool:
    return Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_outputs_of_many_samples_come_back_in_order(tmp_path: Path, scratch: Path) -> None:
    path, w = matrix(tmp_path)
    x = np.random.default_rng(1).standard_normal((300, 5)).astype(np.float32)
    with open_session(path, MATMUL) as session:
        assert session.loaded.inputs[0].shape == (1, 5)
        assert session.loaded.runtime_version == np.__version__
        (y,) = session.run((x,))
    np.testing.assert_allclose(y, x @ w, rtol=0, atol=5 * 5 * np.finfo(np.float32).eps)
    assert not list(scratch.iterdir())


def test_large_inputs_are_handed_over_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, w = matrix(tmp_path)
    monkeypatch.setattr("edgesmith.compiler.profile.session.CHUNK_BYTES", 7 * 5 * 4)
    x = np.random.default_rng(1).standard_normal((33, 5)).astype(np.float32)
    with open_session(path, MATMUL) as session:
        np.testing.assert_allclose(session.run((x,))[0], x @ w, rtol=0, atol=1e-5)


def test_chatter_and_threads_are_in_the_log(tmp_path: Path) -> None:
    path, _ = matrix(tmp_path)
    with logging_to(tmp_path / "log"), open_session(path, MATMUL, threads=2):
        pass
    log = (tmp_path / "log").read_text()
    assert "native chatter on standard output" in log
    assert "threads ['2', '2', '1'] 2" in log, "OpenBLAS computes the canary, on one thread"


def test_process_is_pinned_to_as_many_cores_as_threads(tmp_path: Path) -> None:
    with open_session(script(tmp_path), SCRIPTED, threads=1) as session:
        assert len(session.loaded.cores) == 1
        assert os.sched_getaffinity(int((tmp_path / "pid").read_text())) == set(session.loaded.cores)


def test_more_threads_than_cores_leaves_it_unpinned(tmp_path: Path) -> None:
    with open_session(script(tmp_path), SCRIPTED, threads=4096) as session:
        assert session.loaded.cores == ()


def test_calls_are_timed_for_long_enough_and_often_enough(tmp_path: Path) -> None:
    samples = (np.zeros((3, 2), np.float32),)
    with open_session(script(tmp_path, sleep_ms=[5]), SCRIPTED, samples=samples) as session:
        timed = session.time(0.1, least=4)
        assert 4 <= len(timed.ns) <= 20
        assert timed.ns.sum() >= 0.09e9
        assert timed.ns.min() >= 5e6
        assert len(timed.lost) == len(timed.ns)
        assert min(timed.canary_ns) > 0
        assert len(session.time(0.0, least=4, settle=2).ns) == 4


def test_calls_wait_for_a_fast_machine_but_not_for_ever(tmp_path: Path) -> None:
    samples = (np.zeros((1, 2), np.float32),)
    with open_session(script(tmp_path), SCRIPTED, samples=samples) as session:
        began = time.monotonic()
        assert len(session.time(0.0, least=3, quiet_ns=1, patience_s=0.3).ns) == 3
        waited_s = time.monotonic() - began
        assert waited_s >= 0.3, "no canary takes a nanosecond"
        session.time(0.0, quiet_ns=10**12, patience_s=600.0)
        assert time.monotonic() - began - waited_s < 300.0, "every canary takes less than a thousand seconds"


def test_a_process_runs_on_the_cores_it_is_given(tmp_path: Path) -> None:
    last = max(os.sched_getaffinity(0))
    with open_session(script(tmp_path), SCRIPTED, cores=(last,)) as session:
        assert session.loaded.cores == (last,)


def test_a_call_that_lost_its_core_is_known(tmp_path: Path) -> None:
    """A neighbour on the same core that never sleeps takes turns with the calls."""
    core = max(os.sched_getaffinity(0))
    samples = (np.zeros((1, 2), np.float32),)
    busy = subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"])
    try:
        with open_session(script(tmp_path, sweeps=20_000), SCRIPTED, cores=(core,), samples=samples) as session:
            timed = session.time(0.5, least=3)
    finally:
        busy.kill()
        busy.wait()
    assert timed.lost.any()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"load": "die"}, r"failed to load: it ended with SIGSEGV[\s\S]*about to touch address zero"),
        ({"load": "raise"}, r"failed to load: ValueError: flatbuffer verification failed"),
        ({"load": "hang"}, r"failed to load: no answer within 1 s, so it was stopped"),
        ({"load": "import"}, r"failed to load: ModuleNotFoundError"),
        ({"run": "die"}, r"failed to run: it ended with SIGSEGV[\s\S]*about to touch address zero"),
        ({"run": "raise"}, r"failed to run: ValueError"),
        ({"run": "hang"}, r"failed to run: no answer within 1 s"),
    ],
    ids=lambda value: "-".join(f"{k}-{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_misbehaviour_is_one_clear_error_and_leaves_nothing(tmp_path: Path, scratch: Path, what: dict[str, str], says: str) -> None:
    with pytest.raises(RunnerError, match=says), open_session(script(tmp_path, **what), SCRIPTED, timeout_s=1.0) as session:
        session.run((np.zeros((1, 2), np.float32),))
    assert not is_alive(tmp_path)
    assert not list(scratch.iterdir())


def test_a_hanging_runner_is_stopped_at_once(tmp_path: Path) -> None:
    with open_session(script(tmp_path, run="hang"), SCRIPTED, timeout_s=1.0) as session:
        for _ in range(2):
            with pytest.raises(RunnerError, match="failed to run"):
                session.run((np.zeros((1, 2), np.float32),))
            assert not is_alive(tmp_path)


def test_an_error_here_ends_the_process_too(tmp_path: Path, scratch: Path) -> None:
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), open_session(script(tmp_path), SCRIPTED):
        raise KeyboardInterrupt
    assert time.monotonic() - start < 4
    assert not is_alive(tmp_path)
    assert not list(scratch.iterdir())


def test_a_hanging_runner_ends_with_its_killed_parent(tmp_path: Path) -> None:
    path = script(tmp_path, load="hang")
    code = (
        "from pathlib import Path; from edgesmith.compiler.profile.session import open_session\n"
        f"with open_session(Path({str(path)!r}), Path({str(SCRIPTED)!r})): pass"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        waited(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text() != "")
        assert is_alive(tmp_path)
    finally:
        parent.kill()
        parent.wait()
    waited(lambda: not is_alive(tmp_path))


def waited(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds, for half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["die", "raise"])
def test_a_foreign_file_that_does_not_load_is_the_users(tmp_path: Path, how: str) -> None:
    with pytest.raises(UserError, match=r"script.json cannot be loaded") as caught, open_session(script(tmp_path, load=how), SCRIPTED, foreign=True):
        pass
    assert caught.value.exit_code == 2


def test_a_missing_file_and_a_missing_runtime_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"), open_session(tmp_path / "none.json", SCRIPTED):
        pass
    missing = pytest.raises(MissingExtraError, match=r"no_such_runtime is not installed\n.*edgesmith\[litert\]")
    with missing, open_session(script(tmp_path, load="import"), SCRIPTED, extra="litert"):
        pass


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ((np.zeros((2, 3), np.float32),), r"x takes samples of float32\[2\] but was given float32\[3\]"),
        ((np.zeros((2, 2), np.float64),), r"x takes samples of float32\[2\] but was given float64\[2\]"),
        ((np.zeros((0, 2), np.float32),), "at least one"),
        ((np.zeros((2, 2), np.float32),) * 2, "takes 1 inputs but 2 were given"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path: Path, inputs: tuple[np.ndarray, ...], says: str) -> None:
    with open_session(script(tmp_path), SCRIPTED) as session, pytest.raises(DataError, match=says):
        session.run(inputs)
