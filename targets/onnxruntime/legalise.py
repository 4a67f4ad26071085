"""Write a QuantPlan into an exported graph as what ONNX Runtime fuses into integer kernels.

- static matrix product: ``Gemm`` on two dimensions between Q/DQ, with an int32 bias -> ``QGemm``
- static convolution: ``Conv`` between Q/DQ, with an int32 bias -> ``QLinearConv``
- dynamic matrix product: ``DynamicQuantizeLinear``, ``MatMulInteger`` and a rescale -> ``DynamicQuantizeMatMul``
- dynamic convolution: ``DynamicQuantizeLinear``, ``ConvInteger`` and a rescale
- other static operators: Q/DQ around them; the runtime has integer kernels for some, and the others are computed in float between grids

Weights are int8 per channel, activations uint8. What cannot run as planned stays float and is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.model import Model
from edgesmith.compiler.quantplan import QuantPlan, Scheme
from edgesmith.compiler.weighted import CONVOLUTIONS, Weighted, weighted
from edgesmith.targets.onnxruntime.export import ORIGIN, Exported, tensor_nodes
from edgesmith.targets.onnxruntime.integers import Grid, Integers, uint8_grid
from edgesmith.targets.onnxruntime.weights import Constants, constants, why_not

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten

NOT_HONOURED = "onnxruntime.not-honoured"
FLOAT_BETWEEN_GRIDS = "onnxruntime.float-between-grids"

_SHAPES = ("Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
_VALUES = ("Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul", "Sigmoid", "Softmax")
INTEGER_KERNELS = frozenset(_SHAPES + _VALUES)
"""Operators beside products and convolutions that ONNX Runtime 1.31 computes, or moves, as integers when they stand between Q/DQ."""

_CLAMPS = frozenset({aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default})
_PADDINGS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
"""The exporter lets a convolution do a zero padding before it."""


def watched(model: Model) -> tuple[str, ...]:
    """The nodes whose tensors legalisation has to find in the exported graph."""
    plan = model.quant
    if plan is None:
        return ()
    wanted = set(plan.activations)
    for node in graphs.operators(model.graph):
        if plan.scheme(node.name) is not Scheme.FLOAT:
            wanted |= {node.name, *(a.name for a in node.all_input_nodes)}
    return tuple(name for name, node in tensor_nodes(model.graph).items() if name in wanted and node.op == "call_function")


def legalise(exported: Exported, model: Model) -> tuple[Diagnostic, ...]:
    """Rewrite ``exported`` in place as the plan of ``model`` says; a WARNING for each operator whose scheme could not be honoured.

    Raises:
        DefectError: a weight does not lie on the grid that its plan gives it.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

    if model.quant is None:
        return ()
    work = _Legaliser(exported, model, model.quant)
    refused = tuple(remark for node in graphs.operators(model.graph) for remark in work.apply(node))
    TopologicalSortPass()(exported.model)
    RemoveUnusedNodesPass()(exported.model)
    return refused + work.float_inside()


