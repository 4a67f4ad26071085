"""After a removal: weights are fitted anew, so that layers give what they gave, and batch norms take new statistics.

Least squares with the unpruned model's own activations (Kwon et al., NeurIPS 2022, section 4.3; He et al., Channel Pruning, ICCV 2017, section 3.1),
drawn towards the old weights instead of zero. Layer after layer, each with what it reads from the pruned ones before it; one whose result is added to a
stream is fitted to what the stream lacks. Nothing is trained, no label is looked at.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes import Axes
from edgesmith.compiler.model import Model
from edgesmith.passes.observe.abreast import Change, Sight, Values, abreast
from edgesmith.passes.observe.inputs import MOST_ROWS, Batches, Inputs, Moments
from edgesmith.passes.prune.least_squares import Fit, Wanted, fitted
from edgesmith.passes.prune.readers import Indices, Reader
from edgesmith.passes.prune.statistics import following, has_statistics

aten = torch.ops.aten


@dataclass(frozen=True)
class Refit:
    """One operator's error, relative to its outputs, on samples held out: with the units gone, and after the fit."""

    where: str
    before: float
    after: float


def reconstructed(axes: Axes, after: Model, removals: Mapping[str, Sequence[int]], batches: Batches) -> tuple[Model, tuple[Refit, ...]]:
    """``after`` with all layers that read something else than before fitted to what is wanted of them, and what came of it.

    Args:
        axes: the analysis of the unpruned model.
        after: that model without ``removals``, its weights as they were.
        removals: group name -> units that are gone.
        batches: calibration samples, from the first one on; all that is computed of them at one place is held in memory.
    """
    graph, left = after.edit(), _Left(axes, removals)
    found: list[Refit] = []
    changes: dict[str, Change] = {}
    for node in graphs.operators(graph):
        inputs = Inputs.of(graph, node)
        if has_statistics(node):
            changes[node.name] = following(graph, node, left.of(_name(node.args[3]), 0))
        elif inputs is not None:
            changes[node.name] = _Sequential(graph, inputs, left, found)
    abreast(axes.model.graph, graph, changes, list(batches()))
    return after.with_graph(graph), tuple(found)


def refitted(axes: Axes, after: Model, removals: Mapping[str, Sequence[int]], held: Mapping[str, Reader], batches: Batches) -> Model:
    """``after`` with the readers of what is gone fitted alone, and batch norms that follow: what the removal of one group comes to, quickly.

    Args:
        axes: the analysis of the unpruned model.
        after: that model without ``removals``, its weights as they were.
        removals: group name -> units that are gone.
        held: the readers, which hold the moments of their inputs in the unpruned model.
        batches: samples for the statistics of batch norms.
    """
    graph, left = after.edit(), _Left(axes, removals)
    for reader in held.values():
        if len(reader.inputs.parts) == 2:
            _write(graph, reader.inputs, _parallel(reader, axes.model.graph, left))
    changes = {node.name: following(graph, node, left.of(_name(node.args[3]), 0)) for node in graphs.operators(graph) if has_statistics(node)}
    if changes:
        abreast(axes.model.graph, graph, changes, list(batches()))
    return after.with_graph(graph)


@dataclass(frozen=True)
class _Left:
    """What a removal leaves of the tensors of the unpruned model."""

    axes: Axes
    removals: Mapping[str, Sequence[int]]

    def of(self, name: str, dim: int) -> Indices:
        """The indices of dimension ``dim`` of the tensor ``name`` that are still there."""
        stays = np.ones(graphs.tensor(self.axes.model.graph, name).shape[dim], dtype=np.bool_)
        for group, units in self.removals.items():
            for member in self.axes.group(group).members:
                if (member.name, member.dim) == (name, dim):
                    stays &= ~np.isin(member.labels, list(units)).any(axis=0)
        return np.flatnonzero(stays)


def _name(value: object) -> str:
    assert isinstance(value, fx.Node)
    return str(value.target)


