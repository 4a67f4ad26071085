"""What ONNX Runtime takes in memory for an ``.onnx`` file on the CPU.

Constants are copied out of the file, or rearranged for the matrix kernels instead. Activations come from an arena that grows by doubling: one by one in
the first run, and from the second on as one block of a size that the first run found (``onnxruntime/core/framework/mem_pattern_planner.h``).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesmith.compiler.errors import UnsupportedError, UserError
from edgesmith.compiler.profile.devices import environment
from edgesmith.compiler.profile.memory_types import MemoryPlan
from edgesmith.kernels import arena, packing
from edgesmith.kernels.growing_arena import Event, GrowingArena, online_best_fit, replay


def _kinds(text: str) -> frozenset[str]:
    return frozenset(text.split())


PACKED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger"})
"""Operators whose second operand, if constant, is rearranged."""
IN_PLACE = _kinds("Add Sub Mul Div Max Min Relu Clip Sigmoid Tanh Erf Exp Sqrt Neg Abs LeakyRelu Elu HardSwish HardSigmoid Cast Pow Reciprocal")
"""Operators that write over an input of the same size that nobody reads any more, or that are fused into what makes it."""
VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
QUANTIZE, DEQUANTIZE, DYNAMIC = "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""Of onnx.TensorProto's data types."""
SUM_BYTES = 4
SMALL_BYTES = 1024
"""Constants up to this size may be shapes, which shape inference reads."""
BYTES_PER_CHUNK_RECORD = 32
"""The arena keeps 8 bytes for every 256 that it reserves."""
RECORDS_BYTES, NODE_BYTES, CONSTANT_BYTES = 120_000, 1_600, 2_600
"""The runtime's records: of any file, of a node of the file, of a constant. Measured with version 1.31."""