class _Legaliser:
    """Applies one plan to one exported graph, operator by operator in graph order."""

    def __init__(self, exported: Exported, model: Model, plan: QuantPlan) -> None:
        self._model, self._plan = model, plan
        self._values = dict(exported.values)
        self._integers = Integers(exported.model.graph)
        self._replaced: dict[ir.Value, ir.Value] = {}
        self._groups: dict[str, list[ir.Node]] = {}
        for node in exported.model.graph:
            self._groups.setdefault(node.metadata_props[ORIGIN], []).append(node)
        self._merged = self._merged_differently()

    def apply(self, node: fx.Node) -> tuple[Diagnostic, ...]:
        """Rewrite the ONNX nodes of ``node`` by its scheme; what has to be said about it."""
        scheme = self._plan.scheme(node.name)
        if scheme is Scheme.FLOAT:
            return ()
        self._integers.origin = node.name
        kind = weighted(node)
        twin = self._replaced.get(self._values[node.name]) if node.name in self._values else None
        if twin is not None:  # the exporter computes two equal operators once
            self._values[node.name], why = twin, ""
        elif node.name in self._merged:
            why = "the exporter computes it once with an equal operator, which the plan puts on another grid"
        elif scheme is Scheme.STATIC16X8:
            why = "the runtime computes with int16 activations in float"
        elif kind is not None:
            why = why_not(self._model, node, kind, scheme) or self._product(node, kind, scheme)
        elif scheme is Scheme.DYNAMIC:
            why = "only operators that multiply by a weight can be dynamic"
        else:
            why = self._between_grids(node)
        if why:
            return (Diagnostic(Severity.WARNING, NOT_HONOURED, graphs.source(node), f"{node.target} was planned {scheme.value} and runs in float: {why}"),)
        return ()

    def _merged_differently(self) -> frozenset[str]:
        """Operators that share a value in the exported graph and not their grid in the plan."""
        planned: dict[ir.Value, dict[str, tuple[Scheme, Grid | None]]] = {}
        for node in graphs.operators(self._model.graph):
            scheme = self._plan.scheme(node.name)
            if scheme is not Scheme.FLOAT and node.name in self._values:
                planned.setdefault(self._values[node.name], {})[node.name] = scheme, self._grid(node)
        return frozenset(name for sharing in planned.values() if len(set(sharing.values())) > 1 for name in sharing)

    def _grid(self, node: fx.Node) -> Grid | None:
        return uint8_grid(self._plan.activations[node.name]) if node.name in self._plan.activations else None

    def _product(self, node: fx.Node, kind: Weighted, scheme: Scheme) -> str:
        """Replace a matrix product or convolution by its integer form; why not, if it cannot be."""
        source = kind.argument(node, kind.activation)
        assert source is not None
        x, old = self._values[source.name], self._values[node.name]
        if scheme is Scheme.STATIC:
            read, written = self._grid(source), self._grid(node)
            if read is None or written is None:
                return f"the plan has no range for {node.name if read else source.name}"
            data = constants(self._model, node, kind, input_scale=read[0])
            new = self._static_convolution(node, data, read, written) if node.target in CONVOLUTIONS else self._static_gemm(node, x, data, read, written)
        else:
            data = constants(self._model, node, kind)
            new = self._dynamic_convolution(node, data) if node.target in CONVOLUTIONS else self._dynamic_matmul(x, data)
        if new is None:
            return "the exporter merged it with its neighbours"
        self._integers.redirect(old, new)
        self._values[node.name] = self._replaced[old] = new
        return ""

    def _static_gemm(self, node: fx.Node, x: ir.Value, data: Constants, read: Grid, written: Grid) -> ir.Value:
        add = self._integers
        rows, columns = data.integers.shape
        shape = node.meta["val"].shape
        flat = len(shape) == 2
        integers = add.quantize(x, read)
        integers = integers if flat else add.reshape(integers, (-1, rows))
        operands = [add.dequantize(integers, read), add.weights(data.integers, data.scales, 1)]
        if data.bias is not None:
            operands.append(add.weights(data.integer_bias(read[0]), data.scales * read[0], 0))
        result = add.quantize(add.node("Gemm", operands)[0], written)
        return add.dequantize(result if flat else add.reshape(result, (*_batch_one(self._model, shape[:-1]), columns)), written)

    def _static_convolution(self, node: fx.Node, data: Constants, read: Grid, written: Grid) -> ir.Value | None:
        add, old = self._integers, self._convolution(node)
        if old is None:
            return None
        x = old.inputs[0]
        assert x is not None
        operands = [add.on_grid(x, read), add.weights(data.integers, data.scales, 0)]
        if data.bias is not None:
            operands.append(add.weights(data.integer_bias(read[0]), data.scales * read[0], 0))
        return add.on_grid(add.node("Conv", operands, old.attributes)[0], written)

    def _dynamic_matmul(self, x: ir.Value, data: Constants) -> ir.Value:
        add = self._integers
        integers, scale, zero = add.dynamic(x)
        (sums,) = add.node("MatMulInteger", [integers, add.own_constant(data.integers), zero])
        return self._rescaled(sums, scale, data.scales, data.bias)

    def _dynamic_convolution(self, node: fx.Node, data: Constants) -> ir.Value | None:
        """Weights as uint8 around 128: ONNX Runtime's ``ConvInteger`` takes int8 ones by a path that measured ten times slower."""
        add, old = self._integers, self._convolution(node)
        if old is None:
            return None
        x = old.inputs[0]
        assert x is not None
        integers, scale, zero = add.dynamic(x)
        weights = (data.integers.astype(np.int16) + 128).astype(np.uint8)
        (sums,) = add.node("ConvInteger", [integers, add.own_constant(weights), zero, add.constant(np.array(128, np.uint8))], old.attributes)
        channels = (1, -1) + (1,) * (data.integers.ndim - 2)
        return self._rescaled(sums, scale, data.scales.reshape(channels), None if data.bias is None else data.bias.reshape(channels))

    def _rescaled(self, sums: ir.Value, scale: ir.Value, scales: np.ndarray, bias: np.ndarray | None) -> ir.Value:
        add = self._integers
        (factor,) = add.node("Mul", [scale, add.constant(scales.astype(np.float32))])
        (result,) = add.node("Mul", [add.node("Cast", [sums], {"to": 1})[0], factor])
        return result if bias is None else add.node("Add", [result, add.constant(bias.astype(np.float32))])[0]

    def _convolution(self, node: fx.Node) -> ir.Node | None:
        """The ONNX node that computes ``node``, if that is a convolution from its input, or from what a zero padding before it reads, to its result."""
        source, found = node.args[0], self._values[node.name].producer()
        assert isinstance(source, fx.Node)
        sources = [source, *(source.all_input_nodes if source.target in _PADDINGS else ())]
        return found if found is not None and found.op_type == "Conv" and found.inputs[0] in [self._values.get(s.name) for s in sources] else None

    def _between_grids(self, node: fx.Node) -> str:
        """Put what ``node`` reads and gives on the plan's grids; why not, if that cannot be."""
        own, old = self._grid(node), self._values.get(node.name)
        if own is None or old is None:
            return f"the plan has no range for {node.name}"
        for source in node.all_input_nodes:
            grid = self._grid(source)
            if grid is not None and source.name in self._values:
                self._read_on_grid(node, source, grid)
        sources = [self._values[a.name] for a in node.all_input_nodes if a.name in self._values]
        saturated = len(sources) == 1 and self._integers.is_on(sources[0], own) and _does_nothing(node, own)
        base = sources[0] if saturated else old
        new = self._integers.on_grid(base, own)
        if new is not old:
            self._integers.redirect(old, new, keep=self._integers.quantize(base, own).producer())
            self._replaced[old] = new
        self._values[node.name] = new
        return ""

    def _read_on_grid(self, node: fx.Node, source: fx.Node, grid: Grid) -> None:
        value = self._values[source.name]
        rounded = self._integers.on_grid(value, grid)
        for use in list(value.uses()):
            if rounded is not value and use.node.metadata_props.get(ORIGIN) == node.name and use.node.op_type != "QuantizeLinear":
                use.node.replace_input_with(use.idx, rounded)

    def float_inside(self) -> tuple[Diagnostic, ...]:
        """An INFO for each static operator that is still there and that ONNX Runtime computes in float, between conversions."""
        remarks = []
        for node in graphs.operators(self._model.graph):
            present = {n.op_type for n in self._groups.get(node.name, ()) if n.graph is not None}
            inside = sorted(present - INTEGER_KERNELS)
            if self._plan.scheme(node.name) is Scheme.STATIC and weighted(node) is None and inside:
                message = f"{node.target} is computed in float between int8 conversions: ONNX Runtime has no integer {', '.join(inside)}"
                remarks.append(Diagnostic(Severity.INFO, FLOAT_BETWEEN_GRIDS, graphs.source(node), message))
        return tuple(remarks)


def _batch_one(model: Model, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(s) // graphs.BATCH if model.dynamic_batch and s % graphs.BATCH == 0 else int(s) for s in shape)


def _does_nothing(node: fx.Node, grid: Grid) -> bool:
    """Whether ``node`` is a clamp that maps every value of ``grid`` to itself once rounded: saturation has done its work."""
    if node.target not in _CLAMPS:
        return False
    scale, zero = grid
    steps = torch.arange(256, dtype=torch.float32)
    target: Callable[..., torch.Tensor] = node.target
    clamped = target((steps - zero) * scale, *node.args[1:])
    return bool(torch.equal(torch.clamp(torch.round(clamped / scale) + zero, 0, 255), steps))
