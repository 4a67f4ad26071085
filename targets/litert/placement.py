"""Which operators of a ``.tflite`` file are not on LiteRT's fast path on a CPU, which is XNNPACK with as few conversions and copies as may be."""

from __future__ import annotations

from collections.abc import Sequence

from edgesmith.compiler.profile.operator_types import FAST, Category, Executed, Placement

_NO_KERNEL = "XNNPACK has no kernel for it, or not for these types and options; LiteRT's own runs it, and the tensors around it are handed over"
_UNDELEGATED = {
    "CAST": "XNNPACK has no 64-bit integers: give the model int32 or float32",
    "EMBEDDING_LOOKUP": "a look-up in a table copies rows and has nothing to speed up",
    "GATHER": "a look-up in a table copies rows and has nothing to speed up",
    "GATHER_ND": "a look-up in a table copies rows and has nothing to speed up",
    "GELU": "XNNPACK has no GELU of this type: leave it in float32",
    "HARD_SWISH": "XNNPACK has no hard swish of this type: leave it in float32",
    "LOGICAL_AND": "masks are computed in booleans outside XNNPACK: give the model a float mask that is added to the scores",
    "PADV2": "padding with another value than zero, as before a max pool, cuts the file in two: pad with zeros what is never negative, or pool unpadded",
    "SELECT_V2": "masks are applied outside XNNPACK: give the model a float mask that is added to the scores",
}
_VIEW = "XNNPACK copies at every view: fewer reshapes in the source mean fewer copies"
_PARTS = "parts of a tensor are copied out or together: layers of their own instead of one that is split save it"
_LAYOUT = {
    "Constant Pad": "a tensor is copied into a larger one: XNNPACK pads inside a convolution only where nothing, no conversion either, is between the two",
    "Copy": _PARTS,
    "Depth To Space": "pixels are moved between channels and space",
    "Slice": _PARTS,
    "Space To Depth": "pixels are moved between channels and space",
    "Static Expand Dims": _VIEW,
    "Static Reshape": _VIEW,
    "Transpose": "a tensor is copied into another order: fewer permutations in the source, and channels last at the input, mean fewer copies",
}
_CONVERT = Placement(
    Category.QUANTIZE, "values pass between float32 and int8: quantize both neighbours or neither; at the file's ends, give and take what its first layer reads"
)
_UNQUANTIZED = "it runs in float32 in a quantized file: the plan leaves it out or the build's remarks (litert.not-honoured) say why; static int8 is faster"
_WEIGHTED = {
    "Convolution": _UNQUANTIZED + ", a dynamic scheme is not (XNNPACK expands its weights to float32)",
    "Deconvolution": _UNQUANTIZED,
    "Fully Connected": _UNQUANTIZED,
}
_NORMALISATION = "a normalisation in parts stays in float32, for its sums need the range: it is cheaper folded or narrower"
_ISLANDS = {
    "Batch Matrix Multiply": "a product of two activations has no weights to quantize and stays in float32",
    "Mean": _NORMALISATION,
    "Reciprocal Square Root": _NORMALISATION,
    "Softmax": "a softmax is not faster on int8 and stays in float32",
    "Squared Difference": _NORMALISATION,
}
_ISLAND = "it runs in float32 in an int8 file, between conversions: quantize it too, or leave its neighbours in float32"


def place(operators: Sequence[Executed]) -> tuple[Placement, ...]:
    """See ``Target.place``. The kind of a matrix product says which types XNNPACK computes it in: ``QD8`` is a dynamic scheme."""
    dynamic = any("QD8" in o.kind for o in operators)
    static = any(o.delegate and o.dtype == "int8" and _base(o) not in {*_LAYOUT, "Convert"} for o in operators)
    return tuple(_placed(operator, static, static or dynamic) for operator in operators)


def _placed(operator: Executed, static: bool, quantized: bool) -> Placement:
    base = _base(operator)
    if not operator.delegate:
        return Placement(Category.UNDELEGATED, _UNDELEGATED.get(operator.kind, _NO_KERNEL))
    if base == "Convert":
        return _CONVERT
    if base in _LAYOUT:
        return Placement(Category.LAYOUT, _LAYOUT[base])
    if quantized and base in _WEIGHTED and "QD8" not in operator.kind and operator.dtype == "float32":
        return Placement(Category.FLOAT_ISLAND, _WEIGHTED[base])
    if static and base not in _WEIGHTED and operator.dtype == "float32":
        return Placement(Category.FLOAT_ISLAND, _ISLANDS.get(base, _ISLAND))
    return FAST


def _base(operator: Executed) -> str:
    """The operator of XNNPACK without types and algorithm: ``Convolution`` of ``Convolution (NHWC, F32) IGEMM``."""
    return operator.kind.partition(" (")[0]