def memory_plan(path: Path) -> MemoryPlan:
    """The plan of the file ``path``; see ``Target.memory_plan``.

    Raises:
        UnsupportedError: onnx, which reads such files, is not installed; or a tensor's size is not known before it is computed.
        UserError: it is no ``.onnx`` file.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UnsupportedError("the memory of an .onnx file is planned with the reader of onnx", hint="pip install 'edgesmith[onnxruntime]'")
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise UserError(f"{path} cannot be read", why=str(error)) from error
    _refuse(model)
    graph = _Graph.read(model)
    packed = {name: sums for node in graph.nodes for name, sums in _packed(node, graph)}
    kept = [size for name, size in graph.constants.items() if name not in packed]
    return MemoryPlan(
        weights_bytes=sum(map(packing.allocated, kept)),
        packed_bytes=sum(packing.allocated(graph.constants[name] + sums) for name, sums in packed.items()),
        arena_bytes=_arena_bytes(graph),
        runtime_bytes=RECORDS_BYTES + NODE_BYTES * len(graph.nodes) + CONSTANT_BYTES * len(graph.constants),
        mapped_bytes=0,
    )


def _refuse(model: Any) -> None:
    """Raise UnsupportedError for what is not planned."""
    import onnx

    if any(attribute.type in {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS} for node in model.graph.node for attribute in node.attribute):
        raise UnsupportedError("the memory of a file with control flow is not planned")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise UnsupportedError("the memory of a file whose constants are in other files is not planned")


@dataclass(frozen=True)
class _Graph:
    """``sizes`` in bytes of the tensors that a run makes, ``constants`` of those in the file; ``source``: a dequantized tensor -> the integers."""

    nodes: tuple[Any, ...]
    outputs: frozenset[str]
    sizes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    constants: dict[str, int]
    source: dict[str, str]
    readers: dict[str, tuple[Any, ...]]

    @classmethod
    def read(cls, model: Any) -> _Graph:
        """What the plan needs to know of an ONNX model."""
        constants = {tensor.name: math.prod(tensor.dims) * _ITEM_BYTES.get(tensor.data_type, 4) for tensor in model.graph.initializer}
        types = _types(model)
        readers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        shapes = {name: tuple(d.dim_value for d in kind.shape.dim) for name, kind in types.items()}
        return cls(
            nodes=tuple(model.graph.node),
            outputs=frozenset(value.name for value in model.graph.output),
            sizes={name: math.prod(shapes[name]) * _ITEM_BYTES.get(kind.elem_type, 4) for name, kind in types.items()},
            shapes=shapes,
            constants=constants,
            source={node.output[0]: node.input[0] for node in model.graph.node if node.op_type == DEQUANTIZE},
            readers={name: tuple(nodes) for name, nodes in readers.items()},
        )

    def is_integer_unit(self, node: Any) -> bool:
        """Whether the runtime fuses ``node`` with the dequantizations before it and the quantization behind it."""
        behind = [reader for name in node.output for reader in self.readers.get(name, ())]
        return (
            node.op_type not in {QUANTIZE, DEQUANTIZE}
            and any(name in self.source for name in node.input)
            and bool(behind)
            and all(reader.op_type == QUANTIZE for reader in behind)
            and not self.outputs & set(node.output)
        )

    def steps(self) -> Iterator[tuple[Any, tuple[str, ...], tuple[str, ...]]]:
        """Nodes that run, what they read and what they write, integers where the runtime keeps those."""
        units = {id(node) for node in self.nodes if self.is_integer_unit(node)}
        written_by_units = {name for node in self.nodes if id(node) in units for name in node.output}
        for node in self.nodes:
            if (
                node.op_type == DEQUANTIZE
                and all(id(reader) in units for reader in self.readers.get(node.output[0], ()))
                and node.output[0] not in self.outputs
            ):
                continue
            if node.op_type == QUANTIZE and node.input[0] in written_by_units:
                continue
            if id(node) not in units:
                yield node, tuple(node.input), tuple(node.output)
            else:
                written = tuple(reader.output[0] for name in node.output for reader in self.readers[name])
                yield node, tuple(self.source.get(name, name) for name in node.input), written


def _types(model: Any) -> dict[str, Any]:
    """Tensor types of everything that a run makes.

    Raises:
        UnsupportedError: a size is not known.
    """
    import onnx

    light = onnx.ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if len(tensor.raw_data) > SMALL_BYTES:
            tensor.ClearField("raw_data")
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    kept = [tensor for tensor in light.graph.initializer if len(tensor.raw_data) or math.prod(tensor.dims) * 8 <= SMALL_BYTES]
    del light.graph.initializer[:]
    light.graph.initializer.extend(kept)
    graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    made = {name for node in graph.node for name in node.output}
    types = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.output) if value.name in made}
    unknown = [name for name, kind in types.items() if any(not d.HasField("dim_value") for d in kind.shape.dim)]
    if unknown or made - types.keys() - {""}:
        name = next(iter([*unknown, *sorted(made - types.keys() - {""})]))
        raise UnsupportedError("the memory of this file cannot be planned", where=name, why="its size is not known before it is computed")
    return types


def _packed(node: Any, graph: _Graph) -> Iterator[tuple[str, int]]:
    """The constant that ``node`` has rearranged, if any, and the bytes of the sums of each output's weights that integers need beside it."""
    if node.op_type not in PACKED:
        return
    name = graph.source.get(node.input[1], node.input[1])
    if name in graph.constants:
        integers = node.op_type == "MatMulInteger" or node.input[1] in graph.source
        shape = graph.shapes[node.output[0]]
        yield name, SUM_BYTES * (shape[1] if "Conv" in node.op_type else shape[-1]) if integers else 0


def _arena_bytes(graph: _Graph) -> int:
    """Pages of the arena that the first three runs write, and its own table of chunks; later runs find what they need."""
    numbers: dict[str, int] = {}
    steps, scratch = [], []
    order = list(graph.steps())
    places = {id(node): number for number, (node, _, _) in enumerate(order)}
    made = {name: number for number, (_, _, written) in enumerate(order) for name in written}
    for number, (node, read, written) in enumerate(order):
        summand = _summand(node, graph, places, made)
        read = (summand, *read) if summand else read
        reads, writes = (tuple(numbers.setdefault(name, len(numbers)) for name in names if name in graph.sizes) for names in (read, written))
        steps.append(arena.Step(reads, writes, in_place=node.op_type in IN_PLACE, view=bool(summand) or node.op_type in VIEWS))
        scratch += [arena.Block(size, number, number) for size in _scratch(node, graph)]
    inside = {number: graph.sizes[name] for name, number in numbers.items() if graph.sizes[name]}
    outputs = {numbers[name] for name in graph.outputs if name in numbers}
    shapes = {number: (graph.shapes[name], graph.sizes[name]) for name, number in numbers.items()}
    blocks = _reused(arena.spans(steps, inside, kept=outputs), shapes)
    grown = GrowingArena()
    replay(grown, _events([*blocks, *scratch], len(steps)))
    one = Event(-1, online_best_fit(_events(blocks, len(steps))))
    for _ in range(2):
        replay(grown, [one, *_events(scratch, len(steps))])
    return grown.touched_bytes + grown.reserved_bytes // BYTES_PER_CHUNK_RECORD


