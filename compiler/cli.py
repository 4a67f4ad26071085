"""The command ``edgesmith``. It parses, calls and prints; everything heavy is imported inside a command."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from edgesmith.compiler.border import BROKEN_PIPE, INTERRUPTED, guarded

DEFAULT_FILE = "edgesmith.toml"
_FILE = click.argument("file", default=DEFAULT_FILE, type=click.Path(path_type=Path))
_TARGETS = click.option("--target", "targets", metavar="NAME", multiple=True, help="Build this target only; may be repeated.")
_SET = click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the build file: budget.latency_ms=5, target.litert.threads=2."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


WAITING = ("OMP_WAIT_POLICY", "PASSIVE")
"""Torch's threads sleep while they wait for each other: spinning makes training several times slower on a machine that others use too."""

COLLECT_EVERY = (50_000, 20, 100)
"""New objects between two searches for garbage, and searches between two of the older objects: importing torch makes hundreds of thousands that stay,
and searching them again and again took a fifth of a check's time."""


def main() -> NoReturn:
    """``sys.argv`` in, an exit code out."""
    arguments = sys.argv[1:]
    os.environ.setdefault(*WAITING)
    gc.set_threshold(*COLLECT_EVERY)
    sys.exit(guarded(lambda: run(arguments), arguments))


def leave() -> NoReturn:
    """``main``, but the process ends without taking torch apart object by object, which takes a command half a second."""
    try:
        main()
    except SystemExit as ended:
        code = ended.code
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except BrokenPipeError:
            code = BROKEN_PIPE
        os._exit(code if isinstance(code, int) else 1)


