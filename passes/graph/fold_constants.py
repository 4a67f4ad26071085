"""Evaluate what depends on no input, and drop operators that do nothing in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult

aten = torch.ops.aten

GROWTH_BYTES = 2**20
"""A constant is not stored where that takes this much more than the tensors it was made of: a broadcast mask, a table looked up."""

_LITERALS = (int, float, bool)


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Constants computed once, at compile time; identities removed.

    A subgraph that reads no input (a transposed or normalised weight, position embeddings looked up, a causal mask) becomes one tensor: a
    Parameter where it was made from a Parameter, so that it still trains, else a buffer. Random operators are left alone, and so is a
    result that would take 1 MiB more than the tensors that it replaces. Identities are dropout in eval mode (so fold after the last
    training), views, slices and conversions that change nothing, sums with 0 and products with 1.
    """

    name: ClassVar[str] = "fold-constants"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        """The model with fewer operators and the same outputs."""
        graph = model.edit()
        removed = sum(_removed(graph, node) for node in list(graphs.operators(graph)) if _is_identity(node))
        folded = _fold(graph)
        changed = removed + folded > 0
        return PassResult(model.with_graph(graph) if changed else model, changed)


def _same_value(_: fx.Node) -> bool:
    return True


def _same_shape(node: fx.Node) -> bool:
    return _kept(node, lambda value: tuple(value.shape))


def _same_layout(node: fx.Node) -> bool:
    return _kept(node, lambda value: value.stride())


def _same_dtype(node: fx.Node) -> bool:
    return _kept(node, lambda value: (value.dtype, value.device))


def _in_order(node: fx.Node) -> bool:
    dims = node.args[1]
    assert isinstance(dims, (list, tuple))
    return list(dims) == sorted(dims) and all(isinstance(d, int) and d >= 0 for d in dims)


def _no_amount(node: fx.Node) -> bool:
    return not any(node.args[1])  # type: ignore[arg-type]


def _by(neutral: int) -> Callable[[fx.Node], bool]:
    return lambda node: isinstance(node.args[1], _LITERALS) and node.args[1] == neutral and len(node.args) == 2


def _evaluates(position: int) -> Callable[[fx.Node], bool]:
    return lambda node: node.args[position] is False


_IDENTITY_IF: dict[object, Callable[[fx.Node], bool]] = {
    aten._to_copy.default: _same_layout,
    aten.add.Tensor: _by(0),
    aten.alias.default: _same_value,
    aten.alpha_dropout.default: _evaluates(2),
    aten.clone.default: _same_layout,
    aten.constant_pad_nd.default: _no_amount,
    aten.contiguous.default: _same_layout,
    aten.detach.default: _same_value,
    aten.div.Tensor: _by(1),
    aten.dropout.default: _evaluates(2),
    aten.expand.default: _same_shape,
    aten.feature_dropout.default: _evaluates(2),
    aten.lift_fresh_copy.default: _same_layout,
    aten.mul.Tensor: _by(1),
    aten.pad.default: _no_amount,
    aten.permute.default: _in_order,
    aten.reshape.default: _same_shape,
    aten.slice.Tensor: _same_shape,
    aten.squeeze.dim: _same_shape,
    aten.sub.Tensor: _by(0),
    aten.to.device: _same_dtype,
    aten.to.dtype: _same_dtype,
    aten.to.dtype_layout: _same_dtype,
    aten.view.default: _same_shape,
}
"""When an operator gives back its first argument. Shape, dtype and device have to be the same besides."""


def _kept(node: fx.Node, of: Callable[[torch.Tensor], object]) -> bool:
    argument = node.args[0]
    assert isinstance(argument, fx.Node)
    return of(node.meta["val"]) == of(argument.meta["val"])


def _is_identity(node: fx.Node) -> bool:
    test = _IDENTITY_IF.get(node.target)
    if test is None or not isinstance(node.args[0], fx.Node) or not isinstance(node.args[0].meta["val"], torch.Tensor):
        return False
    if node.args[0].op != "call_function" and any(user.op == "output" for user in node.users):
        return False
    return test(node) and _same_shape(node) and _same_dtype(node)


def _removed(graph: fx.GraphModule, node: fx.Node) -> bool:
    argument = node.args[0]
    assert isinstance(argument, fx.Node)
    node.replace_all_uses_with(argument)
    graph.graph.erase_node(node)
    return True


def _fold(graph: fx.GraphModule) -> int:
    """Replace the results of constant subgraphs that others read; how many."""
    constant = _constants(graph)
    results = [n for n in constant if n.op == "call_function" and any(user not in constant for user in n.users)]
    values = _evaluated(graph, constant, results)
    count = 0
    for node in results:
        value = values[node]
        if isinstance(value, torch.Tensor) and _worth_storing(graph, node, value, constant):
            _replace_by_tensor(graph, node, value)
            count += 1
        elif isinstance(value, _LITERALS):
            _replace_by_literal(node, value)
            count += 1
    return count


def _constants(graph: fx.GraphModule) -> dict[fx.Node, None]:
    """Every node that depends on no input, in order."""
    found: dict[fx.Node, None] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(a in found for a in node.all_input_nodes) and not _is_random(node)):
            found[node] = None
    return found


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _evaluated(graph: fx.GraphModule, constant: dict[fx.Node, None], results: list[fx.Node]) -> dict[fx.Node, Any]:
    """The values of ``results`` and of all that they are computed from."""
    needed = {ancestor for node in results for ancestor in _ancestors(node)}
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in (n for n in constant if n in needed):
            if node.op == "get_attr":
                values[node] = graphs.tensor(graph, str(node.target)).detach()
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                assert callable(node.target)
                values[node] = node.target(*args, **kwargs)
    return values


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """``node`` and everything that it is computed from."""
    found, queue = {node}, [node]
    while queue:
        fresh = set(queue.pop().all_input_nodes) - found
        found |= fresh
        queue += fresh
    return found


def _leaves(node: fx.Node) -> list[fx.Node]:
    """The ``get_attr`` nodes that a constant node is computed from, in order."""
    return sorted(n for n in _ancestors(node) if n.op == "get_attr")


def _worth_storing(graph: fx.GraphModule, node: fx.Node, value: torch.Tensor, constant: dict[fx.Node, None]) -> bool:
    freed = {
        id(tensor): tensor.nbytes
        for tensor, leaf in ((graphs.tensor(graph, str(n.target)), n) for n in _leaves(node))
        if all(user in constant for user in leaf.users) and len(graphs.same_tensor(graph, str(leaf.target))) == 1
    }
    return value.nbytes <= sum(freed.values()) + GROWTH_BYTES


def _replace_by_tensor(graph: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> None:
    made_from = [graphs.tensor(graph, str(leaf.target)) for leaf in _leaves(node)]
    stored = value.clone(memory_format=torch.contiguous_format)
    if value.is_floating_point() and any(isinstance(t, nn.Parameter) for t in made_from):
        stored = nn.Parameter(stored, requires_grad=any(t.requires_grad for t in made_from))
    name = f"_folded.{node.name}"
    graphs.add_tensor(graph, name, stored)
    with graph.graph.inserting_before(node):
        fresh = graph.graph.get_attr(name)
    fresh.meta = {"source": node.meta.get("source", ""), "val": node.meta["val"]}
    node.replace_all_uses_with(fresh)


def _replace_by_literal(node: fx.Node, value: Any) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)
