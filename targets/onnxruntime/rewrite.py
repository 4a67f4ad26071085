"""Forms of an exported program that the ONNX exporter refuses, or ONNX Runtime gets wrong, brought into forms that they take."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

aten = torch.ops.aten

_PADDINGS = (aten.pad.default, aten.constant_pad_nd.default)
_LARGEST = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)


def prepare(program: torch.export.ExportedProgram) -> None:
    """Rewrite ``program`` in place; results and names of the existing nodes stay."""
    for node in list(program.graph.nodes):
        if node.target is aten.view.default:
            # Decomposition may change the strides of what is viewed; a reshape copies where a view would be refused.
            node.target = aten.reshape.default
        elif node.target is aten.scaled_dot_product_attention.default:
            _four_dimensional(program.graph, node)
        elif node.target in _LARGEST and (padding := node.all_input_nodes[0]).target in _PADDINGS and padding.meta["val"].is_floating_point():
            _kept_apart(program.graph, padding, node)
    for node in program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        _contiguous(program.graph, node)
    program.graph_module.recompile()


def _kept_apart(graph: fx.Graph, padding: fx.Node, pool: fx.Node) -> None:
    """Put an operator that changes nothing between the two: ONNX Runtime lets the pool do the padding, which does it with less than all numbers."""
    with graph.inserting_before(pool):
        same = graph.call_function(aten.clamp_min.default, (padding, torch.finfo(padding.meta["val"].dtype).min))
    same.meta.update(padding.meta)
    pool.replace_input_with(padding, same)


def _contiguous(graph: fx.Graph, attention: fx.Node) -> None:
    """Fix the strides of the result: those of one implementation when the views behind it are made may be another's when it is decomposed."""
    readers = list(attention.users)
    with graph.inserting_after(attention):
        copy = graph.call_function(aten.clone.default, (attention,), {"memory_format": torch.contiguous_format})
    copy.meta.update(attention.meta)
    for reader in readers:
        reader.replace_input_with(attention, copy)


def _four_dimensional(graph: fx.Graph, attention: fx.Node) -> None:
    """Fold the leading dimensions of an attention that has not exactly two of them into two."""
    query, key, value = attention.args[:3]
    shape = attention.meta["val"].shape
    if len(shape) == 4:
        return
    leading = shape[:-2]
    with graph.inserting_before(attention):
        folded = [_folded(graph, operand, leading) for operand in (query, key, value)]
        rest = list(attention.args[3:])
        if rest and isinstance(rest[0], fx.Node):
            rest[0] = _folded(graph, rest[0], leading) if rest[0].meta["val"].dim() > 2 else rest[0]
        whole = graph.call_function(aten.scaled_dot_product_attention.default, (*folded, *rest), attention.kwargs)
    attention.target = aten.reshape.default
    attention.args, attention.kwargs = (whole, list(shape)), {}


def _folded(graph: fx.Graph, operand: object, leading: Sequence[int]) -> fx.Node:
    assert isinstance(operand, fx.Node)
    rows, columns = operand.meta["val"].shape[-2:]
    expanded = graph.call_function(aten.expand.default, (operand, [*leading, rows, columns]))
    outer = math.prod(leading[:-1])
    return graph.call_function(aten.reshape.default, (expanded, [outer, leading[-1] if leading else 1, rows, columns]))
