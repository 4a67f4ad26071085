"""Intervals of percentiles of timings, where neighbouring calls resemble each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgesmith.compiler.budget import Interval

TAIL = 0.025
RESAMPLES = 1000
MOST_BINS = 2000


def block_percentile(samples: npt.NDArray[np.int64], block_sizes: Sequence[int], percentile: float) -> Interval:
    """A percentile of ``samples`` with its 95 % interval, in the unit of ``samples``.

    Calls inside a block share the machine's mood, so whole blocks are resampled (Kuensch 1989, "The jackknife and the bootstrap for
    general stationary observations"). For few blocks and high percentiles that is still too narrow; the interval is therefore never narrower
    than the one from order statistics of as many independent calls as the blocks are worth. Where even the calls
    themselves are too few to bound the percentile, the end is infinite (below: zero).
    """
    value = float(np.percentile(samples, percentile))
    tail = 100 * _expanded_tail(len(block_sizes))
    ranks = 100 * _rank_bounds(samples <= value, block_sizes, percentile / 100)
    ends = np.percentile(_resampled_percentiles(samples, block_sizes, percentile), [tail, 100 - tail])
    low, high = np.stack([ends, np.percentile(samples, ranks)]).T
    least, most = (percentile / 100) ** len(samples), (1 - percentile / 100) ** len(samples)
    return Interval(value, 0.0 if most > TAIL else float(min(low)), math.inf if least > TAIL else float(max(high)))


def mean_interval(values: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
    """The mean of independent ``values`` with its 95 % interval by Student's t; infinite for fewer than two.

    With ``weights``, the weighted mean; its variance is the sum of the squares of what each value, by its weight, is off, corrected for as many values as
    the weights are worth (Kish 1992, "Weighting for Unequal P_i"), which gives the degrees of freedom as well.
    """
    from scipy import special

    if len(values) == 0:
        return Interval(math.nan, -math.inf, math.inf)
    share = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    share = share / share.sum()
    value, worth = float(share @ np.asarray(values)), float(1 / (share @ share))
    if worth <= 1:
        return Interval(value, -math.inf, math.inf)
    half = float(-special.stdtrit(worth - 1, TAIL) * math.sqrt(((share * (np.asarray(values) - value)) ** 2).sum() * worth / (worth - 1)))
    return Interval(value, value - half, value + half)


def between_rounds(samples: npt.NDArray[np.int64], block_sizes: Sequence[int], rounds: Sequence[int], percentile: float) -> float:
    """By what factor a percentile is uncertain because processes differ: the half width of the 95 % interval of the mean of the logarithms of each
    round's own percentile, by its number of calls, as a factor of at least 1. ``rounds`` is the round of each block. Infinite for a single round.
    """
    parts = np.split(samples, np.cumsum(block_sizes)[:-1])
    own = [np.concatenate([part for part, number in zip(parts, rounds, strict=True) if number == wanted]) for wanted in sorted(set(rounds))]
    found = mean_interval([math.log(max(1.0, float(np.percentile(calls, percentile)))) for calls in own], [len(calls) for calls in own])
    return math.exp(min(700.0, found.high - found.value))


def _rank_bounds(below: npt.NDArray[np.bool_], block_sizes: Sequence[int], share: float) -> npt.NDArray[np.float64]:
    """The shares of calls between which the ``share``-quantile lies, after Korn and Graubard 1998 ("Confidence intervals for proportions with
    small expected number of positive counts estimated from survey data"): an exact binomial interval at the number of independent calls that
    would vary as much as the blocks do.
    """
    from scipy import special

    count, blocks = len(below), len(block_sizes)
    worth = float(count)
    if blocks > 1:
        off = np.add.reduceat(below - below.mean(), np.cumsum([0, *block_sizes[:-1]]))
        variance = float((off**2).sum()) * blocks / (blocks - 1) / count**2
        worth = min(worth, share * (1 - share) / variance) if variance else worth
        worth *= (special.ndtri(TAIL) / special.stdtrit(blocks - 1, TAIL)) ** 2
    hits, misses = share * worth, (1 - share) * worth
    return np.asarray([special.betaincinv(hits, misses + 1, TAIL), special.betaincinv(hits + 1, misses, 1 - TAIL)])


def _expanded_tail(count: int) -> float:
    """The tail of the bootstrap distribution that leaves 95 % inside with ``count`` resampled units.

    Percentiles of the bootstrap are too narrow for few units, as a normal instead of a t interval with variance over n instead of n - 1
    is (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", 3.3).
    """
    from scipy import special

    if count < 2:
        return 0.0
    return float(special.ndtr(math.sqrt(count / (count - 1)) * special.stdtrit(count - 1, TAIL)))


def _resampled_percentiles(samples: npt.NDArray[np.int64], block_sizes: Sequence[int], percentile: float) -> npt.NDArray[np.float64]:
    """The percentile in each of RESAMPLES draws of blocks with replacement.

    Drawing blocks is weighting them: with the samples sorted into bins of equal count (one sample each up to MOST_BINS), the
    counts of every draw are one matrix product, and the percentile is where their running sum passes it.
    """
    edges, values, block = _binned(samples, block_sizes)
    table = np.zeros((len(block_sizes), len(values)))
    np.add.at(table, (block, edges), 1.0)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(block_sizes), np.full(len(block_sizes), 1 / len(block_sizes)), size=RESAMPLES)
    running = np.cumsum(draws @ table, axis=1)
    wanted = running[:, -1] * percentile / 100
    position = (running < wanted[:, None]).sum(axis=1)
    found: npt.NDArray[np.float64] = values[np.minimum(position, len(values) - 1)]
    return found


def _binned(samples: npt.NDArray[np.int64], block_sizes: Sequence[int]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    """For each sorted sample its bin and its block, and for each bin its mean."""
    order = np.argsort(samples, kind="stable")
    block = np.repeat(np.arange(len(block_sizes)), block_sizes)[order]
    bins = min(len(samples), MOST_BINS)
    which = np.arange(len(samples)) * bins // len(samples)
    values = np.bincount(which, weights=samples[order].astype(np.float64)) / np.bincount(which)
    return which, values, block
