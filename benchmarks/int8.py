"""INT8 files of a build beside those of the runtimes' own quantizers: ``python benchmarks/int8.py [BUILD_FILE ...] [--target NAME ...] [--nncf PYTHON]``.

Every build file gives a model and its data; the passes are equalise and quantize alone, at most 0.3 points may be lost. Same float file, same calibration
samples, same test samples, all files of one target timed in one run. A build file loses a case where a peer's file is as fast (to 3 %) and more than 0.1
points better, or faster and at least as good. The exit code is 1 if that is so in more than a tenth of the cases.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from int8_peers import PEERS, Arrays, Peer, with_nncf

from edgesmith.compiler import registry
from edgesmith.compiler.accuracy import outputs_of
from edgesmith.compiler.arbiter import TIE
from edgesmith.compiler.budget import Interval
from edgesmith.compiler.buildfile import read
from edgesmith.compiler.data import Split
from edgesmith.compiler.line import Line
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.devices import environment
from edgesmith.compiler.profile.protocol import compare
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.progress import silent
from edgesmith.compiler.target import Artifact, Target
from edgesmith.passes.observe.batches import calibration_batches

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = (EXAMPLES / "digits" / "edgesmith.toml", EXAMPLES / "grocery" / "efficientnet.toml")
SAMPLES, EQUAL, MOST_LOST = 128, 0.001, 0.1
PASSES = f'pipeline.passes=["fold-batch-norm", "fold-constants", "equalise{{samples={SAMPLES}}}", "quantize{{samples={SAMPLES}}}"]'
LIMITS = ("accuracy.max_drop=0.003", "budget={}")
LIMIT_S = 60.0


@dataclass(frozen=True)
class File:
    """One file: its accuracy on test data, and its time over that of the float file."""

    name: str
    size_bytes: int
    accuracy: float
    ratio: Interval


def main() -> int:
    """Print a table for each target of each build file, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=FILES)
    parser.add_argument("--target", action="append", choices=registry.target_names())
    parser.add_argument("--folder", type=Path, default=Path("out/benchmark-int8"))
    parser.add_argument("--nncf", type=Path, metavar="PYTHON", help="the interpreter of an environment with nncf, onnx and onnxruntime")
    wanted = parser.parse_args()
    peers = with_nncf(wanted.nncf) if wanted.nncf else PEERS
    machine = environment()
    print(f"{machine['cpu']}, {machine['os']}, load {machine['load_average']}; one thread.")
    lost, cases = 0, 0
    for number, file in enumerate(wanted.files):
        folder = wanted.folder / f"{number}-{file.stem}"
        line = Line.of(read(file, (PASSES, *LIMITS), wanted.target or registry.target_names()), folder, silent())
        model = line.compressed()
        shipping = line.shipping(model)
        assert shipping is not None and line.data is not None
        some = tuple(np.concatenate(parts) for parts in zip(*calibration_batches(model, line.data.for_passes().train, SAMPLES, line.spec.seed), strict=True))
        for spec, target in zip(line.spec.targets, line.targets, strict=True):
            ours, ruling = shipping.chosen(spec, target)
            plain = shipping.lowering.artifact(shipping.twin, target)
            files = {"float": plain.path, f"edgesmith ({ruling.chosen})": ours.path}
            refused = add_peers(files, peers[target.name], (shipping.twin, plain, some), folder / target.name, target.suffix)
            found = measured(files, target, line.data.test, line)
            behind = dominators(found)
            show(f"{file.parent.name}/{file.stem}, {target.distribution}, {len(line.data.test)} test samples", found, refused, behind)
            cases, lost = cases + 1, lost + bool(behind)
    print(f"\n{lost} of {cases} cases behind a peer")
    return 1 if lost > MOST_LOST * cases else 0


def add_peers(files: dict[str, Path], peers: Mapping[str, Peer], given: tuple[Model, Artifact, Arrays], folder: Path, suffix: str) -> dict[str, str]:
    """Add the ``peers``' files in ``folder``; why there is none of some."""
    folder.mkdir(exist_ok=True)
    refused = {}
    for name, quantize in peers.items():
        path = folder / f"{name.replace(' ', '-').replace(',', '')}{suffix}"
        try:
            files[name] = quantize(*given, path)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its answer
            refused[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"
    return refused


def measured(files: dict[str, Path], target: Target, test: Split, line: Line) -> list[File]:
    """Every file scored in its runtime, and timed against the first."""
    timed = compare(list(files.values()), target=target, samples=test.batch(slice(0, 8)), limit_s=LIMIT_S) if len(files) > 1 else None
    found = []
    for place, (name, path) in enumerate(files.items()):
        with open_session(path, target.runner, extra=target.extra, foreign=True) as session:
            accuracy = line.metric(outputs_of(session, test), test.labels)
        ratio = timed.ratio(place) if timed and place else Interval.exact(1.0)
        found.append(File(name, path.stat().st_size, accuracy, ratio))
    return found


def dominators(found: Sequence[File]) -> list[str]:
    """The peers that are better than ours, the second of ``found``."""
    _, ours, *peers = found
    return [
        p.name
        for p in peers
        if (p.ratio.value <= ours.ratio.value * (1 + TIE) and p.accuracy > ours.accuracy + EQUAL)
        or (p.ratio.value < ours.ratio.value * (1 - TIE) and p.accuracy >= ours.accuracy)
    ]


def show(title: str, found: Sequence[File], refused: dict[str, str], behind: Sequence[str]) -> None:
    """Print one table."""
    print(f"\n**{title}**\n\n| file | MB | top-1 | time of float | 95 % |\n| --- | --- | --- | --- | --- |")
    for file in found:
        print(f"| {file.name} | {file.size_bytes / 1e6:.2f} | {file.accuracy:.4f} | {file.ratio.value:.2f} | {file.ratio.low:.2f} to {file.ratio.high:.2f} |")
    for name, why in refused.items():
        print(f"| {name} | no file: {why} | | | |")
    print(f"\n{'behind ' + ', '.join(behind) if behind else 'not behind any'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
