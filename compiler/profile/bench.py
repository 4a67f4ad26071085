"""The bench of a target: models are lowered, checked and measured as a build's artifacts are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgesmith.compiler import registry
from edgesmith.compiler.bench import KEPT, Bench, Cost, Paired
from edgesmith.compiler.budget import Budget
from edgesmith.compiler.data import Array, PassData
from edgesmith.compiler.instruments import fixed_inputs
from edgesmith.compiler.lowering import Lowering
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.profile.operator_types import OperatorProfile
from edgesmith.compiler.profile.operators import profile_operators
from edgesmith.compiler.profile.protocol import SAMPLES, compare, measure
from edgesmith.compiler.target import Artifact, Target

COST_LIMIT_S, PAIRED_LIMIT_S, OPERATORS_LIMIT_S = 2.0, 8.0, 1.0
COMPARED_ON = 8


@dataclass(frozen=True)
class TargetBench(Bench):
    """Measures on ``target``. ``folder`` holds the last few artifacts. They are run on training samples of ``data``; on random inputs without."""

    target: Target
    folder: Path
    device: str = "host"
    threads: int = 1
    budget: Budget = field(default_factory=Budget)
    data: PassData | None = None
    seed: int = 0
    _kept: dict[str, Artifact] = field(default_factory=dict)

    @classmethod
    def of(cls, target: str, folder: Path, *, threads: int = 1) -> TargetBench:
        """For the target called ``target``, on this machine.

        Raises:
            UserError: there is no such target.
        """
        return cls(registry.target(target), folder, threads=threads)

    def cost(self, model: Model) -> Cost:
        """See ``Bench``."""
        artifact, asked = self._artifact(model), Budget(latency_ms=self.budget.latency_ms, percentile=self.budget.percentile)
        profile = measure(
            artifact, target=self.target, device=self.device, threads=self.threads, samples=self._samples, budget=asked, limit_s=COST_LIMIT_S, memory=False
        )
        latency_ms = profile.latency_ms(self.budget.percentile)
        return Cost(artifact.size_bytes, latency_ms.value, latency_ms.low)

    def paired(self, base: Model, new: Model) -> Paired:
        """See ``Bench``."""
        files = [self._artifact(model) for model in (base, new)]
        found = compare(files, target=self.target, device=self.device, threads=self.threads, samples=self._samples, limit_s=PAIRED_LIMIT_S)
        return Paired(found.ratio(), found.profiles[0].latency_ms(self.budget.percentile))

    def operators(self, model: Model) -> OperatorProfile:
        """See ``Bench``."""
        artifact = self._artifact(model)
        return profile_operators(artifact, target=self.target, device=self.device, threads=self.threads, samples=self._samples, limit_s=OPERATORS_LIMIT_S)

    def _artifact(self, model: Model) -> Artifact:
        """The file of ``model``; those that were asked for longest ago are deleted."""
        key = model.fingerprint
        artifact = self._kept.pop(key, None)
        if artifact is None:
            inputs = fixed_inputs(model, PassContext(data=self.data, seed=self.seed), COMPARED_ON)
            artifact = Lowering(self.folder, inputs).artifact(model, self.target)
        self._kept[key] = artifact
        while len(self._kept) > KEPT:
            self._kept.pop(next(iter(self._kept))).path.unlink(missing_ok=True)
        return artifact

    @property
    def _samples(self) -> tuple[Array, ...] | None:
        return None if self.data is None else self.data.train.batch(slice(0, SAMPLES))
