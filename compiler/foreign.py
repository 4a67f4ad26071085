"""One vocabulary: operators of other libraries are written in ATen at capture, or refused there; second names give way to the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.errors import CaptureError

aten = torch.ops.aten

PLAINER = "choose an implementation of plain torch operators, often by an option of the model's configuration"

_SECOND_NAMES = {
    "absolute": "abs",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "true_divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "subtract": "sub",
}
_OF_SIZES = {"_operator", "math"}
_OF_TORCH = {torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not}


def write_in_aten(graph: fx.GraphModule) -> None:
    """Rewrite ``graph`` in place so that every operator is torch's own, under its first name.

    Raises:
        CaptureError: an operator of another library, which no runtime would know.
    """
    graph.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in {"placeholder", "output"} or graphs.is_write(node))
    for node in list(graphs.operators(graph)):
        if getattr(node.target, "namespace", "") == "aten":
            node.target = _first_name(node.target)
            continue
        if getattr(node.target, "__module__", "") in _OF_SIZES or node.target in _OF_TORCH:
            continue
        written = WRITTEN.get(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else None
        if written is None:
            raise CaptureError(
                f"{_path(node.target)} is no operator that runtimes know",
                where=graphs.source(node),
                hint=PLAINER,
            )
        there = set(graph.graph.nodes)
        with graph.graph.inserting_before(node):
            result = written(graph.graph, *node.all_input_nodes)
        for made in set(graph.graph.nodes) - there:
            made.meta["source"] = node.meta.get("source", "")
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)


def _first_name(overload: Any) -> Any:
    name = overload._schema.name.removeprefix("aten::")
    first = _SECOND_NAMES.get(name.removesuffix("_"))
    if first is None:
        return overload
    packet = getattr(aten, first + "_" * name.endswith("_"))
    return getattr(packet, overload._overloadname, overload)


def _path(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


def grouped_matrix_product(graph: fx.Graph, rows: fx.Node, matrices: fx.Node, ends: fx.Node) -> fx.Node:
    """Each row of (S, K) by the matrix of its group: matrices (E, K, N), group i ends before row ``ends[i]`` -> (S, N).

    Every row takes a copy of its matrix, as runtimes have no product in groups: S x K x N elements.
    """
    count = graph.call_function(aten.sym_size.int, (rows, 0))
    numbers = graph.call_function(aten.arange.default, (count,))
    behind = graph.call_function(aten.ge.Tensor, (graph.call_function(aten.unsqueeze.default, (numbers, 1)), ends))
    group = graph.call_function(aten.sum.dim_IntList, (behind, [1]))
    own = graph.call_function(aten.index.Tensor, (matrices, [group]))
    product = graph.call_function(aten.bmm.default, (graph.call_function(aten.unsqueeze.default, (rows, 1)), own))
    return graph.call_function(aten.squeeze.dim, (product, 1))


WRITTEN: Mapping[str, Callable[..., fx.Node]] = MappingProxyType({"transformers::grouped_mm_fallback": grouped_matrix_product})
"""Operator -> what builds it from the operator's tensors, in a graph."""
