"""Operators that reduce a dimension or run along one."""

from __future__ import annotations

import torch

from edgesmith.compiler.axes.axes import Term, Trait
from edgesmith.compiler.axes.op import Op, Result, Shape
from edgesmith.compiler.axes.rules.table import rule

aten = torch.ops.aten


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax(op: Op) -> Shape:
    """Normalised over one dimension."""
    x = op.terms("self")
    if x:
        op.mark([x[op.int_arg("dim") % len(x)]], Trait.STATISTIC)
    return x


@rule(
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.var.dim,
    aten.var.correction,
    aten.std.dim,
    aten.std.correction,
    aten.logsumexp.default,
    aten.sum.dim_IntList,
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
    aten.norm.ScalarOpt_dim_dtype,
    aten.frobenius_norm.dim,
    aten.any.dim,
    aten.any.dims,
    aten.all.dim,
    aten.prod.dim_int,
)
def reduction(op: Op) -> Shape:
    """The reduced dimensions disappear, or become 1. What they held is a statistic."""
    x = op.terms("self")
    return _reduced(op, x, op.dims("dim", len(x)), bool(op.arg("keepdim")))


@rule(aten.mean.default, aten.sum.default, aten.max.default, aten.min.default, aten.norm.Scalar)
def total(op: Op) -> Shape:
    """All dimensions are reduced."""
    x = op.terms("self")
    return _reduced(op, x, list(range(len(x))), False)


@rule(aten.max.dim, aten.min.dim, aten.var_mean.correction)
def pair(op: Op) -> Result:
    """Two results of the reduced shape; an index into the reduced dimension pins it."""
    x = op.terms("self")
    dims = op.dims("dim", len(x))
    if op.node.target is not aten.var_mean.correction and _used(op, 1):
        op.pin([x[d] for d in dims], "an index into it is computed")
    shape = _reduced(op, x, dims, bool(op.arg("keepdim")))
    return [shape, shape]


@rule(aten.argmax.default, aten.argmin.default)
def argmax(op: Op) -> Shape:
    """An index into the reduced dimension, which is pinned."""
    x = op.terms("self")
    dims = op.dims("dim", len(x))
    op.pin([x[d] for d in dims], "an index into it is computed")
    return _reduced(op, x, dims, bool(op.arg("keepdim")))


@rule(aten.cumsum.default, aten.flip.default, aten.roll.default, aten.cumprod.default, aten.tril.default, aten.triu.default)
def ordered(op: Op) -> Shape:
    """The order along these dimensions matters: they are pinned."""
    x = op.terms("self")
    if op.node.target in {aten.tril.default, aten.triu.default}:
        dims = [len(x) - 2, len(x) - 1]
    else:
        dims = op.dims("dims" if op.node.target in {aten.flip.default, aten.roll.default} else "dim", len(x))
    op.pin([x[d] for d in dims], "its order matters")
    return x


@rule(aten.diff.default)
def diff(op: Op) -> Shape:
    """Neighbours are subtracted: pinned. What is put before and behind has the same units along the other dimensions."""
    x = list(op.terms("self"))
    dim = op.int_arg("dim") % len(x)
    op.pin([x[dim]], "its order matters")
    for other in (op.maybe("prepend"), op.maybe("append")):
        for i, term in enumerate(other or ()):
            if i == dim:
                op.pin([term], "its order matters")
            else:
                op.unify(x[i], term)
    x[dim] = op.pinned(op.out_sizes[dim], "its order matters")
    return tuple(x)


@rule(aten.topk.default, aten.sort, aten.argsort)
def sorting(op: Op) -> Result:
    """The sorted dimension is pinned, and so is what is left of it."""
    x = op.terms("self")
    dim = op.int_arg("dim") % len(x)
    op.pin([x[dim]], "its order matters")
    value = op.node.meta["val"]
    one = value if isinstance(value, torch.Tensor) else value[0]
    shape = (*x[:dim], op.pinned(int(one.shape[dim]), "its order matters"), *x[dim + 1 :])
    return shape if one is value else [shape, shape]


def _reduced(op: Op, x: Shape, dims: list[int], keepdim: bool) -> Shape:
    op.mark([x[d] for d in dims], Trait.STATISTIC)
    gone: Term = ()
    return tuple(gone if i in dims else term for i, term in enumerate(x) if keepdim or i not in dims)


def _used(op: Op, position: int) -> bool:
    return any(len(user.args) < 2 or user.args[1] == position for user in op.node.users)
