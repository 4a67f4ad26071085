"""One operator as its rule sees it, and what a rule may say."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes.axes import Axis, Reason, Term, cut, fresh, leaves, mark, resolve, size, unify
from edgesmith.compiler.diagnostics import Diagnostic, Severity

Shape = tuple[Term, ...]
"""The terms of a tensor's dimensions."""
Result = Shape | list[Shape | None]
"""What a rule returns: the shape of the result, or those of several results."""
Kept = Callable[[Term], int]
"""How many units of a term are left after a removal."""
Edit = Callable[[fx.Node, Kept], None]
"""Recomputes a literal argument of a node after a removal."""


@dataclass
class State:
    """What the analysis knows while it walks the graph."""

    graph: fx.GraphModule
    values: dict[fx.Node, Result] = field(default_factory=dict)
    tensors: dict[int, Shape] = field(default_factory=dict)
    constant: set[fx.Node] = field(default_factory=set)
    edits: dict[fx.Node, list[Edit]] = field(default_factory=dict)
    roles: dict[tuple[int, int], str] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    by_name: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter, buffer or constant called ``name``."""
        found = self.by_name.get(name)
        if found is None:
            found = self.by_name[name] = graphs.tensor(self.graph, name)
        return found


@functools.cache
def arguments(target: Any) -> dict[str, tuple[int, Any]]:
    """Name -> (position, default) of the arguments of an ATen operator."""
    return {a.name: (i, a.default_value) for i, a in enumerate(target._schema.arguments)}


class Op:
    """A node being looked at. Rules read its arguments by name, relate terms, and say how literals follow the axes."""

    __slots__ = ("_reason", "node", "state")

    def __init__(self, node: fx.Node, state: State) -> None:
        self.node = node
        self.state = state
        self._reason: Reason | None = None

    @property
    def reason(self) -> Reason:
        """Why dimensions would be pinned here that do not align."""
        if self._reason is None:
            self._reason = Reason(graphs.source(self.node), f"regrouped by {self.node.target}")
        return self._reason

    # what the operator is given ---------------------------------------------------------------------------------

    def arg(self, name: str) -> Any:
        """The argument called ``name``, its default where it is not given."""
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        position, default = arguments(self.node.target)[name]
        return self.node.args[position] if position < len(self.node.args) else default

    def int_arg(self, name: str) -> int:
        """An integer argument; one that is computed has the value of the shape metadata."""
        return concrete(self.arg(name))

    def ints(self, name: str) -> list[int]:
        """A list of integers; a single one counts as a list."""
        value = self.arg(name)
        return [concrete(v) for v in (value if isinstance(value, (list, tuple)) else [value])]

    def dims(self, name: str, rank: int) -> list[int]:
        """A list of dimensions without negative ones; all of them where the argument is empty or None."""
        value = self.arg(name)
        if value is None or value == []:
            return list(range(rank))
        return [d % max(rank, 1) for d in self.ints(name)]

    def terms(self, name: str) -> Shape:
        """The terms of a tensor argument."""
        return self.of(self.arg(name))

    def maybe(self, name: str) -> Shape | None:
        """The terms of an optional tensor argument."""
        value = self.arg(name)
        return self.of(value) if isinstance(value, fx.Node) else None

    def of(self, node: fx.Node) -> Shape:
        """The terms of the tensor that ``node`` computes."""
        shape = self.state.values[node]
        assert isinstance(shape, tuple)
        return shape

    def sizes(self, node: fx.Node) -> list[int]:
        """The shape metadata of a tensor."""
        return [int(n) for n in node.meta["val"].shape]

    @property
    def out_sizes(self) -> list[int]:
        """The shape metadata of the (single) result."""
        return self.sizes(self.node)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether ``node`` depends on no input of the model, but for its size."""
        return node in self.state.constant

    # what a rule says -------------------------------------------------------------------------------------------

    def unify(self, left: Term, right: Term) -> None:
        """The two dimensions are one."""
        if left is not right:
            unify(left, right, self.reason)

    def unify_shapes(self, left: Sequence[Term], right: Sequence[Term]) -> None:
        """The dimensions are the same, one by one."""
        for a, b in zip(left, right, strict=True):
            self.unify(a, b)

    def pin(self, terms: Iterable[Term], why: str) -> None:
        """These dimensions must keep their sizes."""
        reason = Reason(self.reason.where, why)
        for term in terms:
            mark(term, pin=reason)

    def pinned(self, n: int, why: str) -> Term:
        """A new dimension that must keep its size."""
        return fresh(n, Reason(self.reason.where, why))

    def mark(self, terms: Iterable[Term], traits: int) -> None:
        """Note what this operator says about these dimensions."""
        for term in terms:
            mark(term, traits=traits)

    def broadcast(self, shapes: Sequence[Shape]) -> Shape:
        """Shapes aligned at the right into one; a size of 1 against more says nothing."""
        result: list[Term] = []
        for back in range(1, max(len(shape) for shape in shapes) + 1):
            terms = [shape[-back] for shape in shapes if len(shape) >= back and size(shape[-back]) != 1]
            for other in terms[1:]:
                self.unify(terms[0], other)
            result.append(terms[0] if terms else ())
        return tuple(reversed(result))

    def align(self, shape: Shape, target: Shape) -> None:
        """``shape`` is broadcast to ``target``, which is at least as large."""
        for a, b in zip(reversed(shape), reversed(target), strict=False):
            if size(a) != 1:
                self.unify(a, b)

    def pieces(self, term: Term, offsets: Sequence[int]) -> list[Term]:
        """``term`` cut at ``offsets`` (increasing, inside it). Where that would go through a block, all of it is pinned."""
        pieces = cut(term, offsets)
        if pieces is None:
            self.pin([term], f"cut inside a block by {self.node.target}")
            bounds = [0, *offsets, size(term)]
            pieces = [self.pinned(b - a, f"cut inside a block by {self.node.target}") for a, b in pairwise(bounds)]
        return pieces

    def unknown(self, what: str) -> Result:
        """Pin everything that the operator touches, and say so: for operators without a rule."""
        self.state.diagnostics.append(
            Diagnostic(Severity.WARNING, "axes.no-rule", self.reason.where, f"no rule for {what}: the dimensions it touches keep their sizes")
        )
        why = f"touched by {what}, for which there is no rule"
        for node in self.node.all_input_nodes:
            result = self.state.values.get(node, ())
            for shape in result if isinstance(result, list) else [result]:
                self.pin(shape or (), why)
        value = self.node.meta["val"]
        if isinstance(value, torch.Tensor):
            return tuple(self.pinned(int(n), why) for n in value.shape)
        return [tuple(self.pinned(int(n), why) for n in v.shape) if isinstance(v, torch.Tensor) else None for v in value]

    def role(self, node: object, **dims: int) -> None:
        """Which dimension of a weight produces units and which consumes them: ``producer=0, consumer=1``. What is no weight is passed over."""
        weight, order = _weight(node)
        if weight is not None:
            key = id(self.state.tensor(str(weight.target)))
            for side, dim in dims.items():
                self.state.roles.setdefault((key, order[dim] if order else dim), side)

    def is_weight(self, node: fx.Node) -> bool:
        """Whether ``node`` is a tensor that the model holds, or some of its units picked by number, its dimensions in any order."""
        return _weight(node)[0] is not None

    # how literals follow ----------------------------------------------------------------------------------------

    def edit(self, change: Edit) -> None:
        """Call ``change`` on the node's copy after a removal."""
        self.state.edits.setdefault(self.node, []).append(change)

    def resize(self, name: str, *summands: Term) -> None:
        """The integer argument ``name`` is the total size of ``summands``."""

        def change(node: fx.Node, kept: Kept) -> None:
            new = sum(kept(t) for t in summands)
            if new != sum(size(t) for t in summands):
                set_argument(node, name, new)

        if summands:
            self.edit(change)

    def resize_list(self, name: str, terms: Sequence[Term | None], *, infer: bool = False) -> None:
        """The entries of the list argument ``name`` are the sizes of ``terms``; None leaves an entry alone.

        An entry of -1 stays. With ``infer`` a computed entry whose ratio to the batch changes may become -1.
        """

        def change(node: fx.Node, kept: Kept) -> None:
            given = get_argument(node, name)
            values = list(given) if isinstance(given, (list, tuple)) else [given] * len(terms)
            changed = False
            for i, term in enumerate(terms):
                if term is None or (new := kept(term)) == (old := size(term)) or values[i] == -1:
                    continue
                changed = True
                if not isinstance(values[i], fx.Node):
                    values[i] = new
                elif infer and -1 not in values:
                    values[i] = -1
                else:
                    values[i] = _scaled(node, values[i], old, new)
            if changed:
                set_argument(node, name, values)

        if any(terms):
            self.edit(change)


