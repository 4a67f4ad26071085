"""Which forms of a model a target tried, and which it ships: as data for ``report.json``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgesmith.compiler.arbiter import Ruling, Tried


@dataclass(frozen=True)
class FormReport:
    """One form of the model that was tried on a target: ``ratio`` is its time over the float file's, with its 95 % interval. See ``arbiter.Tried``."""

    name: str
    chosen: bool
    schemes: Mapping[str, str]
    size_bytes: int | None
    p50: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    accuracy: float | None
    refused: str

    @property
    def mix(self) -> str:
        """How many operators run by which scheme."""
        return ", ".join(f"{count} {name}" for name, count in Counter(self.schemes.values()).most_common())


@dataclass(frozen=True)
class RulingReport:
    """Why a target ships the form that it does; ``accuracy`` of the forms is that on validation data. ``warning``: that it is slower than the float one."""

    chosen: str
    reason: str
    warning: str
    forms: tuple[FormReport, ...]

    @classmethod
    def of(cls, ruling: Ruling) -> RulingReport:
        """The report of ``ruling``."""
        return cls(ruling.chosen, ruling.reason, ruling.warning, tuple(_form(tried, ruling.chosen) for tried in ruling.tried))


def _form(tried: Tried, chosen: str) -> FormReport:
    ratio = tried.ratio
    return FormReport(
        name=tried.name,
        chosen=tried.name == chosen,
        schemes={path: scheme.value for path, scheme in tried.schemes.items()},
        size_bytes=tried.size_bytes,
        p50=tried.p50_ms,
        ratio=None if ratio is None else ratio.value,
        ratio_low=None if ratio is None else _finite(ratio.low),
        ratio_high=None if ratio is None else _finite(ratio.high),
        accuracy=tried.accuracy,
        refused=tried.refused,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
