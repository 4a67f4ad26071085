"""Which blocks count, and what ratios and their intervals are worth: on timings made by a known process."""

from __future__ import annotations

import numpy as np
import pytest

from edgesmith.compiler.budget import Budget, Interval, Verdict
from edgesmith.compiler.profile.comparison import Comparison, Difference, difference
from edgesmith.compiler.profile.recording import LEAST_KEPT, Block, Recording
from edgesmith.compiler.profile.session import Timed
from edgesmith.compiler.profile.types import Profile
from edgesmith.compiler.profile.verdicts import judge

MS = 1_000_000


def timed(ns: list[int], lost: list[bool] | None = None, canary: tuple[int, int] = (100, 100)) -> Timed:
    return Timed(np.asarray(ns), np.asarray(lost or [False] * len(ns)), canary)


def recorded(*blocks: Block) -> Recording:
    recording = Recording()
    for block in blocks:
        recording.add(block)
    return recording


def test_a_call_that_lost_its_core_does_not_count() -> None:
    recording = recorded(Block(0, 0, 0, timed([10, 90, 11], [False, True, False])))
    rounds, calls, kept = recording.kept(0)
    assert rounds == [0] and [list(c) for c in calls] == [[10, 11]]
    assert kept == pytest.approx(2 / 3)


def test_calls_beside_a_slow_canary_are_not_shown_even_when_only_a_later_one_shows_it() -> None:
    slow, slower, fast = (Block(0, 0, turn, timed([10 * turn] * 2, canary=canary)) for turn, canary in enumerate([(150, 150), (150, 180), (100, 105)]))
    assert recorded(slow).unloaded(slow)
    assert not recorded(slow, slower).unloaded(slower)
    rounds, calls, kept = recorded(slow, slower, fast).kept(0)
    assert rounds == [0] and [list(c) for c in calls] == [[20, 20]]
    assert kept == pytest.approx(1 / 3)


def test_a_canary_is_the_machines_whichever_process_it_ran_in() -> None:
    blocks = Block(0, 0, 0, timed([10], canary=(100, 100))), Block(1, 0, 0, timed([10], canary=(150, 150))), Block(0, 1, 0, timed([10], canary=(105, 109)))
    recording = recorded(*blocks)
    assert [recording.unloaded(block) for block in blocks] == [True, False, True]


def test_a_machine_that_changes_during_a_block_spoils_it_and_one_that_stays_slow_does_not() -> None:
    assert Block(0, 0, 0, timed([10], canary=(200, 210))).steady
    assert not Block(0, 0, 0, timed([10], canary=(100, 140))).steady
    assert not Block(0, 0, 0, timed([10], canary=(140, 100))).steady
    assert not Block(0, 0, 0, timed([10], [True])).steady


def test_calls_of_one_turn_belong_together() -> None:
    recording = recorded(*(Block(0, number, turn, timed([number, turn])) for number in range(2) for turn in range(2) for _ in range(2)))
    rounds, calls, _ = recording.kept(0)
    assert rounds == [0, 0, 1, 1]
    assert [list(c) for c in calls] == [[0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1]]


def test_where_hardly_anything_counts_everything_is_shown() -> None:
    _, calls, kept = recorded(Block(0, 0, 0, timed([10] + [50] * 49, [False] + [True] * 49))).kept(0)
    assert len(calls[0]) == 50 and kept == pytest.approx(0.02) and kept < LEAST_KEPT


