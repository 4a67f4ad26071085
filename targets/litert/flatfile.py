"""Reading and naming the parts of a ``.tflite`` flatbuffer, in numpy terms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesmith.targets.litert.sources import Names

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """The affine grid of an integer tensor: ``real = scale * (q - zero_point)``, per index of ``axis`` if there are several scales."""

    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.int64]
    axis: int


@dataclass(frozen=True)
class Tensor:
    """One tensor of the main graph. ``data`` is what a constant holds; ``grid`` is None where it is not quantized."""

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    data: Array | None
    grid: Grid | None


@dataclass(frozen=True)
class Op:
    """One operator of the main graph, by the runtime's own name (``FULLY_CONNECTED``). Absent optional inputs are left out.

    ``fused``: an activation function is built into it.
    """

    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    fused: bool


class FlatFile:
    """The main graph of a ``.tflite`` file's content."""

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert.tools import flatbuffer_utils

        self.content = content
        self._utils = flatbuffer_utils
        self._model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
        self._graph = self._model.subgraphs[0]

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, by index."""
        return tuple(self._tensor(i, t) for i, t in enumerate(self._graph.tensors))

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """All operators, in order of execution."""
        return tuple(
            Op(
                self._utils.opcode_to_name(self._model, op.opcodeIndex),
                tuple(self.tensors[i] for i in op.inputs if i >= 0),
                tuple(self.tensors[i] for i in op.outputs),
                bool(getattr(op.builtinOptions, "fusedActivationFunction", 0)),
            )
            for op in self._graph.operators
        )

    def _tensor(self, index: int, tensor: Any) -> Tensor:
        dtype = np.dtype(self._utils.type_to_name(tensor.type).lower().replace("bool", "bool_"))
        shape = tuple(int(size) for size in (tensor.shape if tensor.shape is not None else ()))
        raw = self._model.buffers[tensor.buffer].data
        data = None if raw is None or len(raw) == 0 else np.frombuffer(bytes(raw), dtype=dtype).reshape(shape)
        return Tensor(index, tensor.name.decode(), shape, dtype, data, _grid(tensor.quantization))


def _grid(quantization: Any) -> Grid | None:
    if quantization is None or quantization.scale is None or len(quantization.scale) == 0:
        return None
    return Grid(np.asarray(quantization.scale, dtype=np.float32), np.asarray(quantization.zeroPoint, dtype=np.int64), int(quantization.quantizedDimension))


def with_names(content: bytes, inputs: Sequence[str], outputs: Sequence[str], tensor_names: Names) -> bytes:
    """``content`` with its inputs and outputs in the order that they were converted in, under the names given, and its tensors named by ``tensor_names``."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    (signature,) = model.signatureDefs
    graph = model.subgraphs[signature.subgraphIndex]
    for entries, names in ((signature.inputs, inputs), (signature.outputs, outputs)):
        entries.sort(key=lambda entry: int(re.sub(rb"\D", b"", entry.name)))
        for entry, name in zip(entries, names, strict=True):
            entry.name = name.encode()
    for index, tensor in enumerate(graph.tensors):
        tensor.name = tensor_names.of_tensor(tensor.name.decode(), index).encode()
    for entry, name in zip(signature.outputs, tensor_names.of_outputs(outputs), strict=True):
        graph.tensors[entry.tensorIndex].name = name.encode()
    graph.inputs = [entry.tensorIndex for entry in signature.inputs]
    graph.outputs = [entry.tensorIndex for entry in signature.outputs]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))
