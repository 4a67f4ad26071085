"""Run batches through a graph and an edited copy of it, operator by operator, so that what both show at one place can change the copy from there on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs

Values = list[Any]
"""What a node computes, batch by batch."""


@dataclass
class _Run:
    """One of the graphs, and what its nodes computed that is still needed."""

    graph: fx.GraphModule
    batches: Sequence[tuple[torch.Tensor, ...]]
    values: dict[str, Values] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = {node.name: node for node in self.graph.graph.nodes}
        self._last = {read.name: node.name for node in self.graph.graph.nodes for read in node.all_input_nodes}
        for node, given in zip(self.graph.graph.find_nodes(op="placeholder"), zip(*self.batches, strict=True), strict=True):
            self.values[node.name] = list(given)

    def of(self, name: str) -> Values:
        node = self.nodes[name]
        if node.op == "get_attr":
            return [graphs.tensor(self.graph, str(node.target))] * len(self.batches)
        return self.values[name]

    def step(self, name: str) -> None:
        node, found = self.nodes[name], []
        for number in range(len(self.batches)):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n, number=number: self.of(n.name)[number])  # type: ignore[misc]
            found.append(node.target(*args, **kwargs))
        self.values[name] = found

    def free(self, name: str) -> None:
        """Forget what was read for the last time."""
        for read in self.nodes[name].all_input_nodes:
            if self._last[read.name] == name:
                self.values.pop(read.name, None)


@dataclass(frozen=True)
class Sight:
    """What both graphs have computed when an operator of the copy is about to run: by name of a node, what it has read or reads next, in batches."""

    _before: _Run
    _after: _Run

    def has(self, name: str) -> bool:
        """Whether both have computed it already."""
        return name in self._before.values and name in self._after.values

    def old(self, name: str) -> Values:
        """In the graph; of the operator itself, what it gave."""
        return self._before.of(name)

    def new(self, name: str) -> Values:
        """In the copy."""
        return self._after.of(name)


Change = Callable[[Sight], None]
"""May put other tensors into the copy."""


def abreast(before: fx.GraphModule, after: fx.GraphModule, changes: Mapping[str, Change], batches: Sequence[tuple[torch.Tensor, ...]]) -> None:
    """Run ``batches`` and call ``changes`` by the names of operators. What all batches need at a time is held together, until its last reader ran.

    Args:
        before: a graph.
        after: its edited copy: some of its nodes, with the same names.
        changes: name of an operator of ``after`` -> called before it runs, when ``before`` has run it.
        batches: of the inputs of both.
    """
    old, new = _Run(before, batches), _Run(after, batches)
    sight = Sight(old, new)
    with torch.no_grad():
        for node in graphs.operators(before):
            old.step(node.name)
            if node.name in new.nodes:
                if node.name in changes:
                    changes[node.name](sight)
                new.step(node.name)
                new.free(node.name)
            old.free(node.name)
