"""What quantization knows about operators beside the weighted ones: which keep a grid, which make a new one, which fuse."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import fx

aten = torch.ops.aten

SAME_GRID: frozenset[object] = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.dropout.default,
        aten.expand.default,
        aten.feature_dropout.default,
        aten.flatten.using_ints,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
"""Operators whose results are some of their first argument's values: exact on integers, on the same grid."""

_PADDING: frozenset[object] = frozenset({aten.constant_pad_nd.default, aten.pad.default})

CLAMPS: frozenset[object] = frozenset({aten.clamp.default, aten.hardtanh.default, aten.relu.default, aten.relu6.default})
"""Activations that runtimes fuse into the operator before them: saturation at the ends of the grid does their work."""

UNARY: frozenset[object] = CLAMPS | frozenset(
    {
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.avg_pool1d.default,
        aten.avg_pool2d.default,
        aten.elu.default,
        aten.gelu.default,
        aten.hardsigmoid.default,
        aten.hardswish.default,
        aten.leaky_relu.default,
        aten.mean.dim,
        aten.mish.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.tanh.default,
    }
)
"""Functions of one tensor with a grid of their own; between two static operators they lose nothing by being static too."""

FIXED: Mapping[object, tuple[float, float]] = MappingProxyType({aten.sigmoid.default: (0.0, 255 / 256), aten.tanh.default: (-1.0, 127 / 128)})
"""Functions whose results get one grid whatever their values, because a runtime knows no other (TensorFlow Lite 8-bit quantization specification)."""

FIXED_PEAK = 1 - 2.0**-15
"""The end of their int16 grid."""

SUMS: frozenset[object] = frozenset({aten.add.Tensor, aten.sub.Tensor})
PRODUCTS: frozenset[object] = frozenset({aten.mul.Tensor})
CONCATENATIONS: frozenset[object] = frozenset({aten.cat.default})
"""All arguments and the result share one grid, so that concatenation copies integers."""


def keeps_grid(node: fx.Node) -> bool:
    """Whether the values of ``node`` are some of its first argument's, and zeros: exact on integers, on the same grid."""
    if node.target in _PADDING:
        rest = list(node.args[2:])
        mode = rest.pop(0) if node.target is aten.pad.default and rest else "constant"
        return mode == "constant" and not any(rest)
    return node.target in SAME_GRID


def activations(node: fx.Node) -> tuple[fx.Node, ...]:
    """The float tensors that ``node`` reads and that depend on the inputs."""
    return tuple(a for a in node.all_input_nodes if a.op != "get_attr" and is_float(a))


def is_float(node: fx.Node) -> bool:
    """Whether ``node`` is a float32 tensor."""
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def fused_clamp(node: fx.Node) -> fx.Node | None:
    """The clamping activation that alone reads ``node``, or None."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return reader if reader is not None and reader.target in CLAMPS and reader.args[0] is node and _holds_zero(reader) else None


def _holds_zero(clamp: fx.Node) -> bool:
    """Whether zero survives the clamp: only then can a grid, which always holds zero, end where the clamp does."""
    defaults = {aten.hardtanh.default: (-1.0, 1.0), aten.clamp.default: (None, None)}.get(clamp.target, (0.0, None))  # type: ignore[call-overload]
    low, high = (clamp.args[i + 1] if len(clamp.args) > i + 1 else defaults[i] for i in range(2))
    return (low is None or (isinstance(low, (int, float)) and low <= 0)) and (high is None or (isinstance(high, (int, float)) and high >= 0))
