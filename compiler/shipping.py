"""Which form of a build's model each target ships."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from edgesmith.compiler.accuracy import Metric, model_outputs_of, outputs_of
from edgesmith.compiler.arbiter import MIXED, Known, Limits, Ruling, Rung, arbitrate
from edgesmith.compiler.buildfile import TargetSpec
from edgesmith.compiler.data import Array, Data
from edgesmith.compiler.errors import RunnerError, UnsupportedError
from edgesmith.compiler.forms import WIDE, forms, wide
from edgesmith.compiler.lowering import Lowering
from edgesmith.compiler.mixed import Timed, Wish, mixtures
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.comparison import Comparison
from edgesmith.compiler.profile.operators import profile_operators
from edgesmith.compiler.profile.protocol import compare
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.progress import Progress
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.report import BYTES_PER_MB
from edgesmith.compiler.sensitivity import Sensitivities
from edgesmith.compiler.simulate import simulated_graph
from edgesmith.compiler.target import Artifact, Target

ARBITER_LIMIT_S = 8.0
OPERATORS_LIMIT_S = 1.0


@dataclass(frozen=True)
class Shipping:
    """A quantized ``model``, its ``twin`` before quantization, and what its files are judged by on validation data: at least ``floor``."""

    model: Model
    twin: Model
    lowering: Lowering
    data: Data | None
    metric: Metric
    floor: float | None
    sensitivities: Sensitivities | None
    progress: Progress

    def chosen(self, wanted: TargetSpec, target: Target) -> tuple[Artifact, Ruling]:
        """The file that ``target`` ships, and why.

        Raises:
            UnsupportedError: the target cannot run the float form.
        """
        budget, samples = wanted.budget, None if self.data is None else self.data.train.batch(slice(0, 8))

        def lower(form: Model) -> Artifact:
            return self.lowering.artifact(form, target)

        def timed(artifacts: Sequence[Artifact]) -> Comparison:
            self.progress.step(f"{target.name}: timing {len(artifacts)} forms")
            return compare(artifacts, target=target, device=wanted.device, threads=wanted.threads, samples=samples, limit_s=ARBITER_LIMIT_S)

        def mixed(known: Sequence[Known], below_ms: float) -> Iterator[Model]:
            if self.sensitivities is None:
                raise UnsupportedError("what an operator costs in accuracy is not known without data")
            wish = Wish(partial(self._keeps_accuracy, target=target), below_ms, math.inf if limits.size_bytes is None else limits.size_bytes)
            return self._mixed([self._timed(one, wanted, target, samples) for one in known], wish)

        def widened(known: Sequence[Known], below_ms: float) -> Iterator[Model]:
            if math.isinf(below_ms):  # int16 activations are for accuracy: no runtime is faster on them than on float32
                self.progress.step(f"{target.name}: widening activations to int16")
                yield wide(self.model, self.twin)

        rungs: dict[str, Rung] = {MIXED: mixed}
        if Scheme.STATIC16X8 in target.schemes:
            rungs[WIDE] = widened
        limits = Limits(self.floor, None if budget.size_mb is None else budget.size_mb * BYTES_PER_MB, budget.latency_ms, budget.percentile)
        score = None if self.data is None else lambda artifact: self._score(artifact, target, wanted.threads)
        return arbitrate(forms(self.model, self.twin), lower, timed, score, limits, rungs)

    def _score(self, artifact: Artifact, target: Target, threads: int) -> float:
        """What the file scores on validation data."""
        assert self.data is not None
        with open_session(artifact.path, target.runner, threads, extra=target.extra) as session:
            return self.metric(outputs_of(session, self.data.validation), self.data.validation.labels)

    def _timed(self, known: Known, wanted: TargetSpec, target: Target, samples: tuple[Array, ...] | None) -> Timed:
        """Where the time of a file goes.

        Raises:
            UnsupportedError: its runtime cannot say, or failed to.
        """
        self.progress.step(f"{target.name}: timing the operators of {known.tried.name}")
        try:
            profile = profile_operators(known.artifact, target=target, device=wanted.device, threads=wanted.threads, samples=samples, limit_s=OPERATORS_LIMIT_S)
        except RunnerError as error:
            raise UnsupportedError(f"the operators of {known.tried.name} were not timed: {error.what}", why=error.why) from error
        plan = known.model.quant
        return Timed({} if plan is None else plan.ops, known.tried.p50_ms or profile.whole_ms, profile, known.artifact.size_bytes)

    def _mixed(self, timed: Sequence[Timed], wish: Wish) -> Iterator[Model]:
        """Forms that mix the schemes of those that were timed."""
        assert self.sensitivities is not None
        self.progress.step("quantizing each operator alone, by each scheme")
        for scheme in (Scheme.DYNAMIC, Scheme.STATIC):
            self.sensitivities.of({name: scheme for one in timed for name, has in one.ops.items() if has is scheme})
        return mixtures(self.model, self.twin, timed, self.sensitivities.noise, wish)

    def _keeps_accuracy(self, form: Model, *, target: Target) -> bool:
        """Whether ``form`` keeps it in simulation of ``target``."""
        assert self.data is not None
        if self.floor is None:
            return True
        validation, simulated = self.data.validation, replace(form, graph=simulated_graph(form, target.dynamic_grid))
        return self.metric(model_outputs_of(simulated, validation), validation.labels) >= self.floor
