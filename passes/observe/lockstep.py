"""Run many batches through a graph together, operator by operator, so that what one of them shows can change those behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs

Before = Callable[[list[Any]], None]
"""Called with an operator's first argument for every batch, before it runs; may put other tensors into the graph."""


def lockstep(graph: fx.GraphModule, before: Mapping[fx.Node, Before], batches: Sequence[tuple[torch.Tensor, ...]]) -> None:
    """Run ``batches`` and call ``before`` on its nodes. What all batches need at a time is held together; each tensor is freed after its last reader."""
    values: dict[fx.Node, list[Any]] = dict(zip(graph.graph.find_nodes(op="placeholder"), map(list, zip(*batches, strict=True)), strict=True))
    last = {read: node for node in graph.graph.nodes for read in node.all_input_nodes}

    def value(node: fx.Node, number: int) -> Any:
        return graphs.tensor(graph, str(node.target)) if node.op == "get_attr" else values[node][number]

    with torch.no_grad():
        for node in graphs.operators(graph):
            if node in before:
                source = node.args[0]
                assert isinstance(source, fx.Node)
                before[node]([value(source, number) for number in range(len(batches))])
            found = []
            for number in range(len(batches)):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n, number=number: value(n, number))  # type: ignore[misc]
                found.append(node.target(*args, **kwargs))  # type: ignore[operator]
            values[node] = found
            for read in node.all_input_nodes:
                if last[read] is node:
                    values.pop(read, None)
