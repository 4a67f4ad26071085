"""What a candidate costs and how well it does, and which of them wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgesmith.compiler.bench import Cost
from edgesmith.compiler.budget import Budget
from edgesmith.compiler.candidate import Candidate
from edgesmith.compiler.model import Model

_MB = 1_000_000


@dataclass(frozen=True)
class Entry:
    """A candidate under consideration. ``score`` is higher is better; None while it is not known."""

    name: str
    model: Model
    cost: Cost | None = None
    score: float | None = None

    def candidate(self, *, accurate: bool, kept: bool, reason: str) -> Candidate:
        """The entry as the report shows it; ``accurate`` tells whether the score is an accuracy."""
        latency_ms, size_bytes = (self.cost.latency_ms, self.cost.size_bytes) if self.cost else (None, None)
        return Candidate(self.name, self.model.params, self.model.macs, self.score if accurate else None, latency_ms, size_bytes, kept, reason)


def over_budget(cost: Cost, budget: Budget) -> str:
    """Which limits ``cost`` is over even at its optimistic end, with the figures; empty where it may be within all of them."""
    limits = (("latency of at least", cost.latency_low_ms, budget.latency_ms, "ms"), ("size", cost.size_bytes / _MB, budget.size_mb, "MB"))
    return " and ".join(f"{what} {value:.4g} {unit} is over {limit:g} {unit}" for what, value, limit, unit in limits if limit is not None and value > limit)


def by_cheapness(entry: Entry) -> tuple[int, int]:
    """Sort key: multiply-accumulates, then parameters. Counted, not measured, so that one seed gives one result."""
    return (entry.model.macs, entry.model.params)


def winner(entries: Sequence[Entry], slack: float) -> Entry:
    """The cheapest of the entries that score at least the best score less ``slack``; of equally cheap ones the better."""
    best = max(entry.score for entry in entries if entry.score is not None)
    near = [(by_cheapness(entry), -entry.score, entry) for entry in entries if entry.score is not None and entry.score >= best - slack]
    return min(near, key=lambda ranked: ranked[:2])[2]


def standard_error(fraction: float, samples: int) -> float:
    """Of a fraction of ``samples``, with two successes and two failures added so that none and all have one too (Agresti and Coull 1998).

    0 where it is no fraction.
    """
    if not 0 <= fraction <= 1:
        return 0.0
    shrunk = (fraction * samples + 2) / (samples + 4)
    return math.sqrt(shrunk * (1 - shrunk) / (samples + 4))
