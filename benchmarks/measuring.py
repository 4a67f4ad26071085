"""How far the measuring instrument can be trusted: ``python benchmarks/measuring.py [SECTION]... [--count N] [--idle]``.

Sections: ``same`` (a file against itself), ``five`` and ``two`` (against itself made 5 % and 2 % slower), ``width`` (interval of the median of a model
of about 10 ms within 60 s), ``own`` (against the runtimes' own loops, and what a call costs beyond them), ``verdicts`` (budgets around the true value).
All but ``own`` run beside a load that comes and goes, unless ``--idle`` is given.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgesmith import Model, compare, measure
from edgesmith.compiler import registry
from edgesmith.compiler.budget import Budget, Finding, Verdict
from edgesmith.compiler.profile.comparison import Difference
from edgesmith.compiler.profile.devices import environment
from edgesmith.compiler.profile.statistics import mean_interval
from edgesmith.compiler.profile.verdicts import judge
from edgesmith.compiler.target import Target

LIMIT_S = 8.0
LONG = 10
TARGETS = ("onnxruntime", "litert", "executorch")
SECTIONS = ("same", "five", "two", "width", "own", "verdicts")
SHARES = {"same": 0.0, "five": 0.05, "two": 0.02}


def network(width: int, layers: int) -> Model:
    """A convolutional network with a residual path; random weights, so that nothing needs to be trained."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.second(torch.relu(self.first(x)))

    stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
    module = nn.Sequential(stem, *(Block() for _ in range(layers)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return Model.from_module(module, (torch.randn(2, 3, 64, 64),))


def ran_by(target: Target, runner: str) -> Target:
    """``target`` with a runner of this folder."""
    return type("Other", (type(target),), {"runner": Path(__file__).with_name(runner)})()


def beside(file: Path, about: dict[str, object], name: str) -> Path:
    """A copy of ``file`` in a folder ``name``, with what its runner reads beside it."""
    folder = file.parent / name
    folder.mkdir(exist_ok=True)
    copy = folder / file.name
    shutil.copyfile(file, copy)
    Path(f"{copy}.about").write_text(json.dumps(about))
    return copy


def slower(file: Path, target: Target, share: float) -> Path:
    """A copy of ``file`` that takes ``share`` longer."""
    return beside(file, {"runner": str(target.runner), "share": share}, f"slower_{share:g}")


def _busy(seed: int) -> None:
    """Spin and sleep by turns, one second each on average, as long as the process that started this one lives."""
    parent = os.getppid()
    rng = random.Random(seed)
    data = np.random.default_rng(0).standard_normal(1 << 16)
    while os.getppid() == parent:
        end = time.monotonic() + rng.expovariate(1.0)
        while time.monotonic() < end:
            np.sort(data)
        time.sleep(rng.expovariate(1.0))


@contextmanager
def load(wanted: bool) -> Iterator[None]:
    """A background load that comes and goes: a process that is busy half of the time."""
    process = multiprocessing.get_context("spawn").Process(target=_busy, args=(0,), daemon=True)
    if wanted:
        process.start()
    try:
        yield
    finally:
        if wanted:
            process.kill()
            process.join()


def known_ratio(section: str, files: dict[str, Path], count: int) -> None:
    """Compare a file with itself made slower by a known share, ``count`` times, the runtimes in turn."""
    share = SHARES[section]
    found, covered, widths, seconds = [], [], [], []
    names = ("onnxruntime", "litert")
    pairs = {name: (slower(files[name], registry.target(name), 0.0), slower(files[name], registry.target(name), share)) for name in names}
    for number in range(count):
        name = names[number % len(names)]
        base, new = pairs[name]
        began = time.monotonic()
        comparison = compare((base, new), target=ran_by(registry.target(name), "varied_runner.py"), limit_s=LIMIT_S)
        seconds.append(time.monotonic() - began)
        ratio = comparison.ratio()
        found.append(comparison.difference())
        covered.append(ratio.low <= 1 + share <= ratio.high)
        widths.append(ratio.high / ratio.value - 1)
        print(f"{section} {number + 1}/{count} {name}: {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}] {found[-1].value}", file=sys.stderr, flush=True)
    words = {word: sum(difference is word for difference in found) for word in Difference}
    print(
        f"| {section}: ratio {1 + share:g} | {count} | "
        + ", ".join(f"{words[word]} {word.value}" for word in Difference)
        + f" | {np.mean(covered):.1%} | {np.median(widths):.2%} | {np.median(seconds):.1f} s |"
    )


def width(files: dict[str, Path]) -> None:
    """Half width of the median's interval within 60 s."""
    for name, file in files.items():
        began = time.monotonic()
        profile = measure(file, limit_s=60.0, memory=False)
        p50 = profile.latency_ms(50)
        half = max(p50.high - p50.value, p50.value - p50.low) / p50.value
        print(f"| {name} | {p50.value:.2f} ms | {half:.2%} | {profile.kept:.0%} | {time.monotonic() - began:.0f} s |")


def verdicts(files: dict[str, Path], folder: Path, count: int) -> None:
    """Budgets within 10 % of the true value: how many that were MET does a measurement ten times as long refute?

    The long measurement of a file is ten measurements, taken in between, and refutes a budget that lies below the interval of their mean. Beside real
    files one whose 90th percentile is known, because it waits for times drawn from a list.
    """
    rng = random.Random(0)
    times_ms = [2.0 * rng.lognormvariate(0.0, 0.15) for _ in range(1000)]
    sleeper = folder / "sleeper.onnx"
    sleeper.write_text(json.dumps(times_ms))
    sleeping = ran_by(registry.target("onnxruntime"), "sleeper_runner.py")
    each = count // (len(TARGETS) + 1)
    for name, file, target in (*((name, files[name], registry.target(name)) for name in TARGETS), ("known times", sleeper, sleeping)):
        met_above = [float(np.percentile(times_ms, 90))] if file is sleeper else []
        p90s: list[float] = []
        findings: list[Finding] = []
        for number in range(each):
            if len(p90s) < LONG and number % max(1, each // LONG) == 0:
                p90s.append(measure(file, target=target, limit_s=LIMIT_S, memory=False).latency_ms(90).value)
            budget = Budget(latency_ms=float(np.mean(p90s)) * rng.uniform(0.9, 1.1))
            findings += judge(budget, measure(file, target=target, budget=budget, limit_s=LIMIT_S, memory=False), None)
            print(f"verdicts {name} {number + 1}: {findings[-1].limit / np.mean(p90s):.3f} of p90: {findings[-1].verdict.value}", file=sys.stderr, flush=True)
        long = mean_interval(p90s)
        met = [finding.limit for finding in findings if finding.verdict is Verdict.MET]
        tally = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
        refuted, untrue = sum(limit < long.low for limit in met), sum(limit < value for limit in met for value in met_above)
        known = untrue if met_above else ""
        print(f"| {name} | {sum(tally.values())} | " + ", ".join(f"{tally[v]} {v.value}" for v in Verdict) + f" | {refuted} | {known} |", flush=True)


def own(files: dict[str, Path], tiny: dict[str, Path]) -> None:
    """Ours against the runtime called as its own documentation does it, in one run; and the difference in microseconds on a model that does next to nothing."""
    for name in TARGETS:
        target = registry.target(name)
        for what, file in (("10 ms", files[name]), ("tiny", tiny[name])):
            bare, ours = (beside(file, {"runner": str(target.runner), "bare": bare}, f"bare_{bare}") for bare in (True, False))
            comparison = compare((bare, ours), target=ran_by(target, "varied_runner.py"), limit_s=60.0, precision=0.005)
            ratio, bare_ms = comparison.ratio(), comparison.profiles[0].latency_ms(50).value
            extra_us = 1e3 * bare_ms * (ratio.value - 1)
            print(
                f"| {name} | {what} | {bare_ms:.4g} ms | {ratio.value - 1:+.2%} [{ratio.low - 1:+.2%}, {ratio.high - 1:+.2%}] | {extra_us:+.2f} us |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--count", type=int, default=200, help="comparisons, and budgets")
    parser.add_argument("--idle", action="store_true", help="no background load")
    wanted = parser.parse_args()
    print(", ".join(f"{key}: {value}" for key, value in environment().items()))
    with tempfile.TemporaryDirectory(prefix="edgesmith-measuring-") as folder:
        made: dict[str, dict[str, Path]] = {}
        for size, model in {"two_ms": network(32, 3), "five_ms": network(56, 4), "ten_ms": network(56, 9), "tiny": network(4, 1)}.items():
            place = Path(folder) / size
            place.mkdir()
            made[size] = {name: registry.target(name).lower(model, place).path for name in TARGETS}
        for section in wanted.sections:
            with load(not wanted.idle and section != "own"):
                if section in SHARES:
                    known_ratio(section, made["two_ms"], wanted.count)
                elif section == "width":
                    width({**made["ten_ms"], "executorch": made["five_ms"]["executorch"]})
                elif section == "own":
                    own(made["ten_ms"], made["tiny"])
                else:
                    verdicts(made["two_ms"], Path(folder), wanted.count)


if __name__ == "__main__":
    main()
