"""Is NEW slower than BASE? Artifacts, or the reports of builds, against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from edgesmith.compiler import registry
from edgesmith.compiler.budget import Interval, Verdict, overall
from edgesmith.compiler.errors import UserError
from edgesmith.compiler.files import file_hash
from edgesmith.compiler.profile.comparison import Difference, difference
from edgesmith.compiler.profile.protocol import compare, measure
from edgesmith.compiler.report import JSON_NAME, Report, TargetReport

MACHINE = ("cpu", "cpu_features", "cores", "governor", "os")
"""The keys of an environment that make two of them comparable or not."""


@dataclass(frozen=True)
class Row:
    """One artifact against the one before. ``ratio`` is new over base; ``how`` says where it comes from, and ``notes`` what to bear in mind.

    Times are of one call: medians where both were timed in one run, else the percentile that the reports judged. Without a base, ``base_ms``,
    ``ratio`` and ``difference`` are None.
    """

    name: str
    verdict: Verdict
    base_ms: float | None
    new_ms: float
    ratio: Interval | None
    difference: Difference | None
    how: str
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """What was found, for people."""
        if self.ratio is None or self.base_ms is None or self.difference is None:
            return f"{self.new_ms:.4g} ms; {self.how}"
        change = f"{self.ratio.value - 1:+.1%} (95 % interval {self.ratio.low - 1:+.1%} to {self.ratio.high - 1:+.1%})"
        word = "cannot be told" if self.difference is Difference.UNKNOWN else self.difference.value
        return f"{word}: {self.base_ms:.4g} ms -> {self.new_ms:.4g} ms, {change}; {self.how}"


@dataclass(frozen=True)
class Gate:
    """All rows, and the slowdown that is allowed (0.03 is 3 %). ``informational``: there was no baseline."""

    rows: tuple[Row, ...]
    max_slowdown: float
    informational: bool

    @property
    def verdict(self) -> Verdict:
        """MISSED if any artifact is slower than allowed, UNKNOWN if that cannot be told of one, else MET."""
        return overall(row.verdict for row in self.rows)


def gate(base: Path, new: Path, *, max_slowdown: float, threads: int = 1, limit_s: float = 60.0) -> Gate:
    """Compare ``new`` with ``base``: two artifacts, or two reports (``report.json``, or the folder that holds it).

    Artifacts are timed against each other in one run of at most ``limit_s`` seconds. Reports are compared target by target, by their artifacts
    where both are still there unchanged, else by the numbers in them. A ``base`` that does not exist makes the result informational: ``new`` is
    measured, and nothing can be missed.

    Raises:
        UserError: ``new`` does not exist; one is a report and the other an artifact; or the reports have no target in common.
    """
    if not new.exists():
        raise UserError("there is no such file", where=str(new))
    if _is_report(new):
        return _reports(base, new, max_slowdown, limit_s)
    if not base.exists():
        return Gate((_alone(new.name, new, threads, limit_s),), max_slowdown, informational=True)
    if _is_report(base):
        raise UserError("a report cannot be compared with an artifact", where=f"{base}, {new}", hint="give two reports, or two artifacts")
    return Gate((_paired(new.name, (base, new), threads, max_slowdown, limit_s),), max_slowdown, informational=False)


def _is_report(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".json"


def _read(path: Path) -> tuple[Report, Path]:
    """The report, and the folder it lies in."""
    file = path / JSON_NAME if path.is_dir() else path
    try:
        return Report.from_json(file.read_text(encoding="utf-8")), file.parent
    except FileNotFoundError as error:
        raise UserError("there is no report", where=str(file)) from error
    except ValueError as error:
        raise UserError("this is no report of edgesmith", where=str(file), why=str(error).splitlines()[0]) from error


def _reports(base: Path, new: Path, max_slowdown: float, limit_s: float) -> Gate:
    found, folder = _read(new)
    if not base.exists():
        rows = tuple(_recorded_alone(target) for target in found.targets if target.latency_ms is not None)
        return Gate(rows, max_slowdown, informational=True)
    if not _is_report(base):
        raise UserError("an artifact cannot be compared with a report", where=f"{base}, {new}", hint="give two reports, or two artifacts")
    before, old_folder = _read(base)
    known = {target.name: target for target in before.targets}
    judged: list[Row] = []
    for target in (target for target in found.targets if target.name in known):
        files = (_artifact(known[target.name], old_folder), _artifact(target, folder))
        same_threads = known[target.name].threads == target.threads
        if files[0] is not None and files[1] is not None and same_threads:
            judged.append(_paired(target.name, (files[0], files[1]), target.threads, max_slowdown, limit_s))
        else:
            judged.append(_recorded(known[target.name], target, max_slowdown))
    if not judged:
        names = ", ".join(target.name for target in found.targets)
        raise UserError("the reports have no target in common", where=f"{base}, {new}", why=f"they are of {', '.join(known)} and of {names}")
    return Gate(tuple(judged), max_slowdown, informational=False)


def _artifact(target: TargetReport, folder: Path) -> Path | None:
    """The artifact that a report in ``folder`` speaks of, if it is still there as it was."""
    path = folder / Path(target.artifact.path).name
    return path if path.is_file() and file_hash(path) == target.artifact.sha256 else None


def _judged(ratio: Interval, max_slowdown: float) -> Verdict:
    if ratio.high <= 1 + max_slowdown:
        return Verdict.MET
    return Verdict.MISSED if ratio.low > 1 + max_slowdown else Verdict.UNKNOWN


def _paired(name: str, files: tuple[Path, Path], threads: int, max_slowdown: float, limit_s: float) -> Row:
    base, new = files
    if registry.target_for(base).name != registry.target_for(new).name:
        notes: tuple[str, ...] = (f"{base.name} and {new.name} are of different runtimes",)
    else:
        notes = ()
    found = compare(files, threads=threads, limit_s=limit_s)
    ratio = found.ratio()
    base_ms, new_ms = (profile.latency_ms(50).value for profile in found.profiles)
    how = f"timed against each other in {len(set(found.profiles[0].rounds))} pairs of processes"
    return Row(name, _judged(ratio, max_slowdown), base_ms, new_ms, ratio, difference(ratio), how, notes)


def _alone(name: str, file: Path, threads: int, limit_s: float) -> Row:
    profile = measure(file, threads=threads, limit_s=limit_s, memory=False)
    return Row(name, Verdict.MET, None, profile.latency_ms(50).value, None, None, "informational, there is no baseline")


def _recorded_alone(target: TargetReport) -> Row:
    assert target.latency_ms is not None
    return Row(target.name, Verdict.MET, None, target.latency_ms.p50, None, None, "informational, there is no baseline")


def _recorded(base: TargetReport, new: TargetReport, max_slowdown: float) -> Row:
    """By the numbers of two reports, which were measured at different times: their intervals are added."""
    if base.latency_ms is None or new.latency_ms is None:
        raise UserError("a report holds no latency", where=new.name)
    notes = [f"{key} was {base.environment.get(key)!r}, is {new.environment.get(key)!r}" for key in MACHINE if _differs(base, new, key)]
    notes += [f"{what} was {was}, is {now}" for what, was, now in _settings(base, new) if was != now]
    logs = [math.log(report.latency_ms.p90) for report in (base, new) if report.latency_ms is not None]
    spread = math.hypot(*(_half_width(report) for report in (base, new)))
    value = logs[1] - logs[0]
    ratio = Interval(math.exp(value), math.exp(value - spread), math.exp(min(700.0, value + spread)))
    verdict = Verdict.UNKNOWN if notes else _judged(ratio, max_slowdown)
    how = "from the p90 of two reports, measured at different times" + (" in different environments" if notes else "")
    return Row(new.name, verdict, base.latency_ms.p90, new.latency_ms.p90, ratio, difference(ratio), how, tuple(notes))


def _differs(base: TargetReport, new: TargetReport, key: str) -> bool:
    return base.environment.get(key) != new.environment.get(key)


def _settings(base: TargetReport, new: TargetReport) -> list[tuple[str, object, object]]:
    return [
        ("the runtime", base.runtime_version, new.runtime_version),
        ("threads", base.threads, new.threads),
        ("the device", base.device, new.device),
    ]


def _half_width(report: TargetReport) -> float:
    """Of the 95 % interval of a report's p90, as a logarithm."""
    latency = report.latency_ms
    if latency is None or latency.ci_high is None or not latency.ci_low:
        return math.inf
    return math.log(latency.ci_high / latency.ci_low) / 2
