from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgesmith.kernels.affine import activation_grid, ends, fake_quantize
from edgesmith.kernels.ranges import BINS, SEARCHES, Histogram, entropy, expected_square_error, minmax, mse, percentile

VALUES = arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-20 else 0.0))


def histogram_of(*batches: np.ndarray) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def samples(kind: str, size: int = 50_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    made = {
        "normal": lambda: rng.normal(size=size),
        "relu": lambda: np.maximum(rng.normal(size=size), 0),
        "relu6": lambda: np.clip(4 * rng.normal(size=size), 0, 6),
        "heavy": lambda: rng.standard_t(2, size=size),
        "negative": lambda: -rng.exponential(size=size),
        "constant": lambda: np.full(size, 3.25),
        "zero": lambda: np.zeros(size),
    }
    return made[kind]().astype(np.float32)


KINDS = ["normal", "relu", "relu6", "heavy", "negative", "constant", "zero"]


@settings(max_examples=50)
@given(values=VALUES, cuts=st.lists(st.integers(0, 60), max_size=4), data=st.data())
def test_counts_depend_on_the_values_alone(values: np.ndarray, cuts: list[int], data: st.DataObject) -> None:
    whole = histogram_of(values)
    shuffled = values[np.array(data.draw(st.permutations(range(len(values)))))]
    parts = np.split(shuffled, sorted(min(c, len(values)) for c in cuts))
    merged = Histogram()
    for part in parts:
        merged.merge(histogram_of(part))
    for other in (histogram_of(*parts), merged):
        assert (other.low, other.high, other.zeros, other.width) == (whole.low, whole.high, whole.zeros, whole.width)
        assert (other.counts == whole.counts).all()
        assert (other.edges == whole.edges).all()


@given(values=VALUES)
def test_counts_are_those_of_numpy_and_memory_is_bounded(values: np.ndarray) -> None:
    histogram = histogram_of(values)
    assert histogram.total == len(values)
    assert len(histogram.counts) <= BINS
    nonzero = values[values != 0].astype(np.float64)
    expected = np.bincount(np.searchsorted(histogram.edges, nonzero, side="right") - 1, minlength=len(histogram.counts))
    assert (histogram.counts == expected).all()


def test_resolution_follows_the_extent() -> None:
    histogram = histogram_of(samples("normal"))
    fine = histogram.width
    histogram.update(np.array([1000.0], np.float32))
    assert BINS / 2 - 1 <= len(histogram.counts) <= BINS
    assert histogram.width > fine


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Histogram().update(np.array([0.0, bad], np.float32))


@pytest.mark.parametrize(("search", "kind"), itertools.product(SEARCHES, KINDS))
def test_a_range_holds_zero_and_is_no_wider_than_the_data(search: str, kind: str) -> None:
    values = samples(kind, 5000)
    low, high = SEARCHES[search](histogram_of(values))
    assert min(float(values.min()), 0.0) <= low <= 0.0 <= high <= max(float(values.max()), 0.0)
    assert high > low or kind == "zero"


def test_percentile_is_that_of_the_values() -> None:
    values = samples("normal")
    histogram = histogram_of(values)
    low, high = percentile(histogram, 99.0)
    assert low == pytest.approx(np.percentile(values, 0.5), abs=2 * histogram.width)
    assert high == pytest.approx(np.percentile(values, 99.5), abs=2 * histogram.width)
    relu = samples("relu")
    assert percentile(histogram_of(relu), 99.0)[1] == pytest.approx(np.percentile(relu, 99.5), abs=2 * histogram.width)


def real_square_error(values: np.ndarray, low: float, high: float) -> float:
    return float(np.square(fake_quantize(values, activation_grid(low, high)).astype(np.float64) - values).sum())


@pytest.mark.parametrize("kind", ["normal", "relu", "relu6", "heavy", "negative"])
def test_mse_is_no_worse_than_min_max_and_near_the_best_of_all(kind: str) -> None:
    values = samples(kind)
    histogram = histogram_of(values)
    found = real_square_error(values, *mse(histogram))
    low, high = minmax(histogram)
    assert found <= 1.02 * real_square_error(values, low, high)
    best = min(real_square_error(values, low * a, high * b) for a in np.linspace(0.02, 1, 40) for b in np.linspace(0.02, 1, 40))
    assert found <= 1.05 * best


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy"])
def test_the_expected_error_is_the_real_one(kind: str) -> None:
    values = samples(kind)
    histogram = histogram_of(values)
    low, high = (0.6 * end for end in minmax(histogram))
    bottom, top = ends(activation_grid(low, high))
    expected = expected_square_error(histogram, np.array([bottom]), np.array([top]))[0, 0]
    # the noise model spreads errors evenly over a step: one part in sqrt(values), and one bin of resolution
    assert expected == pytest.approx(real_square_error(values, low, high), rel=0.05)


def test_an_outlier_spoils_min_max_and_not_a_percentile() -> None:
    histogram = histogram_of(samples("normal"), np.array([40.0], np.float32))
    assert minmax(histogram)[1] == 40.0
    assert percentile(histogram)[1] < 5.0


def test_mse_cuts_an_outlier_off_only_where_that_pays() -> None:
    """Keeping one value at R costs n R^2 / (12 255^2) square error, cutting it off R^2: the balance is at n = 780 300."""
    rare = histogram_of(samples("normal"))
    for _ in range(7):
        rare.merge(rare)
    assert rare.total == 128 * 50_000
    rare.update(np.array([40.0], np.float32))
    assert mse(rare)[1] < 8.0
    assert mse(histogram_of(samples("normal"), np.array([40.0], np.float32)))[1] > 30.0


def test_entropy_keeps_a_uniform_distribution_whole_and_cuts_a_long_tail() -> None:
    uniform = np.random.default_rng(0).uniform(0, 1, 50_000).astype(np.float32)
    assert entropy(histogram_of(uniform))[1] > 0.95
    heavy = samples("heavy")
    assert entropy(histogram_of(heavy))[1] < 0.8 * minmax(histogram_of(heavy))[1]
