"""Pruning to a latency without training, beside others: ``python benchmarks/pruning.py [BUILD_FILE ...] [--target NAME ...] [--modelopt PYTHON]``.

Every build file gives a model and its data (``benchmarks/cifar-*.toml``; first ``python benchmarks/cifar.py``). Ours is asked for a share of the latency, by
units and blocks. Uniform pruning, torch-pruning, and FastNAS where PYTHON has nvidia-modelopt, are asked for a share of the units that takes as long on the
same runtime, found by bisection with measured files (uniform widths are those found for L2, whatever goes). All files are scored in their runtime on test
samples, and timed against the whole model in pairs. Nothing is trained. The exit code is 1 where ours misses its share by more than 3 %, or another one of
the same time is more accurate.

``--recover EPOCHS`` does something else: ours is asked for half of the latency, and so many epochs of ``recover`` follow.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch_pruning
from torch import nn

from edgesmith.compiler import registry
from edgesmith.compiler.accuracy import outputs_of
from edgesmith.compiler.bench import Bench
from edgesmith.compiler.budget import Interval
from edgesmith.compiler.buildfile import read
from edgesmith.compiler.errors import UserError
from edgesmith.compiler.frontends.user_code import call
from edgesmith.compiler.line import Line
from edgesmith.compiler.lowering import Lowering
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.pipeline import Pipeline
from edgesmith.compiler.profile.bench import TargetBench
from edgesmith.compiler.profile.devices import environment
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.progress import silent

HERE = Path(__file__).parent
FILES = tuple(HERE / f"cifar-{name}.toml" for name in ("wide-resnet", "wide-vit", "resnet", "mobile", "vit"))
SHARE, HALF, CLOSE, EQUAL = 0.65, 0.485, 0.03, 0.02
STEPS = 6
SAMPLES, SCORED = 4096, 2000
OURS = "prune{{latency={share:.4f},target={target},importance=obs,reconstruct=true,samples={samples},kinds=[channels,hidden,heads,head_dim,residual,blocks]}}"
L2 = "prune{{ratio={ratio:.4f},importance=l2}}"
OBS = "prune{{ratio={ratio:.4f},importance=obs,reconstruct=true,samples={samples}}}"
Narrowed = Callable[[float], Model]


@dataclass(frozen=True)
class Row:
    """One pruned model: its time over the whole one's, its accuracy, and the seconds that it took to make."""

    name: str
    share: Interval
    accuracy: float
    params: float
    macs: float
    seconds: float


@dataclass(frozen=True)
class Case:
    """A model on a target."""

    line: Line
    bench: Bench
    folder: Path
    context: PassContext
    target: str

    def accuracy(self, model: Model) -> float:
        """Of the model's file in its runtime on test samples."""
        target = registry.target(self.target)
        assert self.line.data is not None
        inputs = tuple(torch.from_numpy(x) for x in self.line.data.train.batch(slice(0, 8)))
        artifact = Lowering(self.folder, inputs).artifact(model, target)
        with open_session(artifact.path, target.runner, extra=target.extra) as session:
            return self.line.metric(outputs_of(session, self.line.data.test), self.line.data.test.labels)

    def row(self, name: str, make: Callable[[], Model]) -> Row:
        """What ``make`` makes, measured."""
        began, whole = time.monotonic(), self.line.teacher
        model = make()
        seconds = time.monotonic() - began
        share = Interval.exact(1.0) if model is whole else self.bench.paired(whole, model).share
        return Row(name, share, self.accuracy(model), model.params / whole.params, model.macs / whole.macs, seconds)

    def pruned(self, passes: str) -> Model:
        """The model after ``passes``."""
        return Pipeline.parse(passes).run(self.line.teacher, self.context)

    def as_fast(self, share: float, narrowed: Narrowed) -> tuple[float, Model]:
        """What takes the ``share`` of the time and the ratio that it was made with, by bisection."""
        low, high, best = 0.0, 0.95, (float("inf"), 0.0, self.line.teacher)
        for _ in range(STEPS):
            middle = (low + high) / 2
            model = narrowed(middle)
            found = self.bench.paired(self.line.teacher, model).share.value
            best = min(best, (abs(found - share), middle, model), key=lambda one: one[0])
            if abs(found / share - 1) < EQUAL:
                break
            low, high = (middle, high) if found > share else (low, middle)
        return best[1:]


