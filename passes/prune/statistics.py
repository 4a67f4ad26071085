"""Means and variances of batch norms whose inputs have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.passes.observe.inputs import Batches
from edgesmith.passes.observe.lockstep import Before, lockstep
from edgesmith.passes.observe.visit import Look, visit
from edgesmith.passes.prune.readers import Indices

aten = torch.ops.aten

MOST_BATCHES = 4
"""So many give the means of a channel over thousands of positions; they are held in memory together."""


def follow_statistics(before: fx.GraphModule, after: fx.GraphModule, kept: Callable[[str], Indices], batches: Batches) -> int:
    """Move the means and variances of the batch norms of ``after`` as far as what they read has moved from ``before``; how many there are.

    Both see the same samples, ``after`` norm by norm, so that each reads what those before it give now. What did not change stays, however few the samples.

    Args:
        before: the unpruned graph.
        after: the pruned one, with the same node names; its statistics are replaced.
        kept: name of a tensor of ``before`` -> the indices of its first dimension that ``after`` has.
        batches: samples, from the first one on.
    """
    norms = [node for node in graphs.operators(after) if node.target is aten.batch_norm.default and isinstance(node.args[3], fx.Node)]
    if not norms:
        return 0
    some = list(islice(batches(), MOST_BATCHES))
    found = {node.name: _Moments() for node in norms}
    visit(before, {node: found[node.name].look() for node in before.graph.nodes if node.name in found}, some)

    def moved(node: fx.Node) -> Before:
        def move(read: Sequence[Any]) -> None:
            now = _Moments()
            for x in read:
                now.add(x)
            names = [str(place.target) for place in node.args[3:5] if isinstance(place, fx.Node)]
            rows = torch.from_numpy(kept(names[0]))
            (old_mean, old_variance), (new_mean, new_variance) = found[node.name].result(), now.result()
            mean, variance = (graphs.tensor(after, name).double() for name in names)
            ratio = torch.where(old_variance[rows] > 0, new_variance / old_variance[rows], torch.ones((), dtype=torch.float64))
            for name, value in zip(names, (mean + new_mean - old_mean[rows], variance * ratio), strict=True):
                graphs.set_tensor(after, name, value.to(graphs.tensor(after, name).dtype))

        return move

    lockstep(after, {node: moved(node) for node in norms}, some)
    return len(norms)


class _Moments:
    """Mean and variance of each channel, dimension 1, over all that was read."""

    def __init__(self) -> None:
        self._count = 0
        self._sum, self._squares = (torch.zeros((), dtype=torch.float64) for _ in range(2))

    def add(self, x: torch.Tensor) -> None:
        """Another batch."""
        x = x.transpose(0, 1).flatten(1).double()
        self._count += x.shape[1]
        self._sum, self._squares = self._sum + x.sum(1), self._squares + x.square().sum(1)

    def look(self) -> Look:
        """What adds the inputs of a norm."""
        return lambda args, kwargs, result: self.add(args[0])

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance."""
        mean = self._sum / self._count
        return mean, (self._squares / self._count - mean.square()).clamp(min=0)
