"""One build in progress: what was read, and the steps that lead to the report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from edgesmith.compiler import registry
from edgesmith.compiler.accuracy import Accuracy, Metric, Outputs, accuracy_of, judge_accuracy, load_metric, model_outputs_of, outputs_of
from edgesmith.compiler.buildfile import BuildSpec, TargetSpec
from edgesmith.compiler.cache import PassCache, files_key
from edgesmith.compiler.data import Array, Data
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.errors import RunnerError, UnsupportedError
from edgesmith.compiler.files import translated
from edgesmith.compiler.frontends.data_source import load_data
from edgesmith.compiler.frontends.model_source import load_model
from edgesmith.compiler.instruments import fixed_inputs
from edgesmith.compiler.lowering import Lowering, refuse_unsupported
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Pass, PassContext, PassResult
from edgesmith.compiler.pipeline import Pipeline
from edgesmith.compiler.profile.bench import TargetBench
from edgesmith.compiler.profile.devices import device
from edgesmith.compiler.profile.operator_types import OperatorProfile
from edgesmith.compiler.profile.operators import profile_operators
from edgesmith.compiler.profile.protocol import measure
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.profile.verdicts import judge
from edgesmith.compiler.progress import Progress
from edgesmith.compiler.report import ModelReport, Report, TargetReport
from edgesmith.compiler.sensitivity import Sensitivities, Sensitivity
from edgesmith.compiler.shipping import OPERATORS_LIMIT_S, Shipping
from edgesmith.compiler.spec import format_pass, parse_pass
from edgesmith.compiler.target import Artifact, Target

CACHE = "cache"


@dataclass(frozen=True)
class Line:
    """The teacher, its data, and where results go."""

    spec: BuildSpec
    folder: Path
    progress: Progress
    teacher: Model
    data: Data | None
    pipeline: Pipeline
    targets: tuple[Target, ...]
    twin: Twin

    @classmethod
    def of(cls, spec: BuildSpec, folder: Path, progress: Progress) -> Line:
        """Read everything that ``spec`` names.

        Raises:
            UserError: something cannot be read, or an unknown pass, target or device is named.
        """
        pipeline = Pipeline(tuple(_pass(spec, index) for index in range(len(spec.passes))))
        targets = tuple(_target(spec, wanted) for wanted in spec.targets)
        progress.step("reading the model and its data")
        teacher = load_model(spec.model)
        data = None if spec.data is None else load_data(spec.data, teacher, spec.seed, classification=spec.accuracy.metric == "top1")
        return cls(spec, folder, progress, teacher, data, pipeline, targets, Twin())

    def remarks(self) -> tuple[Diagnostic, ...]:
        """What the passes and the targets say of the model before anything is trained."""
        return (*self.pipeline.check(self.teacher), *(d for target in self.targets for d in target.unsupported(self.teacher)))

    def refuse(self) -> None:
        """Raise what ``remarks`` refuses.

        Raises:
            UnsupportedError: a target lacks an operator, or accuracy is to be judged without data.
        """
        for target in self.targets:
            refuse_unsupported(self.teacher, target)
        goal = self.spec.accuracy
        if self.data is None and (goal.max_drop is not None or goal.floor is not None):
            raise UnsupportedError("accuracy cannot be judged without data", where=self.spec.where("accuracy"), hint="add [data]")

    @cached_property
    def metric(self) -> Metric:
        """The metric of outputs and labels that the build file names."""
        return load_metric(self.spec.accuracy.metric)

    def compressed(self) -> Model:
        """The teacher after every pass; written to ``model.pt2``."""
        data_key = "" if self.spec.data is None else files_key(self.spec.data.source.path)
        cache = PassCache(self.folder / CACHE, "|".join([data_key, str(self.spec.data), self.spec.accuracy.metric, str(self.spec.targets)]))
        scratch = self.folder / CACHE / "scratch"
        with translated(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
        ctx = PassContext(
            seed=self.spec.seed,
            workdir=scratch,
            data=self.data.for_passes() if self.data else None,
            evaluate=self._evaluate if self.data else None,
            benches={t.name: self._bench(wanted, t, scratch) for wanted, t in zip(self.spec.targets, self.targets, strict=True)},
            budget=self.spec.targets[0].budget,
            progress=self.progress.update,
        )
        model = self.pipeline.run(self.teacher, ctx, [self.twin, _Announced(self.progress), cache])
        model.save(self.folder / "model.pt2")
        shutil.rmtree(scratch, ignore_errors=True)
        return model

    def report(self, model: Model, key: str) -> Report:
        """Every target's artifact of ``model``, measured and judged."""
        shipping = self.shipping(model)
        targets = tuple(self._target(model, shipping, wanted, target) for wanted, target in zip(self.spec.targets, self.targets, strict=True))
        return Report.of(
            key=key,
            teacher=ModelReport.of(self.teacher),
            model=ModelReport.of(model),
            passes=model.history,
            targets=targets,
            sensitivity=self._sensitivities(model, shipping),
        )

    def _sensitivities(self, model: Model, shipping: Shipping | None) -> tuple[Sensitivity, ...]:
        """What each INT8 operator costs alone, on validation data; nothing without data or integers."""
        if shipping is None or shipping.sensitivities is None or model.quant is None:
            return ()
        self.progress.step("quantizing each operator alone")
        return shipping.sensitivities.of(model.quant.ops)

    def _target(self, model: Model, shipping: Shipping | None, wanted: TargetSpec, target: Target) -> TargetReport:
        self.progress.step(f"{target.name}: lowering")
        chosen, ruling = shipping.chosen(wanted, target) if shipping else (self._lowering(model).artifact(model, target), None)
        artifact = self._kept(chosen, target)
        samples = None if self.data is None else self.data.test.batch(slice(0, 8))
        self.progress.step(f"{target.name}: measuring on {wanted.device}")
        profile = measure(artifact, target=target, device=wanted.device, threads=wanted.threads, samples=samples, budget=wanted.budget)
        accuracy = self._accuracy(artifact, target, wanted.threads)
        operators, remarks = self._operators(artifact, target, wanted, samples)
        artifact = replace(artifact, diagnostics=(*artifact.diagnostics, *remarks))
        findings = (*judge(wanted.budget, profile, artifact.size_bytes, device=wanted.device), *judge_accuracy(self.spec.accuracy, accuracy))
        return TargetReport.of(target.name, artifact, profile, accuracy, findings, operators, ruling)

    def shipping(self, model: Model) -> Shipping | None:
        """How the form that a target ships is chosen; None where there is but one."""
        if model.quant is None or self.twin.model is None:
            return None
        sensitivities = None
        if self.data is not None:
            sensitivities = Sensitivities(model, self.twin.model, self.data.validation, self.metric, lambda n, of: self.progress.update(n, of, "operators"))
        return Shipping(model, self.twin.model, self._lowering(model), self.data, self.metric, self._floor, sensitivities, self.progress)

    @property
    def _floor(self) -> float | None:
        """The least accuracy on validation data that keeps what the build file asks for."""
        goal = self.spec.accuracy
        drop = None if goal.max_drop is None or self.data is None else self._evaluate(self.teacher) - goal.max_drop
        return max((limit for limit in (goal.floor, drop) if limit is not None), default=None)

    def _operators(
        self, artifact: Artifact, target: Target, wanted: TargetSpec, samples: tuple[Array, ...] | None
    ) -> tuple[OperatorProfile | None, tuple[Diagnostic, ...]]:
        """The time of each operator; or none, and why: the artifact is as good without."""
        self.progress.step(f"{target.name}: timing its operators")
        try:
            found = profile_operators(artifact, target=target, device=wanted.device, threads=wanted.threads, samples=samples, limit_s=OPERATORS_LIMIT_S)
        except (RunnerError, UnsupportedError) as error:
            return None, (Diagnostic(Severity.WARNING, "operators.not-timed", "", error.what, error.why),)
        return found, ()

    def _lowering(self, model: Model) -> Lowering:
        ctx = PassContext(data=self.data.for_passes() if self.data else None, seed=self.spec.seed)
        return Lowering(self.folder / CACHE, fixed_inputs(model, ctx, 8))

    def _kept(self, artifact: Artifact, target: Target) -> Artifact:
        """A copy of a cached artifact in the output folder, in place of the one before."""
        place = self.folder / f"model{target.suffix}"
        with translated(place):
            temporary = place.with_name(f".{place.name}.new")
            shutil.copyfile(artifact.path, temporary)
            temporary.replace(place)
        return replace(artifact, path=place)

    def _accuracy(self, artifact: Artifact, target: Target, threads: int) -> Accuracy | None:
        if self.data is None:
            return None
        self.progress.step(f"{target.name}: scoring {len(self.data.test)} test samples")
        with open_session(artifact.path, target.runner, threads, extra=target.extra) as session:
            outputs = outputs_of(session, self.data.test)
        return accuracy_of(self.spec.accuracy.metric, self.metric, outputs, self._baseline, self.data.test.labels, seed=self.spec.seed)

    @cached_property
    def _baseline(self) -> Outputs:
        assert self.data is not None
        return model_outputs_of(self.teacher, self.data.test)

    def _evaluate(self, model: Model) -> float:
        assert self.data is not None
        return self.metric(model_outputs_of(model, self.data.validation), self.data.validation.labels)

    def _bench(self, wanted: TargetSpec, target: Target, folder: Path) -> TargetBench:
        data = self.data.for_passes() if self.data else None
        return TargetBench(target, folder / target.name, wanted.device, wanted.threads, wanted.budget, data, self.spec.seed)


@dataclass
class Twin:
    """Keeps the model as it was before quantization."""

    model: Model | None = None

    def around(self, step: Pass, model: Model, ctx: PassContext, proceed: Callable[[], PassResult]) -> PassResult:
        """Proceed, and remember ``model`` if that quantizes it."""
        result = proceed()
        if model.quant is None and result.model.quant is not None:
            self.model = model
        return result


@dataclass(frozen=True)
class _Announced:
    """Says which pass runs."""

    progress: Progress

    def around(self, step: Pass, model: Model, ctx: PassContext, proceed: Callable[[], PassResult]) -> PassResult:
        """Announce, then proceed."""
        self.progress.step(format_pass(step))
        return proceed()


def _pass(spec: BuildSpec, index: int) -> Pass:
    with spec.at("pipeline", "passes", index):
        return parse_pass(spec.passes[index], spec.root)


def _target(spec: BuildSpec, wanted: TargetSpec) -> Target:
    with spec.at(*wanted.key, "device"):
        device(wanted.device)
    with spec.at(*wanted.key, "name"):
        return registry.target(wanted.name)
