"""How long the analysis of axes takes, by the size of the graph: ``python benchmarks/axes.py``.

Transformers and residual networks of growing depth, already captured. The exit code is 1 where a graph takes more than 100 ms for every 2 000 nodes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from cifar_networks import Basic, Block
from torch import nn

from edgesmith.compiler.axes import Axes
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.devices import environment

MS_OF_2000 = 100.0
RUNS = 7


def transformer(depth: int) -> tuple[nn.Module, torch.Tensor]:
    """Blocks of fused attention and a hidden layer."""
    return nn.Sequential(*(Block(24, 3, 2) for _ in range(depth)), nn.Linear(24, 10)), torch.randn(2, 8, 24)


def residual(depth: int) -> tuple[nn.Module, torch.Tensor]:
    """Blocks of two convolutions with batch norms."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), *(Basic(8, 8, 1) for _ in range(depth))), torch.randn(2, 3, 8, 8)


CASES: tuple[tuple[str, Callable[[int], tuple[nn.Module, torch.Tensor]], tuple[int, ...]], ...] = (
    ("transformer", transformer, (5, 20, 80)),
    ("residual", residual, (10, 40, 160)),
)


def main() -> int:
    """Print the table in Markdown."""
    machine = environment()
    print(
        f"{machine['cpu']}, {machine['os']}; the median of {RUNS}.\n\n| network | blocks | nodes | ms | ms for 2 000 nodes |\n| --- | --- | --- | --- | --- |"
    )
    slow = 0
    for name, make, depths in CASES:
        for depth in depths:
            module, example = make(depth)
            model = Model.from_module(module.eval(), (example,))
            nodes, taken_ms = len(model.graph.graph.nodes), statistics.median(taken(model) for _ in range(RUNS))
            each = taken_ms / nodes * 2000
            slow += each > MS_OF_2000
            print(f"| {name} | {depth} | {nodes} | {taken_ms:.1f} | {each:.1f} |", flush=True)
    return 1 if slow else 0


def taken(model: Model) -> float:
    """Milliseconds of one analysis."""
    began = time.perf_counter()
    Axes.of(model)
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
