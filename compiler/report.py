"""What a build found: ``report.json``, and the same for a terminal. ``report_html.py`` makes the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesmith.compiler.budget import EXIT_CODES, Finding, Interval, Verdict, overall
from edgesmith.compiler.candidate import Candidate
from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.files import file_hash, write_text
from edgesmith.compiler.profile.memory_types import PHASES
from edgesmith.compiler.report_operators import OperatorsReport
from edgesmith.compiler.report_ruling import RulingReport
from edgesmith.compiler.report_sensitivity import SensitivityReport

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from rich.console import Console

    from edgesmith.compiler.accuracy import Accuracy
    from edgesmith.compiler.arbiter import Ruling
    from edgesmith.compiler.model import Model, PassRecord
    from edgesmith.compiler.profile.memory_types import Memory
    from edgesmith.compiler.profile.operator_types import OperatorProfile
    from edgesmith.compiler.profile.types import Profile
    from edgesmith.compiler.sensitivity import Sensitivity
    from edgesmith.compiler.target import Artifact

SCHEMA_VERSION = 1
JSON_NAME, HTML_NAME = "report.json", "report.html"
BYTES_PER_MB = 1e6


@dataclass(frozen=True)
class ModelReport:
    """A model in three numbers; ``macs`` are the multiply-accumulates of one sample."""

    params: int
    macs: int
    fingerprint: str

    @classmethod
    def of(cls, model: Model) -> ModelReport:
        """The numbers of ``model``."""
        return cls(model.params, model.macs, model.fingerprint)


@dataclass(frozen=True)
class PassReport:
    """One pass; ``params`` and ``macs`` are those of its result."""

    spec: str
    seconds: float
    changed: bool
    params: int
    macs: int
    diagnostics: tuple[Diagnostic, ...] = ()

    @classmethod
    def of(cls, record: PassRecord) -> PassReport:
        """The report of ``record``."""
        return cls(record.spec, record.seconds, record.changed, record.params, record.macs, record.diagnostics)


@dataclass(frozen=True)
class ArtifactReport:
    """A file that was made."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class LatencyReport:
    """Time of one call, of ``samples`` that were timed. ``ci_low`` and ``ci_high`` are the 95 % interval of the percentile that the
    budget names (90 where it names none); ``ci_high`` is None where too few calls were timed to bound it.
    """

    p50: float
    p90: float
    p99: float
    ci_low: float | None
    ci_high: float | None
    samples: int

    @classmethod
    def of(cls, profile: Profile, findings: Sequence[Finding]) -> LatencyReport:
        """The report of ``profile``, with the interval that ``findings`` judged."""
        judged = next((f for f in findings if f.budget == "latency_ms" and f.low is not None and f.high is not None), None)
        p50, p90, p99 = (profile.latency_ms(percentile) for percentile in (50, 90, 99))
        shown = p90 if judged is None or judged.low is None or judged.high is None else Interval(p90.value, judged.low, judged.high)
        return cls(p50.value, p90.value, p99.value, shown.low, shown.high if math.isfinite(shown.high) else None, len(profile.samples_ns))


@dataclass(frozen=True)
class MemoryPlanReport:
    """What the runtime should take in steady state, computed from the file; ``mapped`` pages of the file are clean, the rest is dirty."""

    weights: float
    packed: float
    arena: float
    runtime: float
    mapped: float


@dataclass(frozen=True)
class MemoryReport:
    """``peak_rss`` of a whole process with its runtime; the rest is what the model adds to it, medians of the fresh processes.

    ``model`` is what a budget is judged on: dirty memory, at the most of ``loaded``, ``first`` (run) and ``steady``. ``mapped`` are
    clean pages of the file in steady state, ``peak`` is resident memory at its highest, both kinds and what loading needed for a moment.
    """

    peak_rss: float
    model: float
    loaded: float | None = None
    first: float | None = None
    steady: float | None = None
    mapped: float | None = None
    peak: float | None = None
    plan: MemoryPlanReport | None = None

    @classmethod
    def of(cls, memory: Memory) -> MemoryReport:
        """The report of ``memory``."""
        plan = memory.plan
        return cls(
            peak_rss=memory.process_peak_rss_bytes / BYTES_PER_MB,
            model=memory.dirty_bytes.value / BYTES_PER_MB,
            **{phase: memory.dirty_at(phase).value / BYTES_PER_MB for phase in PHASES[1:]},
            mapped=memory.mapped_bytes.value / BYTES_PER_MB,
            peak=memory.peak_rss_bytes.value / BYTES_PER_MB,
            plan=None if plan is None else MemoryPlanReport(*(getattr(plan, f"{f.name}_bytes") / BYTES_PER_MB for f in fields(MemoryPlanReport))),
        )


