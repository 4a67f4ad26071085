"""Exact rewrites of operators into those that XNNPACK takes, or fuses, instead of leaving them to slower kernels between delegates."""

from __future__ import annotations

import math

import torch
from torch import fx

from edgesmith.compiler import graph as graphs

aten = torch.ops.aten


def rewrite_bounds(graph: fx.GraphModule) -> None:
    """``relu6`` and ``clamp`` by numbers become ``relu`` or ``hardtanh``, in place and under the same node names."""
    for node in graphs.operators(graph):
        bounds = _bounds(node)
        if bounds == (0.0, math.inf):
            node.target, node.args, node.kwargs = aten.relu.default, (node.args[0],), {}
        elif bounds is not None and all(map(math.isfinite, bounds)):
            node.target, node.args, node.kwargs = aten.hardtanh.default, (node.args[0], *bounds), {}


def _bounds(node: fx.Node) -> tuple[float, float] | None:
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target is not aten.clamp.default or node.meta["val"].dtype is not torch.float32:
        return None
    low, high = (*node.args[1:], None, None)[:2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))  # type: ignore[arg-type]
