"""Which operators XNNPACK runs in int8, with which neighbours and numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.grid_operators import CONCATENATIONS, SAME_GRID
from edgesmith.compiler.quantplan import QuantPlan, Scheme, TensorRange

aten = torch.ops.aten

PLAN_NAME = "edgesmith_plan_name"
"""Key in a node's ``meta``: the plan's name of the tensor that this node repeats in another shape."""
PLAN_ALIASES = "edgesmith_plan_aliases"
"""Likewise: the plan's names of what copied this node's tensor and is gone."""

_CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding})
_TRANSPOSED = frozenset({aten.conv_transpose2d.input})
_GEMM = frozenset({aten.linear.default}) | _CONVOLUTIONS | _TRANSPOSED
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_PRODUCTS = frozenset({aten.mul.Tensor})
_MEANS = frozenset({aten.mean.dim, aten.adaptive_avg_pool2d.default})
_BOUNDS = frozenset({aten.relu.default, aten.hardtanh.default, aten.clamp.default})
_SAME_VALUES = SAME_GRID | CONCATENATIONS
"""Operators that copy values: on one grid they give the same integers, whether XNNPACK moves bytes or floats."""
_PADDING = frozenset({aten.pad.default, aten.constant_pad_nd.default})

_FUSED = dict.fromkeys(_GEMM, frozenset({aten.relu.default, aten.hardtanh.default})) | {aten.add.Tensor: frozenset({aten.relu.default})}
"""Operator -> activations that XNNPACK computes as the bounds of its int8 result, which is rounded once, on the activation's grid.

Rounding before the activation as well spends the grid on what the activation cuts off. ExecuTorch's own quantizer does that with relu6: in
EfficientNet-Lite0 its grids before the 33 relu6 span 14 to 169 where 6 is kept, and the logits' relative error is 0.50 instead of 0.11.
"""

LARGEST_REQUANTIZATION = 256.0
"""XNNPACK's int8 kernels rescale their int32 sums by (input scale x weight scale / output scale), which must stay below this."""
_SUM_RATIO = (2.0**-10, 2.0**8)
_PRODUCT_RATIO = (2.0**-16, 2.0**8)
LARGEST_BIAS_STEPS = 2.0**30 * 1.01
"""The plan keeps biases within 2^30 steps of (input scale x weight scale); from 2^31 on, the toolchain's conversion to int32 wraps."""


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
    inputs = [node.args[0]] if node.target in _GEMM else node.all_input_nodes
    return tuple(_through_padding(node, x) for x in inputs if isinstance(x, fx.Node))


def pads_between_grids(x: fx.Node) -> bool:
    """Whether ``x`` pads with zeros, and for readers that do not take the padding in as a convolution does."""
    return x.target in _PADDING and _zero_spatial_padding(x) and any(user.target not in _CONVOLUTIONS for user in x.users)


