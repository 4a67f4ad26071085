"""What LiteRT takes in memory for a ``.tflite`` file whose operators run in its XNNPACK delegate, wherever that has them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from edgesmith.compiler.errors import UnsupportedError, UserError
from edgesmith.compiler.profile.memory_types import MemoryPlan
from edgesmith.kernels import arena, packing
from edgesmith.targets.litert.flatfile import FlatFile, Op, Tensor


def _kinds(text: str) -> frozenset[str]:
    return frozenset(text.split())


PACKED = frozenset({"FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "BATCH_MATMUL"})
"""Operators whose second operand, if constant, is rearranged. Transposed convolutions have it second, too."""
CONVOLUTIONS = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D"})
CONTROL = frozenset({"IF", "WHILE", "CALL", "CALL_ONCE"})
PADS = frozenset({"PAD"})
TABLES = frozenset({"GATHER", "EMBEDDING_LOOKUP"})
"""Operators that read a few rows of a constant, so that the other pages of it are never touched."""
IN_PLACE = _kinds(
    "ADD SUB MUL DIV MAXIMUM MINIMUM RELU RELU6 RELU_N1_TO_1 LOGISTIC SOFTMAX GELU TANH HARD_SWISH SQRT RSQRT SQUARE ABS NEG EXP LOG FLOOR CEIL "
    "ELU LEAKY_RELU SQUARED_DIFFERENCE RESHAPE EXPAND_DIMS SQUEEZE"
)
DELEGATED = (
    PACKED
    | PADS
    | IN_PLACE
    | _kinds(
        "AVERAGE_POOL_2D CONCATENATION DEPTH_TO_SPACE DEQUANTIZE MAX_POOL_2D MEAN PRELU QUANTIZE RESIZE_BILINEAR ROUND SIN COS SLICE SPACE_TO_DEPTH SPLIT "
        "STRIDED_SLICE SUM TRANSPOSE"
    )
)
"""What XNNPACK's delegate takes (``xnnpack_delegate.cc``)."""
FAULT_AROUND_BYTES = 65_536
"""What Linux maps of a file around a page that is read (mm/memory.c)."""
RECORDS_BYTES, OPERATOR_BYTES, GRID_BYTES = 30_000, 1_800, 8
"""The runtime's records: of any file, of an operator, of one scale of a tensor. The first two were measured with version 2.3."""


def memory_plan(path: Path) -> MemoryPlan:
    """The plan of the file ``path``; see ``Target.memory_plan``.

    Raises:
        UnsupportedError: ai-edge-litert, whose reader of such files it takes, is not installed; or the file has control flow.
        UserError: it is no ``.tflite`` file.
    """
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise UnsupportedError("the memory of a .tflite file is planned with the reader of ai-edge-litert", hint="pip install 'edgesmith[litert]'")
    content = path.read_bytes()
    if content[4:8] != b"TFL3":
        raise UserError(f"{path} is no .tflite file")
    file = FlatFile(content)
    _refuse(file)
    ops = file.ops
    return MemoryPlan(
        weights_bytes=0,
        packed_bytes=sum(packing.allocated(_packed(op)) for op in ops),
        arena_bytes=_arenas(file) + sum(_indirection(op) for op in ops),
        runtime_bytes=RECORDS_BYTES + OPERATOR_BYTES * len(ops) + GRID_BYTES * sum(len(t.grid.scales) for t in file.tensors if t.grid is not None),
        mapped_bytes=len(content) - sum(_untouched(op) for op in ops),
    )


def _refuse(file: FlatFile) -> None:
    """Raise UnsupportedError for what is not planned."""
    try:
        kinds = {op.kind for op in file.ops}
    except TypeError as error:
        raise UnsupportedError("the memory of this file is not planned", why=f"a tensor of a type that numpy does not have: {error}") from error
    if kinds & CONTROL:
        raise UnsupportedError("the memory of a file with control flow is not planned")


