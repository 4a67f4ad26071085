"""Operators that some runtime lacks, written as ones that it has: for files, which are not trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.model import Model

aten = torch.ops.aten


def plain(model: Model) -> Model:
    """``model`` with what ``REWRITES`` knows written out. Every node keeps its name and its value, to the rounding of float32."""
    if not any(node.target in REWRITES for node in graphs.operators(model.graph)):
        return model
    graph = model.edit()
    for node in list(graphs.operators(graph)):
        if node.target in REWRITES:
            REWRITES[node.target](node)
    graph.recompile()
    return replace(model, graph=graph)


def _mean(node: fx.Node) -> None:
    """A mean over the last dimension."""
    if node.args[1] in ([1], (1,), 1):
        node.target, node.args = aten.mean.dim, (node.args[0], [-1], True)


def _root_of_squares(node: fx.Node) -> None:
    """The Euclidean norm. Its gradient at zero would be infinite, which is why training keeps the operator."""
    given = dict(zip(("x", "ord", "dim", "keepdim"), node.args, strict=False))
    x, dims = given["x"], given.get("dim")
    if given.get("ord", 2) != 2 or dims is None or node.kwargs:
        return
    with node.graph.inserting_before(node):
        total = _added(node, aten.sum.dim_IntList, _added(node, aten.mul.Tensor, x, x), dims, given.get("keepdim", False))
    node.target, node.args = aten.sqrt.default, (total,)


def _added(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    values = fx.map_arg(args, lambda n: n.meta["val"])
    made = node.graph.call_function(target, args)
    with node.meta["val"].fake_mode:
        made.meta.update({"source": graphs.source(node), "val": target(*values)})
    return made


REWRITES: dict[Any, Callable[[fx.Node], None]] = {
    aten.adaptive_avg_pool1d.default: _mean,
    aten.linalg_vector_norm.default: _root_of_squares,
}
"""Operator -> how its node is changed."""
