"""Where the time of a run goes: its operators, one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum


class Category(Enum):
    """What a runtime spends an operator's time on."""

    FAST = "fast"
    QUANTIZE = "quantize-dequantize"
    LAYOUT = "layout copy"
    FLOAT_ISLAND = "float island"
    UNDELEGATED = "undelegated"


@dataclass(frozen=True)
class Placement:
    """Where an operator runs, and what to do about it (nothing where it is fast)."""

    category: Category
    advice: str = ""


FAST = Placement(Category.FAST)


@dataclass(frozen=True)
class Executed:
    """One operator that a runtime executed.

    ``name`` and ``kind`` are the runtime's own. ``sources`` are the paths of the source modules that it computes, several where the runtime fused
    them, none where the file does not say; what the model's own forward computes has the captured operator's name. ``delegate`` is the delegate or
    provider that ran it, ``dtype`` numpy's name of its first result's dtype; both are empty where the runtime does not say.
    """

    name: str
    kind: str
    sources: tuple[str, ...] = ()
    delegate: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class OperatorTime:
    """One operator of a file. ``ms`` is the median over runs, ``share`` its part of all operators' medians together."""

    name: str
    kind: str
    sources: tuple[str, ...]
    delegate: str
    ms: float
    share: float
    category: Category
    advice: str = ""


@dataclass(frozen=True)
class CategoryTime:
    """All operators of one category and one advice together."""

    category: Category
    advice: str
    ms: float
    share: float
    operators: int


@dataclass(frozen=True)
class OperatorProfile:
    """The operators of one artifact, in order of execution.

    ``method`` is ``instrumented`` where the runtime itself times its operators, else what was done instead. ``whole_ms`` is the median time of a whole
    run without instrumentation, ``instrumented_ms`` with it, both measured in turn with the operators. ``runs`` were counted, after warm-up.
    """

    method: str
    whole_ms: float
    instrumented_ms: float
    runs: int
    threads: int
    runtime_version: str
    operators: tuple[OperatorTime, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def total_ms(self) -> float:
        """All operators together."""
        return sum(operator.ms for operator in self.operators)

    @property
    def sourced_share(self) -> float:
        """The part of the operators' time that carries a source path."""
        return sum(operator.share for operator in self.operators if operator.sources)

    @property
    def fast_share(self) -> float:
        """The part of the operators' time that is on the fast path."""
        return sum(operator.share for operator in self.operators if operator.category is Category.FAST)

    def categories(self) -> tuple[CategoryTime, ...]:
        """Time by category and advice, the fast path first, then the most expensive."""
        groups: dict[tuple[Category, str], list[OperatorTime]] = {}
        for operator in self.operators:
            groups.setdefault((operator.category, operator.advice), []).append(operator)
        found = [
            CategoryTime(category, advice, sum(o.ms for o in members), sum(o.share for o in members), len(members))
            for (category, advice), members in groups.items()
        ]
        return tuple(sorted(found, key=lambda c: (c.category is not Category.FAST, -c.ms)))


def placed(operators: Sequence[Executed], table: Mapping[str, Placement], default: Placement = FAST) -> tuple[Placement, ...]:
    """One placement for each of ``operators``, from a table by kind."""
    return tuple(table.get(operator.kind, default) for operator in operators)