def _arenas(file: FlatFile) -> int:
    """The interpreter's arena, and the workspace that the delegated parts share.

    Consecutive delegated operators are one part. A tensor that leaves its part lies in the interpreter's arena, as the file's inputs do from
    beginning to end; the others in the workspace.
    """
    parts = list(_parts(file.ops))
    sizes = {t.index: _bytes(t) for t in file.tensors if t.data is None}
    made = {t.index: number for number, part in enumerate(parts) for op in part for t in op.outputs}
    read: dict[int, set[int]] = {}
    for number, part in enumerate(parts):
        for op in part:
            for tensor in op.inputs:
                read.setdefault(tensor.index, set()).add(number)
    inside = {index for index, number in made.items() if read.get(index) == {number} and parts[number][0].kind in DELEGATED}
    outer = {index: size for index, size in sizes.items() if index not in inside}
    inputs = outer.keys() - made.keys()
    outputs = made.keys() - read.keys()
    whole = [arena.Step(tuple(t.index for op in part for t in op.inputs), tuple(t.index for op in part for t in op.outputs)) for part in parts]
    shared = (_workspace(part, {index: sizes[index] for index in inside}) for part in parts)
    return arena.greedy_by_size(arena.blocks(whole, outer, kept=inputs | outputs)) + max(shared, default=0)


def _parts(ops: Iterable[Op]) -> Iterator[list[Op]]:
    for delegated, group in groupby(ops, lambda op: op.kind in DELEGATED):
        if delegated:
            yield list(group)
        else:
            yield from ([op] for op in group)


def _workspace(part: list[Op], sizes: dict[int, int]) -> int:
    padded = _fused_pads(part)
    own = {t.index for op in part for t in op.outputs}
    return arena.greedy_by_size(arena.blocks([_step(op, padded) for op in part], {index: size for index, size in sizes.items() if index in own}))


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _fused_pads(ops: list[Op]) -> set[int]:
    """Outputs of paddings that only convolutions read: these pad by themselves."""
    pads = {op.outputs[0].index for op in ops if op.kind in PADS}
    return pads - {t.index for op in ops if op.kind not in CONVOLUTIONS for t in op.inputs}


def _step(op: Op, padded: set[int]) -> arena.Step:
    reads, writes = tuple(t.index for t in op.inputs), tuple(t.index for t in op.outputs)
    return arena.Step(reads, writes, in_place=op.kind in IN_PLACE, view=writes[0] in padded, scratch_bytes=_quantized_input(op))


def _is_dynamic(op: Op) -> bool:
    """Integer weights under a float activation."""
    return op.kind in PACKED and len(op.inputs) > 1 and op.inputs[1].dtype == np.int8 and op.inputs[0].dtype == np.float32


def _scheme(op: Op) -> tuple[str, int]:
    """How XNNPACK packs the weights, and bits of one: those of a convolution under a float activation it expands to float32."""
    bits = 8 * op.inputs[1].dtype.itemsize
    if _is_dynamic(op):
        return ("float", 32) if op.kind in CONVOLUTIONS else ("dynamic", bits)
    return ("static" if op.inputs[1].dtype == np.int8 else "float"), bits


def _quantized_input(op: Op) -> int:
    return math.prod(op.inputs[0].shape) if _is_dynamic(op) else 0


def _packed(op: Op) -> int:
    if op.kind not in PACKED or len(op.inputs) < 2 or op.inputs[1].data is None:
        return 0
    weights = op.inputs[1]
    scheme, bits = _scheme(op)
    if op.kind == "DEPTHWISE_CONV_2D":
        return packing.convolution_bytes(weights.shape[-1], 1, math.prod(weights.shape[1:3]), bits, scheme)
    outputs = weights.shape[0] if op.kind != "BATCH_MATMUL" else op.outputs[0].shape[-1]
    return packing.matrix_bytes(outputs, math.prod(weights.shape) // outputs, bits, scheme)


def _indirection(op: Op) -> int:
    if op.kind not in CONVOLUTIONS:
        return 0
    (_, height, width, _), (_, rows, columns, _) = op.inputs[0].shape, op.outputs[0].shape
    kernel = (op.inputs[1].shape[1], op.inputs[1].shape[2])
    return packing.indirection_bytes(kernel, (round(height / rows), round(width / columns)), (rows, columns), depthwise=op.kind == "DEPTHWISE_CONV_2D")


def _untouched(op: Op) -> int:
    """Bytes of a table that one run does not bring into memory, its rows being looked up at random: each comes with the pages around it."""
    if op.kind not in TABLES:
        return 0
    table, rows = sorted(op.inputs, key=_bytes, reverse=True)[:2]
    size = _bytes(table)
    return round(size * (1 - min(1, FAULT_AROUND_BYTES / size)) ** math.prod(rows.shape)) if table.data is not None else 0
