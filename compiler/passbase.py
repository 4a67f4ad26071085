"""The contract of a pass."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from edgesmith.compiler.bench import Bench
from edgesmith.compiler.budget import Budget
from edgesmith.compiler.candidate import Candidate
from edgesmith.compiler.data import PassData
from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.suggest import did_you_mean


class Numerics(enum.Enum):
    """How close a pass keeps the outputs; checked after every pass on fixed inputs."""

    EXACT = "exact"
    """The same arithmetic: equal to the last bit or two (relative 1e-6)."""
    CLOSE = "close"
    """The same function in another order of arithmetic (relative 1e-4)."""
    LOSSY = "lossy"
    """Another function by intent; outputs keep their shapes and are finite."""


@dataclass(frozen=True)
class PassContext:
    """Everything a pass may use beside the model; there is no global state.

    ``teacher`` is the model before the first pass. ``evaluate`` scores a model on validation data (higher is better).
    ``benches`` measure what a model would cost on each target, by its name, the main one first: a pass is given such as first apply the later passes
    that do not train.
    ``progress`` takes (done, total, text). ``workdir`` is a scratch folder of the pass's own. Members that the caller cannot offer are None: ask with
    ``need_data()`` and the like, which refuse with one clear sentence.
    """

    seed: int = 0
    workdir: Path | None = None
    data: PassData | None = None
    teacher: Model | None = None
    evaluate: Callable[[Model], float] | None = None
    benches: Mapping[str, Bench] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    progress: Callable[[int, int, str], None] = lambda done, total, text: None

    def need_data(self, who: str) -> PassData:
        """The data, or a refusal that names ``who`` asked."""
        if self.data is None:
            raise UnsupportedError(f"{who} needs data", hint="give [data] in the build file, or PassContext(data=...)")
        return self.data

    def need_teacher(self, who: str) -> Model:
        """The teacher, or a refusal that names ``who`` asked."""
        if self.teacher is None:
            raise UnsupportedError(f"{who} needs a teacher", hint="Pipeline.run gives the model before the first pass; or PassContext(teacher=...)")
        return self.teacher

    def need_bench(self, who: str, target: str = "") -> Bench:
        """The bench of ``target``, of the main one where that is empty; or a refusal that names ``who`` asked."""
        if not self.benches:
            raise UnsupportedError(f"{who} needs a target to measure on", hint="run it in a build, or give PassContext(benches=...)")
        name = target or next(iter(self.benches))
        if name not in self.benches:
            raise UnsupportedError(f"{who}: this build has no target {name!r}", hint=did_you_mean(name, self.benches))
        return self.benches[name]


@dataclass(frozen=True)
class PassResult:
    """What a pass hands back; ``changed`` is checked against fingerprints. ``seconds`` is filled in by the pipeline."""

    model: Model
    changed: bool
    diagnostics: tuple[Diagnostic, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    seconds: float = 0.0


class Pass(ABC):
    """One step from Model to Model. Subclasses are frozen dataclasses whose fields are the pass's options.

    ``run`` must not write to the model's graph or tensors (copy with ``model.edit()``), must give the same result for
    the same model, context and seed, and must report ``changed`` truthfully.
    """

    name: ClassVar[str]
    numerics: ClassVar[Numerics]
    trains: ClassVar[bool] = False
    """Whether it runs training; the price of a candidate is asked for with the later passes that do not."""

    def requires(self, model: Model) -> Iterable[Diagnostic]:
        """Why this pass cannot run on ``model``: cheap, no training. ERROR diagnostics refuse the pipeline."""
        return ()

    @abstractmethod
    def run(self, model: Model, ctx: PassContext) -> PassResult:
        """The transformed model."""