def _summand(node: Any, graph: _Graph, places: dict[int, int], made: dict[str, int]) -> str:
    """The tensor that a float convolution adds to and writes over, the sum behind it being fused into it; "" if there is none."""
    readers = graph.readers.get(node.output[0], ())
    if node.op_type != "Conv" or graph.is_integer_unit(node) or len(readers) != 1 or readers[0].op_type != "Add":
        return ""
    here = places[id(node)]
    other = next((name for name in readers[0].input if name != node.output[0]), "")
    if graph.shapes.get(other) != graph.shapes[node.output[0]] or made.get(other, here) >= here:
        return ""
    return other if all(places.get(id(reader), 0) < here for reader in graph.readers[other] if reader is not readers[0]) else ""


def _reused(spans: dict[int, tuple[int, int]], shapes: dict[int, tuple[tuple[int, ...], int]]) -> list[arena.Block]:
    """Buffers: one that is free is taken again for a tensor of exactly its shape, and kept until the last such (``allocation_planner.cc``)."""
    free: dict[tuple[tuple[int, ...], int], list[list[int]]] = {}
    buffers: list[list[int]] = []
    for tensor, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        same = free.setdefault(shapes[tensor], [])
        ready = [buffer for buffer in same if buffer[1] < first]
        if ready:
            max(ready, key=lambda buffer: buffer[1])[1] = last
        else:
            same.append([first, last, shapes[tensor][1]])
            buffers.append(same[-1])
    return [arena.Block(size, first, last) for first, last, size in buffers]


def _events(blocks: list[arena.Block], steps: int) -> Iterator[Event]:
    """Allocations and returns of ``blocks``, in order of time."""
    begins, ends = (dict[int, list[int]](), dict[int, list[int]]())
    for number, block in enumerate(blocks):
        begins.setdefault(block.first, []).append(number)
        ends.setdefault(block.last, []).append(number)
    for step in range(steps):
        yield from (Event(number, blocks[number].size_bytes) for number in begins.get(step, ()))
        yield from (Event(number, 0) for number in ends.get(step, ()))


def _scratch(node: Any, graph: _Graph) -> tuple[int, ...]:
    """What an integer convolution needs while it runs: sums of 32 bits, and its input as a matrix, or pointers into it if it is depthwise.

    The kernels for signed weights need no sums and take pointers instead of the matrix (``onnxruntime/core/providers/cpu/quantization/qlinearconv.cc``).
    """
    if node.op_type != "Conv" or not graph.is_integer_unit(node) or graph.source.get(node.input[1]) not in graph.constants:
        return ()
    shape = graph.shapes[node.output[0]]
    attributes = {attribute.name: attribute for attribute in node.attribute}
    depth = graph.constants[graph.source[node.input[1]]] // shape[1]
    groups = attributes["group"].i if "group" in attributes else 1
    kernel, pixels, sums = math.prod(attributes["kernel_shape"].ints), math.prod(shape[2:]), SUM_BYTES * math.prod(shape)
    pointers = packing.POINTER_BYTES * kernel * pixels
    moved = kernel > 1 or any(side > 1 for side in _ints(attributes, "strides")) or any(_ints(attributes, "pads"))
    depthwise = groups == shape[1] > 1 and depth == kernel
    if _has_signed_kernel(groups, depth // kernel, shape[1], depthwise=depthwise):
        return (pointers,) if depthwise or moved else ()
    if depthwise:
        return sums, pointers
    return (sums, depth * pixels) if moved else (sums,)


def _ints(attributes: dict[str, Any], name: str) -> tuple[int, ...]:
    return tuple(attributes[name].ints) if name in attributes else ()


def _has_signed_kernel(groups: int, inputs: int, outputs: int, *, depthwise: bool) -> bool:
    """Whether a convolution of so many channels has one; it is used where the runner lets it, on processors with VNNI (``core/mlas/lib/convsym.cpp``)."""
    features = environment()["cpu_features"].split()
    step = 4 if "avx512_vnni" in features else 8 if "avx_vnni" in features else 0
    if not step:
        return False
    return outputs % 16 == 0 if depthwise else groups == 1 and outputs >= 16 and inputs % 4 == 0 and outputs % step == 0
