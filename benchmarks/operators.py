"""Operators of the models of memory_models.py on every runtime: what their times add up to, and how much of it is traced to a source module.

    python benchmarks/operators.py [--folder FOLDER] [--target NAME ...]

The files are made once and kept in FOLDER. The exit code is 1 if a sum is off a whole run's median by more than 10 %, at the best of three looks, or less
than 95 % of the time carries a source path.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memory_models import CASES, artifact

from edgesmith.compiler import registry
from edgesmith.compiler.profile.devices import environment
from edgesmith.compiler.profile.operator_types import Category, OperatorProfile
from edgesmith.compiler.profile.operators import profile_operators
from edgesmith.compiler.target import Target

SUM, SOURCED, LOOKS, SAMPLES = 0.10, 0.95, 3, 8
SHOWN = (Category.FAST, Category.QUANTIZE, Category.LAYOUT, Category.FLOAT_ISLAND, Category.UNDELEGATED)
COLUMNS = ("model", "method", "operators", "whole run ms", "sum ms", "off", "looks", "with source", *(category.value for category in SHOWN))


def main() -> int:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("out/benchmark-memory"))
    parser.add_argument("--target", action="append", choices=registry.target_names())
    arguments = parser.parse_args()
    machine = environment()
    print(f"{machine['cpu']}, {machine['os']}, load {machine['load_average']}; one thread; shares of the operators' time.")
    missed = 0
    for name in arguments.target or registry.target_names():
        print(f"\n**{registry.target(name).distribution}**\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
        missed += sum(row(case, registry.target(name), arguments.folder) for case in CASES)
    print(f"\n{missed} outside a bar" if missed else f"\nevery sum within {SUM:.0%}, at least {SOURCED:.0%} with a source")
    return 1 if missed else 0


def row(case: str, target: Target, folder: Path) -> bool:
    """Print one line of the table; whether it misses a bar."""
    path, samples = artifact(case, target.name, folder), CASES[case].samples(SAMPLES)
    seen: list[OperatorProfile] = []
    while len(seen) < LOOKS and (not seen or off(seen[-1]) > SUM):
        seen.append(profile_operators(path, target=target, samples=samples))
    best = min(seen, key=off)
    shares = {category: sum(o.share for o in best.operators if o.category is category) for category in SHOWN}
    ratio = f"{best.total_ms / best.whole_ms - 1:+.1%}"
    cells = (
        case, best.method, str(len(best.operators)), f"{best.whole_ms:.3f}", f"{best.total_ms:.3f}", ratio, str(len(seen)),
        f"{best.sourced_share:.1%}", *(f"{share:.1%}" for share in shares.values()),
    )  # fmt: skip
    print(f"| {' | '.join(cells)} |", flush=True)
    return off(best) > SUM or best.sourced_share < SOURCED


def off(profile: OperatorProfile) -> float:
    """How far the operators are from the whole run, as a share of it."""
    return abs(profile.total_ms / profile.whole_ms - 1)


if __name__ == "__main__":
    sys.exit(main())
