"""Quantize, dequantize and integer operators, written into an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgesmith.compiler.quantplan import TensorRange
from edgesmith.targets.onnxruntime.export import ORIGIN

if TYPE_CHECKING:
    import onnx_ir as ir

Array = npt.NDArray[np.generic]
Grid = tuple[float, int]
"""Scale and zero point of an activation's uint8 grid."""


def uint8_grid(extent: TensorRange) -> Grid:
    """The plan's int8 grid, shifted by 128 to uint8: the same real values, and the type that ``DynamicQuantizeLinear`` gives as well.

    On x86 ONNX Runtime turns int8 activations into uint8 when it loads a file; measured, the two run equally fast.
    """
    return float(np.float32(extent.scale)), extent.zero_point + 128


class Integers:
    """Adds nodes to one ONNX graph. New nodes carry the origin that is set in ``origin``."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.origin = ""
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}
        self._quantized: dict[tuple[ir.Value, Grid], ir.Value] = {}
        self._grids: dict[ir.Value, tuple[ir.Value, Grid]] = {}
        self._dynamic: dict[ir.Value, tuple[ir.Value, ...]] = {}

    def constant(self, array: Array) -> ir.Value:
        """An initializer; equal arrays share one."""
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = self.own_constant(array)
        return self._constants[key]

    def own_constant(self, array: Array) -> ir.Value:
        """An initializer for one reader only.

        int8 weights and their zero points need it: where ONNX Runtime 1.31 turns them into uint8 when it loads a file (x86 without VNNI), it refuses
        the file if two operators share one ("Attempt to replace the existing tensor").
        """
        import onnx_ir as ir

        array = np.ascontiguousarray(array) if array.ndim else array
        name = f"edgesmith.constant.{len(self.graph.initializers)}"
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape), const_value=ir.tensor(array))
        self.graph.register_initializer(value)
        return value

    def node(self, operator: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None, outputs: int = 1) -> tuple[ir.Value, ...]:
        """Append an operator; its results."""
        import onnx_ir as ir

        made = ir.node(operator, inputs, attributes or {}, num_outputs=outputs, metadata_props={ORIGIN: self.origin})
        self.graph.append(made)
        return tuple(made.outputs)

    def quantize(self, value: ir.Value, grid: Grid) -> ir.Value:
        """The uint8 tensor of ``value`` on ``grid``: one for each, and none but the present one where ``value`` was made from integers on that grid."""
        if value in self._grids and self._grids[value][1] == grid:
            return self._grids[value][0]
        if (value, grid) not in self._quantized:
            (self._quantized[value, grid],) = self.node("QuantizeLinear", [value, *self._parameters(grid)])
        return self._quantized[value, grid]

    def dequantize(self, integers: ir.Value, grid: Grid) -> ir.Value:
        """The float tensor that the uint8 tensor ``integers`` on ``grid`` stands for."""
        (value,) = self.node("DequantizeLinear", [integers, *self._parameters(grid)])
        self._grids[value] = (integers, grid)
        return value

    def on_grid(self, value: ir.Value, grid: Grid) -> ir.Value:
        """``value`` rounded to ``grid``, as float; ``value`` itself where it is on that grid already."""
        if value in self._grids and self._grids[value][1] == grid:
            return value
        return self.dequantize(self.quantize(value, grid), grid)

    def is_on(self, value: ir.Value, grid: Grid) -> bool:
        """Whether ``value`` was made from integers on ``grid``."""
        return value in self._grids and self._grids[value][1] == grid

    def weights(self, integers: Array, scales: Array, axis: int) -> ir.Value:
        """The float tensor that int8 weights or int32 biases stand for, with one scale per index of ``axis`` and zero point 0."""
        zeros = self.own_constant(np.zeros(scales.shape, integers.dtype))
        (value,) = self.node("DequantizeLinear", [self.own_constant(integers), self.constant(scales.astype(np.float32)), zeros], {"axis": axis})
        return value

    def dynamic(self, value: ir.Value) -> tuple[ir.Value, ...]:
        """uint8 tensor, scale and zero point of ``value``, found from its own values at run time; readers share them."""
        if value not in self._dynamic:
            self._dynamic[value] = self.node("DynamicQuantizeLinear", [value], outputs=3)
        return self._dynamic[value]

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """``value`` in ``shape``."""
        return self.node("Reshape", [value, self.constant(np.array(shape, np.int64))])[0]

    def redirect(self, old: ir.Value, new: ir.Value, keep: ir.Node | None = None) -> None:
        """Let all who read ``old``, the graph's outputs included, read ``new``, except the node ``keep``."""
        for use in list(old.uses()):
            if use.node is not keep:
                use.node.replace_input_with(use.idx, new)
        for position, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[position] = new

    def _parameters(self, grid: Grid) -> tuple[ir.Value, ir.Value]:
        return self.constant(np.array(grid[0], np.float32)), self.constant(np.array(grid[1], np.uint8))
