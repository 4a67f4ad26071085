"""Which operators of a ``.pte`` file are not on its fast path, and what to do about them."""

from __future__ import annotations

from collections.abc import Sequence

from edgesmith.compiler.profile.operator_types import FAST, Category, Executed, Placement

_CONVERTED = Placement(
    Category.QUANTIZE,
    "a tensor goes from float to int8 or back: let neighbours run in the same scheme (fewer exclusions of `quantize`, or a lone INT8 operator excluded)",
)
_MOVED = Placement(
    Category.LAYOUT,
    "XNNPACK copies a tensor into another order (it computes images channels last, products rows first): keep permutations out of chains of operators",
)
_ISLAND = Placement(
    Category.FLOAT_ISLAND,
    "float in an INT8 file: XNNPACK has no int8 norms, softmax, activations or products of two activations; the rest is excluded from `quantize`, or the build "
    "warned that it could not honour it",
)
_CONVERTED_OUTSIDE = Placement(Category.QUANTIZE, "quantized by an ExecuTorch kernel outside XNNPACK: quantize the operators around it in one scheme")
_MOVED_OUTSIDE = Placement(
    Category.LAYOUT,
    "copied by an ExecuTorch kernel outside XNNPACK: take it out of the model's forward, or write it with slices, reshapes and permutations, which XNNPACK has",
)
_OUTSIDE = Placement(
    Category.UNDELEGATED,
    "run by an ExecuTorch kernel, which does not use vector instructions or threads, because XNNPACK's delegate does not take it: use an operator that it has",
)

_DELEGATED = {"XNNConvert": _CONVERTED, "XNNStaticTranspose": _MOVED, "XNNCopy": _MOVED}
_FREE = frozenset({"XNNStaticReshape", "XNNStaticSlice", *(f"XNNConcatenate{n}" for n in range(2, 6))})
"""Operators that take the dtype they are given."""
_DYNAMIC = "XNNConvert+"
"""How the kind of a product begins whose input is quantized on the fly: its arithmetic is INT8, its result float."""
_KERNELS = (
    ("quantized_decomposed::", _CONVERTED_OUTSIDE),
    ("executorch_prim::et_view", _MOVED_OUTSIDE),
    ("dim_order_ops::", _MOVED_OUTSIDE),
    *((f"aten::{name}", _MOVED_OUTSIDE) for name in ("cat", "clone", "stack", "repeat", "constant_pad")),
)
"""First matching beginnings of a kernel's name; a name that has ``_copy`` in it only copies, too."""
_CALLS = frozenset({"set_inputs", "get_outputs"})
"""What the runner times besides operators."""


def place(operators: Sequence[Executed]) -> tuple[Placement, ...]:
    """Where each of ``operators`` runs. Float arithmetic is an island in a file that has int8 results, as static INT8 has and dynamic INT8 has not."""
    static = any(operator.dtype == "int8" for operator in operators)
    return tuple(_delegated(operator, static) if operator.delegate else _kernel(operator.kind) for operator in operators)


def _delegated(operator: Executed, static: bool) -> Placement:
    island = static and operator.dtype.startswith("float") and operator.kind not in _FREE and not operator.kind.startswith(_DYNAMIC)
    return _DELEGATED.get(operator.kind, _ISLAND if island else FAST)


def _kernel(kind: str) -> Placement:
    if kind in _CALLS:
        return FAST
    if "_copy." in kind:
        return _MOVED_OUTSIDE
    return next((placement for beginning, placement in _KERNELS if kind.startswith(beginning)), _OUTSIDE)
