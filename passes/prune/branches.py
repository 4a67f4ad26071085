"""Residual branches found in the graph: ``x + f(x)``, whatever wrote it, and how much each moves its stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes.proof import DOUBLE_TOLERANCE, as_double
from edgesmith.compiler.errors import NumericsError
from edgesmith.compiler.model import Model

_ADDITIONS = frozenset({torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor})


@dataclass(frozen=True)
class Branch:
    """An addition of a stream and a function of that stream, both of the result's shape. All three are node names.

    ``source`` is the source path of the branch's last operator; ``influence`` is one minus the cosine between the stream before and after.
    """

    addition: str
    stream: str
    branch: str
    source: str
    influence: float = 0.0


def residual_branches(model: Model) -> tuple[Branch, ...]:
    """The innermost residual branches, in graph order. Taking one out leaves every shape as it is.

    The stream may itself be a sum (``x + f(x) + g(x)``, both branches of one x). A shortcut with weights of its own is no stream.
    """
    found: list[Branch] = []
    additions = 0
    ancestors = _ancestors(model.graph)
    position = {node: number for number, node in enumerate(model.graph.graph.nodes)}
    for node in graphs.operators(model.graph):
        sides = _sides(node, ancestors, position)
        if sides is None:
            continue
        stream, branch = sides
        inside = ancestors[branch] & ~ancestors[stream]
        if not inside & additions:
            found.append(Branch(node.name, stream.name, branch.name, graphs.source(branch)))
        additions |= 1 << position[node]
    return tuple(found)


def inside(model: Model, branch: Branch) -> frozenset[fx.Node]:
    """The operators that only ``branch`` needs, and its addition."""
    nodes = {node.name: node for node in model.graph.graph.nodes}
    addition, stream = nodes[branch.addition], nodes[branch.stream]
    found, queue = {addition}, [nodes[branch.branch]]
    while queue:
        node = queue.pop()
        if node is not stream and node.op == "call_function" and all(user in found for user in node.users):
            found.add(node)
            queue.extend(node.all_input_nodes)
    return frozenset(found)


def with_influence(model: Model, branches: Sequence[Branch], inputs: tuple[torch.Tensor, ...]) -> tuple[Branch, ...]:
    """``branches`` with the block influence measured on ``inputs``: mean over samples of 1 - cos(before, after) (Men et al. 2024, "ShortGPT", section 2.2)."""
    wanted = {name for b in branches for name in (b.stream, b.addition)}
    values = _Recorder(model.graph, wanted).values_on(*inputs)
    return tuple(replace(b, influence=_one_minus_cosine(values[b.stream], values[b.addition])) for b in branches)


def without(model: Model, branches: Sequence[Branch]) -> Model:
    """``model`` with each addition replaced by its stream; what only the branch needed is gone."""
    graph = model.edit()
    nodes = {node.name: node for node in graph.graph.nodes}
    position = {name: number for number, name in enumerate(nodes)}
    for branch in sorted(branches, key=lambda b: position[b.addition], reverse=True):  # a stream may itself be an addition that goes
        nodes[branch.addition].replace_all_uses_with(nodes[branch.stream])
    return model.with_graph(graph)


def prove_without(before: Model, after: Model, branches: Sequence[Branch]) -> float:
    """Show that ``after`` equals ``before`` with the results of ``branches`` zero, on random inputs.

    Returns:
        The largest difference relative to the largest output, in float64.

    Raises:
        NumericsError: they differ by more than 1e-9.
    """
    (masked, _), (pruned, _) = as_double(before.graph), as_double(after.graph)
    nodes = {node.name: node for node in masked.graph.nodes}
    for branch in branches:
        addition = nodes[branch.addition]
        with masked.graph.inserting_before(addition):
            nothing = masked.graph.call_function(torch.ops.aten.mul.Tensor, (nodes[branch.branch], 0.0))
        addition.replace_input_with(nodes[branch.branch], nothing)
    masked.recompile()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in before.example_inputs())
    with torch.no_grad():
        expected, got = (out if isinstance(out, tuple) else (out,) for out in (masked(*inputs), pruned(*inputs)))
    worst = max((float((a - b).abs().max() / a.abs().max().clamp(min=torch.finfo(a.dtype).tiny)) for a, b in zip(expected, got, strict=True)), default=0.0)
    if not worst <= DOUBLE_TOLERANCE:
        where = ", ".join(branch.source for branch in branches)
        raise NumericsError("the pruned graph is not the unpruned one without the removed blocks", where=where, why=f"outputs differ by {worst:.2g}")
    return worst


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of the nodes of given names."""

    def __init__(self, graph: fx.GraphModule, wanted: Set[str]) -> None:
        super().__init__(graph)
        self._wanted = wanted
        self._values: dict[str, torch.Tensor] = {}

    def values_on(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self.run(*inputs)
        return self._values

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._wanted:
            self._values[n.name] = value
        return value


def _one_minus_cosine(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean over samples; a whole sample is one vector."""
    return float(1 - torch.nn.functional.cosine_similarity(before.flatten(1), after.flatten(1), dim=1).mean())


def _ancestors(graph: fx.GraphModule) -> dict[fx.Node, int]:
    """Of every node: the nodes that it depends on, itself included, as a bit set over positions in the graph."""
    found: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.graph.nodes):
        bits = 1 << position
        for argument in node.all_input_nodes:
            bits |= found[argument]
        found[node] = bits
    return found


def _sides(node: fx.Node, ancestors: Mapping[fx.Node, int], position: Mapping[fx.Node, int]) -> tuple[fx.Node, fx.Node] | None:
    """(stream, branch) of a residual addition; None for any other node."""
    if node.target not in _ADDITIONS or len(node.args) < 2:
        return None
    left, right = node.args[:2]
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or "alpha" in node.kwargs:
        return None
    shape = node.meta["val"].shape
    for stream, branch in ((left, right), (right, left)):
        if stream.meta["val"].shape == shape == branch.meta["val"].shape and any(ancestors[branch] >> position[n] & 1 for n in _summed(stream)):
            return stream, branch
    return None


def _summed(stream: fx.Node) -> set[fx.Node]:
    """``stream``, and where it is itself a sum of two nodes of one shape, what it sums."""
    found, queue = {stream}, [stream]
    while queue:
        node = queue.pop()
        if node.target in _ADDITIONS:
            for side in node.all_input_nodes:
                if side not in found and side.op != "get_attr" and side.meta["val"].shape == node.meta["val"].shape:
                    found.add(side)
                    queue.append(side)
    return found
