"""Which of the operators that ONNX Runtime executed are on its fast path, and what to do about the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from edgesmith.compiler.profile.operator_types import FAST, Category, Executed, Placement

_CONVERT = Placement(
    Category.QUANTIZE,
    "converts between float and int8: plan both its neighbours as int8, or leave the whole stretch in float",
)
_MEASURE = Placement(
    Category.QUANTIZE,
    "finds the grid of an activation in every run: quantize{scheme=static} finds it once, beforehand",
)
_COPY = Placement(
    Category.LAYOUT,
    "copies a tensor into another order: permute, slice and concatenate less in the module named",
)
_REORDER = Placement(
    Category.LAYOUT,
    "copies between plain and blocked layout where a run of convolutions begins or ends: keep convolutions together",
)
_ISLAND = Placement(
    Category.FLOAT_ISLAND,
    "is computed in float in an int8 file, between conversions: ONNX Runtime has no int8 kernel for it, or the plan leaves it out",
)

_BY_KIND: Mapping[str, Placement] = MappingProxyType(
    {
        **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _CONVERT),
        "DynamicQuantizeLinear": _MEASURE,
        **dict.fromkeys(("Concat", "Expand", "Slice", "Split", "Tile", "Transpose"), _COPY),
        **dict.fromkeys(("ReorderInput", "ReorderOutput"), _REORDER),
    }
)
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""They hand on what they read without a copy."""
_FLOATS = frozenset({"float16", "float32", "float64"})
_STATIC = frozenset({"QGemm", "QLinearConv", "QLinearMatMul"})
_DYNAMIC = frozenset({"ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat"})


def place(operators: Sequence[Executed]) -> tuple[Placement, ...]:
    """One placement per operator.

    A file whose products are mostly static is meant to run in int8 throughout: what else is float in it is an island. Where they are mostly dynamic, float
    between them is how it is meant.
    """
    static, dynamic = (sum(operator.kind in kinds for operator in operators) for kinds in (_STATIC, _DYNAMIC))
    return tuple(_placement(operator, static > dynamic) for operator in operators)


def _placement(operator: Executed, static: bool) -> Placement:
    if operator.kind in _BY_KIND:
        return _BY_KIND[operator.kind]
    float_alone = operator.dtype in _FLOATS and operator.kind not in _VIEWS | _DYNAMIC
    return _ISLAND if static and float_alone else FAST
