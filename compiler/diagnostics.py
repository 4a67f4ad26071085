"""What we have to say about a model, as data."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Severity(enum.Enum):
    """How much a diagnostic matters: an ERROR refuses, a WARNING asks for a look, INFO explains."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Diagnostic:
    """One remark: where (a source path such as ``blocks.3.attn.qkv``), what, and what to do.

    ``code`` is a stable dotted name (``axes.no-rule``, ``litert.unsupported-op``) for filters and tests.
    """

    severity: Severity
    code: str
    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f" {self.where}:" if self.where else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.severity.value} [{self.code}]{place} {self.message}{hint}"


def errors(diagnostics: tuple[Diagnostic, ...]) -> tuple[Diagnostic, ...]:
    """Those of ``diagnostics`` that refuse."""
    return tuple(d for d in diagnostics if d.severity is Severity.ERROR)
