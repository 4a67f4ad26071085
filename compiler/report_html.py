"""A report as one self-contained page, for light and dark, phone and desk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgesmith.compiler import report_operator_plots, report_operators, report_plots, report_sensitivity_plot
from edgesmith.compiler.budget import Finding, Verdict
from edgesmith.compiler.report import summary
from edgesmith.compiler.report_text import digits, short

if TYPE_CHECKING:
    from edgesmith.compiler.diagnostics import Diagnostic
    from edgesmith.compiler.report import Report

TEMPLATE = Path(__file__).with_name("report_template.html")
SIGNS = {Verdict.MET: "✓", Verdict.MISSED: "✕", Verdict.UNKNOWN: "?"}
TITLES = {"latency_ms": "Latency", "memory_mb": "Memory", "size_mb": "File size", "max_drop": "Accuracy lost", "floor": "Accuracy"}
PLOTS = (
    (
        "Accuracy against latency",
        "○ a candidate: its cost on the first target, accuracy on validation data · ◆ the one kept · ■ an artifact in its runtime: p50, accuracy on test data.",
        report_plots.accuracy_against_latency,
    ),
    ("Size before and after", "The source model's weights as float32, and the files that were made.", report_plots.size_before_and_after),
    ("What each pass left", "Parameters and multiply-accumulates (MACs), as a share of the source model's.", report_plots.what_is_left),
    ("Where a run's time goes", "By category, as a share of the operators' time: what is not fast is listed below.", report_operator_plots.by_category),
    ("The modules that take most", "Milliseconds of all operators that compute a source module, per target.", report_operator_plots.by_module),
    (
        "What INT8 costs, operator by operator",
        "Each operator quantized alone: the higher, the less the model's outputs notice. Low and to the left is what to leave in float.",
        report_sensitivity_plot.sensitivity,
    ),
    ("Time per pass", "Seconds that each pass took.", report_plots.seconds_per_pass),
)
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
MOST_OPERATORS = 12
ROOM = 1.12
"""A gauge reaches this far beyond its largest number."""


@dataclass(frozen=True)
class Gauge:
    """A finding as a bar: everything in per cent of its width."""

    zero: float
    value: float
    low: float
    high: float
    limit: float


@dataclass(frozen=True)
class Tile:
    """A number at the head of the page: what it was, what it is."""

    name: str
    before: str
    after: str
    change: str


def page(report: Report) -> str:
    """The text of ``report.html``. It loads nothing: no script, no font, no picture from elsewhere."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"short": short, "digits": digits}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        summary=summary(report),
        signs=SIGNS,
        titles=TITLES,
        tiles=tiles(report),
        gauge=gauge,
        plots=[(title, words, draw(report)) for title, words, draw in PLOTS],
        remarks=remarks(report),
        source=report_operators.source,
        most_operators=MOST_OPERATORS,
    )


def tiles(report: Report) -> tuple[Tile, ...]:
    """Parameters, multiply-accumulates, the largest file, the lowest accuracy."""
    found = [
        Tile("Parameters", short(report.teacher.params), short(report.model.params), _change(report.teacher.params, report.model.params)),
        Tile("MACs", short(report.teacher.macs), short(report.model.macs), _change(report.teacher.macs, report.model.macs)),
    ]
    if report.targets:
        before, after = report.teacher.params * 4 / 1e6, max(t.artifact.size_bytes for t in report.targets) / 1e6
        found.append(Tile("Largest file, MB", digits(before), digits(after), _change(before, after)))
    worst = min((t.accuracy for t in report.targets if t.accuracy), key=lambda accuracy: accuracy.value, default=None)
    if worst is not None:
        found.append(
            Tile(f"Lowest {worst.metric.rpartition(':')[2]}", f"{worst.baseline:.4f}", f"{worst.value:.4f}", f"{-worst.drop:+.4f}".replace("-", MINUS))
        )
    return tuple(found)


def _change(before: float, after: float) -> str:
    if not before:
        return ""
    ratio = before / after if after else 0.0
    return f"{ratio:.3g}{TIMES} smaller" if ratio >= 1.005 else "unchanged" if ratio > 0.995 else f"{after / before:.3g}{TIMES} larger"


def gauge(finding: Finding) -> Gauge | None:
    """Where a finding's numbers lie on a bar that begins at zero or below; None for what was not measured."""
    if finding.measured is None:
        return None
    low = finding.measured if finding.low is None else finding.low
    high = finding.measured if finding.high is None else finding.high
    finite = [number for number in (0.0, finding.measured, finding.limit, low, high) if abs(number) != float("inf")]
    start, end = min(finite) * ROOM, max(finite) * ROOM or 1.0

    def place(number: float) -> float:
        return 100 * min(1.0, max(0.0, (number - start) / (end - start)))

    return Gauge(place(0.0), place(finding.measured), place(low), place(high), place(finding.limit))


def remarks(report: Report) -> tuple[tuple[str, Diagnostic], ...]:
    """Every diagnostic with who made it."""
    made = [(step.spec, diagnostic) for step in report.passes for diagnostic in step.diagnostics]
    return tuple(made + [(target.name, diagnostic) for target in report.targets for diagnostic in target.diagnostics])
