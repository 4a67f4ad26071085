"""A model that was considered, kept or not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One alternative that a pass weighed, for the report's plot.

    ``accuracy`` is on validation data and ``latency_ms``/``size_bytes`` are what the context's ``cost`` said; None where they were not
    looked at. ``reason`` says why it was kept or dropped.
    """

    name: str
    params: int
    macs: int
    accuracy: float | None
    latency_ms: float | None
    size_bytes: int | None
    kept: bool
    reason: str
