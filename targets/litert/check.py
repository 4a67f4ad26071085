"""Reads the numbers of a quantization plan back out of the ``.tflite`` file that should hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.errors import DefectError
from edgesmith.compiler.quantplan import STATIC_SCHEMES
from edgesmith.targets.litert.flatfile import Array, FlatFile, Op
from edgesmith.targets.litert.match import CHANNEL_AXIS, weight_of
from edgesmith.targets.litert.quantizer import Numbers

if TYPE_CHECKING:
    from edgesmith.targets.litert.legalise import Choice


def check(choices: Sequence[Choice], before: FlatFile, after: FlatFile, numbers: Mapping[str, Numbers]) -> None:
    """Compare the operators of ``after`` with what was chosen for those of ``before``, the file that it was quantized from.

    Raises:
        DefectError: a weight has other integers, or an activation another grid, than the plan.
    """
    kept = [op for op in after.ops if op.kind not in {"QUANTIZE", "DEQUANTIZE"}]
    written = {old.outputs[0].index: new for old, new in zip(before.ops, kept, strict=True)}
    for choice in choices:
        op = written[choice.op.outputs[0].index]
        wrong = _wrong_weight(op, choice.integers) if choice.integers is not None else ""
        if not wrong and choice.scheme in STATIC_SCHEMES:
            wrong = _wrong_activations(op, choice.op, numbers)
        if wrong:
            raise DefectError("the .tflite file differs from the quantization plan", where=graphs.source(choice.node), why=wrong)


def _wrong_weight(op: Op, integers: Array) -> str:
    weight = weight_of(op)
    if weight is None or weight.data is None or weight.dtype != np.int8:
        return "its weight is not int8"
    rows = np.moveaxis(weight.data, CHANNEL_AXIS[op.kind], 0).reshape(len(integers), -1)
    return "" if np.array_equal(np.sort(rows, axis=1), np.sort(integers, axis=1)) else "its weight has other integers"


def _wrong_activations(new: Op, old: Op, numbers: Mapping[str, Numbers]) -> str:
    for tensor, wanted in zip((*new.inputs, *new.outputs), (*old.inputs, *old.outputs), strict=True):
        if wanted.name not in numbers or wanted.data is not None:
            continue
        scale, zero_point = numbers[wanted.name].grid
        if tensor.dtype != np.dtype(f"int{numbers[wanted.name].bits}") or tensor.grid is None:
            return f"{tensor.name} is not int{numbers[wanted.name].bits}"
        if not np.isclose(tensor.grid.scales[0], scale, rtol=1e-6, atol=0) or tensor.grid.zero_points[0] != zero_point:
            return f"{tensor.name} has scale {tensor.grid.scales[0]} and zero point {tensor.grid.zero_points[0]}, not {scale} and {zero_point}"
    return ""
