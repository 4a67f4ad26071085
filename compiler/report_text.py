"""A report for a terminal, and for the log of a build server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgesmith.compiler.budget import Verdict
from edgesmith.compiler.report import summary

if TYPE_CHECKING:
    from edgesmith.compiler.report import PassReport, Report, TargetReport

LEAST_WIDTH = 100
STYLES = {Verdict.MET: "bold green", Verdict.MISSED: "bold red", Verdict.UNKNOWN: "bold yellow"}
LONGEST_SPEC = 44
METRIC_PREFIX = {1000**3: "G", 1000**2: "M", 1000: "k"}


def show(report: Report, console: Console | None = None) -> None:
    """Print what the passes did, every target against its budget, and the verdict."""
    if console is None:
        console = Console(file=sys.stdout, highlight=False)
        console.width = max(console.width, LEAST_WIDTH)
    if report.passes:
        console.print(_passes(report), "")
    if report.targets:
        console.print(_targets(report), "")
    rulings = [target for target in report.targets if target.ruling is not None]
    if rulings:
        console.print(_rulings(rulings), "")
    for target in report.targets:
        for finding in target.findings:
            if finding.verdict is not Verdict.MET:
                console.print(_marked(finding.verdict, f"{target.name}: {finding.message}"), soft_wrap=True)
        ruled = _ruled(target)
        if ruled is not None:
            console.print(ruled, soft_wrap=True)
    console.print(_marked(report.verdict, summary(report)), soft_wrap=True)


def short(count: float) -> str:
    """A count in three digits: 12345678 is 12.3 M."""
    for unit, letter in METRIC_PREFIX.items():
        if count >= unit:
            return f"{count / unit:.3g} {letter}"
    return f"{count:.3g}"


def digits(value: float | None) -> str:
    """A measurement in three digits; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _marked(verdict: Verdict, words: str) -> Text:
    return Text.assemble((verdict.name, STYLES[verdict]), "  ", words)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=bool(number))
    return table


def _passes(report: Report) -> Table:
    table = _table("pass", "seconds", "parameters", "MACs")
    table.add_row("(source model)", "", short(report.teacher.params), short(report.teacher.macs))
    for step in report.passes:
        table.add_row(Text(_spec(step)), f"{step.seconds:.1f}", short(step.params), short(step.macs))
    return table


def _spec(step: PassReport) -> str:
    text = step.spec if len(step.spec) <= LONGEST_SPEC else step.spec[: LONGEST_SPEC - 3] + "..."
    return text if step.changed else f"{text} (nothing to do)"


def _targets(report: Report) -> Table:
    metric = next((t.accuracy.metric for t in report.targets if t.accuracy), "accuracy")
    table = _table("target", "size MB", "p50 ms", "p90 ms", "p99 ms", "memory MB", "load ms", metric.rpartition(":")[2], "drop", "verdict")
    for target in report.targets:
        table.add_row(target.name, *_numbers(target), Text(target.verdict.name, STYLES[target.verdict]))
    return table


def _rulings(targets: Sequence[TargetReport]) -> Table:
    """Every form that was tried on a target; the one that is shipped is marked."""
    table = _table("target", "form", "size MB", "p50 ms", "time of float", "95 %", "validation", "")
    for target in targets:
        assert target.ruling is not None
        for number, form in enumerate(target.ruling.forms):
            known = form.ratio_low is not None and form.ratio_high is not None and form.ratio_low < form.ratio_high
            spread = f"{form.ratio_low:.2f} to {form.ratio_high:.2f}" if known else ""
            validation = f"{form.accuracy:.4f}" if form.accuracy is not None else "-"
            size = digits(form.size_bytes and form.size_bytes / 1e6)
            mark = "shipped" if form.chosen else "left out" if form.refused else ""
            table.add_row("" if number else target.name, form.name, size, digits(form.p50), digits(form.ratio), spread, validation, mark)
    return table


def _ruled(target: TargetReport) -> Text | None:
    """Why a target ships what it does, where that is not plain: a slower file, or forms that were left out."""
    ruling = target.ruling
    if ruling is None:
        return None
    notes = [*([ruling.warning] if ruling.warning else []), *(f"{form.name} left out: {form.refused}" for form in ruling.forms if form.refused)]
    return Text(f"{target.name}: {'; '.join(notes)}", "yellow" if ruling.warning else "") if notes else None


def _numbers(target: TargetReport) -> tuple[str, ...]:
    latency, memory, accuracy = target.latency_ms, target.memory_mb, target.accuracy
    return (
        digits(target.artifact.size_bytes / 1e6),
        digits(latency.p50 if latency else None),
        digits(latency.p90 if latency else None),
        digits(latency.p99 if latency else None),
        digits(memory.model if memory else None),
        digits(target.load_ms),
        f"{accuracy.value:.4f}" if accuracy else "-",
        f"{accuracy.drop:+.4f}" if accuracy else "-",
    )
