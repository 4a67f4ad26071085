"""Range search with bounded memory: a streaming histogram, and what to cut off before quantizing to 8 bits.

Every search gives (low, high) with low <= 0 <= high, never wider than the data together with zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

BINS = 8192
"""Most bins of a histogram; at least half as many are in use, unless the values are denser than 2^-100."""
LEVELS = 255
_SMALLEST_EXPONENT = -100
_CANDIDATES = 97
_SMALLEST_SHARE = 2.0**-11

Floats = npt.NDArray[np.float64]


class Histogram:
    """Counts of values seen, in at most ``BINS`` bins of equal width; the width doubles when the extent outgrows them.

    Widths are powers of two and bins start at multiples of the width, so halving the resolution merges whole pairs: the counts depend
    only on the values, not on the order or the batches they came in. Exact zeros are counted apart: every grid holds zero without error.
    """

    def __init__(self) -> None:
        self.low = np.inf
        self.high = -np.inf
        self.zeros = 0
        self.counts: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._first = 0
        self._exponent = _SMALLEST_EXPONENT

    @property
    def width(self) -> float:
        """Width of a bin."""
        return float(2.0**self._exponent)

    @property
    def edges(self) -> Floats:
        """The ``len(counts) + 1`` borders of the bins, ascending; zero is one of them."""
        return np.arange(self._first, self._first + len(self.counts) + 1, dtype=np.float64) * self.width

    @property
    def total(self) -> int:
        """Number of values seen."""
        return self.zeros + int(self.counts.sum())

    def update(self, values: npt.NDArray[np.floating]) -> None:
        """Count ``values`` (any shape).

        Raises:
            ValueError: one of them is not finite.
        """
        flat = np.asarray(values, dtype=np.float32).reshape(-1)
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("a value is not finite")
        self._fit(low, high)
        index = np.floor(flat * np.float32(2.0**-self._exponent)).astype(np.int32) - self._first
        zero = -self._first
        counts = np.bincount(index, minlength=len(self.counts))
        zeros = int(flat.size - np.count_nonzero(flat))
        if zeros:
            counts[zero] -= zeros
        self.zeros += zeros
        self.counts += counts

    def merge(self, other: Histogram) -> None:
        """Count everything that ``other`` counted."""
        if other.total == 0:
            return
        self._fit(other.low, other.high)
        clone = Histogram()
        clone.low, clone.high, clone.counts, clone._first, clone._exponent = other.low, other.high, other.counts, other._first, other._exponent
        clone._fit(self.low, self.high)
        self.counts += clone.counts
        self.zeros += other.zeros

    def _fit(self, low: float, high: float) -> None:
        """Make room for [low, high]: double the width until the extent, zero included, takes at most ``BINS`` bins."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        bottom, top = min(self.low, 0.0), max(self.high, 0.0)
        exponent = self._exponent
        while np.floor(top / 2.0**exponent) - np.floor(bottom / 2.0**exponent) >= BINS:
            exponent += 1
        first, last = int(np.floor(bottom / 2.0**exponent)), int(np.floor(top / 2.0**exponent))
        where = ((self._first + np.arange(len(self.counts))) >> (exponent - self._exponent)) - first
        counts = np.zeros(last - first + 1, np.int64)
        np.add.at(counts, where, self.counts)
        self.counts, self._first, self._exponent = counts, first, exponent


def minmax(histogram: Histogram) -> tuple[float, float]:
    """The least and the greatest value seen."""
    return float(min(histogram.low, 0.0)), float(max(histogram.high, 0.0))


def percentile(histogram: Histogram, percent: float = 99.99) -> tuple[float, float]:
    """The interval that holds ``percent`` % of the values and leaves an equal share out on either side, to the width of a bin."""
    low, high = minmax(histogram)
    tail = histogram.total * (1 - percent / 100) / 2
    edges = histogram.edges
    counts = histogram.counts.copy()
    counts[np.searchsorted(edges, 0.0)] += histogram.zeros
    below = np.cumsum(counts)
    above = np.cumsum(counts[::-1])
    left = edges[np.argmax(below > tail)]
    right = edges[::-1][np.argmax(above > tail)]
    return float(np.clip(left, low, 0.0)), float(np.clip(right, 0.0, high))


