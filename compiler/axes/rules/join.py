"""Operators that put dimensions together and take them apart."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import fx

from edgesmith.compiler.axes.axes import Term, concatenation, factored, resolve, size
from edgesmith.compiler.axes.op import Kept, Op, Result, Shape, set_argument
from edgesmith.compiler.axes.rules.table import rule

aten = torch.ops.aten


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(op: Op) -> Shape:
    """One dimension is the concatenation of all, the others are the same."""
    rank = len(op.out_sizes)
    shapes = [op.of(node) for node in op.arg("tensors") if len(op.of(node)) == rank]
    dim = op.int_arg("dim") % rank
    for other in shapes[1:]:
        for i in range(rank):
            if i != dim:
                op.unify(shapes[0][i], other[i])
    joined = concatenation([shape[dim] for shape in shapes])
    return (*shapes[0][:dim], joined, *shapes[0][dim + 1 :])


@rule(aten.stack.default)
def stack(op: Op) -> Shape:
    """A new dimension with one unit for each tensor; all have the same shape."""
    shapes = [op.of(node) for node in op.arg("tensors")]
    dim = op.int_arg("dim") % (len(shapes[0]) + 1)
    for other in shapes[1:]:
        op.unify_shapes(shapes[0], other)
    return (*shapes[0][:dim], concatenation([()] * len(shapes)), *shapes[0][dim:])


@rule(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
def split(op: Op) -> Result:
    """Consecutive pieces of a dimension; once their sizes change, the operator is written with sizes."""
    x = op.terms("self")
    dim = op.int_arg("dim") % len(x)
    sizes = [int(value.shape[dim]) for value in op.node.meta["val"]]
    pieces = op.pieces(x[dim], list(accumulate(sizes))[:-1])

    def change(node: fx.Node, kept: Kept) -> None:
        new = [kept(piece) for piece in pieces]
        if new != sizes:
            node.target = aten.split_with_sizes.default
            node.args = (node.args[0], new, dim)
            node.kwargs = {}

    op.edit(change)
    return [(*x[:dim], piece, *x[dim + 1 :]) for piece in pieces]


@rule(aten.unbind.int)
def unbind(op: Op) -> Result:
    """Every unit of a dimension by itself: all of them stay."""
    x = op.terms("self")
    dim = op.int_arg("dim") % len(x)
    n = len(op.node.meta["val"])
    for piece in op.pieces(x[dim], list(range(1, n))):
        op.pin([piece], "taken apart unit by unit")
    return [x[:dim] + x[dim + 1 :] for _ in range(n)]


@rule(aten.select.int)
def select(op: Op) -> Shape:
    """One unit of a dimension: that unit stays."""
    x = op.terms("self")
    dim = op.int_arg("dim") % len(x)
    n = size(x[dim])
    index = op.int_arg("index")
    before = _part(op, x[dim], index % n, index % n + 1)[0]
    if index >= 0 and before is not None:
        op.resize("index", before)
    return x[:dim] + x[dim + 1 :]


@rule(aten.slice.Tensor)
def slice_(op: Op) -> Shape:
    """A range of a dimension; with a step, the first of every ``step`` units."""
    x = op.terms("self")
    dim = op.int_arg("dim") % len(x)
    n, step = size(x[dim]), op.int_arg("step")
    start = _bound(op.arg("start"), 0, n)
    stop = max(start, _bound(op.arg("end"), n, n))
    if step != 1:
        return (*x[:dim], _strided(op, x[dim], start, stop, step, op.out_sizes[dim]), *x[dim + 1 :])
    before, piece = _part(op, x[dim], start, stop)
    _slice_edit(op, x[dim], before, piece)
    return (*x[:dim], piece, *x[dim + 1 :])


def _slice_edit(op: Op, whole: Term, before: Term | None, piece: Term) -> None:
    old_start, old_stop = size(before) if before is not None else 0, (size(before) if before is not None else 0) + size(piece)

    def change(node: fx.Node, kept: Kept) -> None:
        start = kept(before) if before is not None else 0
        stop = start + kept(piece)
        if (start, stop) == (old_start, old_stop) and kept(whole) == size(whole):
            return
        if old_start:
            set_argument(node, "start", start)
        if old_stop != size(whole) or (len(node.args) > 3 and isinstance(node.args[3], int) and node.args[3] == old_stop):
            set_argument(node, "end", stop)

    op.edit(change)


def _part(op: Op, term: Term, start: int, stop: int) -> tuple[Term | None, Term]:
    """What lies before ``start``, and what from there to ``stop``."""
    n = size(term)
    if start == stop:
        return None, op.pinned(0, "empty")
    offsets = [offset for offset in (start, stop) if 0 < offset < n]
    pieces = op.pieces(term, offsets)
    return (pieces[0], pieces[1]) if start > 0 else (None, pieces[0])


def _bound(value: object, default: int, n: int) -> int:
    if value is None:
        return default
    bound = int(value.meta["val"]) if isinstance(value, fx.Node) else int(value)  # type: ignore[call-overload]
    return min(max(bound + n if bound < 0 else bound, 0), n)


def _strided(op: Op, term: Term, start: int, stop: int, step: int, count: int) -> Term:
    n = size(term)
    if n % step == 0 and start < step and stop == n:
        outer, inner = factored(term, [n // step, step], op.reason)
        op.pin([inner], "taken with a step")
        op.resize("end", term) if op.arg("end") == n else None
        return resolve(outer)
    op.pin([term], "taken with a step")
    return op.pinned(count, "taken with a step")


@rule(aten.narrow.default)
def narrow(op: Op) -> Shape:
    """``length`` units from ``start`` on."""
    x = op.terms("self")
    dim = op.int_arg("dim") % len(x)
    start = op.int_arg("start") % size(x[dim])
    before, piece = _part(op, x[dim], start, start + op.int_arg("length"))
    if before is not None:
        op.resize("start", before)
    op.resize("length", piece)
    return (*x[:dim], piece, *x[dim + 1 :])
