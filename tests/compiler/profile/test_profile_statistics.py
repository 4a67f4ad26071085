"""Intervals of percentiles: do they cover, also when neighbours resemble each other?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from edgesmith.compiler.profile.statistics import MOST_BINS, between_rounds, block_percentile, mean_interval

BLOCKS, CALLS = 20, 25


def drawn(rng: np.random.Generator, between: float) -> np.ndarray:
    """Timings of BLOCKS blocks around 1e6 ns: log-normal inside a block, and a common factor of each block."""
    mood = rng.normal(0, between, (BLOCKS, 1))
    return (1e6 * np.exp(mood + rng.normal(0, 0.05, (BLOCKS, CALLS)))).ravel().astype(np.int64)


@pytest.mark.parametrize(("percentile", "between"), [(50, 0.03), (90, 0.03), (90, 0.0)])
def test_nominal_95_percent_intervals_cover(percentile: int, between: float) -> None:
    rng = np.random.default_rng(percentile)
    truth = 1e6 * math.exp(math.hypot(between, 0.05) * {50: 0.0, 90: 1.2816}[percentile])
    found = [block_percentile(drawn(rng, between), [CALLS] * BLOCKS, percentile) for _ in range(100)]
    covered = sum(interval.low <= truth <= interval.high for interval in found)
    assert covered >= 95 - 3 * math.sqrt(100 * 0.95 * 0.05)


def test_blocks_taken_for_independent_calls_would_not_cover() -> None:
    rng = np.random.default_rng(0)
    found = [block_percentile(drawn(rng, 0.1), [1] * (BLOCKS * CALLS), 50) for _ in range(20)]
    assert sum(interval.low <= 1e6 <= interval.high for interval in found) < 14


def test_an_interval_is_in_the_samples_and_around_the_value() -> None:
    samples = drawn(np.random.default_rng(3), 0.1)
    for percentile in (1, 50, 90, 95):
        found = block_percentile(samples, [CALLS] * BLOCKS, percentile)
        assert samples.min() * 0.99 <= found.low <= found.value <= found.high <= samples.max() * 1.01
        assert found.value == np.percentile(samples, percentile)


@pytest.mark.parametrize("percentile", [50, 80])
def test_blocks_of_equal_calls_are_worth_one_call_each(percentile: int) -> None:
    moods = np.sort(np.random.default_rng(1).integers(1_000_000, 2_000_000, BLOCKS))
    found = block_percentile(np.repeat(moods, CALLS), [CALLS] * BLOCKS, percentile)
    alone = stats.quantile_test(moods, p=percentile / 100).confidence_interval(0.95)
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.25)


def test_the_upper_end_is_infinite_exactly_where_order_statistics_cannot_bound_it() -> None:
    # n samples bound the 90th percentile from above at 97.5 % only when 1 - 0.9**n >= 0.975: n >= 36.
    samples = np.arange(1, 37) * 1000
    assert math.isinf(block_percentile(samples[:35], [5] * 7, 90).high)
    assert math.isfinite(block_percentile(samples, [6] * 6, 90).high)


def test_many_samples_are_binned_without_moving_the_interval() -> None:
    rng = np.random.default_rng(5)
    samples = rng.normal(1e6, 1e5, 40 * MOST_BINS).astype(np.int64)
    found = block_percentile(samples, [2 * MOST_BINS] * 20, 90)
    # Standard error of a normal's 90th percentile: sqrt(p (1 - p) / n) / density.
    error = 1e5 * math.sqrt(0.09 / len(samples)) / 0.17550
    assert abs(found.value - (1e6 + 1.2816e5)) < 4 * error
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.5)


def test_processes_of_unlike_many_calls_are_covered() -> None:
    """The median of all calls is that of the processes by their number of calls; taken for their plain mean it is covered in 87 of 100."""
    rng = np.random.default_rng(0)
    covered, trials, processes = 0, 200, 12
    for _ in range(trials):
        counts = np.ceil(rng.lognormal(2.0, 1.0, processes)).astype(int)
        moods = rng.normal(0.0, 0.03, processes)
        samples = np.repeat(1e6 * np.exp(moods), counts).astype(np.int64)
        factor = math.log(between_rounds(samples, counts.tolist(), range(processes), 50))
        covered += abs(float(counts @ moods) / counts.sum()) <= factor
    assert covered >= trials * 0.95 - 3 * math.sqrt(trials * 0.95 * 0.05)


def test_equal_weights_are_none_and_a_single_value_bounds_nothing() -> None:
    assert mean_interval([1.0, 2.0, 4.0], [7.0] * 3).high == pytest.approx(mean_interval([1.0, 2.0, 4.0]).high)
    assert mean_interval([1.0, 2.0, 4.0]).high == pytest.approx(stats.ttest_1samp([1.0, 2.0, 4.0], 0).confidence_interval().high)
    assert math.isinf(mean_interval([1.0]).high) and math.isinf(mean_interval([1.0, 2.0], [1.0, 1e300]).high)
