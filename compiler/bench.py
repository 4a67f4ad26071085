"""What a pass may ask of a target: what a model would cost there, measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgesmith.compiler.budget import Interval
from edgesmith.compiler.profile.operator_types import OperatorProfile

if TYPE_CHECKING:
    from edgesmith.compiler.model import Model


KEPT = 3
"""Finished models, and files of models, that a bench holds at a time."""


@dataclass(frozen=True)
class Cost:
    """What a model would cost at the end of the line: ``latency_ms`` as measured, and the optimistic end of its interval."""

    size_bytes: int
    latency_ms: float
    latency_low_ms: float


@dataclass(frozen=True)
class Paired:
    """Two models, timed against each other: ``share`` is the second's time over the first's, ``base_ms`` the first's at the percentile of the budget."""

    share: Interval
    base_ms: Interval


class Bench(ABC):
    """Measures models on one target. Every method takes a Model in the state in which a pass has it: the rest of the line comes first."""

    @abstractmethod
    def cost(self, model: Model) -> Cost:
        """Size, and latency at the percentile of the budget."""

    @abstractmethod
    def paired(self, base: Model, new: Model) -> Paired:
        """Both in one run, interleaved."""

    @abstractmethod
    def operators(self, model: Model) -> OperatorProfile:
        """The time of every operator.

        Raises:
            UnsupportedError: the target cannot tell.
        """

    def after(self, rest: Callable[[Model], Model]) -> Bench:
        """The same for models that ``rest`` has to be applied to first."""
        return _After(self, rest)


@dataclass(frozen=True)
class _After(Bench):
    bench: Bench
    rest: Callable[[Model], Model]
    _done: dict[str, Model] = field(default_factory=dict)

    def cost(self, model: Model) -> Cost:
        return self.bench.cost(self._finished(model))

    def paired(self, base: Model, new: Model) -> Paired:
        return self.bench.paired(self._finished(base), self._finished(new))

    def operators(self, model: Model) -> OperatorProfile:
        return self.bench.operators(self._finished(model))

    def _finished(self, model: Model) -> Model:
        """``model`` after the rest of the line; the last few are kept."""
        key = model.fingerprint
        found = self._done.pop(key, None)
        self._done[key] = found if found is not None else self.rest(model)
        while len(self._done) > KEPT:
            del self._done[next(iter(self._done))]
        return self._done[key]
