"""Operators that compute every element from the elements at the same place."""

from __future__ import annotations

import torch
from torch import fx

from edgesmith.compiler.axes.axes import Term, Trait, size
from edgesmith.compiler.axes.op import Op, Shape, disjoint
from edgesmith.compiler.axes.rules.table import rule

aten = torch.ops.aten

_ADDITIONS = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor}


@rule(
    aten.dropout.default,
    aten.alpha_dropout.default,
    aten.feature_dropout.default,
    aten.rrelu.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.log_sigmoid.default,
    aten.floor_divide,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.masked_fill.Tensor,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.copy.default,
    aten.__and__,
    aten.__or__,
    aten.__xor__,
    aten.where,
    aten.real.default,
    aten.clip,
)
def elementwise(op: Op) -> Shape:
    """Operands are aligned at the right; a size of 1 against more says nothing."""
    operands = _tensor_arguments(op.node)
    result: list[Term] = []
    shapes = [op.of(node) for node in operands]
    added = op.node.target in _ADDITIONS and not any(op.is_constant(node) for node in operands)
    sizes = op.out_sizes
    for back in range(1, len(sizes) + 1):
        meeting = [shape[-back] for shape in shapes if len(shape) >= back and size(shape[-back]) == sizes[-back]]
        for other in meeting[1:]:
            different = added and disjoint(meeting[0], other)
            op.unify(meeting[0], other)
            if different:
                op.mark([other], Trait.ADDED)
        result.append(meeting[0])
    return tuple(reversed(result))


@rule(aten.type_as.default, aten.to.other)
def converted(op: Op) -> Shape:
    """The values of the first tensor in the type of the second."""
    return op.terms("self")


def _tensor_arguments(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.all_input_nodes if isinstance(a.meta["val"], torch.Tensor)]


@rule(aten.prelu.default)
def prelu(op: Op) -> Shape:
    """One slope for each channel (dimension 1), or one for all."""
    shape, weight = op.terms("self"), op.terms("weight")
    if size(weight[0] if weight else ()) != 1:
        op.unify(shape[1 if len(shape) > 1 else 0], weight[0])
    return shape


@rule(aten.glu.default)
def glu(op: Op) -> Shape:
    """The first half of a dimension times a function of the second half."""
    shape = list(op.terms("self"))
    dim = op.int_arg("dim") % len(shape)
    half = op.out_sizes[dim]
    first, second = op.pieces(shape[dim], [half])
    op.unify(first, second)
    shape[dim] = first
    return tuple(shape)
