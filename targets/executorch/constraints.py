"""Which operators XNNPACK runs in int8, with which neighbours and numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.quantplan import QuantPlan, Scheme
from edgesmith.kernels.affine import activation_grid

aten = torch.ops.aten

_CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding})
_TRANSPOSED = frozenset({aten.conv_transpose2d.input})
_GEMM = frozenset({aten.linear.default}) | _CONVOLUTIONS | _TRANSPOSED
_ELEMENTWISE = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor})
_BOUNDED = frozenset({aten.relu.default, aten.hardtanh.default})
_FUSED = {op: _BOUNDED for op in _GEMM} | {aten.add.Tensor: frozenset({aten.relu.default})}
"""Operator -> activations that XNNPACK computes as the bounds of its int8 result."""

LARGEST_REQUANTIZATION = 256.0
"""XNNPACK's int8 kernels rescale their int32 sums by (input scale x weight scale / output scale), which must stay below this."""
_ADD_RATIO = (2.0**-10, 2.0**8)
_MUL_RATIO = (2.0**-16, 2.0**8)
_LARGEST_BIAS_STEPS = 2.0**30
"""Half of int32: the other half is left for the sum of products."""


def weight(node: fx.Node) -> fx.Node | None:
    """The ``get_attr`` node of the weight of a linear or convolution operator; None for other operators."""
    if node.target not in _GEMM:
        return None
    candidate = node.args[1]
    return candidate if isinstance(candidate, fx.Node) and candidate.op == "get_attr" else None


def activations(node: fx.Node) -> tuple[tuple[fx.Node, fx.Node], ...]:
    """The tensors that ``node`` reads in int8, each with the node that consumes it.

    That is ``node`` itself, or the zero padding before a convolution, which XNNPACK does in int8 too.
    """
    inputs = [node.args[0]] if node.target in _GEMM else list(node.args[:2])
    return tuple(_through_padding(node, x) for x in inputs if isinstance(x, fx.Node))


