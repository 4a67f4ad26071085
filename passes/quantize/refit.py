"""Rounding that makes up for itself: what rounding one weight changes in the result is taken off by the weights that are rounded after it (Frantar
et al., GPTQ, ICLR 2023, section 3; with its order of columns by the energy of their inputs)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.quantplan import WeightGrid
from edgesmith.passes.observe.inputs import Batches, Inputs, gathered
from edgesmith.passes.quantize.schemes import Candidates
from edgesmith.passes.quantize.weights import like

STEPS = 127
DAMPING = 0.01
"""Of the mean energy of the inputs, added to each: a column that the samples hardly know must not be bent for them."""
MOST_BYTES = 2**28
"""Of the products of inputs that are gathered at a time; where there are more, the samples run again for the next ones."""
BLOCK = 128
WORTH = 0.999
"""Of the error by nearest rounding, on samples held out, that must be left at most for a channel to be taken."""


def refit(before: fx.GraphModule, after: fx.GraphModule, quantized: Candidates, grids: Mapping[str, WeightGrid], batches: Batches) -> int:
    """Round weights of the operators ``quantized`` of ``before`` anew in ``after``, its copy with weights on ``grids``; how many channels changed.

    Every second batch is held out: a channel keeps its nearest values unless the error of its results is smaller there. Weights that several
    operators share are left alone. The largest weight of a channel stays where it is, at the end of the grid.
    """
    found = [inputs for node in quantized if (inputs := Inputs.of(before, node)) is not None and inputs.size_bytes <= MOST_BYTES]
    return sum(_refitted(inputs, before, after, grids) for wave in gathered(before, found, batches, MOST_BYTES) for inputs in wave)


def _refitted(inputs: Inputs, before: fx.GraphModule, after: fx.GraphModule, grids: Mapping[str, WeightGrid]) -> int:
    """Round again what gains by it; how many channels."""
    if len(inputs.parts) < 2:
        return 0
    name, axis = inputs.weight, inputs.kind.axis
    exact, nearest = (graphs.tensor(graph, name) for graph in (before, after))
    scales = torch.tensor(grids[name].scales, dtype=torch.float32)
    fitting, held = (part.products for part in inputs.parts)
    groups = len(fitting)
    steps = exact.detach().movedim(axis, 0).flatten(1) / scales[:, None]
    old = torch.round(nearest.detach().movedim(axis, 0).flatten(1) / scales[:, None])
    new = torch.cat([rounded(part, product) for part, product in zip(steps.chunk(groups), fitting, strict=True)])
    errors = [
        torch.cat([((q - part) @ product * (q - part)).sum(1) for q, part, product in zip(some.chunk(groups), steps.chunk(groups), held, strict=True)])
        for some in (old, new)
    ]
    better = errors[1] < WORTH * errors[0]
    chosen = torch.where(better[:, None], new, old) * scales[:, None]
    placed = chosen.reshape(exact.movedim(axis, 0).shape).movedim(0, axis).contiguous()
    graphs.add_tensor(after, name, like(nearest, placed))
    return int(better.sum())


def rounded(steps: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Integers for the weights ``steps`` (channels x d, in steps of their grid) whose inputs have the sums of products ``products`` (d x d).

    The error of what was rounded goes to what was not yet, as least squares have it; a weight at the end of the grid stays there. Nearest
    integers where the products tell nothing.
    """
    energy = products.diagonal()
    known = energy > 0
    nearest = torch.round(steps)
    factor = _inverse_factor(products + torch.diag(torch.where(known, DAMPING * energy.mean(), torch.ones(()))))
    if factor is None or not bool(known.any()):
        return nearest
    order, upper = factor
    left, result = steps[:, order].clone(), nearest[:, order].clone()
    ends = result.abs() >= STEPS
    for start in range(0, left.shape[1], BLOCK):
        stop = min(start + BLOCK, left.shape[1])
        errors = torch.zeros(left.shape[0], stop - start)
        for column in range(start, stop):
            whole = torch.where(ends[:, column], result[:, column], torch.round(left[:, column]).clamp(-STEPS, STEPS))
            result[:, column] = whole
            error = (left[:, column] - whole) / upper[column, column]
            left[:, column + 1 : stop] -= error[:, None] * upper[column, column + 1 : stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    back = torch.empty_like(result)
    back[:, order] = result
    return torch.where(known, back, nearest)


def _inverse_factor(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The order in which columns are rounded, the most energetic first, and the upper Cholesky factor of the inverse in that order."""
    order = torch.argsort(products.diagonal(), descending=True, stable=True)
    lower, failed = torch.linalg.cholesky_ex(products[order][:, order].double())
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) else (order, upper.float())
