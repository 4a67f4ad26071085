"""What there is to choose from, and how a machine or an artifact is doing, as tables for people."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesmith.compiler.profile.memory_types import FIRST, LOADED, STEADY

if TYPE_CHECKING:
    from edgesmith.compiler.budget import Finding
    from edgesmith.compiler.doctor import Health
    from edgesmith.compiler.profile.memory_types import Memory
    from edgesmith.compiler.profile.types import Profile
    from edgesmith.compiler.report_operators import OperatorsReport

Rows = list[tuple[str, ...]]
PERCENTILES = (50, 90, 99)


def show(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table to standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=sys.stdout)
    console.width = max(console.width, 100)
    console.print(table)


def passes() -> Rows:
    """Name with options, what it keeps of the numbers, what it does."""
    from edgesmith.compiler import registry

    found: Rows = []
    for name in registry.pass_names():
        step = registry.pass_class(name)
        fields = (f"{f.name}={_default(f)}" for f in dataclasses.fields(step))  # type: ignore[arg-type]
        options = ", ".join(fields)
        found.append((name, step.numerics.value, options, _first_line(step)))
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return "..." if value is dataclasses.MISSING else f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value).lower()


def _first_line(thing: object) -> str:
    return (getattr(thing, "__doc__", None) or "").strip().split("\n", 1)[0].replace("``", "")


def targets() -> Rows:
    """Name, suffix of its files, version of its runtime, or the extra that brings it."""
    from edgesmith.compiler import registry

    found: Rows = []
    for name in registry.target_names():
        target = registry.target(name)
        schemes = ", ".join(sorted(scheme.value for scheme in target.schemes))
        found.append((name, target.suffix, _installed(target.distribution) or f"not installed: pip install 'edgesmith[{target.extra}]'", schemes))
    return found


def _installed(distribution: str) -> str | None:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> Rows:
    """Name, what it is, and what is known of it."""
    from edgesmith.compiler.profile.devices import devices as known
    from edgesmith.compiler.profile.devices import environment

    machine = environment()
    about = f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_features'] or 'no vector instructions known'}"
    return [(device.name, device.summary, about if device.name == "host" else "") for device in known().values()]


def health(found: Health) -> Rows:
    """Requirement, extra, what is wanted, what is installed, status; what conflicts further down comes last."""
    rows: Rows = [(f.name, f.extra or "always", f.wanted, f.installed or "-", f.status) for f in found.direct]
    rows += [(f"{f.name} (for {f.by})", f.extra or "always", f.wanted, f.installed or "-", f.status) for f in found.indirect]
    return rows


def advice(found: Health) -> list[str]:
    """What to do about it, one line each; and the machine."""
    lines = [f"{key}: {value or 'none'}" for key, value in found.machine.items()]
    if not found.installed:
        lines.append("edgesmith itself is not installed, so that its requirements are not known: pip install edgesmith")
    lines += [f"missing: {extra}: pip install 'edgesmith[{extra}]'" for extra in found.missing_extras]
    lines += [f"broken: {f.by} needs {f.name}{f.wanted}, installed is {f.installed or 'none'}" for f in found.broken]
    return lines


def profile_data(artifact: Path, profile: Profile, findings: Sequence[Finding], operators: OperatorsReport | None = None) -> dict[str, Any]:
    """A measurement as plain data, its keys as in ``report.json``."""
    from edgesmith.compiler.report import LatencyReport, MemoryReport

    return {
        "artifact": {"path": str(artifact), "size_bytes": artifact.stat().st_size},
        "device": profile.device,
        "threads": profile.threads,
        "runtime_version": profile.runtime_version,
        "latency_ms": dataclasses.asdict(LatencyReport.of(profile, findings)),
        "memory_mb": None if profile.memory is None else dataclasses.asdict(MemoryReport.of(profile.memory)),
        "kept": profile.kept,
        "load_ms": profile.load_ms,
        "environment": dict(profile.environment),
        "findings": [{**dataclasses.asdict(f), "verdict": f.verdict.value} for f in findings],
        "operators": None if operators is None else _plain(dataclasses.asdict(operators)),
    }


def _plain(value: Any) -> Any:
    """Plain data, with an enumeration's members as their values."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.value if isinstance(value, Enum) else value


def profile_rows(profile: Profile) -> Rows:
    """Quantity, value, 95 % interval."""
    rows: Rows = []
    for percentile in PERCENTILES:
        found = profile.latency_ms(percentile)
        rows.append((f"latency p{percentile}", f"{found.value:.3f} ms", f"{found.low:.3f} to {found.high:.3f}"))
    disturbed = f"{1 - profile.kept:.0%} of all were disturbed by other processes" if profile.kept < 1 else ""
    rows.append(("calls", f"{len(profile.samples_ns)} in {len(set(profile.rounds))} processes", disturbed))
    rows.append(("load", f"{profile.load_ms:.1f} ms", ""))
    if profile.memory is not None:
        rows += memory_rows(profile.memory)
    rows.append(("runtime", profile.runtime_version, f"{profile.threads} thread{'s' if profile.threads > 1 else ''}"))
    return rows


def memory_rows(memory: Memory) -> Rows:
    """What the model adds to its process, beside what was planned; the process's own peak comes last."""
    plan = memory.plan
    planned = "" if plan is None else f"planned {_mb(plan.dirty_bytes)}"
    parts = "" if plan is None else f": weights {_mb(plan.weights_bytes)}, packed {_mb(plan.packed_bytes)}, arena {_mb(plan.arena_bytes)}"
    parts += "" if plan is None else f", records {_mb(plan.runtime_bytes)}"
    spread = f"{len(memory.processes)} processes: {_mb(memory.dirty_bytes.low)} to {_mb(memory.dirty_bytes.high)}"
    return [
        ("memory of the model, dirty", _mb(memory.dirty_bytes.value), spread),
        ("  when loaded", _mb(memory.dirty_at(LOADED).value), ""),
        ("  after the first run", _mb(memory.dirty_at(FIRST).value), ""),
        ("  in steady state", _mb(memory.dirty_at(STEADY).value), planned + parts),
        ("  clean pages of its file", _mb(memory.mapped_bytes.value), "" if plan is None else f"planned {_mb(plan.mapped_bytes)}"),
        ("  most at any moment, both", _mb(memory.peak_rss_bytes.value), ""),
        ("peak memory of the process", _mb(memory.process_peak_rss_bytes), ""),
    ]


def _mb(size_bytes: float) -> str:
    """Two digits, so that a model of a hundred kilobytes shows."""
    return f"{size_bytes / 1e6:.2f} MB"