def main() -> int:
    """Print a table for each target of each build file, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=FILES)
    parser.add_argument("--target", action="append", choices=registry.target_names())
    parser.add_argument("--modelopt", type=Path, help="the interpreter of an environment that has nvidia-modelopt")
    parser.add_argument("--recover", type=int, metavar="EPOCHS")
    parser.add_argument("--share", type=float, default=SHARE, help="of the latency that is to be left")
    parser.add_argument("--folder", type=Path, default=Path("out/benchmark-pruning"))
    wanted = parser.parse_args()
    machine = environment()
    print(f"{machine['cpu']}, {machine['os']}, load {machine['load_average']}; one thread, torch-pruning {torch_pruning.__version__}.")
    behind = 0
    for file in wanted.files:
        line = Line.of(read(file, (), wanted.target or registry.target_names()), wanted.folder / file.stem, silent())
        for target in (target.name for target in line.targets):
            behind += not done(line, target, wanted)
    return 1 if behind else 0


def done(line: Line, target: str, wanted: argparse.Namespace) -> bool:
    """Print one table; whether what it shows is as it should be."""
    folder = wanted.folder / Path(str(line.spec.file)).stem / target
    folder.mkdir(parents=True, exist_ok=True)
    assert line.data is not None
    data = line.data.for_passes()
    bench = replace(TargetBench.of(target, folder), data=data)
    case = Case(line, bench, folder, PassContext(data=data, teacher=line.teacher, benches={target: bench}), target)
    print(f"\n**{Path(str(line.spec.file)).stem}, {target}, {len(line.data.test)} test samples**\n")
    print("| pruned | time of the whole | 95 % | top-1 | parameters | multiply-accumulates | seconds |\n| --- | --- | --- | --- | --- | --- | --- |")
    whole = show(case.row("nothing", lambda: line.teacher))
    return compared(case, whole, wanted.share, wanted.modelopt) if wanted.recover is None else recovered(case, whole, wanted.recover)


def recovered(case: Case, whole: Row, epochs: int) -> bool:
    """Whether half the time is left after pruning and training."""
    passes = f"{OURS.format(share=HALF, target=case.target, samples=SAMPLES)},recover{{epochs={epochs}}}"
    ours = show(case.row(f"edgesmith, {epochs} epochs", lambda: case.pruned(passes)))
    print(f"\n{100 * (whole.accuracy - ours.accuracy):.2f} points lost at {1 / ours.share.value:.2f} times the speed", flush=True)
    return ours.share.value <= 0.5


def compared(case: Case, whole: Row, share: float, modelopt: Path | None) -> bool:
    """Whether ours is on time and not behind."""
    try:
        ours = show(case.row("edgesmith", lambda: case.pruned(OURS.format(share=share, target=case.target, samples=SAMPLES))))
    except UserError as error:
        print(f"\nedgesmith refuses: {error.what}: {error.why}", flush=True)
        return False
    ratios: list[float] = []

    def searched(narrowed: Narrowed) -> Model:
        ratio, model = case.as_fast(ours.share.value, narrowed)
        ratios.append(ratio)
        return model

    def uniform() -> float:
        if not ratios:
            raise ValueError("no share of every group takes as long")
        return ratios[0]

    others = {
        "uniform, L2": lambda: searched(lambda ratio: case.pruned(L2.format(ratio=ratio))),
        "uniform, OBS, refitted": lambda: case.pruned(OBS.format(ratio=uniform(), samples=SAMPLES)),
        "torch-pruning, isomorphic, Taylor": lambda: searched(lambda ratio: isomorphic(case, ratio)),
    }
    if modelopt is not None:
        others["ModelOpt, FastNAS"] = lambda: searched(lambda ratio: fastnas(case, ratio, modelopt))
    rows = []
    for name, make in others.items():
        try:
            rows.append(show(case.row(name, make)))
        except (UserError, RuntimeError, ValueError) as error:
            print(f"| {name} | fails: {str(error).splitlines()[0]} | | | | | |", flush=True)
    late = abs(ours.share.value / share - 1) > CLOSE
    better = [row.name for row in rows if row.accuracy > ours.accuracy and row.share.value <= ours.share.value * (1 + EQUAL)]
    said = f"{100 * (whole.accuracy - ours.accuracy):.2f} points lost at {1 / ours.share.value:.2f} times the speed"
    print(f"\n{said}; {'missed its share' if late else 'on time'}; {'behind ' + ', '.join(better) if better else 'not behind any'}", flush=True)
    return not (late or better)


def show(row: Row) -> Row:
    """Print one line of a table."""
    share = f"{row.share.value:.3f} | {row.share.low:.3f} to {row.share.high:.3f}"
    print(f"| {row.name} | {share} | {row.accuracy:.4f} | {row.params:.2f} | {row.macs:.2f} | {row.seconds:.0f} |", flush=True)
    return row


def isomorphic(case: Case, ratio: float) -> Model:
    """torch-pruning's documented best: global isomorphic ranking by Taylor's expansion, whole heads, with labels."""
    assert case.line.data is not None
    split, module = case.line.data.train, call(case.line.spec.model.source)
    assert isinstance(module, nn.Module)
    example = torch.from_numpy(split.batch(slice(0, 2))[0])
    attention = {block.qkv: block for block in module.modules() if hasattr(block, "qkv")}
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        module,
        example,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.95,
        ignored_layers=[last],
        num_heads={qkv: block.heads for qkv, block in attention.items()},
        prune_num_heads=bool(attention),
        head_pruning_ratio=ratio,
    )
    for start in range(0, SAMPLES, 128):
        (x,), labels = split.batch(slice(start, start + 128)), split.labels[start : start + 128]
        nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(labels)).backward()
    pruner.step()
    for qkv, block in attention.items():
        block.heads = pruner.num_heads[qkv]
    return Model.from_module(module.eval(), (example,))


def fastnas(case: Case, ratio: float, python: Path) -> Model:
    """By FastNAS, scored on samples that nothing else here looks at, batch norms calibrated on as many as ours sees."""
    assert case.line.data is not None
    samples, pruned = case.folder.parent / "fastnas.npz", case.folder / "fastnas.pt2"
    if not samples.is_file():
        train, choosing = case.line.data.train, case.line.data.validation
        inputs = {"calibration": train.batch(slice(0, SAMPLES))[0], "inputs": choosing.batch(slice(0, SCORED))[0]}
        np.savez(samples, **inputs, labels=choosing.labels[:SCORED])
    script = Path(__file__).with_name("pruning_fastnas.py")
    command = [str(python), str(script), str(case.line.spec.model.source), str(samples), str(1 - ratio), str(pruned)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it failed")
    return Model.load(pruned)


if __name__ == "__main__":
    sys.exit(main())
