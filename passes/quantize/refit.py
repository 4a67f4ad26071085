"""Rounding that makes up for itself: what rounding one weight changes in the result is taken off by the weights that are rounded after it (Frantar
et al., GPTQ, ICLR 2023, section 3; with its order of columns by the energy of their inputs)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.quantplan import WeightGrid
from edgesmith.compiler.weighted import CONVOLUTIONS, LINEARS, Weighted
from edgesmith.passes.quantize.schemes import Candidates
from edgesmith.passes.quantize.visit import Look, visit
from edgesmith.passes.quantize.weights import like

STEPS = 127
DAMPING = 0.01
"""Of the mean energy of the inputs, added to each: a column that the samples hardly know must not be bent for them."""
MOST_BYTES = 2**28
"""Of the products of inputs that are gathered at a time; where there are more, the samples run again for the next ones."""
MOST_ROWS = 4096
"""Rows of inputs (positions, tokens) of one batch that are gathered, evenly spread."""
BLOCK = 128
WORTH = 0.999
"""Of the error by nearest rounding, on samples held out, that must be left at most for a channel to be taken."""

Batches = Callable[[], Iterable[tuple[torch.Tensor, ...]]]


def refit(before: fx.GraphModule, after: fx.GraphModule, quantized: Candidates, grids: Mapping[str, WeightGrid], batches: Batches) -> int:
    """Round weights of the operators ``quantized`` of ``before`` anew in ``after``, its copy with weights on ``grids``; how many channels changed.

    Every second batch is held out: a channel keeps its nearest values unless the error of its results is smaller there. Weights that several
    operators share are left alone. The largest weight of a channel stays where it is, at the end of the grid.
    """
    gathered = [_Gathered(node, kind, rows) for node, kind in quantized.items() if (rows := _rows_of(before, node, kind)) is not None]
    gathered = [one for one in gathered if one.size_bytes <= MOST_BYTES]
    changed = 0
    for wave in _waves(gathered):
        visit(before, {one.node: one.look() for one in wave}, batches())
        changed += sum(one.apply(before, after, grids) for one in wave)
        for one in wave:
            one.products.clear()
    return changed


Rows = Callable[[torch.Tensor], torch.Tensor]
"""An operator's input -> (groups, n, d): the vectors that its weights are multiplied by."""


def _rows_of(graph: fx.GraphModule, node: fx.Node, kind: Weighted) -> Rows | None:
    """How the rows of ``node``'s input are taken, if its weight is its own and the operator one that is refitted."""
    weight = kind.argument(node, kind.weight)
    assert weight is not None
    name = str(weight.target)
    if len(weight.users) != 1 or len(graphs.same_tensor(graph, name)) != 1:
        return None
    if node.target in LINEARS:
        return lambda x: x.reshape(1, -1, x.shape[-1])
    if node.target not in CONVOLUTIONS or kind.transposed or graphs.tensor(graph, name).dim() != 4:
        return None
    return lambda x: _patches(x, node, graphs.tensor(graph, name))


def _patches(x: torch.Tensor, node: fx.Node, weight: torch.Tensor) -> torch.Tensor:
    """(groups, n, channels of a group x kernel) of a convolution in two dimensions."""
    given: tuple[Any, ...] = node.args
    stride, padding, dilation = (given[i] if len(given) > i else default for i, default in ((3, 1), (4, 0), (5, 1)))
    kernel = tuple(weight.shape[2:])
    both = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(both, kernel, strict=True)]
        x = F.pad(x, [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2])
    around = 0 if isinstance(padding, str) else padding
    columns = F.unfold(x, kernel, both, around, stride).unflatten(1, (x.shape[1] // weight.shape[1], -1))
    rows: torch.Tensor = columns.permute(1, 0, 3, 2).flatten(1, 2)
    return rows


@dataclass
class _Gathered:
    """Products of the inputs of one operator, for fitting and held out."""

    node: fx.Node
    kind: Weighted
    rows: Rows
    products: list[torch.Tensor] = field(default_factory=list)
    seen: int = 0

    @property
    def size_bytes(self) -> int:
        """Of the products."""
        activation, weight = (self.kind.argument(self.node, place) for place in (self.kind.activation, self.kind.weight))
        assert activation is not None and weight is not None
        shape: torch.Size = weight.meta["val"].shape
        groups = activation.meta["val"].shape[1] // shape[1] if self.node.target in CONVOLUTIONS else 1
        return 2 * 4 * int(groups) * (shape.numel() // shape[self.kind.axis]) ** 2

    def look(self) -> Look:
        """Gathers batches in turn for fitting and for holding out."""

        def look(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            rows = self.rows(args[self.kind.activation])
            rows = rows[:, :: -(-rows.shape[1] // MOST_ROWS)]
            product = rows.transpose(1, 2) @ rows
            if self.seen < 2:
                self.products.append(product)
            else:
                self.products[self.seen % 2] += product
            self.seen += 1

        return look

    def apply(self, before: fx.GraphModule, after: fx.GraphModule, grids: Mapping[str, WeightGrid]) -> int:
        """Round again what gains by it; how many channels."""
        weight = self.kind.argument(self.node, self.kind.weight)
        if len(self.products) < 2 or weight is None:
            return 0
        name = str(weight.target)
        exact, nearest = (graphs.tensor(graph, name) for graph in (before, after))
        scales = torch.tensor(grids[name].scales, dtype=torch.float32)
        fitting, held = self.products
        groups = len(fitting)
        steps = exact.detach().movedim(self.kind.axis, 0).flatten(1) / scales[:, None]
        old = torch.round(nearest.detach().movedim(self.kind.axis, 0).flatten(1) / scales[:, None])
        new = torch.cat([rounded(part, product) for part, product in zip(steps.chunk(groups), fitting, strict=True)])
        errors = [
            torch.cat([((q - part) @ product * (q - part)).sum(1) for q, part, product in zip(some.chunk(groups), steps.chunk(groups), held, strict=True)])
            for some in (old, new)
        ]
        better = errors[1] < WORTH * errors[0]
        chosen = torch.where(better[:, None], new, old) * scales[:, None]
        placed = chosen.reshape(exact.movedim(self.kind.axis, 0).shape).movedim(0, self.kind.axis).contiguous()
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


def _waves(gathered: Sequence[_Gathered]) -> Iterator[list[_Gathered]]:
    """Parts of ``gathered`` whose products fit into memory together."""
    wave: list[_Gathered] = []
    for one in gathered:
        if wave and sum(other.size_bytes for other in wave) + one.size_bytes > MOST_BYTES:
            yield wave
            wave = []
        wave.append(one)
    if wave:
        yield wave
