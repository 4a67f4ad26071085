"""Operators that only move values: between two int8 operators they run on int8 too, which saves two conversions and changes no number."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from edgesmith.targets.litert.flatfile import FlatFile, Op

if TYPE_CHECKING:
    from edgesmith.targets.litert.quantizer import Numbers

_MOVERS = frozenset({"TRANSPOSE", "RESHAPE", "PAD", "SLICE", "STRIDED_SLICE", "MAX_POOL_2D"})


def carried(file: FlatFile, static: Set[int], numbers: dict[str, Numbers]) -> list[Op]:
    """The movers of ``file`` that read an int8 tensor and write for int8 readers only, on the same grid.

    Args:
        file: the float32 file.
        static: tensor indices that the chosen static operators write.
        numbers: ranges by tensor name; those of the tensors that the result writes are added.
    """
    readers: dict[int, list[Op]] = {}
    for op in file.ops:
        for tensor in op.inputs:
            readers.setdefault(tensor.index, []).append(op)
    found = [op for op in file.ops if op.kind in _MOVERS]
    while True:
        integer = set(static) | {op.outputs[0].index for op in found}
        kept = [op for op in found if op.inputs[0].index in integer and _read_by(integer, readers.get(op.outputs[0].index, []))]
        if len(kept) == len(found):
            break
        found = kept
    result = []
    for op in found:
        read, written = numbers.get(op.inputs[0].name), op.outputs[0].name
        if read is not None and (written not in numbers or numbers[written].same_grid(read)):
            numbers[written] = read.reshaped(len(op.outputs[0].shape))
            result.append(op)
    return result


def _read_by(integer: Set[int], readers: list[Op]) -> bool:
    return bool(readers) and all(op.outputs[0].index in integer for op in readers)
