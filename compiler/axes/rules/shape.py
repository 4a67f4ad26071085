"""Operators that move, regroup, drop or repeat dimensions."""

from __future__ import annotations

from math import prod

import torch

from edgesmith.compiler.axes.axes import Axis, Reason, Term, fresh, mark, resolve, size, unify
from edgesmith.compiler.axes.op import Op, Result, Shape
from edgesmith.compiler.axes.rules.table import rule

aten = torch.ops.aten


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.ravel.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.atleast_1d.default,
    aten.atleast_2d.default,
    aten.atleast_3d.default,
)
def view(op: Op) -> Shape:
    """The same elements in the same order, regrouped into other dimensions."""
    result = regroup(op.terms("self"), op.out_sizes, op.reason)
    name = _LITERAL.get(op.node.target)  # type: ignore[call-overload]
    if name == "sizes":
        start = op.int_arg("dim") % len(op.terms("self"))
        op.resize_list(name, result[start : start + len(op.arg(name))], infer=True)
    elif name:
        op.resize_list(name, result, infer=True)
    return result


_LITERAL = {aten.view.default: "size", aten.reshape.default: "shape", aten._unsafe_view.default: "size", aten.unflatten.int: "sizes"}


def regroup(shape: Shape, sizes: list[int], reason: Reason) -> Shape:
    """``shape`` read in order and cut into dimensions of ``sizes``. Where that goes through an axis, the axis becomes a product."""
    if 0 in sizes:
        for term in shape:
            mark(term, pin=reason)
        return tuple(fresh(n, reason) for n in sizes)
    queue: list[Axis] = [axis for term in shape for axis in resolve(term)][::-1]
    result: list[Term] = []
    at = 0
    while at < len(sizes):
        term, wanted = _take(queue, sizes[at], reason)
        if wanted == 1:
            result.append(term)
            at += 1
            continue
        queue.extend(reversed(term))
        count = _freeze(queue, sizes[at:], reason)
        result.extend(fresh(n, reason) for n in sizes[at : at + count])
        at += count
    return tuple(result)


def _take(queue: list[Axis], wanted: int, reason: Reason) -> tuple[Term, int]:
    """Axes off the end of ``queue`` that make up ``wanted``; what is left of ``wanted`` is 1 if they did."""
    taken: list[Axis] = []
    while wanted > 1:
        axis = queue.pop()
        if wanted % axis.size == 0:
            taken.append(axis)
            wanted //= axis.size
        elif axis.size % wanted == 0 and _split(axis, wanted, queue, taken, reason):
            wanted = 1
        else:
            queue.append(axis)
            break
    return tuple(taken), wanted


def _split(axis: Axis, outer: int, queue: list[Axis], taken: list[Axis], reason: Reason) -> bool:
    """``axis`` becomes ``outer x rest``: the first is taken, the rest is left."""
    product = (Axis(outer), Axis(axis.size // outer))
    unify((axis,), product, reason)
    if axis.link is None:
        return False
    factors = resolve(product)
    done = 1
    for i, factor in enumerate(factors):
        if done == outer:
            queue.extend(reversed(factors[i:]))
            break
        taken.append(factor)
        done *= factor.size
    return True


def _freeze(queue: list[Axis], sizes: list[int], reason: Reason) -> int:
    """Pin the shortest run of axes that is a whole number of the dimensions in ``sizes``; return how many of those."""
    have, count = 1, 1
    while have != (need := prod(sizes[:count])):
        if have < need:
            axis = queue.pop()
            mark((axis,), pin=reason)
            have *= axis.size
        else:
            count += 1
    return count


@rule(
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.adjoint.default,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
)
def permute(op: Op) -> Shape:
    """Dimensions in another order; that of the rarer operators is found by asking torch."""
    x = op.of(op.node.args[0])  # type: ignore[arg-type]
    if op.node.target is aten.permute.default:
        return tuple(x[d] for d in op.dims("dims", len(x)))
    if op.node.target is aten.transpose.int:
        a, b = op.int_arg("dim0") % len(x), op.int_arg("dim1") % len(x)
        return tuple(x[{a: b, b: a}.get(d, d)] for d in range(len(x)))
    numbered = torch.empty([i + 1 for i in range(len(x))], device="meta")
    order = op.node.target(numbered, *op.node.args[1:], **op.node.kwargs).shape  # type: ignore[operator]
    return tuple(x[n - 1] for n in order)


@rule(aten.expand.default, aten.broadcast_to.default)
def expand(op: Op) -> Shape:
    """A dimension of size 1 becomes a new one; new dimensions may come in front."""
    x = op.terms("self")
    sizes = op.out_sizes
    ahead = len(sizes) - len(x)
    result: list[Term] = []
    for i, n in enumerate(sizes):
        old = x[i - ahead] if i >= ahead else ()
        result.append(old if size(old) == n else fresh(n))
    op.resize_list("size", result)
    return tuple(result)


@rule(aten.expand_as.default)
def expand_as(op: Op) -> Shape:
    """Broadcast to another tensor's shape."""
    x, other = op.terms("self"), op.terms("other")
    op.align(x, other)
    return other


@rule(aten.broadcast_tensors.default)
def broadcast_tensors(op: Op) -> Result:
    """Each tensor broadcast to the shape of all."""
    nodes = op.arg("tensors")
    shape = op.broadcast([op.of(n) for n in nodes])
    return [shape for _ in nodes]


@rule(aten.meshgrid.indexing, aten.meshgrid.default)
def meshgrid(op: Op) -> Result:
    """Each vector along its own dimension of every result."""
    vectors = [op.of(n)[0] if op.of(n) else () for n in op.arg("tensors")]
    if op.node.target is aten.meshgrid.indexing and op.arg("indexing") == "xy" and len(vectors) > 1:
        vectors[:2] = vectors[1::-1]
    return [tuple(vectors) for _ in vectors]


@rule(aten.repeat.default, aten.tile.default)
def repeat(op: Op) -> Shape:
    """The whole dimension several times over: repeats x size."""
    x = op.terms("self")
    name = "repeats" if op.node.target is aten.repeat.default else "dims"
    counts = op.ints(name)
    x = ((),) * (len(counts) - len(x)) + x
    times = [fresh(n) for n in [1] * (len(x) - len(counts)) + counts]
    op.resize_list(name, times[len(x) - len(counts) :])
    return tuple(n + term for n, term in zip(times, x, strict=True))


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(op: Op) -> Shape:
    """Every unit several times over: size x repeats."""
    x, dim = op.terms("self"), op.arg("dim")
    if dim is None:
        x, dim = regroup(x, [prod(size(t) for t in x)], op.reason), 0
    dim %= len(x)
    times = fresh(op.int_arg("repeats"))
    op.resize("repeats", times)
    if op.arg("output_size") is not None:
        op.resize("output_size", x[dim] + times)
    return (*x[:dim], x[dim] + times, *x[dim + 1 :])
