"""Budgets, measurements and the verdict between them."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Verdict(enum.Enum):
    """MET only if the pessimistic end of the interval is inside the limit; MISSED only if the optimistic end is outside."""

    MET = "met"
    MISSED = "missed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Interval:
    """A measured value between two ends: its 95 % confidence interval, where nothing else is said."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Interval:
        """A value that has no uncertainty, such as a file's size."""
        return cls(value, value, value)


@dataclass(frozen=True)
class Finding:
    """One limit against one measurement. ``budget`` is the key of the limit: ``latency_ms``, ``max_drop`` ..."""

    budget: str
    verdict: Verdict
    limit: float
    measured: float | None
    low: float | None
    high: float | None
    message: str


@dataclass(frozen=True)
class Budget:
    """Limits of one target; None leaves a quantity free. 1 MB is 1 000 000 bytes."""

    latency_ms: float | None = None
    percentile: int = 90
    memory_mb: float | None = None
    size_mb: float | None = None


@dataclass(frozen=True)
class AccuracyGoal:
    """What the artifact must keep. ``max_drop`` and ``floor`` are in the metric's own unit (a fraction for ``top1``)."""

    metric: str = "top1"
    max_drop: float | None = None
    floor: float | None = None


def judge_below(budget: str, limit: float, measured: Interval | None, unit: str, why_unmeasured: str = "", *, between: str = "95 % interval") -> Finding:
    """The finding for "``measured`` must be at most ``limit``"; ``between`` says what its two ends are."""
    if measured is None:
        return Finding(budget, Verdict.UNKNOWN, limit, None, None, None, f"{budget} was not measured: {why_unmeasured}")
    if measured.high <= limit:
        verdict, words, by = Verdict.MET, "within", ""
    elif measured.low > limit:
        verdict, words, by = Verdict.MISSED, "over", f" by {measured.value - limit:.4g} {unit}"
    else:
        verdict, words, by = Verdict.UNKNOWN, "too close to call against", ""
    spread = "" if measured.low == measured.high else f" ({between} {measured.low:.4g} to {measured.high:.4g})"
    message = " ".join(f"{budget} {measured.value:.4g} {unit}{spread} is {words} the limit of {limit:g} {unit}{by}".split())
    return Finding(budget, verdict, limit, measured.value, measured.low, measured.high, message)


def judge_above(budget: str, limit: float, measured: Interval | None, unit: str, why_unmeasured: str = "") -> Finding:
    """The finding for "``measured`` must be at least ``limit``"."""
    if measured is None:
        return judge_below(budget, limit, None, unit, why_unmeasured)
    mirrored = judge_below(budget, -limit, Interval(-measured.value, -measured.high, -measured.low), unit)
    words = {Verdict.MET: "at or above", Verdict.MISSED: f"short by {limit - measured.value:.4g} {unit} of", Verdict.UNKNOWN: "too close to call against"}
    message = f"{budget}: {measured.value:.4g} {unit} (95 % interval {measured.low:.4g} to {measured.high:.4g}) is {words[mirrored.verdict]} {limit:g} {unit}"
    return Finding(budget, mirrored.verdict, limit, measured.value, measured.low, measured.high, message)


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """MISSED if any is, else UNKNOWN if any is, else MET."""
    seen = set(verdicts)
    for verdict in (Verdict.MISSED, Verdict.UNKNOWN):
        if verdict in seen:
            return verdict
    return Verdict.MET


EXIT_CODES = {Verdict.MET: 0, Verdict.MISSED: 1, Verdict.UNKNOWN: 3}
"""Exit code of a command that ends with a verdict."""