def _through_padding(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    if node.target in _CONVOLUTIONS and x.target in _PADDING and len(x.users) == 1 and _zero_spatial_padding(x):
        source = x.args[0]
        assert isinstance(source, fx.Node)
        return source, x
    return x, node


def _zero_spatial_padding(node: fx.Node) -> bool:
    amounts = node.args[1]
    assert isinstance(amounts, (list, tuple))
    rest = list(node.args[2:])
    mode = rest.pop(0) if node.target is aten.pad.default and rest else "constant"
    spatial = node.meta["val"].dim() - 2
    inside = all(isinstance(a, int) and a >= 0 for a in amounts) and not any(amounts[2 * spatial :])
    return mode == "constant" and not any(rest) and not node.kwargs and inside


def result(node: fx.Node, plan: QuantPlan) -> fx.Node:
    """The tensor that ``node`` writes in int8: its own, or that of the sole following activation that XNNPACK fuses."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in _FUSED.get(node.target, frozenset()) and users[0].name in plan.activations:  # type: ignore[call-overload]
        return users[0]
    return node


def planned_range(tensor: fx.Node, plan: QuantPlan) -> TensorRange | None:
    """The range of ``tensor``: its own, that of a copy, or that of the padding after it, which adds only zeros."""
    names = [str(tensor.meta.get(PLAN_NAME, tensor.name)), *tensor.meta.get(PLAN_ALIASES, ()), *(u.name for u in tensor.users if u.target in _PADDING)]
    return next((plan.activations[name] for name in names if name in plan.activations), None)


def why_not(graph: fx.GraphModule, node: fx.Node, scheme: Scheme, plan: QuantPlan) -> str:
    """Why XNNPACK cannot run ``node`` by ``scheme``; empty if it can."""
    return next((reason for check in _CHECKS[scheme] if (reason := check(graph, node, plan))), "")


def _static_kind(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan) -> str:
    if node.target in _MEANS:
        return "" if _mean_of_image(node) else "XNNPACK averages in int8 over the whole of an image only"
    if node.target in _SUMS | _PRODUCTS:
        return "" if len(node.all_input_nodes) == 2 and not node.kwargs else "XNNPACK's int8 kernel takes two tensors and no alpha"
    return "" if node.target in _GEMM | _SAME_VALUES | _BOUNDS else "XNNPACK has no static int8 kernel for it"


def _mean_of_image(node: fx.Node) -> bool:
    if node.meta["val"].dim() != 4:
        return False
    if node.target is aten.adaptive_avg_pool2d.default:
        return tuple(node.meta["val"].shape[2:]) == (1, 1)
    dims = node.args[1]
    return isinstance(dims, (list, tuple)) and sorted(int(d) % 4 for d in dims) == [2, 3]  # type: ignore[arg-type]


def _dynamic_kind(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan) -> str:
    if node.target is aten.linear.default:
        return ""
    if node.target not in {aten.conv2d.default, aten.conv2d.padding}:
        return "XNNPACK quantizes activations at run time for linear and plain two-dimensional convolutions only"
    kernel = weight(node)
    return "XNNPACK has no dynamic int8 kernel for depthwise convolutions" if kernel is not None and kernel.meta["val"].shape[1] == 1 else ""


def _weight(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan) -> str:
    if node.target not in _GEMM:
        return ""
    kernel = weight(node)
    if kernel is None or str(kernel.target) not in plan.weights:
        return "its weight is not a parameter with a planned grid"
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, fx.Node) and bias.op != "get_attr":
        return "its bias is computed at run time"
    axis = plan.weights[str(kernel.target)].axis
    if node.target in _TRANSPOSED:
        groups = node.args[6] if len(node.args) > 6 else 1
        return "" if axis == 1 and groups == 1 else "XNNPACK quantizes transposed convolutions along axis 1 and without groups only"
    return "" if axis == 0 else f"XNNPACK quantizes weights along axis 0, the plan along axis {axis}"


def _ranges(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan) -> str:
    for tensor in (*(x for x, _ in activations(node)), result(node, plan)):
        if planned_range(tensor, plan) is None:
            return f"the plan has no range for {tensor.name}"
        if tensor.meta["val"].dtype is not torch.float32:
            return f"{tensor.name} is {tensor.meta['val'].dtype}"
    return ""


def _scale(tensor: fx.Node, plan: QuantPlan) -> float:
    found = planned_range(tensor, plan)
    assert found is not None
    return found.scale


def _requantization(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan) -> str:
    if node.target not in _GEMM | _SUMS | _PRODUCTS:
        return ""
    inputs = [_scale(x, plan) for x, _ in activations(node)]
    out = _scale(result(node, plan), plan)
    if node.target in _GEMM:
        return _gemm_requantization(graph, node, plan, inputs[0], out)
    low, high = _PRODUCT_RATIO if node.target in _PRODUCTS else _SUM_RATIO
    ratios = [inputs[0] * inputs[-1] / out] if node.target in _PRODUCTS else [scale / out for scale in inputs]
    outside = [r for r in ratios if not low <= r < high]
    return f"XNNPACK rescales by factors in [{low:g}, {high:g}), this one needs {outside[0]:g}" if outside else ""


def _gemm_requantization(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan, scale: float, out: float) -> str:
    kernel = weight(node)
    assert kernel is not None
    steps = scale * np.asarray(plan.weights[str(kernel.target)].scales)
    if steps.max() / out >= LARGEST_REQUANTIZATION:
        return f"XNNPACK rescales by factors below {LARGEST_REQUANTIZATION:g}, this one needs {steps.max() / out:g}"
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, fx.Node):
        most = float(np.abs(graphs.tensor(graph, str(bias.target)).detach().double().numpy() / steps).max())
        if most > LARGEST_BIAS_STEPS:
            return f"a bias of {most:.3g} steps of (input scale x weight scale) overflows int32"
    return ""


_Check = Callable[[fx.GraphModule, fx.Node, QuantPlan], str]
_CHECKS: dict[Scheme, tuple[_Check, ...]] = {
    Scheme.FLOAT: (),
    Scheme.DYNAMIC: (_dynamic_kind, _weight),
    Scheme.STATIC: (_static_kind, _weight, _ranges, _requantization),
    Scheme.STATIC16X8: (lambda graph, node, plan: "XNNPACK has no int16 activations",),
}
