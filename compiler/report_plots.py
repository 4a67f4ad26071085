"""The plots of a report, as SVG that takes its colours from the page: one drawing for light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgesmith.compiler.report_text import digits, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from edgesmith.compiler.report import Report

WIDTH_IN, HEIGHT_IN = 5.1, 3.2
ROW_IN, MARGIN_IN = 0.34, 0.75
FONT_PT = 10
LABEL_CHARACTERS = 28
PAIR_OFFSET = 0.19
"""Half the distance of two bars in one row."""
SERIES = 6
INK, MUTED, LINE, ACCENT, SURFACE, FAINT = (f"#0000{n:02x}" for n in range(1, 7))
SERIES_COLOURS = tuple(f"#0001{n:02x}" for n in range(1, SERIES + 1))
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", SURFACE: "surface", FAINT: "faint"}
VARIABLES |= {colour: f"series-{number}" for number, colour in enumerate(SERIES_COLOURS, 1)}
"""Stand-ins that no drawing would use by itself -> the custom property of the page that takes their place."""
LOG_FROM = 8.0
"""A latency axis that spans more than this factor is logarithmic."""
PLACES = ((7, 0, "left", "center"), (-7, 0, "right", "center"), (0, 8, "center", "bottom"), (0, -8, "center", "top"))
"""Where a point's label may stand: offset in points, alignment; the first that is free."""
MARKERS = {"candidate": "o", "kept": "D", "artifact": "s"}


@dataclass(frozen=True)
class Point:
    """One dot of accuracy against latency. ``kind`` is a key of MARKERS."""

    label: str
    latency_ms: float
    accuracy: float
    kind: str
    colour: str
    tip: str


def points(report: Report) -> tuple[Point, ...]:
    """Every candidate and every artifact of which both numbers are known."""
    found = []
    for c in report.candidates:
        if c.latency_ms is not None and c.accuracy is not None:
            tip = f"{c.name}: {digits(c.latency_ms)} ms, {c.accuracy:.4g}, {short(c.params)} parameters. {c.reason}"
            found.append(Point(c.name, c.latency_ms, c.accuracy, "kept" if c.kept else "candidate", ACCENT if c.kept else MUTED, tip))
    for number, t in enumerate(report.targets):
        if t.latency_ms is not None and t.accuracy is not None:
            tip = f"{t.name}: p50 {digits(t.latency_ms.p50)} ms, {t.accuracy.metric.rpartition(':')[2]} {t.accuracy.value:.4g}"
            found.append(Point(t.name, t.latency_ms.p50, t.accuracy.value, "artifact", SERIES_COLOURS[number % SERIES], tip))
    return tuple(found)


def accuracy_against_latency(report: Report) -> str | None:
    """Every candidate seen and every artifact; None where nothing has both numbers."""
    shown = points(report)
    if not shown:
        return None
    from matplotlib.ticker import LogLocator, NullFormatter

    def draw(figure: Figure, axes: Axes) -> None:
        for number, point in enumerate(shown):
            face = SURFACE if point.kind == "candidate" else point.colour
            axes.scatter(
                point.latency_ms,
                point.accuracy,
                s=46,
                marker=MARKERS[point.kind],
                facecolor=face,
                edgecolor=point.colour,
                linewidth=1.4,
                zorder=3,
                gid=f"point-{number}",
            )
        latencies = [point.latency_ms for point in shown]
        if max(latencies) > LOG_FROM * min(latencies):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.margins(0.14, 0.16)
        axes.grid(visible=True)
        axes.set_xlabel("latency, ms")
        axes.set_ylabel(_metric(report))
        first = sorted(shown, key=lambda point: point.kind == "candidate")
        name_points(figure, axes, [(p.latency_ms, p.accuracy, p.label, MUTED if p.kind == "candidate" else INK) for p in first])

    tips = {f"point-{number}": point.tip for number, point in enumerate(shown)}
    return svg(draw, f"Accuracy against latency of {len(shown)} models", tips=tips)


def _metric(report: Report) -> str:
    return next((t.accuracy.metric.rpartition(":")[2] for t in report.targets if t.accuracy), "accuracy")