@dataclass(frozen=True)
class AccuracyReport:
    """What the artifact scores in its runtime on ``samples`` that no pass saw; ``baseline`` is the source model's score on the same."""

    metric: str
    value: float
    baseline: float
    drop: float
    samples: int


@dataclass(frozen=True)
class TargetReport:
    """One artifact, measured and judged. What is None was not measured."""

    name: str
    runtime_version: str | None
    device: str
    threads: int
    artifact: ArtifactReport
    latency_ms: LatencyReport | None
    memory_mb: MemoryReport | None
    load_ms: float | None
    accuracy: AccuracyReport | None
    findings: tuple[Finding, ...]
    diagnostics: tuple[Diagnostic, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    operators: OperatorsReport | None = None
    ruling: RulingReport | None = None

    @classmethod
    def of(
        cls,
        name: str,
        artifact: Artifact,
        profile: Profile,
        accuracy: Accuracy | None,
        findings: Sequence[Finding],
        operators: OperatorProfile | None = None,
        ruling: Ruling | None = None,
    ) -> TargetReport:
        """The report of one artifact."""
        return cls(
            name=name,
            runtime_version=profile.runtime_version,
            device=profile.device,
            threads=profile.threads,
            artifact=ArtifactReport(str(artifact.path), artifact.size_bytes, artifact.sha256),
            latency_ms=LatencyReport.of(profile, findings),
            memory_mb=MemoryReport.of(profile.memory) if profile.memory is not None else None,
            load_ms=profile.load_ms,
            accuracy=None
            if accuracy is None
            else AccuracyReport(accuracy.metric, accuracy.value.value, accuracy.baseline, accuracy.drop.value, accuracy.samples),
            findings=tuple(findings),
            diagnostics=artifact.diagnostics,
            environment=dict(profile.environment),
            operators=None if operators is None else OperatorsReport.of(operators),
            ruling=None if ruling is None else RulingReport.of(ruling),
        )

    @property
    def verdict(self) -> Verdict:
        """Of all its findings together."""
        return overall(finding.verdict for finding in self.findings)


@dataclass(frozen=True)
class Report:
    """Everything that a build found. Field by field this is ``report.json``.

    ``model`` is what the passes made of ``teacher``, the model that came in. ``candidates`` are all alternatives that passes weighed. ``key``
    identifies what the build was asked for: the same key gives the same report.
    """

    schema_version: int
    verdict: Verdict
    exit_code: int
    model: ModelReport
    teacher: ModelReport
    passes: tuple[PassReport, ...]
    targets: tuple[TargetReport, ...]
    candidates: tuple[Candidate, ...]
    environment: Mapping[str, str]
    key: str = ""
    sensitivity: tuple[SensitivityReport, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        teacher: ModelReport,
        model: ModelReport,
        passes: Sequence[PassRecord],
        targets: Sequence[TargetReport],
        key: str = "",
        sensitivity: Sequence[Sensitivity] = (),
    ) -> Report:
        """The report of a build; its verdict is that of all findings together."""
        verdict = overall(target.verdict for target in targets)
        return cls(
            schema_version=SCHEMA_VERSION,
            verdict=verdict,
            exit_code=EXIT_CODES[verdict],
            model=model,
            teacher=teacher,
            passes=tuple(PassReport.of(record) for record in passes),
            targets=tuple(targets),
            candidates=tuple(candidate for record in passes for candidate in record.candidates),
            environment=_shared([target.environment for target in targets]),
            key=key,
            sensitivity=SensitivityReport.of(sensitivity, _module_shares(targets)),
        )

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that ``to_json`` wrote.

        Raises:
            ValueError: it is none of this schema version.
        """
        report: Report = _adapter().validate_json(text)
        if report.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {report.schema_version}, not {SCHEMA_VERSION}")
        return report

    def to_json(self) -> str:
        """The text of ``report.json``."""
        return _adapter().dump_json(self, indent=2).decode()

    @classmethod
    def known(cls, folder: Path, key: str) -> Report | None:
        """The report that a build with the same ``key`` left in ``folder``, if every file it speaks of is still there unchanged.

        Not one that left a latency UNKNOWN: measuring again may decide it.
        """
        path = folder / JSON_NAME
        if not path.is_file() or not (folder / HTML_NAME).is_file():
            return None
        try:
            report = cls.from_json(path.read_text(encoding="utf-8"))
        except ValueError:  # Of another version, or damaged: it is made anew.
            return None
        return report if report.key == key and not _undecided(report) and all(_is_there(target.artifact) for target in report.targets) else None

    def write(self, folder: Path) -> None:
        """Write ``report.html`` and ``report.json`` into ``folder``, each whole or not at all.

        Raises:
            OutputError: the folder cannot be written, or the disk is full.
        """
        from edgesmith.compiler.report_html import page

        write_text(folder / HTML_NAME, page(self))
        write_text(folder / JSON_NAME, self.to_json() + "\n")

    def show(self, console: Console | None = None) -> None:
        """Print it for people; plain where standard output is no terminal."""
        from edgesmith.compiler.report_text import show

        show(self, console)


def _module_shares(targets: Sequence[TargetReport]) -> dict[str, float]:
    """Source module -> its share of the operators' time, the mean over targets."""
    timed = [target.operators for target in targets if target.operators is not None]
    shares: dict[str, float] = {}
    for found in timed:
        for operator in found.operators:
            for module in operator.sources:
                shares[module] = shares.get(module, 0.0) + operator.share / len(operator.sources) / len(timed)
    return shares


def _undecided(report: Report) -> bool:
    return any(f.budget == "latency_ms" and f.verdict is Verdict.UNKNOWN for target in report.targets for f in target.findings)


def _is_there(artifact: ArtifactReport) -> bool:
    path = Path(artifact.path)
    return path.is_file() and path.stat().st_size == artifact.size_bytes and file_hash(path) == artifact.sha256


def _shared(environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all environments agree on."""
    if not environments:
        return {}
    first, *others = environments
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(Report)


@dataclass(frozen=True)
class Binding:
    """The limit that is nearest to being broken, or broken most: ``used`` is the measurement as a share of it."""

    target: str
    finding: Finding
    used: float


def binding(report: Report) -> Binding | None:
    """Of all limits that were measured, the one that is used up most; a missed one before any other. None where there is none."""
    measured = [Binding(target.name, finding, _used(finding)) for target in report.targets for finding in target.findings if finding.measured is not None]
    return max(measured, key=lambda b: (b.finding.verdict is Verdict.MISSED, b.finding.verdict is Verdict.UNKNOWN, b.used), default=None)


def _used(finding: Finding) -> float:
    """How much of a limit is used up; 1 is all of it."""
    assert finding.measured is not None
    if finding.budget == "floor":
        return finding.limit / finding.measured if finding.measured > 0 else math.inf
    if finding.limit > 0:
        return max(0.0, finding.measured / finding.limit)
    return math.inf if finding.measured > finding.limit else 1.0


UNITS = {"latency_ms": "ms", "memory_mb": "MB", "size_mb": "MB"}


def summary(report: Report) -> str:
    """One sentence: which limit binds, and by how much."""
    nearest = binding(report)
    if nearest is None:
        return "No budget was given" if report.verdict is Verdict.MET else "Nothing could be measured"
    finding, unit = nearest.finding, UNITS.get(nearest.finding.budget, "")
    assert finding.measured is not None
    where = f"{finding.budget} on {nearest.target}"
    numbers = f"{finding.measured:.4g} {unit} of {finding.limit:g} {unit}"
    if finding.verdict is Verdict.MISSED:
        beyond = abs(finding.measured - finding.limit)
        share = f", {beyond / abs(finding.limit):.0%}" if finding.limit else ""
        side = "under" if finding.budget == "floor" else "over"
        words = f"{where} binds: {finding.measured:.4g} {unit} is {side} its limit of {finding.limit:g} {unit} by {beyond:.3g} {unit}{share}"
    elif finding.verdict is Verdict.UNKNOWN:
        words = f"{where} cannot be decided: {numbers}"
    else:
        words = f"Every limit is met; {where} comes nearest, {numbers}"
    return " ".join(words.split()).replace(" ,", ",")