def mse(histogram: Histogram) -> tuple[float, float]:
    """The interval with the least expected square error of 8-bit quantization.

    Inside, the error is that of uniform noise, step^2 / 12 (Bennett 1948); outside, the square of the distance to the nearer end.
    Both ends are searched together: on a geometric grid, then on a linear one around the best.
    """
    low, high = minmax(histogram)
    coarse = _best_pair(histogram, low, high, np.append(0.0, np.geomspace(_SMALLEST_SHARE, 1.0, _CANDIDATES)))
    return _best_pair(histogram, max(1.1 * coarse[0], low), min(1.1 * coarse[1], high), np.linspace(0.8, 1.0, _CANDIDATES))


def _best_pair(histogram: Histogram, low: float, high: float, shares: Floats) -> tuple[float, float]:
    lows, highs = np.unique(low * shares), np.unique(high * shares)
    errors = expected_square_error(histogram, lows, highs)
    i, j = np.unravel_index(np.argmin(errors), errors.shape)
    return float(lows[i]), float(highs[j])


def expected_square_error(histogram: Histogram, lows: Floats, highs: Floats) -> Floats:
    """Sum of square errors, (len(lows), len(highs)), when the values are quantized to 255 steps over [low, high]."""
    below, above = _outside(histogram, -lows, negative=True), _outside(histogram, highs, negative=False)
    inside = histogram.counts.sum() - below[0][:, None] - above[0][None, :]
    step = (highs[None, :] - lows[:, None]) / LEVELS
    result: Floats = inside * step**2 / 12 + below[1][:, None] + above[1][None, :]
    return result


def _outside(histogram: Histogram, ends: Floats, *, negative: bool) -> tuple[Floats, Floats]:
    """For each end: how many values lie beyond it (on the side given), and the sum of their square distances to it."""
    centers = histogram.edges[:-1] + histogram.width / 2
    side = centers < 0 if negative else centers > 0
    distance = np.abs(centers[side])
    order = np.argsort(distance)[::-1]
    distance, counts = distance[order], histogram.counts[side][order].astype(np.float64)
    sums = [np.append(0.0, np.cumsum(counts * distance**power)) for power in (0, 1, 2)]
    at = np.searchsorted(-distance, -ends, side="left")
    count, first, second = (s[at] for s in sums)
    return count, np.maximum(second - 2 * ends * first + ends**2 * count, 0.0)


def entropy(histogram: Histogram) -> tuple[float, float]:
    """The interval whose 8-bit distribution tells least apart from the clipped original: the least Kullback-Leibler divergence.

    Source: Migacz, 8-bit Inference with TensorRT (GTC 2017), with both ends shrunk by one factor.
    """
    low, high = minmax(histogram)
    smallest = min(1.0, LEVELS / max(len(histogram.counts), 1))
    best = min((_divergence(histogram, low * share, high * share), -share) for share in np.geomspace(smallest, 1.0, _CANDIDATES))
    return float(-low * best[1]), float(-high * best[1])


def _divergence(histogram: Histogram, low: float, high: float) -> float:
    """KL divergence, in nats, of the values clipped to [low, high] from their spread over 255 levels."""
    centers = histogram.edges[:-1] + histogram.width / 2
    inside = (centers >= low) & (centers <= high)
    if not inside.any() or high <= low:
        return float("inf")
    kept = histogram.counts[inside].astype(np.float64)
    clipped = kept.copy()
    clipped[0] += histogram.counts[centers < low].sum()
    clipped[-1] += histogram.counts[centers > high].sum()
    level = np.minimum(((centers[inside] - low) * (LEVELS / (high - low))).astype(np.int64), LEVELS - 1)
    filled = np.bincount(level, weights=kept > 0, minlength=LEVELS)
    spread = np.bincount(level, weights=kept, minlength=LEVELS) / np.maximum(filled, 1)
    coarse = np.where(kept > 0, spread[level], 0.0)
    seen = clipped > 0
    if coarse.sum() == 0 or clipped.sum() == 0:
        return float("inf")
    p, q = clipped[seen] / clipped.sum(), np.maximum(coarse[seen] / coarse.sum(), 1e-12)
    return float(np.sum(p * np.log(p / q)))


SEARCHES: dict[str, Callable[[Histogram], tuple[float, float]]] = {"entropy": entropy, "minmax": minmax, "mse": mse, "percentile": percentile}
"""Every range search by name."""
