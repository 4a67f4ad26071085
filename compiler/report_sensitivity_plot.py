"""The plot of what each INT8 operator costs alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgesmith.compiler.report_plots import ACCENT, INK, name_points, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from edgesmith.compiler.report import Report

NAMED = 6
"""So many of the most sensitive operators have their names beside their points, where there is room."""


def sensitivity(report: Report) -> str | None:
    """A point an operator: its share of the time, and how far it alone moves the outputs; None where nothing was quantized."""
    shown = [s for s in report.sensitivity if s.time_share is not None]
    if not shown:
        return None
    named = sorted(shown, key=lambda s: s.sqnr_db)[:NAMED]

    def draw(figure: Figure, axes: Axes) -> None:
        for number, s in enumerate(shown):
            axes.scatter(100 * (s.time_share or 0.0), s.sqnr_db, s=40, facecolor=ACCENT, edgecolor=ACCENT, zorder=3, gid=f"operator-{number}")
        axes.margins(0.2, 0.14)
        axes.grid(visible=True)
        axes.set_xlabel("% of the operators' time")
        axes.set_ylabel("SQNR of the outputs, dB")
        name_points(figure, axes, [(100 * (s.time_share or 0.0), s.sqnr_db, s.where, INK) for s in named])

    tips = {f"operator-{number}": f"{s.where} ({s.scheme}): {s.sqnr_db:.1f} dB, {s.drop:+.4f} of the metric lost" for number, s in enumerate(shown)}
    return svg(draw, f"Sensitivity of {len(shown)} operators", tips=tips)