@dataclass(frozen=True)
class _Sequential:
    """Fits one operator of ``graph`` when both graphs have come to it."""

    graph: fx.GraphModule
    inputs: Inputs
    left: _Left
    found: list[Refit]

    def __call__(self, sight: Sight) -> None:
        node, kind = self.inputs.node, self.inputs.kind
        read = kind.argument(node, kind.activation)
        assert read is not None
        new, lacking = sight.new(read.name), self._lacking(sight)
        unchanged = lacking is None and all(map(torch.equal, sight.old(read.name), new))
        if unchanged or len(new) < 2:
            return
        wanted = [self._kept(y) for y in sight.old(node.name)]
        if lacking is not None:
            wanted = [y + more for y, more in zip(wanted, lacking, strict=True)]
        parts = [self._sums(x, y) for x, y in zip(new, wanted, strict=True)]
        fitting, held = (reduce(operator.add, parts[first::2]) for first in (0, 1))
        fit = fitted(self.inputs.matrices(self.graph), fitting, held, shifted=self.inputs.bias is not None)
        _write(self.graph, self.inputs, fit)
        floor = max(held.energy / held.count, torch.finfo(torch.float64).tiny)
        self.found.append(Refit(graphs.source(node), fit.before / floor, fit.after / floor))

    def _sums(self, x: torch.Tensor, y: torch.Tensor) -> Wanted:
        """Of one batch, without what the bias gives already."""
        rows, results = self.inputs.rows(x), self.inputs.results(y)
        if self.inputs.bias is not None:
            results = results - graphs.tensor(self.graph, self.inputs.bias).detach().reshape(len(results), 1, -1)
        step = -(-rows.shape[1] // MOST_ROWS)
        return Wanted.of(rows[:, ::step], results[:, ::step])

    def _kept(self, y: torch.Tensor) -> torch.Tensor:
        """The channels of the unpruned result that the pruned one has."""
        kept = torch.from_numpy(self.left.of(self.inputs.weight, self.inputs.kind.axis))
        return y if len(kept) == y.shape[self.inputs.channels] else y.index_select(self.inputs.channels, kept)

    def _lacking(self, sight: Sight) -> Values | None:
        """What the stream that the result is added to lacks by now; None where it is added to none, or nothing is lacking."""
        node = self.inputs.node
        user, *others = node.users
        if others or user.target is not aten.add.Tensor or user.kwargs or len(user.all_input_nodes) != 2:
            return None
        (stream,) = (other for other in user.all_input_nodes if other is not node)
        if not sight.has(stream.name):
            return None
        wanted, now = [self._kept(x) for x in sight.old(stream.name)], sight.new(stream.name)
        fits = all(a.shape == b.shape == self._kept(y).shape for a, b, y in zip(wanted, now, sight.old(node.name), strict=True))
        return [a - b for a, b in zip(wanted, now, strict=True)] if fits and not all(map(torch.equal, wanted, now)) else None


def _parallel(reader: Reader, before: fx.GraphModule, left: _Left) -> Fit:
    """The fit of an operator to its own result, from the moments of its inputs."""
    inputs = reader.inputs
    channels = left.of(inputs.weight, 1 - inputs.kind.axis)
    kept = torch.from_numpy((channels[:, None] * reader.kernel + np.arange(reader.kernel)).ravel())
    rows = torch.from_numpy(left.of(inputs.weight, inputs.kind.axis))
    weight = inputs.matrices(before)
    if len(rows) < weight.shape[:2].numel():
        weight = weight.flatten(0, 1)[rows].reshape(len(weight), -1, weight.shape[2])
    fitting, held = (_own(moments, weight, kept) for moments in inputs.parts)
    return fitted(weight[:, :, kept], fitting, held, shifted=inputs.bias is not None)


def _own(moments: Moments, weight: torch.Tensor, kept: torch.Tensor) -> Wanted:
    """What ``weight`` made of all inputs, wanted of those that are kept."""
    products, sums = moments.products.double(), moments.sums.double()
    energy = float(((weight @ products) * weight).sum())
    return Wanted(
        products[:, kept][:, :, kept],
        products[:, kept] @ weight.transpose(1, 2),
        sums[:, kept],
        (weight @ sums[..., None])[..., 0],
        energy,
        moments.count,
    )


def _write(graph: fx.GraphModule, inputs: Inputs, fit: Fit) -> None:
    weight = graphs.tensor(graph, inputs.weight)
    shape = weight.movedim(inputs.kind.axis, 0).shape
    graphs.set_tensor(graph, inputs.weight, fit.weight.reshape(shape).movedim(0, inputs.kind.axis).contiguous().to(weight.dtype))
    if inputs.bias is not None:
        graphs.set_tensor(graph, inputs.bias, graphs.tensor(graph, inputs.bias).detach() + fit.shift.flatten().to(weight.dtype))
