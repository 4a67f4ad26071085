"""The straight line: build file -> model -> passes -> artifacts -> verdict -> report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgesmith.compiler.buildfile import BuildSpec, read
from edgesmith.compiler.cache import build_key
from edgesmith.compiler.quiet import logging_to
from edgesmith.compiler.report import Report
from edgesmith.compiler.workspace import workspace

if TYPE_CHECKING:
    from edgesmith.compiler.diagnostics import Diagnostic
    from edgesmith.compiler.progress import Progress

DEFAULT_OUT = Path("out")


def build(
    source: str | Path | BuildSpec,
    *,
    out: str | Path = DEFAULT_OUT,
    targets: Sequence[str] = (),
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Compile what a build file describes, measure every artifact, and judge it.

    Args:
        source: a build file, or a spec read from one.
        out: the folder for the artifacts, ``model.pt2``, ``report.json``, ``report.html``, ``build.log`` and the cache. An unchanged
            build is answered from it; a killed one continues.
        targets: names of the only targets to build.
        overrides: ``KEY=VALUE`` settings that replace the file's.

    Returns:
        the report; its ``exit_code`` is 0 met, 1 missed, 3 unknown.

    Raises:
        UserError: something in the build file, the model, the data or the folder is wrong; what was there before is left alone.
        NumericsError: a step broke the numbers; it is named.
    """
    from edgesmith.compiler.progress import silent

    spec = source if isinstance(source, BuildSpec) else read(source, overrides, targets)
    progress = progress or silent()
    with workspace(Path(out), lambda: progress.step("waiting for another build into this folder")) as folder, logging_to(folder / "build.log"):
        key = build_key(spec)
        known = Report.known(folder, key)
        if known is not None:
            return known
        from edgesmith.compiler.line import Line

        line = Line.of(spec, folder, progress)
        line.refuse()
        report = line.report(line.compressed(), key)
        report.write(folder)
        return report


def check(source: str | Path | BuildSpec, *, targets: Sequence[str] = (), overrides: Sequence[str] = ()) -> tuple[Diagnostic, ...]:
    """Everything that can be refused cheaply: nothing is trained, lowered or written.

    Returns:
        what passes and targets say of the model, refusals included.

    Raises:
        UserError: the build file, the model or the data cannot be used.
    """
    from edgesmith.compiler.line import Line
    from edgesmith.compiler.progress import silent

    spec = source if isinstance(source, BuildSpec) else read(source, overrides, targets)
    return Line.of(spec, Path(), silent()).remarks()
