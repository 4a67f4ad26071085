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
    x = op.terms("self")
    given = list(op.arg("indices"))
    given += [None] * (len(x) - len(given))
    if any(isinstance(i, fx.Node) and i.meta["val"].dtype in {torch.bool, torch.uint8} for i in given):
        shape = op.unknown("an index by a mask")
        assert isinstance(shape, tuple)
        return shape
    places = [d for d, i in enumerate(given) if i is not None]
    op.pin([x[d] for d in places], "looked up by number")
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
    x_sizes, index_sizes = op.sizes(op.arg("self")), op.sizes(op.arg("index"))
    for d in range(len(x)):
        if d == dim:
            continue
        if x_sizes[d] == index_sizes[d]:
            op.unify(x[d], indices[d])
        else:
            op.pin((x[d], indices[d]), "looked up in part")
    return indices


@rule(aten.index_put.default)
def index_put(op: Op) -> Shape:
    """(..., rest) with ``values`` at the indexed places: the indexed dimensions are pinned, the others are those of the values."""
    x, values = op.terms("self"), op.terms("values")
    given = op.arg("indices")
    if any(isinstance(i, fx.Node) and i.meta["val"].dtype in {torch.bool, torch.uint8} for i in given):
        shape = op.unknown("a write by a mask")
        assert isinstance(shape, tuple)
        return shape
    places = [d for d, i in enumerate(given) if i is not None]
    op.pin([x[d] for d in places], "written by number")
    new = op.broadcast([op.of(given[d]) for d in places])
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    rest: list[Term] = [x[d] for d in range(len(x)) if d not in places]
    op.align(values, (*rest[:first], *new, *rest[first:]))
    return x


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two)
def scatter(op: Op) -> Shape:
    """Written along one dimension, which is pinned; along the others all tensors have the same units, or are pinned."""
    x = op.terms("self")
    dim = op.int_arg("dim") % len(x)
    op.pin([x[dim]], "written by number")
    for name in ("index", "src"):
        node = op.arg(name) if name in {a.name for a in op.node.target._schema.arguments} else None  # type: ignore[union-attr]
        if isinstance(node, fx.Node):
            for d, (mine, other) in enumerate(zip(x, op.of(node), strict=True)):
                if d == dim or size(mine) != size(other):
                    op.pin((mine, other), "written in part")
                else:
                    op.unify(mine, other)
    return x


@rule(aten.histc.default)
def histc(op: Op) -> Shape:
    """How many values lie in each of ``bins`` ranges: all of them count."""
    op.pin(op.terms("self"), "counted")
    return (op.pinned(op.int_arg("bins"), "a range of values"),)
