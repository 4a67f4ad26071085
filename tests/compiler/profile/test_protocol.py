"""Measuring: known distributions, known memory, verdicts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from edgesmith.compiler.budget import Budget, Verdict
from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.errors import UnsupportedError, UserError
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile import protocol
from edgesmith.compiler.profile.comparison import Difference
from edgesmith.compiler.profile.devices import devices, environment
from edgesmith.compiler.profile.protocol import compare, measure
from edgesmith.compiler.profile.recording import LEAST_KEPT
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.profile.verdicts import judge
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.target import Artifact, Target


class Scripted(Target):
    """A target whose files are written by hand; see runners/scripted_runner.py."""

    name: ClassVar[str] = "scripted"
    suffix: ClassVar[str] = ".json"
    extra: ClassVar[str] = "scripted"
    distribution: ClassVar[str] = "numpy"
    modules: ClassVar[tuple[str, ...]] = ("numpy",)
    schemes: ClassVar[frozenset[Scheme]] = frozenset()
    runner: ClassVar[Path] = Path(__file__).with_name("runners") / "scripted_runner.py"

    def unsupported(self, model: Model) -> tuple[Diagnostic, ...]:
        return ()

    def lower(self, model: Model, folder: Path, stem: str = "model") -> Artifact:
        raise UnsupportedError("scripts are written by hand")


def script(tmp_path: Path, **what: object) -> Path:
    path = tmp_path / "script.json"
    path.write_text(json.dumps(what))
    return path


@pytest.mark.alone
def test_a_known_distribution_is_found(tmp_path: Path) -> None:
    path = script(tmp_path, sleep_ms=[1.0] * 8 + [3.0] * 2, touch_mb=30)
    profile = measure(path, target=Scripted(), limit_s=8.0)
    p50, p90 = profile.latency_ms(50), profile.latency_ms(90)
    assert 1.0 <= p50.value < 2.0 and 3.0 <= p90.value < 6.0, "no sleep is shorter than asked for"
    assert p50.low <= p50.value <= p50.high, "an interval allows for other processes, and may begin below the shortest sleep"
    assert 2.0 < p90.low <= p90.value <= p90.high
    assert profile.samples_ns.min() >= 1e6
    assert np.mean(profile.samples_ns >= 3e6) >= 0.15, "two calls of ten sleep for 3 ms"
    assert sum(profile.block_sizes) == len(profile.samples_ns)
    assert len(profile.rounds) == len(profile.block_sizes)
    assert len(set(profile.rounds)) >= 2
    assert profile.memory is not None and len(profile.memory.processes) == 2
    assert profile.memory.dirty_bytes.value == pytest.approx(30e6, rel=0.01)
    assert profile.environment["inputs"] == "random"


@pytest.mark.alone
def test_a_clear_verdict_needs_no_more_than_the_first_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(latency_ms=100.0, percentile=50)
    opened: list[Path] = []
    monkeypatch.setattr(protocol, "open_session", lambda artifact, *args, **options: opened.append(artifact) or open_session(artifact, *args, **options))
    profile = measure(script(tmp_path, sleep_ms=[1.0]), target=Scripted(), budget=budget, samples=(np.zeros((1, 2), np.float32),), limit_s=120.0, memory=False)
    assert profile.memory is None
    assert [finding.verdict for finding in judge(budget, profile, 1)] == [Verdict.MET]
    (finding,) = judge(Budget(latency_ms=0.2, percentile=50), profile, 1)
    assert finding.verdict is (Verdict.MISSED if profile.kept >= LEAST_KEPT else Verdict.UNKNOWN)
    assert len(opened) == protocol.ROUNDS
    assert set(profile.rounds) <= set(range(protocol.ROUNDS)), "a round may hold nothing that counts"
    assert profile.environment["inputs"] == "given samples"


def test_an_undecided_verdict_is_measured_up_to_the_limit_and_stays_unknown(tmp_path: Path) -> None:
    path = script(tmp_path, sleep_ms=[1.0] * 9 + [30.0])
    budget = Budget(latency_ms=15.0, percentile=90)
    began = time.monotonic()
    profile = measure(path, target=Scripted(), budget=budget, samples=(np.zeros((1, 2), np.float32),), limit_s=4.0)
    assert time.monotonic() - began >= 4.0
    (finding,) = judge(budget, profile, 1)
    assert finding.verdict is Verdict.UNKNOWN
    assert "measure longer" in finding.message or "too loaded" in finding.message


def test_too_few_calls_to_bound_a_percentile_are_never_met(tmp_path: Path) -> None:
    path = script(tmp_path, sleep_ms=[200.0])
    budget = Budget(latency_ms=1000.0, percentile=90)
    profile = measure(path, target=Scripted(), budget=budget, samples=(np.zeros((1, 2), np.float32),), limit_s=2.0)
    (finding,) = judge(budget, profile, 1)
    assert finding.verdict is Verdict.UNKNOWN
    assert "too few to bound p90" in finding.message


def test_what_was_not_measured_on_the_device_is_unknown(tmp_path: Path) -> None:
    budget = Budget(latency_ms=1000.0, memory_mb=1000.0, size_mb=1.0)
    profile = measure(script(tmp_path), target=Scripted(), limit_s=0.5)
    here = judge(budget, profile, 500_000)
    assert [f.verdict for f in here] == [Verdict.MET] * 3
    for findings in (judge(budget, None, 500_000), judge(budget, profile, 500_000, device="phone")):
        assert {f.budget: f.verdict for f in findings} == {"latency_ms": Verdict.UNKNOWN, "memory_mb": Verdict.UNKNOWN, "size_mb": Verdict.MET}


def test_a_file_over_its_size_limit_is_missed() -> None:
    (finding,) = judge(Budget(size_mb=1.0), None, 1_000_001)
    assert finding.verdict is Verdict.MISSED
    (finding,) = judge(Budget(size_mb=1.0), None, 1_000_000)
    assert finding.verdict is Verdict.MET


def test_an_unknown_device_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown device 'phone'\n.*there is host"):
        measure(script(tmp_path), target=Scripted(), device="phone")
    assert list(devices()) == ["host"]


def test_a_file_the_user_gave_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        measure(script(tmp_path, load="die"), target=Scripted())


@pytest.mark.alone
def test_twice_the_work_takes_twice_the_time(tmp_path: Path) -> None:
    scripts = [tmp_path / f"{sweeps}.json" for sweeps in (400, 800)]
    for path in scripts:
        path.write_text(json.dumps({"sweeps": int(path.stem)}))
    found = compare(scripts, target=Scripted(), samples=(np.zeros((1, 2), np.float32),), limit_s=60.0, precision=0.2)
    ratio = found.ratio()
    assert 1.2 < ratio.low <= ratio.value <= ratio.high < 3.0
    assert found.difference() is Difference.SLOWER
    assert found.difference(0, 1) is Difference.FASTER
    assert all(profile.memory is None for profile in found.profiles)
    assert found.profiles[0].environment["pinned_cores"] == found.profiles[1].environment["pinned_cores"]


def test_a_comparison_needs_two(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs two artifacts"):
        compare([script(tmp_path)], target=Scripted())


def test_the_official_scenario_counts_every_query_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "OFFICIAL_S", 1.5)
    profile = measure(script(tmp_path, sleep_ms=[0.5]), target=Scripted(), samples=(np.zeros((1, 2), np.float32),), official=True)
    assert len(profile.samples_ns) >= 1024
    assert profile.samples_ns.sum() >= 1e9
    assert set(profile.rounds) == {0}


def test_the_environment_says_what_numbers_depend_on() -> None:
    assert set(environment()) == {"cpu", "cpu_features", "cores", "governor", "os", "python", "load_average"}
    assert all(environment().values())
