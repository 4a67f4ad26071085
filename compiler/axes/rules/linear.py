"""Products that contract a dimension: linear layers, matrix products, einsum, attention."""

from __future__ import annotations

from math import sqrt
from string import ascii_letters

import torch
from torch import fx

from edgesmith.compiler.axes.axes import Term, Trait, factored, pinned, size
from edgesmith.compiler.axes.op import Kept, Op, Result, Shape, get_argument, set_argument
from edgesmith.compiler.axes.rules.table import rule

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(op: Op) -> Shape:
    """(..., in) x (out, in) -> (..., out)."""
    x, weight, bias = op.terms("input"), op.terms("weight"), op.maybe("bias")
    op.unify(x[-1], weight[-1])
    if bias is not None:
        op.unify(bias[0], weight[0])
        op.role(op.arg("bias"), producer=0)
    if len(weight) == 1:
        return x[:-1]
    op.role(op.arg("weight"), producer=0, consumer=1)
    return (*x[:-1], weight[0])


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def matmul(op: Op) -> Shape:
    """(..., m, k) x (..., k, n) -> (..., m, n), leading dimensions broadcast; a vector loses its dimension."""
    left, right = op.node.args[0], op.node.args[1]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    return _product(op, left, right)


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(op: Op) -> Shape:
    """self + a matrix product, self broadcast."""
    left, right = ("mat1", "mat2") if op.node.target is aten.addmm.default else ("batch1", "batch2")
    shape = _product(op, op.arg(left), op.arg(right))
    op.align(op.terms("self"), shape)
    op.role(op.arg("self"), producer=len(op.terms("self")) - 1)
    return shape


@rule(aten.outer.default)
def outer(op: Op) -> Shape:
    """(m), (n) -> (m, n)."""
    return (*op.terms("self"), *op.terms("vec2"))


def _product(op: Op, left: fx.Node, right: fx.Node) -> Shape:
    a, b = op.of(left), op.of(right)
    op.unify(a[-1], b[-2] if len(b) > 1 else b[0])
    batch = op.broadcast([a[:-2], b[:-2]])
    rows: Shape = a[-2:-1] if len(a) > 1 else ()
    columns: Shape = b[-1:] if len(b) > 1 else ()
    if not any(op.is_constant(node) or op.is_weight(node) for node in (left, right)):
        op.mark(batch, Trait.HEADS)
        op.mark((a[-1], *rows, *columns), Trait.HEAD_DIM)
    if len(b) > 1:
        op.role(right, consumer=len(b) - 2, producer=len(b) - 1)
    return (*batch, *rows, *columns)


@rule(aten.einsum.default)
def einsum(op: Op) -> Result:
    """Equal letters are equal dimensions; an ellipsis stands for letters of its own, aligned at the right."""
    nodes = list(op.arg("tensors"))
    inputs, output = spelled_out(str(op.arg("equation")), [len(op.of(node)) for node in nodes])
    known: dict[str, Term] = {}
    for letters_of, node in zip(inputs.split(","), nodes, strict=True):
        for letter, term in zip(letters_of, op.of(node), strict=True):
            if letter in known and size(known[letter]) == size(term):
                op.unify(known[letter], term)
            elif size(term) > 1 or letter not in known:
                known[letter] = term
    for letters_of, node in zip(inputs.split(","), nodes, strict=True):
        for dim, letter in enumerate(letters_of):
            if inputs.count(letter) == 1:
                op.role(node, producer=dim)
            elif letter not in output:
                op.role(node, consumer=dim)
    if sum(not op.is_constant(n) for n in nodes) > 1:
        everywhere = [c for c in known if all(c in part for part in inputs.split(",")) and c in output]
        op.mark([known[c] for c in everywhere], Trait.HEADS)
        op.mark([term for c, term in known.items() if c not in everywhere], Trait.HEAD_DIM)
    return tuple(known[c] for c in output)


def spelled_out(equation: str, ranks: list[int]) -> tuple[str, str]:
    """The inputs and the output of an einsum of operands with these ranks, without ellipsis and with its output written."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        letters = sorted(set(inputs) - {",", "."})
        output = "..." * ("..." in inputs) + "".join(c for c in letters if inputs.count(c) == 1)
    widths = [rank - len(part) + 3 for part, rank in zip(inputs.split(","), ranks, strict=True) if "..." in part]
    free = "".join(c for c in ascii_letters if c not in equation)[: max(widths, default=0)]
    parts = [part.replace("...", free[len(free) - (rank - len(part) + 3) :]) for part, rank in zip(inputs.split(","), ranks, strict=True)]
    return ",".join(parts), output.replace("...", free)


@rule(aten.scaled_dot_product_attention.default)
def attention(op: Op) -> Shape:
    """softmax(query (..., L, E) x key (..., S, E)) x value (..., S, V) -> (..., L, V), each leading index by itself."""
    query, key, value, mask = op.terms("query"), op.terms("key"), op.terms("value"), op.maybe("attn_mask")
    op.unify(query[-1], key[-1])
    op.unify(key[-2], value[-2])
    if op.arg("enable_gqa"):
        groups = size(key[-3])
        kv, _ = factored(query[-3], [groups, size(query[-3]) // groups], op.reason)
        op.unify(kv, key[-3])
        op.unify(kv, value[-3])
        batch = query[:-2]
    else:
        batch = op.broadcast([query[:-2], key[:-2], value[:-2]])
    if mask is not None:
        op.align(mask, (*batch, query[-2], key[-2]))
    op.mark(batch, Trait.HEADS)
    op.mark((query[-1], value[-1]), Trait.HEAD_DIM)
    op.mark((key[-2],), Trait.STATISTIC)
    if op.arg("is_causal"):
        op.pin((query[-2], key[-2]), "ordered by a causal mask")
    _keep_scale(op, query[-1])
    return (*batch, query[-2], value[-1])


def _keep_scale(op: Op, head_dim: Term) -> None:
    """The default scale is 1 / sqrt(head_dim): written out once head_dim changes, it stays what it was."""
    if pinned(head_dim) and head_dim:
        return
    old = size(head_dim)

    def change(node: fx.Node, kept: Kept) -> None:
        if kept(head_dim) != old and get_argument(node, "scale") is None:
            set_argument(node, "scale", 1 / sqrt(old))

    op.edit(change)
