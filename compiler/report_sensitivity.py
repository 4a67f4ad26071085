"""What each INT8 operator costs alone, against what it takes: as data for ``report.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgesmith.compiler.sensitivity import Sensitivity


@dataclass(frozen=True)
class SensitivityReport:
    """One operator quantized alone. ``sqnr_db`` is the signal to quantization noise of the outputs in decibels, ``drop`` the loss of the metric on ``samples``
    validation samples; ``time_share`` its module's share of the time, the mean over targets, None where that is not known.
    """

    where: str
    kind: str
    scheme: str
    sqnr_db: float
    drop: float
    samples: int
    time_share: float | None

    @classmethod
    def of(cls, found: Sequence[Sensitivity], shares: dict[str, float]) -> tuple[SensitivityReport, ...]:
        """The reports of ``found``; ``shares``: source module -> share of the time."""
        return tuple(cls(s.where, s.kind, s.scheme.value, s.sqnr_db, s.drop, s.samples, shares.get(s.where)) for s in found)
