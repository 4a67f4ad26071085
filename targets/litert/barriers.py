"""What keeps the converter from merging what must stay apart.

Barriers keep it from folding arithmetic with constants into weights that lie on a grid of the plan.

Unhindered it multiplies the gain of a normalisation into the matrix product behind it, the scale of an attention into the one before it,
through views, and adds the three of a hard sigmoid to the bias of the convolution before it: the operator then has other integers, or
another result, than the plan. And a single head that is repeated for all queries is written out as a concatenation: merged into the products that read
it, as a broadcast of one, the runtime computes something else (seen with litert-torch 0.10 and ai-edge-litert 2.3: differences of the size of the outputs).
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.model import Model
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.weighted import LINEARS, weighted

_aten = torch.ops.aten
_FUSED = frozenset({_aten.clamp.default, _aten.hardtanh.default, _aten.relu.default, _aten.relu6.default})
"""What may be built into the operator before it: no harm, and a conversion saved."""
_ARITHMETIC = frozenset(
    {
        _aten.add.Scalar,
        _aten.add.Tensor,
        _aten.div.Scalar,
        _aten.div.Tensor,
        _aten.hardsigmoid.default,
        _aten.mul.Scalar,
        _aten.mul.Tensor,
        _aten.sub.Scalar,
        _aten.sub.Tensor,
    }
)
"""What is folded into the convolution before it when all else that it reads is constant."""

_REGROUPING = frozenset({_aten.clone.default, _aten.contiguous.default, _aten.reshape.default, _aten.view.default})


def guarded(model: Model) -> fx.GraphModule:
    """A copy of the graph of ``model`` with barriers around what its plan quantizes. Needs litert_torch imported, which defines the operator.

    Matrix products are shut off on both sides, convolutions where need be: a barrier has no channels-last layout.
    """
    graph = model.edit()
    _write_out(graph)
    graph.recompile()
    if model.quant is None:
        return graph
    for node in list(graphs.operators(graph)):
        kind = weighted(node)
        if kind is None or model.quant.scheme(node.name) is Scheme.FLOAT:
            continue
        read = kind.argument(node, kind.activation)
        if node.target in LINEARS and read is not None:
            with graph.graph.inserting_before(node):
                node.replace_input_with(read, _barrier(graph, read))
        shut_off = [user for user in node.users if (user.target not in _FUSED if node.target in LINEARS else _folds(user, node))]
        if shut_off:
            with graph.graph.inserting_after(node):
                barrier = _barrier(graph, node)
            for user in shut_off:
                user.replace_input_with(node, barrier)
    graph.recompile()
    return graph


def _write_out(graph: fx.GraphModule) -> None:
    """Put concatenations of one tensor in place of what repeats a single head of it: one of size 1 in all dimensions between the batch and those that stay."""
    for node in list(graphs.operators(graph)):
        x = node.args[0] if node.target is _aten.expand.default else None
        if not isinstance(x, fx.Node):
            continue
        before, after = x.meta["val"].shape, node.meta["val"].shape
        repeated = [dim for dim in range(len(before)) if len(before) == len(after) and before[dim] != after[dim]]
        if len(repeated) != 1 or repeated[0] == 0 or any(size != 1 for size in before[1 : repeated[0]]):
            continue
        if node.users and all(user.target in _REGROUPING for user in node.users):
            node.target, node.args, node.kwargs = _aten.cat.default, ([x] * int(after[repeated[0]]), repeated[0]), {}


def _folds(user: fx.Node, node: fx.Node) -> bool:
    return user.target in _ARITHMETIC and all(n is node or n.op == "get_attr" for n in user.all_input_nodes)


def _barrier(graph: fx.GraphModule, value: fx.Node) -> fx.Node:
    # Of one tensor alone the converter makes a barrier that it cannot read back.
    both = graph.graph.call_function(torch.ops.litert_torch.optimization_barrier.default, ([value, value],))
    with graph.graph.inserting_after(both):
        first = graph.graph.call_function(operator.getitem, (both, 0))
    both.meta["source"] = first.meta["source"] = graphs.source(value)
    return first
