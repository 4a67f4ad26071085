"""Operators of a scripted runner: their times are known, and so is what has to come out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.errors import DataError, RunnerError, UnsupportedError, UserError
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.operator_types import Category, Executed, Placement, placed
from edgesmith.compiler.profile.operators import profile_operators
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.target import Artifact, Target

RUNNERS = Path(__file__).with_name("runners")
COPY = Placement(Category.LAYOUT, "copy less")


class Unplaced(Target):
    """A target that times operators, and does not say which of them are fast; see runners/profiled_runner.py."""

    name: ClassVar[str] = "profiled"
    suffix: ClassVar[str] = ".json"
    extra: ClassVar[str] = "profiled"
    distribution: ClassVar[str] = "numpy"
    modules: ClassVar[tuple[str, ...]] = ("numpy",)
    schemes: ClassVar[frozenset[Scheme]] = frozenset()
    runner: ClassVar[Path] = RUNNERS / "profiled_runner.py"

    def unsupported(self, model: Model) -> tuple[Diagnostic, ...]:
        return ()

    def lower(self, model: Model, folder: Path, stem: str = "model") -> Artifact:
        raise UnsupportedError("scripts are written by hand")


class Placed(Unplaced):
    def place(self, operators: Sequence[Executed]) -> tuple[Placement, ...]:
        return placed(operators, {"Transpose": COPY})


class Mute(Placed):
    """Its runner has no Profiler."""

    runner: ClassVar[Path] = RUNNERS / "matmul_runner.py"


def row(name: str, kind: str, ns: Sequence[int], *sources: str) -> dict[str, object]:
    return {"name": name, "kind": kind, "ns": list(ns), "sources": list(sources), "delegate": "cpu"}


def script(folder: Path, *rows: dict[str, object], **what: object) -> Path:
    path = folder / "script.json"
    path.write_text(json.dumps({"operators": rows, **what}))
    return path


ROWS = (
    row("a/Conv", "Conv", [590_000, 600_000, 610_000], "a"),
    row("b/MatMul", "MatMul", [300_000], "b", "b.bias"),
    row("Transpose", "Transpose", [60_000]),
    row("c/Transpose", "Transpose", [30_000], "c"),
    row("nothing", "Reshape", [-400], "c"),
)


@pytest.mark.alone
def test_times_shares_categories_and_sources(tmp_path: Path) -> None:
    found = profile_operators(script(tmp_path, *ROWS), target=Placed(), limit_s=0.4)
    assert [operator.name for operator in found.operators] == [r["name"] for r in ROWS]
    assert [operator.ms for operator in found.operators] == pytest.approx([0.6, 0.3, 0.06, 0.03, 0.0], rel=0.2), "whole runs do not all take their median"
    assert [operator.ms / found.operators[1].ms for operator in found.operators[1:]] == pytest.approx([1.0, 0.2, 0.1, 0.0])
    assert found.total_ms == pytest.approx(sum(operator.ms for operator in found.operators))
    assert [operator.share for operator in found.operators] == pytest.approx([60 / 99, 30 / 99, 6 / 99, 3 / 99, 0.0], rel=0.005)
    assert found.operators[1].sources == ("b", "b.bias")
    assert found.operators[2].sources == ()
    assert found.sourced_share == pytest.approx(93 / 99, rel=0.005)
    assert found.fast_share == pytest.approx(90 / 99, rel=0.005)
    fast, copies = found.categories()
    assert (fast.category, fast.operators, fast.ms) == (Category.FAST, 3, pytest.approx(0.9, rel=0.2))
    assert (copies.category, copies.operators, copies.ms, copies.advice) == (Category.LAYOUT, 2, pytest.approx(0.09, rel=0.2), "copy less")
    assert (found.method, found.runtime_version, found.threads) == ("instrumented", "1.0", 1)
    assert 1.0 <= found.whole_ms < 3.0 and 1.0 <= found.instrumented_ms < 3.0, "a run sleeps a millisecond"
    assert found.runs > 10


@pytest.mark.alone
def test_operators_are_set_against_the_whole_runs_beside_them(tmp_path: Path) -> None:
    """Every other tenth of a second this machine is four times slower, and an operator always takes six tenths of a run."""
    path = script(tmp_path, row("a", "Conv", [600_000], "a"), row("b", "Conv", [300_000], "b"), slower=4.0)
    found = profile_operators(path, target=Placed(), limit_s=2.0)
    assert [operator.ms / found.whole_ms for operator in found.operators] == pytest.approx([0.6, 0.3], rel=0.35)


@pytest.mark.alone
def test_times_of_a_coarse_clock_are_averaged(tmp_path: Path) -> None:
    """Half of the runs read nothing, half a microsecond: a median would be one of the two."""
    path = script(tmp_path, row("a", "Conv", [0, 1_000], "a"), row("b", "Conv", [500], "b"))
    one, other = profile_operators(path, target=Placed(), limit_s=0.6).operators
    assert one.ms / other.ms == pytest.approx(1, abs=0.4)


def test_an_operator_that_is_not_timed_in_every_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"times of operator nothing for \d+ runs"):
        profile_operators(script(tmp_path, *ROWS, forget=1), target=Placed(), limit_s=0.2)


def test_a_runner_without_a_profiler_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", w=np.ones((2, 2), np.float32))
    with pytest.raises(UnsupportedError, match=r"cannot time operators: matmul_runner.py has no Profiler"):
        profile_operators(tmp_path / "weights.npz", target=Mute(), limit_s=0.2)


def test_a_target_that_does_not_say_what_is_fast_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="does not say which operators are fast"):
        profile_operators(script(tmp_path, *ROWS), target=Unplaced(), limit_s=0.2)


def test_a_runner_that_dies_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="failed to profile: it ended with SIGABRT"):
        profile_operators(script(tmp_path, *ROWS, die=str(tmp_path / "left")), target=Placed(), limit_s=0.2)
    assert not Path((tmp_path / "left").read_text()).parent.exists()


def test_samples_and_files_are_checked_as_when_measuring(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        profile_operators(tmp_path / "none.json", target=Placed())
    with pytest.raises(DataError, match="x takes samples of float32"):
        profile_operators(script(tmp_path, *ROWS), target=Placed(), samples=(np.zeros((1, 3), np.float32),))
    with pytest.raises(UserError, match="unknown device"):
        profile_operators(script(tmp_path, *ROWS), target=Placed(), device="moon")


def test_the_most_expensive_advice_comes_first(tmp_path: Path) -> None:
    found = profile_operators(script(tmp_path, *ROWS), target=Placed(), limit_s=0.2)
    dearer = replace(found.operators[2], category=Category.FLOAT_ISLAND, advice="plan it", ms=2.0)
    changed = replace(found, operators=(*found.operators, dearer))
    assert [c.category for c in changed.categories()] == [Category.FAST, Category.FLOAT_ISLAND, Category.LAYOUT]