def run(arguments: list[str]) -> int:
    """The exit code of the command that ``arguments`` spell; errors are raised, those of usage told."""
    try:
        result = cli.main(args=arguments, prog_name="edgesmith", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return INTERRUPTED
    except SystemExit:  # click ends a closed pipe with 1, which means "missed" here
        return BROKEN_PIPE
    return result if isinstance(result, int) else 0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgesmith")
def cli() -> None:
    """Compile a fine-tuned PyTorch model and a budget into measured .onnx, .tflite and .pte files.

    Exit codes: 0 the budget is met, 1 missed, 2 something for you to put right, 3 not decided, 70 a defect of edgesmith.
    """


@cli.command()
@_FILE
@_TARGETS
@click.option("--out", default="out", show_default=True, type=click.Path(path_type=Path), help="Folder for artifacts, report and cache.")
@_SET
@_JSON
def build(file: Path, targets: tuple[str, ...], out: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Build what FILE describes, and judge it.

    FILE is edgesmith.toml if not given. The model is compressed, lowered for every target, measured and judged against its budget.
    """
    from edgesmith.compiler.build import build as build_all
    from edgesmith.compiler.progress import progress

    with progress() as shown:
        report = build_all(file, out=out, targets=targets, overrides=overrides, progress=shown)
    click.echo(report.to_json()) if as_json else report.show()
    return report.exit_code


@cli.command()
@_FILE
@_TARGETS
@_SET
def check(file: Path, targets: tuple[str, ...], overrides: tuple[str, ...]) -> int:
    """Refuse what can be refused without training."""
    from edgesmith.compiler.build import check as check_all
    from edgesmith.compiler.diagnostics import errors

    remarks = check_all(file, targets=targets, overrides=overrides)
    for remark in remarks:
        click.echo(str(remark), err=True)
    refused = len(errors(remarks))
    click.echo(f"{file}: {f'{refused} refusals' if refused else 'nothing speaks against building it'}")
    return 2 if refused else 0


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads that the runtime may use.")
@click.option("--latency-ms", type=click.FloatRange(min=0, min_open=True), help="Limit of the 90th percentile of one call.")
@click.option("--memory-mb", type=click.FloatRange(min=0, min_open=True), help="Limit of the dirty memory that the model adds to its process.")
@click.option("--operators", is_flag=True, help="Also time every operator: by source module, with what is not on the fast path.")
@click.option("--official", is_flag=True, help="Time as MLPerf Mobile's single-stream scenario does: 1 024 queries and 60 s at least, every one counted.")
@_JSON
def profile(artifact: Path, *, threads: int, latency_ms: float | None, memory_mb: float | None, operators: bool, official: bool, as_json: bool) -> int:
    """Measure ARTIFACT (.onnx, .tflite, .pte).

    It runs in fresh processes; with limits, the exit code is the verdict.
    """
    from edgesmith.compiler import listing
    from edgesmith.compiler.budget import EXIT_CODES, Budget, overall
    from edgesmith.compiler.profile.operators import profile_operators
    from edgesmith.compiler.profile.protocol import measure
    from edgesmith.compiler.profile.verdicts import judge
    from edgesmith.compiler.report_operators import OperatorsReport, category_rows, headline, operator_rows

    budget = Budget(latency_ms=latency_ms, memory_mb=memory_mb)
    measured = measure(artifact, threads=threads, budget=budget, official=official)
    findings = judge(budget, measured, artifact.stat().st_size)
    timed = OperatorsReport.of(profile_operators(artifact, threads=threads)) if operators else None
    if as_json:
        _echo_json(listing.profile_data(artifact, measured, findings, timed))
    else:
        listing.show((str(artifact), "measured", "95 % interval, where nothing else is said"), listing.profile_rows(measured))
        for finding in findings:
            click.echo(f"{finding.verdict.name}: {finding.message}")
        if timed is not None:
            listing.show(("source module", "operator", "median", "share", "path"), operator_rows(timed))
            listing.show(("path", "operators", "median", "share", "what to do"), category_rows(timed))
            click.echo(headline(timed))
    return EXIT_CODES[overall(finding.verdict for finding in findings)]


class _Share(click.ParamType[float]):
    """``3%`` or ``0.03``."""

    name = "share"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as a number, at least 0."""
        if isinstance(value, float):
            return value
        number, percent, rest = value.partition("%")
        try:
            share = float(number) / (100 if percent else 1)
        except ValueError:
            share = -1.0
        if rest or not 0 <= share < float("inf"):
            self.fail(f"{value!r} is no share: 3% or 0.03", param, ctx)
        return share


@cli.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--max-slowdown", default="3%", show_default=True, type=_Share(), help="How much slower NEW may be.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads that the runtimes may use; reports say their own.")
@click.option("--limit-s", default=60.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help="Seconds that a pair of artifacts may take.")
@click.option("--junit", metavar="FILE", type=click.Path(path_type=Path), help="Write JUnit XML, too.")
@click.option("--github", is_flag=True, help="Print annotations for GitHub Actions, too.")
@_JSON
def compare(base: Path, new: Path, *, max_slowdown: float, threads: int, limit_s: float, junit: Path | None, github: bool, as_json: bool) -> int:  # noqa: PLR0913
    """Say whether NEW is slower than BASE.

    Both are artifacts, which are timed against each other, or reports of builds. The exit code is 1 if NEW is slower than --max-slowdown allows, 3 if
    that cannot be told. Without a BASE there the result is informational.
    """
    from edgesmith.compiler import gate_formats
    from edgesmith.compiler.budget import EXIT_CODES
    from edgesmith.compiler.gate import gate

    found = gate(base, new, max_slowdown=max_slowdown, threads=threads, limit_s=limit_s)
    if junit is not None:
        gate_formats.write_junit(found, junit)
    if as_json:
        _echo_json(gate_formats.data(found))
    else:
        click.echo("\n".join(gate_formats.lines(found)))
    if github:
        click.echo("\n".join(gate_formats.github(found)), err=as_json)
    return EXIT_CODES[found.verdict]


@cli.command()
@click.argument("model", default=DEFAULT_FILE)
@click.option("--picture", metavar="FILE", type=click.Path(path_type=Path), help="Draw every tensor's dimensions, too: .svg, .png or .pdf.")
@_JSON
def axes(model: str, *, picture: Path | None, as_json: bool) -> None:
    """Show what can be pruned in MODEL.

    MODEL is a build file (edgesmith.toml if not given), a .pt2 file, a Hugging Face folder or file.py:function. Groups of parameter slices that go together
    are listed with their members, and what must stay with its reasons.
    """
    from edgesmith.compiler import axes_report
    from edgesmith.compiler.axes import Axes
    from edgesmith.compiler.buildfile import model_spec
    from edgesmith.compiler.frontends.model_source import load_model

    found = Axes.of(load_model(model_spec(model)))
    if picture is not None:
        axes_report.draw(found, picture)
    if as_json:
        _echo_json(axes_report.data(found))
        return
    click.echo("\n".join(axes_report.lines(found, shutil.get_terminal_size().columns)))


@cli.command()
def passes() -> None:
    """List the passes, with their options."""
    from edgesmith.compiler import listing

    listing.show(("pass", "numbers", "options and defaults", "what it does"), listing.passes())


@cli.command()
def targets() -> None:
    """List the targets and their runtimes."""
    from edgesmith.compiler import listing

    listing.show(("target", "file", "runtime", "integers"), listing.targets())


@cli.command()
def devices() -> None:
    """List the devices to measure on."""
    from edgesmith.compiler import listing

    listing.show(("device", "what", "about"), listing.devices())


@cli.command()
def doctor() -> int:
    """Say what is installed, conflicts, is missing.

    The exit code is 2 if something needed is broken.
    """
    from edgesmith.compiler import listing
    from edgesmith.compiler.doctor import examine

    found = examine()
    listing.show(("needs", "extra", "wanted", "installed", "status"), listing.health(found))
    click.echo("\n".join(listing.advice(found)))
    return 2 if found.broken else 0


@cli.command()
@click.argument("file", default=DEFAULT_FILE, type=click.Path(path_type=Path))
@click.option("--schema", is_flag=True, help="Print the JSON Schema of the build file, for editors, and write nothing.")
def init(file: Path, schema: bool) -> None:
    """Write a commented build file.

    FILE is edgesmith.toml if not given, and must not be there yet.
    """
    if schema:
        from edgesmith.compiler.schema import json_schema

        _echo_json(json_schema())
        return
    from edgesmith.compiler.initfile import write_build_file

    click.echo(f"wrote {write_build_file(file)}")


def _echo_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))
