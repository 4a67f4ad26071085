"""The plots of where the time of every target goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgesmith.compiler.profile.operator_types import Category, OperatorTime
from edgesmith.compiler.report_plots import FONT_PT, INK, LABEL_CHARACTERS, MARGIN_IN, ROW_IN, SERIES, SERIES_COLOURS, rows, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from edgesmith.compiler.report import Report

MOST_MODULES = 10
LEGEND_ROWS = 2
NAMED_FROM = 0.06
"""A part of a bar has its number written in it from this share of the whole on."""
COLOURS = dict(zip((Category.FAST, Category.UNDELEGATED, Category.LAYOUT, Category.QUANTIZE, Category.FLOAT_ISLAND), SERIES_COLOURS, strict=False))


def by_category(report: Report) -> str | None:
    """A bar a target, of the shares of all categories; None where no operators were timed."""
    timed = [(target.name, target.operators) for target in report.targets if target.operators is not None]
    if not timed:
        return None
    present = [category for category in COLOURS if any(c.category is category for _, found in timed for c in found.categories)]

    def draw(_: Figure, axes: Axes) -> None:
        for place, (_name, found) in enumerate(timed):
            start = 0.0
            for category in present:
                share = 100 * sum(c.share for c in found.categories if c.category is category)
                axes.barh(place, share, left=start, color=COLOURS[category], height=0.58, zorder=3, label=category.value if not place else None)
                if share >= 100 * NAMED_FROM:
                    axes.text(start + share / 2, place, f"{share:.0f}", ha="center", va="center_baseline", color=INK, fontsize=FONT_PT - 2, zorder=4)
                start += share
        rows(axes, [name for name, _ in timed], 100, "% of the operators' time")
        axes.set_xlim(0, 100)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=FONT_PT - 2)

    return svg(draw, "Share of the time by category", height_in=MARGIN_IN + ROW_IN * (len(timed) + LEGEND_ROWS))


def by_module(report: Report) -> str | None:
    """The modules that take most, a bar a target; None where no operator says its module."""
    times = {target.name: module_times(target.operators.operators) for target in report.targets if target.operators is not None}
    dearest = sorted({m for found in times.values() for m in found}, key=lambda m: -max(found.get(m, 0.0) for found in times.values()))[:MOST_MODULES]
    if not dearest:
        return None
    numbers = {target.name: number for number, target in enumerate(report.targets)}
    height = 0.8 / len(times)

    def draw(_: Figure, axes: Axes) -> None:
        for order, (name, found) in enumerate(times.items()):
            places = [row + (order - (len(times) - 1) / 2) * height for row in range(len(dearest))]
            axes.barh(places, [found.get(m, 0.0) for m in dearest], height=height, color=SERIES_COLOURS[numbers[name] % SERIES], label=name, zorder=3)
        rows(axes, [_end(module) for module in dearest], max(max(found.values(), default=0.0) for found in times.values()), "ms")
        axes.legend(loc="lower right", frameon=False, fontsize=FONT_PT - 2)

    return svg(draw, "The modules that take most", height_in=MARGIN_IN + ROW_IN * len(dearest) * max(1.0, len(times) / 2))


def _end(path: str) -> str:
    """The end of a module's path, which tells it from its neighbours, in the room that there is beside a bar."""
    return path if len(path) <= LABEL_CHARACTERS else "…" + path[1 - LABEL_CHARACTERS :]


def module_times(operators: Sequence[OperatorTime]) -> dict[str, float]:
    """Milliseconds by source module; what several were fused into counts for each in equal parts."""
    found: dict[str, float] = {}
    for operator in operators:
        for path in operator.sources:
            found[path] = found.get(path, 0.0) + operator.ms / len(operator.sources)
    return found