def concrete(value: Any) -> int:
    """An integer literal, or the value that the shape metadata has for a computed one."""
    return int(value.meta["val"]) if isinstance(value, fx.Node) else int(value)


def get_argument(node: fx.Node, name: str) -> Any:
    """The argument called ``name`` of an ATen call."""
    position, default = arguments(node.target)[name]
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if position < len(node.args) else default


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set the argument called ``name`` where it is given, by keyword where it is not."""
    position, _ = arguments(node.target)[name]
    if name not in node.kwargs and position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def disjoint(left: Term, right: Term) -> bool:
    """Whether two dimensions have no axis in common."""
    left, right = resolve(left), resolve(right)
    if len(left) == 1 == len(right) and left[0].parts is None and right[0].parts is None:
        return left[0] is not right[0]
    mine: set[Axis] = set(leaves(left))
    return mine.isdisjoint(leaves(right))


def _scaled(node: fx.Node, value: fx.Node, old: int, new: int) -> fx.Node:
    """``value`` (a multiple of ``old / BATCH``) rescaled for a dimension that goes from ``old`` to ``new`` units."""
    with node.graph.inserting_before(node):
        per_sample = node.graph.call_function(operator.floordiv, (value, old // graphs.BATCH))
        result = node.graph.call_function(operator.mul, (per_sample, new // graphs.BATCH))
    for made in (per_sample, result):
        made.meta["source"] = node.meta.get("source", "")
    return result


def _weight(node: object) -> tuple[fx.Node | None, list[int] | None]:
    """The tensor behind ``node``, and where each dimension of ``node`` is in it (None: at its own place)."""
    order = None
    while isinstance(node, fx.Node) and node.op == "call_function" and (node.target in _MOVES or _picks(node)):
        order = _permuted(node, order)
        node = node.args[0]
    return (node, order) if isinstance(node, fx.Node) and node.op == "get_attr" else (None, None)


def _permuted(node: fx.Node, order: list[int] | None) -> list[int]:
    rank = node.meta["val"].dim()
    mine = list(range(rank))
    if node.target is torch.ops.aten.permute.default:
        mine = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    elif node.target is torch.ops.aten.transpose.int:
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        mine[a], mine[b] = mine[b], mine[a]
    elif node.target is not torch.ops.aten.index.Tensor:
        mine[-2:] = mine[-2:][::-1]
    return mine if order is None else [mine[d] for d in order]


def _picks(node: fx.Node) -> bool:
    """Whether ``node`` picks units of the first dimension by number, and leaves the others where they are."""
    indices = node.args[1] if node.target is torch.ops.aten.index.Tensor else ()
    return len(indices) == 1 and indices[0].meta["val"].dim() == 1  # type: ignore[arg-type, index, union-attr]


_MOVES = (
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.numpy_T.default,
    torch.ops.aten.mT.default,
)