@pytest.mark.parametrize(("limit_ms", "kept", "verdict"), [(20, 0.02, Verdict.MET), (5, 0.02, Verdict.UNKNOWN), (5, 0.9, Verdict.MISSED)])
def test_a_loaded_machine_can_show_that_a_limit_is_met_but_not_that_it_is_missed(limit_ms: float, kept: float, verdict: Verdict) -> None:
    samples = np.full(200, 10 * MS)
    profile = Profile("host", 1, "1", samples, (20,) * 10, tuple(n // 2 for n in range(10)), kept, 1.0, None, {})
    (finding,) = judge(Budget(latency_ms=limit_ms), profile, None)
    assert finding.verdict is verdict
    assert ("too loaded to decide: 98% of the calls" in finding.message) == (verdict is Verdict.UNKNOWN)


def world(rng: np.random.Generator, slowdown: float, rounds: int = 6, turns: int = 6, neighbour: float = 1.0) -> Comparison:
    """Two artifacts whose processes differ by 0.7 %, whose blocks do by 3 %, on a machine that drifts by more than either."""
    recording = Recording()
    for number in range(rounds):
        process = rng.normal(0, 0.007, 2)
        for turn in range(turns):
            drift = rng.normal(0, 0.1)
            canary = round(1e5 * neighbour ** (turn % 2))
            for entrant in (0, 1, 1, 0):
                scale = neighbour ** (turn % 2) * np.exp(drift + process[entrant] + rng.normal(0, 0.03)) * (slowdown if entrant else 1)
                calls = 2e6 * scale * np.exp(np.abs(rng.normal(0, 0.02, 9)))
                recording.add(Block(entrant, number, turn, Timed(calls.astype(np.int64), np.zeros(9, bool), (canary, canary))))
    return Comparison((), recording)


@pytest.mark.parametrize(("slowdown", "least_found", "most_found"), [(1.0, 0.0, 0.05), (1.05, 0.95, 1.0), (1.02, 0.6, 1.0)])
def test_intervals_cover_and_differences_are_found_as_often_as_they_should_be(slowdown: float, least_found: float, most_found: float) -> None:
    rng = np.random.default_rng(0)
    found = [world(rng, slowdown) for _ in range(400)]
    ratios = [comparison.ratio() for comparison in found]
    different = np.mean([comparison.difference() is Difference.SLOWER or comparison.difference() is Difference.FASTER for comparison in found])
    assert np.mean([ratio.low <= slowdown <= ratio.high for ratio in ratios]) >= 0.92
    assert least_found <= different <= most_found


def test_blocks_that_do_not_count_leave_no_trace_in_a_ratio() -> None:
    rng = np.random.default_rng(1)
    comparison = world(rng, 1.0)
    before = comparison.ratio()
    for number in range(6):
        comparison.recording.add(Block(1, number, 0, timed([9 * MS] * 9, canary=(100, 300))))
    assert comparison.ratio() == before


def test_a_round_that_was_cut_short_does_not_count() -> None:
    comparison = world(np.random.default_rng(1), 1.0)
    before = comparison.ratio()
    for turn in range(2):
        for entrant in (0, 1, 1, 0):
            comparison.recording.add(Block(entrant, 6, turn, timed([(2 + entrant) * MS] * 9)))
    assert comparison.ratio() == before


def test_a_slow_machine_does_not_change_a_ratio() -> None:
    """Half of the turns beside a neighbour who makes everything, the canary too, take half as long again."""
    quiet, loaded = (world(np.random.default_rng(2), 1.05, neighbour=neighbour) for neighbour in (1.0, 1.5))
    assert loaded.ratio().value == pytest.approx(quiet.ratio().value, abs=1e-6)


def test_one_pair_of_processes_bounds_nothing() -> None:
    ratio = world(np.random.default_rng(0), 1.05, rounds=1).ratio()
    assert ratio.low == 0 and ratio.high == np.inf
    assert difference(ratio) is Difference.UNKNOWN


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        (Interval(1.03, 1.01, 1.05), Difference.SLOWER),
        (Interval(0.9, 0.85, 0.95), Difference.FASTER),
        (Interval(1.004, 1.003, 1.005), Difference.SAME),
        (Interval(1.01, 0.99, 1.03), Difference.SAME),
        (Interval(1.1, 0.9, 1.3), Difference.UNKNOWN),
    ],
)
def test_a_ratio_in_a_word(ratio: Interval, says: Difference) -> None:
    assert difference(ratio) is says
