"""After a removal: the weights that read what is left are fitted anew, so that they give what they gave, and batch norms take new statistics.

Least squares with the unpruned model's own activations (Kwon et al., NeurIPS 2022, section 4.3; He et al., Channel Pruning, ICCV 2017, section 3.1),
drawn towards the old weights instead of zero. Nothing is trained, no label is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes import Axes
from edgesmith.compiler.model import Model
from edgesmith.passes.observe.inputs import Batches, Moments, gathered
from edgesmith.passes.prune.readers import MOST_BYTES, Reader, covariance, readers
from edgesmith.passes.prune.statistics import follow_statistics

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for how firmly the old weights are held, as a share of the inputs' mean variance; leaving them alone is one, too."""


@dataclass(frozen=True)
class Refit:
    """One operator's error, relative to its outputs, on samples held out: with the units gone, and after the fit."""

    where: str
    before: float
    after: float


def reconstructed(axes: Axes, after: Model, removals: Mapping[str, Sequence[int]], batches: Batches) -> tuple[Model, tuple[Refit, ...]]:
    """``after`` with the readers of what is gone fitted to what they gave, and what came of it.

    Args:
        axes: the analysis of the unpruned model.
        after: that model without ``removals``, its weights as they were.
        removals: group name -> units that are gone.
        batches: calibration samples, from the first one on.
    """
    before = axes.model.graph
    found = readers(axes, [axes.group(name) for name in removals])
    graph = after.edit()
    waves = gathered(before, [reader.inputs for reader in found.values()], batches, MOST_BYTES)
    fits = tuple(_fitted(found[one.weight], axes, graph, removals) for wave in waves for one in wave if len(one.parts) == 2)
    follow_statistics(before, graph, lambda name: _left(name, 0, removals, axes), batches)
    return after.with_graph(graph), fits


def _fitted(reader: Reader, axes: Axes, after: fx.GraphModule, removals: Mapping[str, Sequence[int]]) -> Refit:
    """Write the best weights for ``reader`` into ``after``."""
    inputs, bias, before = reader.inputs, reader.bias(), axes.model.graph
    axis = inputs.kind.axis
    channels = _left(inputs.weight, 1 - axis, removals, axes)
    kept = torch.from_numpy((channels[:, None] * reader.kernel + np.arange(reader.kernel)).ravel())
    solutions = [_solution(reader, before, number, kept, centred=bias is not None) for number in range(inputs.groups)]
    errors = torch.tensor([[error for _, _, error in solution] for solution in solutions], dtype=torch.float64).sum(0)
    best = int(errors.argmin())
    weight = graphs.tensor(after, inputs.weight)
    rows = torch.from_numpy(_left(inputs.weight, axis, removals, axes))
    made = torch.cat([solution[best][0] for solution in solutions])[rows]
    shape = weight.movedim(axis, 0).shape
    graphs.set_tensor(after, inputs.weight, made.reshape(shape).movedim(0, axis).contiguous().to(weight.dtype))
    if bias is not None:
        shift = torch.cat([solution[best][1] for solution in solutions])[rows]
        graphs.set_tensor(after, bias, graphs.tensor(after, bias).detach() + shift.to(weight.dtype))
    energy = sum(float(((w @ covariance(inputs.parts[1], g, centred=bias is not None)) * w).sum()) for g, w in enumerate(reader.matrices(before)))
    floor = max(energy, torch.finfo(torch.float64).tiny)
    return Refit(graphs.source(inputs.node), float(errors[0]) / floor, float(errors[best]) / floor)


def _solution(reader: Reader, graph: fx.GraphModule, number: int, kept: torch.Tensor, *, centred: bool) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Weights for the ``kept`` columns, what to add to the bias, and the squared error on samples held out: left alone, then for every ridge."""
    fitting, held = reader.inputs.parts
    weight = reader.matrices(graph)[number]
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[kept] = False
    product = covariance(fitting, number, centred=centred)
    mean = fitting.sums[number].double() / fitting.count
    within, across = product[kept][:, kept], weight[:, gone] @ product[gone][:, kept]
    level = float(within.diagonal().mean()) or 1.0
    choices = [weight[:, kept]]
    for ridge in RIDGES:
        factor, failed = torch.linalg.cholesky_ex(within + ridge * level * torch.eye(len(kept), dtype=torch.float64))
        if not int(failed):
            choices.append(weight[:, kept] + torch.cholesky_solve(across.T, factor).T)
    choices += choices[:1] * (1 + len(RIDGES) - len(choices))
    found = []
    for place, choice in enumerate(choices):
        lacking = weight.clone()
        lacking[:, kept] -= choice
        shift = lacking @ mean if centred and place else torch.zeros(len(weight), dtype=torch.float64)
        found.append((choice, shift, _error(lacking, shift, held, number)))
    return found


def _error(lacking: torch.Tensor, shift: torch.Tensor, moments: Moments, number: int) -> float:
    """Mean square of ``lacking`` x - ``shift`` over the inputs x that ``moments`` are of."""
    product, mean = moments.products[number].double() / moments.count, moments.sums[number].double() / moments.count
    return float(((lacking @ product) * lacking).sum() - 2 * shift @ (lacking @ mean) + shift @ shift)


def _left(name: str, dim: int, removals: Mapping[str, Sequence[int]], axes: Axes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The indices of dimension ``dim`` of the tensor ``name`` that are still there."""
    stays = np.ones(graphs.tensor(axes.model.graph, name).shape[dim], dtype=np.bool_)
    for group, units in removals.items():
        for member in axes.group(group).members:
            if (member.name, member.dim) == (name, dim):
                stays &= ~np.isin(member.labels, list(units)).any(axis=0)
    return np.flatnonzero(stays)
