"""Batch norms behind what was pruned: their statistics follow what they read now, without training."""

from __future__ import annotations

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.passes.observe.abreast import Change, Sight, Values
from edgesmith.passes.prune.readers import Indices

aten = torch.ops.aten


def has_statistics(node: fx.Node) -> bool:
    """Whether ``node`` is a batch norm with a mean and a variance of its own."""
    return node.target is aten.batch_norm.default and isinstance(node.args[3], fx.Node)


def following(after: fx.GraphModule, node: fx.Node, kept: Indices) -> Change:
    """Moves mean and variance of the batch norm ``node`` of ``after`` as far as what it reads has moved; what did not change stays, however few the samples.

    Args:
        after: the pruned graph; its statistics are replaced.
        node: in ``after``.
        kept: the channels of the unpruned graph that it has.
    """
    read, (mean, variance) = node.args[0], (str(place.target) for place in node.args[3:5] if isinstance(place, fx.Node))
    assert isinstance(read, fx.Node)
    name, rows = read.name, torch.from_numpy(kept)

    def change(sight: Sight) -> None:
        (old_mean, old_variance), (new_mean, new_variance) = (_moments(values) for values in (sight.old(name), sight.new(name)))
        old_mean, old_variance = old_mean[rows], old_variance[rows]
        ratio = torch.where(old_variance > 0, new_variance / old_variance, torch.ones((), dtype=torch.float64))
        _set(after, mean, graphs.tensor(after, mean).double() + new_mean - old_mean)
        _set(after, variance, graphs.tensor(after, variance).double() * ratio)

    return change


def _set(graph: fx.GraphModule, name: str, value: torch.Tensor) -> None:
    graphs.set_tensor(graph, name, value.to(graphs.tensor(graph, name).dtype))


def _moments(values: Values) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel, dimension 1, over all batches."""
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x in values:
        x = x.transpose(0, 1).flatten(1).double()
        count, total, squares = count + x.shape[1], total + x.sum(1), squares + x.square().sum(1)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)