def name_points(figure: Figure, axes: Axes, names: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the name of each (x, y, name, colour) where it hits no other name, point or border; one that finds no place is left to the tip."""
    figure.draw_without_rendering()
    marks = [axes.transData.transform((x, y)) for x, y, _, _ in names]
    taken: list[Any] = []
    for (at_x, at_y, name, colour), (x, y) in zip(names, marks, strict=True):
        for dx, dy, horizontal, vertical in PLACES:
            text = axes.annotate(
                cut(name), (at_x, at_y), (dx, dy), textcoords="offset points", ha=horizontal, va=vertical,
                color=colour, fontsize=FONT_PT - 1.5, parse_math=False,
            )  # fmt: skip
            box = text.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            hits = any(box.overlaps(other) for other in taken) or any(box.padded(3).contains(mx, my) for mx, my in marks if (mx, my) != (x, y))
            if inside and not hits:
                taken.append(box)
                break
            text.remove()


def seconds_per_pass(report: Report) -> str | None:
    """One bar a pass; None where there is none."""
    if not report.passes:
        return None
    labels, values = [p.spec for p in report.passes], [p.seconds for p in report.passes]
    return _bars("Time per pass", "seconds", labels, values, [ACCENT] * len(values), [f"{value:.1f} s" for value in values])


def size_before_and_after(report: Report) -> str | None:
    """The source model's weights as float32, and every file; None where there is no file."""
    if not report.targets:
        return None
    values = [report.teacher.params * 4 / 1e6, *(t.artifact.size_bytes / 1e6 for t in report.targets)]
    labels = ["source, as float32", *(t.name for t in report.targets)]
    colours = [MUTED, *(SERIES_COLOURS[number % SERIES] for number in range(len(report.targets)))]
    return _bars("Size before and after", "MB", labels, values, colours, [f"{digits(value)} MB" for value in values])


def what_is_left(report: Report) -> str | None:
    """Parameters and multiply-accumulates after each pass, as a share of the source model's; None where no pass ran."""
    before = report.teacher
    if not report.passes or not before.params or not before.macs:
        return None
    labels = ["source", *(p.spec.partition("{")[0] for p in report.passes)]
    params = [100.0, *(100 * p.params / before.params for p in report.passes)]
    macs = [100.0, *(100 * p.macs / before.macs for p in report.passes)]

    def draw(_: Figure, axes: Axes) -> None:
        for values, colour, offset in ((params, SERIES_COLOURS[0], -PAIR_OFFSET), (macs, SERIES_COLOURS[1], PAIR_OFFSET)):
            places = [place + offset for place in range(len(values))]
            axes.barh(places, values, color=colour, height=1.8 * PAIR_OFFSET, zorder=3)
            _write_beside(axes, places, values, [f"{value:.0f}" for value in values], FONT_PT - 2)
        axes.text(1, 0.15, "parameters", color=SERIES_COLOURS[0], transform=axes.transAxes, ha="right", fontweight="bold")
        axes.text(1, 0.04, "MACs", color=SERIES_COLOURS[1], transform=axes.transAxes, ha="right", fontweight="bold")
        rows(axes, labels, max(*params, *macs), "% of the source model")

    return svg(draw, "Parameters and multiply-accumulates left after each pass", height_in=MARGIN_IN + ROW_IN * len(labels))


def rows(axes: Axes, labels: Sequence[str], largest: float, unit: str) -> None:
    """The frame of horizontal bars, one row for each label, with room for a number beside the largest."""
    axes.set_yticks(range(len(labels)), [cut(label) for label in labels])
    axes.invert_yaxis()
    axes.set_xlim(0, (largest or 1.0) * 1.18)
    axes.set_xlabel(unit)
    axes.grid(visible=True, axis="x")
    axes.tick_params(axis="y", length=0)


def _write_beside(axes: Axes, places: Sequence[float], values: Sequence[float], words: Sequence[str], size_pt: float) -> None:
    for place, value, word in zip(places, values, words, strict=True):
        axes.annotate(word, (value, place), (5, 0), textcoords="offset points", va="center_baseline", color=INK, fontsize=size_pt)


def _bars(title: str, unit: str, labels: Sequence[str], values: Sequence[float], colours: Sequence[str], words: Sequence[str]) -> str:
    def draw(_: Figure, axes: Axes) -> None:
        axes.barh(range(len(values)), values, color=colours, height=0.58, zorder=3)
        _write_beside(axes, range(len(values)), values, words, FONT_PT - 0.5)
        rows(axes, labels, max(values), unit)

    return svg(draw, title, height_in=MARGIN_IN + ROW_IN * len(labels))


def cut(label: str) -> str:
    """``label`` in the room that there is beside a bar."""
    return label if len(label) <= LABEL_CHARACTERS else label[: LABEL_CHARACTERS - 1] + "…"


def svg(draw: Callable[[Figure, Axes], None], title: str, *, height_in: float = HEIGHT_IN, tips: dict[str, str] | None = None) -> str:
    """Draw, and hand the drawing over to the page: colours and font are the page's, sizes follow its width."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.size": FONT_PT, "font.family": "sans-serif", "axes.unicode_minus": False,
        "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": MUTED, "ytick.labelcolor": INK, "grid.color": LINE, "grid.linewidth": 0.7,
        "text.color": INK, "text.parse_math": False,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        axes = figure.add_subplot()
        draw(figure, axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(stream.getvalue(), title, tips or {})


def _themed(svg: str, title: str, tips: dict[str, str]) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    svg = re.sub(r"<svg[^>]*>", f'<svg {view.group()} role="img" aria-label="{html.escape(title)}">', svg, count=1)
    for gid, tip in tips.items():
        svg = svg.replace(f'<g id="{gid}">', f"<g><title>{html.escape(tip)}</title>")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    svg = re.sub(r"(font: (?:\w+ )?[\d.]+px) [^;\"]*", r"\1 var(--font)", svg)
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", svg)
    return re.sub(r"#000[01][0-9a-f]{2}", lambda found: f"var(--{VARIABLES[found[0]]})" if found[0] in VARIABLES else found[0], svg)