def _through_padding(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    if node.target in _CONVOLUTIONS and x.target in {aten.pad.default, aten.constant_pad_nd.default} and len(x.users) == 1 and _zero_spatial_padding(x):
        source = x.args[0]
        assert isinstance(source, fx.Node)
        return source, x
    return x, node


def _zero_spatial_padding(node: fx.Node) -> bool:
    amounts = node.args[1]
    assert isinstance(amounts, (list, tuple))
    mode, value = (node.args[2:] + ("constant", None)[len(node.args[2:]) :]) if node.target is aten.pad.default else ("constant", (*node.args[2:], 0)[0])
    spatial = node.meta["val"].dim() - 2
    return mode == "constant" and not value and all(isinstance(a, int) and a >= 0 for a in amounts) and not any(amounts[2 * spatial :])


def result(node: fx.Node, plan: QuantPlan) -> fx.Node:
    """The tensor that ``node`` writes in int8: its own, or that of the sole following activation that XNNPACK fuses."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in _FUSED.get(node.target, frozenset()) and users[0].name in plan.activations:  # type: ignore[call-overload]
        return users[0]
    return node


def why_not(graph: fx.GraphModule, node: fx.Node, scheme: Scheme, plan: QuantPlan) -> str:
    """Why XNNPACK cannot run ``node`` by ``scheme``; empty if it can."""
    for check in _CHECKS[scheme]:
        reason = check(graph, node, plan)
        if reason:
            return reason
    return ""


def _static_kind(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan) -> str:  # noqa: ARG001
    if node.target not in _GEMM | _ELEMENTWISE:
        return "XNNPACK has no static int8 kernel for it"
    if node.target in _ELEMENTWISE and (len(activations(node)) != 2 or node.kwargs):
        return "XNNPACK's int8 kernel takes two tensors and no alpha"
    return ""


def _dynamic_kind(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan) -> str:  # noqa: ARG001
    if node.target is aten.linear.default:
        return ""
    if node.target not in {aten.conv2d.default, aten.conv2d.padding}:
        return "XNNPACK quantizes activations at run time for linear and plain two-dimensional convolutions only"
    kernel = weight(node)
    return "XNNPACK has no dynamic int8 kernel for depthwise convolutions" if kernel is not None and kernel.meta["val"].shape[1] == 1 else ""


def _weight(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan) -> str:  # noqa: ARG001
    if node.target not in _GEMM:
        return ""
    kernel = weight(node)
    if kernel is None or str(kernel.target) not in plan.weights:
        return "its weight is not a parameter with a planned grid"
    axis = plan.weights[str(kernel.target)].axis
    if node.target in _TRANSPOSED:
        groups = node.args[6] if len(node.args) > 6 else 1
        return "" if axis == 1 and groups == 1 else "XNNPACK quantizes transposed convolutions along axis 1 and without groups only"
    return "" if axis == 0 else f"XNNPACK quantizes weights along axis 0, the plan along axis {axis}"


def _ranges(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan) -> str:  # noqa: ARG001
    tensors = [*(x for x, _ in activations(node)), result(node, plan)]
    for tensor in tensors:
        if tensor_range_key(tensor, plan) is None:
            return f"the plan has no range for {tensor.name}"
        if tensor.meta["val"].dtype is not torch.float32:
            return f"{tensor.name} is {tensor.meta['val'].dtype}"
    return ""


def tensor_range_key(tensor: fx.Node, plan: QuantPlan) -> str | None:
    """The name under which the plan has the range of ``tensor``: its own, or that of the padding after it, which adds only zeros."""
    if tensor.name in plan.activations:
        return tensor.name
    padded = [u.name for u in tensor.users if u.target in {aten.pad.default, aten.constant_pad_nd.default} and u.name in plan.activations]
    return padded[0] if padded else None


def _scale(tensor: fx.Node, plan: QuantPlan) -> float:
    key = tensor_range_key(tensor, plan)
    assert key is not None
    return float(activation_grid(plan.activations[key].low, plan.activations[key].high).scale)


def _requantization(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan) -> str:
    inputs = [_scale(x, plan) for x, _ in activations(node)]
    out = _scale(result(node, plan), plan)
    if node.target in _GEMM:
        return _gemm_requantization(graph, node, plan, inputs[0], out)
    low, high = _MUL_RATIO if node.target is aten.mul.Tensor else _ADD_RATIO
    ratios = [inputs[0] * inputs[1] / out] if node.target is aten.mul.Tensor else [scale / out for scale in inputs]
    outside = [r for r in ratios if not low <= r < high]
    return f"XNNPACK rescales by factors in [{low:g}, {high:g}), this one needs {outside[0]:g}" if outside else ""


def _gemm_requantization(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan, scale: float, out: float) -> str:
    kernel = weight(node)
    assert kernel is not None
    sums = scale * np.asarray(plan.weights[str(kernel.target)].scales)
    if sums.max() / out >= LARGEST_REQUANTIZATION:
        return f"XNNPACK rescales by factors below {LARGEST_REQUANTIZATION:g}, this one needs {sums.max() / out:g}"
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, fx.Node):
        steps = float(np.abs(graphs.tensor(graph, str(bias.target)).detach().double().numpy() / sums).max())
        if steps > _LARGEST_BIAS_STEPS:
            return f"a bias of {steps:.3g} steps of (input scale x weight scale) overflows int32"
    return ""


def _bias(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan) -> str:  # noqa: ARG001
    bias = node.args[2] if node.target in _GEMM and len(node.args) > 2 else None
    return "its bias is computed at run time" if isinstance(bias, fx.Node) and bias.op != "get_attr" else ""


_Check = Callable[[fx.GraphModule, fx.Node, QuantPlan], str]
_CHECKS: dict[Scheme, tuple[_Check, ...]] = {
    Scheme.FLOAT: (),
    Scheme.DYNAMIC: (_dynamic_kind, _weight, _bias),
    Scheme.STATIC: (_static_kind, _weight, _bias, _ranges, _requantization),
}
