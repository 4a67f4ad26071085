"""Operators that look up units by number."""

from __future__ import annotations

import torch
from torch import fx

from edgesmith.compiler.axes.axes import Term, size
from edgesmith.compiler.axes.op import Op, Shape
from edgesmith.compiler.axes.rules.table import rule

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(op: Op) -> Shape:
    """(V, E) looked up by (...) -> (..., E); V is pinned."""
    weight, indices = op.terms("weight"), op.terms("indices")
    op.pin(weight[:1], "looked up by number")
    op.role(op.arg("weight"), producer=1)
    return (*indices, *weight[1:])


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(op: Op) -> Shape:
    """Indexed dimensions are pinned and give way to the indices' own; the others pass."""
    return _picked(op, "looked up by number")


@rule(aten.index_put.default)
def index_put(op: Op) -> Shape:
    """``values`` have the shape of what is picked: indexed dimensions are pinned, the others are those of the values."""
    op.align(op.terms("values"), _picked(op, "written by number"))
    return op.terms("self")


def _picked(op: Op, why: str) -> Shape:
    """The shape of what the argument ``indices`` picks from ``self``; a mask pins everything."""
    x, given = op.terms("self"), list(op.arg("indices"))
    if any(isinstance(i, fx.Node) and i.meta["val"].dtype in {torch.bool, torch.uint8} for i in given):
        shape = op.unknown("an index by a mask")
        assert isinstance(shape, tuple)
        return shape
    given += [None] * (len(x) - len(given))
    places = [d for d, i in enumerate(given) if i is not None]
    op.pin([x[d] for d in places], why)
    new = op.broadcast([op.of(given[d]) for d in places])
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    rest: list[Term] = [x[d] for d in range(len(x)) if d not in places]
    return (*rest[:first], *new, *rest[first:])


@rule(aten.index_select.default)
def index_select(op: Op) -> Shape:
    """One dimension is looked up, and pinned."""
    x, indices = op.terms("self"), op.terms("index")
    dim = op.int_arg("dim") % len(x)
    op.pin([x[dim]], "looked up by number")
    return (*x[:dim], *(indices or ((),)), *x[dim + 1 :])


@rule(aten.gather.default)
def gather(op: Op) -> Shape:
    """One dimension is looked up, and pinned; along the others both tensors have the same units."""
    x, indices = op.terms("self"), op.terms("index")
    dim = op.int_arg("dim") % len(x)
    op.pin([x[dim]], "looked up by number")
    _beside(op, x, indices, dim, "looked up in part")
    return indices


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two)
def scatter(op: Op) -> Shape:
    """Written along one dimension, which is pinned; along the others all tensors have the same units."""
    x = op.terms("self")
    dim = op.int_arg("dim") % len(x)
    op.pin([x[dim]], "written by number")
    for other in op.node.all_input_nodes[1:]:
        if isinstance(shape := op.state.values.get(other), tuple):
            op.pin([shape[dim]], "written by number")
            _beside(op, x, shape, dim, "written in part")
    return x


def _beside(op: Op, x: Shape, other: Shape, dim: int, why: str) -> None:
    """Both have the same units along all dimensions but ``dim``; where one is only a part of the other, both are pinned."""
    for d, (mine, its) in enumerate(zip(x, other, strict=True)):
        if d != dim and size(mine) == size(its):
            op.unify(mine, its)
        elif d != dim:
            op.pin((mine, its), why)


@rule(aten.histc.default)
def histc(op: Op) -> Shape:
    """How many values lie in each of ``bins`` ranges: all of them count."""
    op.pin(op.terms("self"), "counted")
    return (op.pinned(op.int_arg("bins"), "a range of values"),)
