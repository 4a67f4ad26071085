"""Where the time of a target goes: as data for ``report.json``, as rows for a terminal."""

from __future__ import annotations

from dataclasses import dataclass

from edgesmith.compiler.profile.operator_types import CategoryTime, OperatorProfile, OperatorTime

Rows = list[tuple[str, ...]]
MOST_ROWS = 40


@dataclass(frozen=True)
class OperatorsReport:
    """Where the time of a run goes. ``method`` is ``instrumented`` where the runtime itself timed its operators, else what was done instead.

    ``whole_ms`` is a run without instrumentation, ``total_ms`` all operators together; shares are of the latter. ``sourced_share`` carries the path of a
    source module. ``categories`` are the fast path and what is not on it, with what to do; ``operators`` are in order of execution.
    """

    method: str
    whole_ms: float
    total_ms: float
    sourced_share: float
    fast_share: float
    runs: int
    categories: tuple[CategoryTime, ...]
    operators: tuple[OperatorTime, ...]

    @classmethod
    def of(cls, profile: OperatorProfile) -> OperatorsReport:
        """The report of ``profile``."""
        return cls(
            method=profile.method,
            whole_ms=profile.whole_ms,
            total_ms=profile.total_ms,
            sourced_share=profile.sourced_share,
            fast_share=profile.fast_share,
            runs=profile.runs,
            categories=profile.categories(),
            operators=profile.operators,
        )

    def dearest(self, count: int) -> tuple[OperatorTime, ...]:
        """The ``count`` operators that take most."""
        return tuple(sorted(self.operators, key=lambda operator: -operator.ms)[:count])


def operator_rows(report: OperatorsReport) -> Rows:
    """Source module, operator, time, share, category; the dearest first."""
    shown = report.dearest(MOST_ROWS)
    found: Rows = [(source(o), o.kind, f"{o.ms:.4f} ms", f"{o.share:.1%}", o.category.value) for o in shown]
    left = len(report.operators) - len(shown)
    if left:
        share = 1 - sum(operator.share for operator in shown)
        found.append((f"({left} more)", "", f"{share * report.total_ms:.4f} ms", f"{share:.1%}", ""))
    return found


def category_rows(report: OperatorsReport) -> Rows:
    """Category, operators, time, share, what to do."""
    return [(c.category.value, str(c.operators), f"{c.ms:.4f} ms", f"{c.share:.1%}", c.advice) for c in report.categories]


def headline(report: OperatorsReport) -> str:
    """How the times were come by, and what they add up to, in one line."""
    return (
        f"{len(report.operators)} operators, {report.method}, {report.runs} runs: {report.total_ms:.3f} ms together, {report.whole_ms:.3f} ms a whole run; "
        f"{report.sourced_share:.0%} of the time carries a source path, {report.fast_share:.0%} is on the fast path"
    )


def source(operator: OperatorTime) -> str:
    """The modules that an operator computes, or the runtime's own name for it where they are not known."""
    return ", ".join(operator.sources) or f"({operator.name})"
