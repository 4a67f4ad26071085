"""Memory: known amounts are found, each where it belongs; what a budget is judged on; plans beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from edgesmith.compiler.budget import Budget, Verdict
from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.errors import RunnerError, UnsupportedError
from edgesmith.compiler.listing import memory_rows
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.memory import measure_memory
from edgesmith.compiler.profile.memory_types import FIRST, LOADED, STEADY, Memory, MemoryPlan
from edgesmith.compiler.profile.types import Profile
from edgesmith.compiler.profile.verdicts import judge
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.target import Artifact, Target

MB = 1_000_000
NOISE = 200_000
"""The most that a reading may be off, in bytes: what Python itself moves in between."""


class Scripted(Target):
    """A target whose files are written by hand; see runners/scripted_runner.py."""

    name: ClassVar[str] = "scripted"
    suffix: ClassVar[str] = ".json"
    extra: ClassVar[str] = ""
    distribution: ClassVar[str] = "numpy"
    modules: ClassVar[tuple[str, ...]] = ("numpy",)
    schemes: ClassVar[frozenset[Scheme]] = frozenset()
    runner: ClassVar[Path] = Path(__file__).with_name("runners") / "scripted_runner.py"

    def unsupported(self, model: Model) -> tuple[Diagnostic, ...]:
        return ()

    def lower(self, model: Model, folder: Path, stem: str = "model") -> Artifact:
        raise UnsupportedError("scripts are written by hand")


class Planned(Scripted):
    def memory_plan(self, path: Path) -> MemoryPlan:
        return MemoryPlan(1 * MB, 2 * MB, 3 * MB, 4 * MB, 5 * MB)


def measured(tmp_path: Path, target: Target | None = None, padding: int = 0, **what: object) -> Memory:
    path = tmp_path / "a script.json"
    path.write_text(json.dumps({**what, "padding": "x" * padding}))
    memory = measure_memory(path, target or Scripted(), 1, (np.zeros((2, 1, 2), np.float32),))
    assert memory is not None
    return memory


def profile(memory: Memory | None) -> Profile:
    return Profile("host", 1, "1", np.ones(8, np.int64), (8,), (0,), 1.0, 1.0, memory, {})


def test_every_kind_is_found_where_it_belongs(tmp_path: Path) -> None:
    memory = measured(tmp_path, touch_mb=20, run_mb=10, burst_mb=50, warm_mb=40)
    for phase, size_mb in ((LOADED, 20), (FIRST, 30), (STEADY, 30)):
        assert memory.dirty_at(phase).value == pytest.approx(size_mb * MB, abs=NOISE)
    assert memory.dirty_bytes.value == pytest.approx(30 * MB, abs=NOISE), "what the process takes once, or for a moment, is not the model's"
    assert memory.peak_rss_bytes.value == pytest.approx(50 * MB, abs=MB), "the kernel adds up resident memory in batches"
    assert memory.process_peak_rss_bytes > 90 * MB
    assert memory.mapped_bytes.value == 0


def test_pages_of_the_file_are_mapped_and_not_dirty(tmp_path: Path) -> None:
    memory = measured(tmp_path, touch_mb=3, map=True, padding=8 * MB)
    assert memory.mapped_bytes.value == pytest.approx(8 * MB, abs=8192)
    assert memory.dirty_bytes.value == pytest.approx(3 * MB, abs=NOISE + 8 * MB * 0.01)
    assert memory.held_bytes.value == memory.dirty_at(STEADY).value + memory.mapped_bytes.value


def test_two_runs_agree(tmp_path: Path) -> None:
    first, second = (measured(tmp_path, touch_mb=5, run_mb=2, burst_mb=9) for _ in range(2))
    assert first.dirty_bytes.value == pytest.approx(second.dirty_bytes.value, rel=0.03)


@pytest.mark.parametrize(("limit", "verdict"), [(6.0, Verdict.MISSED), (8.0, Verdict.MET)])
def test_a_budget_is_judged_on_dirty_memory_and_says_what_it_did_not_count(tmp_path: Path, limit: float, verdict: Verdict) -> None:
    memory = measured(tmp_path, touch_mb=7, burst_mb=30, map=True, padding=4 * MB)
    (finding,) = judge(Budget(memory_mb=limit), profile(memory), None)
    assert finding.verdict is verdict
    assert finding.measured == memory.dirty_bytes.value / MB
    assert "95 %" not in finding.message
    assert "of dirty memory" in finding.message
    assert ("2 processes:" in finding.message) is (memory.dirty_bytes.low < memory.dirty_bytes.high)
    assert f"{memory.mapped_bytes.high / MB:.4g} MB clean pages of the file" in finding.message
    assert f"{memory.peak_rss_bytes.high / MB:.4g} MB at the peak of resident memory" in finding.message


def test_what_the_kernel_does_not_count_is_unknown() -> None:
    (finding,) = judge(Budget(memory_mb=1.0), profile(None), None)
    assert finding.verdict is Verdict.UNKNOWN
    assert "the kernel does not count memory here" in finding.message


def test_a_plan_stands_beside_the_measurement(tmp_path: Path) -> None:
    memory = measured(tmp_path, Planned(), touch_mb=1)
    assert memory.plan == MemoryPlan(1 * MB, 2 * MB, 3 * MB, 4 * MB, 5 * MB)
    rows = {name.strip(): beside for name, _, beside in memory_rows(memory)}
    assert rows["in steady state"] == "planned 10.00 MB: weights 1.00 MB, packed 2.00 MB, arena 3.00 MB, records 4.00 MB"
    assert rows["clean pages of its file"] == "planned 5.00 MB"
    assert measured(tmp_path, touch_mb=1).plan is None


def test_a_runner_that_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="failed to count memory"):
        measured(tmp_path, run="die")
