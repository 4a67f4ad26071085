"""Weights and biases of matrix products and convolutions as the integers that a plan gives them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.errors import DefectError
from edgesmith.compiler.model import Model
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.weighted import CONVOLUTIONS, Weighted

_OFF_GRID = 1e-3
"""How far, in steps, a weight may lie from its grid: float32's rounding of 127 steps is 1e-5."""
_LARGEST_BIAS_STEPS = 2.0**30
"""Half of int32; the other half is left to the products."""


@dataclass(frozen=True)
class Constants:
    """int8 weights: [rows, columns] of a matrix product, [out, in / groups, ...] of a convolution; float64 scales and float bias per output channel."""

    integers: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float32] | None

    def integer_bias(self, input_scale: float) -> npt.NDArray[np.int32]:
        """The bias in steps of ``input_scale`` x ``scales``."""
        assert self.bias is not None
        return np.rint(self.bias / (np.float32(input_scale) * self.scales.astype(np.float32)).astype(np.float64)).astype(np.int32)


def why_not(model: Model, node: fx.Node, kind: Weighted, scheme: Scheme) -> str:
    """Why ONNX Runtime has no integer form of ``node``; empty if it has."""
    assert model.quant is not None
    weight, bias = kind.argument(node, kind.weight), kind.argument(node, kind.bias)
    if kind.transposed:
        return f"ONNX Runtime has no {scheme.value} int8 kernel for transposed convolutions"
    source = kind.argument(node, kind.activation)
    if source is None or source.op == "get_attr":
        return "its input is a constant"
    if weight is None or weight.op != "get_attr" or str(weight.target) not in model.quant.weights:
        return "its weight is not a parameter with a planned grid"
    axis = model.quant.weights[str(weight.target)].axis
    if axis != kind.axis:
        return f"ONNX Runtime quantizes this weight along axis {kind.axis}, the plan along axis {axis}"
    if bias is not None and (bias.op != "get_attr" or graphs.tensor(model.graph, str(bias.target)).dim() != 1):
        return "its bias is not one constant per output channel"
    if node.kwargs:
        return f"ONNX Runtime's int8 kernel takes no {', '.join(node.kwargs)}"
    least = 3 if node.target in CONVOLUTIONS else 2
    if node.meta["val"].dim() < least:
        return f"ONNX Runtime's int8 kernel takes at least {least} dimensions"
    return ""


def constants(model: Model, node: fx.Node, kind: Weighted, input_scale: float | None = None) -> Constants:
    """The integers of the weight of ``node``, on the plan's grid.

    With an ``input_scale`` (static), a channel whose weights have all but vanished beside its bias (as batch norm leaves them after training with
    weight decay) gets a wider scale, so that the int32 bias does not overflow: bias / (input scale x 2^30). Its weights are then off
    by at most half such a step, so K products of at most 255 input steps are off by K x 255 / 2^31 of the bias.

    Raises:
        DefectError: the weight does not lie on its grid.
    """
    assert model.quant is not None
    weight, bias = kind.argument(node, kind.weight), kind.argument(node, kind.bias)
    assert weight is not None
    name = str(weight.target)
    values = graphs.tensor(model.graph, name).detach().double().numpy()
    offset = None if bias is None else graphs.tensor(model.graph, str(bias.target)).detach().float().numpy()
    planned = np.asarray(model.quant.weights[name].scales, np.float64)
    along = [-1 if d == kind.axis else 1 for d in range(values.ndim)]
    steps = values / planned.reshape(along)
    if np.abs(steps - np.rint(steps)).max(initial=0) > _OFF_GRID or np.abs(steps).max(initial=0) > 127 + _OFF_GRID:
        raise DefectError("a weight does not lie on its planned grid", where=name)
    scales = planned
    if input_scale is not None and offset is not None:
        scales = np.maximum(planned, np.abs(offset.astype(np.float64)) / (input_scale * _LARGEST_BIAS_STEPS))
    integers = np.rint(values / scales.reshape(along)).astype(np.int8)
    if node.target is torch.ops.aten.linear.default:
        integers = np.ascontiguousarray(integers.T)
    return Constants(integers, scales, offset)
