"""Second moments of what the weights of an operator are multiplied by: all that a least-squares fit of the weights asks of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.weighted import CONVOLUTIONS, LINEARS, Weighted, weighted
from edgesmith.passes.observe.visit import Look, visit

MOST_ROWS = 4096
"""Rows of inputs (positions, tokens) of one batch that are gathered, evenly spread."""

Batches = Callable[[], Iterable[tuple[torch.Tensor, ...]]]
Rows = Callable[[torch.Tensor], torch.Tensor]
"""An operator's input -> (groups, n, d): the vectors that its weights are multiplied by."""


@dataclass(frozen=True)
class Moments:
    """Sums over ``count`` vectors of dimension d, for each group of an operator: of x x^T (groups, d, d) and of x (groups, d), float32."""

    products: torch.Tensor
    sums: torch.Tensor
    count: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.products + other.products, self.sums + other.sums, self.count + other.count)


@dataclass
class Inputs:
    """What the operator ``node`` reads: moments of every second batch for fitting, and of the others, held out; or of all batches together.

    Only for linear layers and convolutions in two dimensions that have their weight for themselves.
    """

    node: fx.Node
    kind: Weighted
    weight: str
    rows: Rows
    parts: list[Moments] = field(default_factory=list)
    seen: int = 0

    @classmethod
    def of(cls, graph: fx.GraphModule, node: fx.Node) -> Inputs | None:
        """For ``node`` of ``graph``, if it is such an operator."""
        kind = weighted(node)
        parameter = None if kind is None else kind.argument(node, kind.weight)
        if kind is None or parameter is None or parameter.op != "get_attr":
            return None
        name = str(parameter.target)
        if len(parameter.users) != 1 or len(graphs.same_tensor(graph, name)) != 1:
            return None
        if node.target in LINEARS:
            return cls(node, kind, name, lambda x: x.reshape(1, -1, x.shape[-1]))
        weight = graphs.tensor(graph, name)
        if node.target not in CONVOLUTIONS or kind.transposed or weight.dim() != 4:
            return None
        return cls(node, kind, name, lambda x: _patches(x, node, weight))

    @property
    def groups(self) -> int:
        """Of a convolution; 1 otherwise."""
        activation, weight = (self.kind.argument(self.node, place) for place in (self.kind.activation, self.kind.weight))
        assert activation is not None and weight is not None
        return int(activation.meta["val"].shape[1]) // int(weight.meta["val"].shape[1]) if self.node.target in CONVOLUTIONS else 1

    @property
    def bias(self) -> str | None:
        """The name of the bias, if there is one and nothing else reads it."""
        found = self.kind.argument(self.node, self.kind.bias)
        return str(found.target) if found is not None and found.op == "get_attr" and len(found.users) == 1 else None

    @property
    def channels(self) -> int:
        """The dimension of the result that the outputs lie along."""
        return -1 if self.node.target in LINEARS else 1

    def results(self, y: torch.Tensor) -> torch.Tensor:
        """What the operator gave, (groups, n, outputs of a group), row by row as ``rows`` has what it read."""
        if self.channels == -1:
            return y.reshape(1, -1, y.shape[-1])
        return y.reshape(len(y), self.groups, -1, y.shape[2:].numel()).permute(1, 0, 3, 2).flatten(1, 2)

    def matrices(self, graph: fx.GraphModule) -> torch.Tensor:
        """The weight in ``graph``, (groups, outputs of a group, d), float64."""
        weight = graphs.tensor(graph, self.weight).detach().double().movedim(self.kind.axis, 0).flatten(1)
        return weight.reshape(self.groups, -1, weight.shape[1])

    @property
    def size_bytes(self) -> int:
        """Of both moments."""
        weight = self.kind.argument(self.node, self.kind.weight)
        assert weight is not None
        shape: torch.Size = weight.meta["val"].shape
        return 2 * 4 * self.groups * (shape.numel() // shape[self.kind.axis]) ** 2

    def look(self, parts: int) -> Look:
        """Gathers batches in so many parts in turn."""

        def look(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            rows = self.rows(args[self.kind.activation])
            rows = rows[:, :: -(-rows.shape[1] // MOST_ROWS)]
            found = Moments(rows.transpose(1, 2) @ rows, rows.sum(1), rows.shape[1])
            if self.seen < parts:
                self.parts.append(found)
            else:
                self.parts[self.seen % parts] += found
            self.seen += 1

        return look


def gathered(graph: fx.GraphModule, wanted: Sequence[Inputs], batches: Batches, most_bytes: int, *, parts: int = 2) -> Iterator[list[Inputs]]:
    """``wanted`` with their moments over ``batches``, as many at a time as ``most_bytes`` hold; for the next ones the samples run again.

    Of ``parts`` every second batch is in the first, for fitting, and the others in the second; one part has all of them.
    """
    for wave in _waves(wanted, most_bytes * 2 // parts):
        visit(graph, {one.node: one.look(parts) for one in wave}, batches())
        yield wave
        for one in wave:
            one.parts.clear()


def _waves(wanted: Sequence[Inputs], most_bytes: int) -> Iterator[list[Inputs]]:
    wave: list[Inputs] = []
    for one in wanted:
        if wave and sum(other.size_bytes for other in wave) + one.size_bytes > most_bytes:
            yield wave
            wave = []
        wave.append(one)
    if wave:
        yield wave


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
