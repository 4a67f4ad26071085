"""Memory of eight models on every runtime: as the kernel counts it, twice, and as planned from the file.

    python benchmarks/memory.py [--folder FOLDER] [--target NAME ...]

The files are made once and kept in FOLDER. The exit code is 1 if a plan is off by more than 10 %, or two runs differ by more than 3 %; both
allow for 100 kB, because a model of a few hundred kilobytes is counted in pages of 4 kB, of which the heap's are shared with the runtime.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from memory_models import CASES, artifact

from edgesmith.compiler import registry
from edgesmith.compiler.profile.devices import environment
from edgesmith.compiler.profile.memory import measure_memory
from edgesmith.compiler.profile.memory_types import Memory, MemoryPlan
from edgesmith.compiler.target import Target

PLAN, REPEAT, PAGES_BYTES = 0.10, 0.03, 100_000
COLUMNS = ("model", "file", "loaded", "first run", "steady", "mapped", "peak", "again", "planned", "off", "planned mapped", "off with mapped")
MB = 1e6


def main() -> int:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("out/benchmark-memory"))
    parser.add_argument("--target", action="append", choices=registry.target_names())
    arguments = parser.parse_args()
    machine = environment()
    print(f"{machine['cpu']}, {machine['os']}; MB of 1 000 000 bytes, one thread; the increase over the same process without the model.")
    missed: list[str] = []
    for name in arguments.target or registry.target_names():
        print(f"\n{registry.target(name).distribution}\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
        for case in CASES:
            missed += row(case, registry.target(name), arguments.folder)
    print(f"\n{'; '.join(missed) or f'every plan within {PLAN:.0%}, every two runs within {REPEAT:.0%}, or {PAGES_BYTES // 1000} kB'}")
    return 1 if missed else 0


def row(case: str, target: Target, folder: Path) -> Iterator[str]:
    """Print one line of the table; what misses a bar comes back."""
    path = artifact(case, target.name, folder)
    calls = [array[:, None] for array in CASES[case].samples(1)]
    first, second = (measure_memory(path, target, 1, calls) for _ in range(2))
    assert first is not None and second is not None
    plan = target.memory_plan(path)
    print(f"| {case} | {' | '.join(cells(path, first, second, plan))} |", flush=True)
    if is_off(plan.dirty_bytes, first.dirty_at("steady").value, PLAN) or is_off(plan.total_bytes, first.held_bytes.value, PLAN):
        yield f"{case} on {target.name}: the plan is off"
    if is_off(second.dirty_bytes.value, first.dirty_bytes.value, REPEAT):
        yield f"{case} on {target.name}: two runs differ"


def cells(path: Path, first: Memory, second: Memory, plan: MemoryPlan) -> Iterator[str]:
    """The columns but the first."""
    steady = first.dirty_at("steady").value
    for size in (path.stat().st_size, *(first.dirty_at(phase).value for phase in ("loaded", "first", "steady")), first.mapped_bytes.value):
        yield f"{size / MB:.2f}"
    yield f"{first.peak_rss_bytes.value / MB:.2f}"
    yield f"{second.dirty_bytes.value / first.dirty_bytes.value - 1:+.1%}"
    yield f"{plan.dirty_bytes / MB:.2f}"
    yield f"{plan.dirty_bytes / steady - 1:+.1%}"
    yield f"{plan.mapped_bytes / MB:.2f}"
    yield f"{plan.total_bytes / first.held_bytes.value - 1:+.1%}"


def is_off(found: float, wanted: float, share: float) -> bool:
    """Whether two sizes differ by more than ``share``, and by more than pages explain."""
    return abs(found - wanted) > max(share * wanted, PAGES_BYTES)


if __name__ == "__main__":
    sys.exit(main())
