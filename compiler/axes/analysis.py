"""The analysis: one walk over the graph, one rule for each operator."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes.axes import Reason, Term, fresh, mark, size
from edgesmith.compiler.axes.groups import Pinned, PruneGroup, collect, named_shapes
from edgesmith.compiler.axes.op import Op, Result, Shape, State
from edgesmith.compiler.axes.rules import find
from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.errors import DefectError, UserError
from edgesmith.compiler.model import Model
from edgesmith.compiler.suggest import did_you_mean


@dataclass(frozen=True)
class Axes:
    """The axes of a model's graph. Analyse again after every change of the graph."""

    model: Model
    groups: tuple[PruneGroup, ...]
    pinned: tuple[Pinned, ...]
    diagnostics: tuple[Diagnostic, ...]
    state: State = field(repr=False, compare=False)

    @classmethod
    def of(cls, model: Model) -> Axes:
        """Analyse ``model``: linear in the number of nodes, some tens of microseconds each.

        Raises:
            DefectError: a rule contradicts the shape metadata; the node is named.
        """
        state = State(model.graph)
        for node in model.graph.graph.nodes:
            _visit(node, state)
        groups, pinned = collect(state)
        return cls(model, groups, pinned, tuple(state.diagnostics), state)

    @cached_property
    def by_name(self) -> dict[str, PruneGroup]:
        """The groups by their names."""
        return {group.name: group for group in self.groups}

    def group(self, name: str) -> PruneGroup:
        """The group called ``name``.

        Raises:
            UserError: there is none; the nearest name is in the hint.
        """
        if name not in self.by_name:
            raise UserError(f"there is no prune group {name!r}", hint=did_you_mean(name, self.by_name))
        return self.by_name[name]

    def shape(self, tensor_name: str) -> Shape:
        """The terms of a parameter, buffer or constant."""
        return self.state.tensors[id(graphs.tensor(self.model.graph, tensor_name))]

    @cached_property
    def coverage(self) -> float:
        """Share of the parameters' elements that lie in a tensor with at least one prunable dimension."""
        prunable = {member.name for group in self.groups for member in group.members}
        counted = {name: graphs.tensor(self.model.graph, name) for name, _ in named_shapes(self.state)}
        elements = {name: value.numel() for name, value in counted.items() if isinstance(value, nn.Parameter)}
        return sum(n for name, n in elements.items() if name in prunable) / max(sum(elements.values()), 1)


def _visit(node: fx.Node, state: State) -> None:
    if node.op == "output":
        for result in node.all_input_nodes:
            value = state.values[result]
            assert isinstance(value, tuple)
            _pin(value, Reason("output", "an output of the model"))
    elif node.op == "placeholder":
        reason = Reason(node.name, "an input of the model")
        state.values[node] = tuple(fresh(int(n), reason) for n in node.meta["val"].shape)
    elif node.op == "get_attr":
        state.values[node] = _attribute(node, state)
        state.constant.add(node)
    else:
        if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)) or all(n in state.constant for n in node.all_input_nodes):
            state.constant.add(node)
        if (called := _call(node, state)) is not None:
            _check(node, called)
            state.values[node] = called


def _attribute(node: fx.Node, state: State) -> Shape:
    key = id(state.tensor(str(node.target)))
    if key not in state.tensors:
        state.tensors[key] = tuple(fresh(int(n)) for n in node.meta["val"].shape)
    return state.tensors[key]


def _call(node: fx.Node, state: State) -> Result | None:
    value = node.meta.get("val")
    if node.target is operator.getitem:
        several = state.values.get(node.args[0])  # type: ignore[arg-type]
        return several[node.args[1]] if isinstance(several, list) else None  # type: ignore[index]
    if not isinstance(value, (torch.Tensor, tuple, list)):
        return None
    op = Op(node, state)
    rule = find(node.target)
    return op.unknown(str(node.target)) if rule is None else rule(op)


def _check(node: fx.Node, result: Result) -> None:
    values = node.meta["val"]
    pairs = [(result, values)] if isinstance(result, tuple) else list(zip(result, values, strict=True))
    for shape, value in pairs:
        if shape is not None and [size(t) for t in shape] != (expected := [int(n) for n in value.shape]):
            raise DefectError(
                f"the axes of {node.target} have the sizes {[size(t) for t in shape]}, the tensor has {expected}",
                where=graphs.source(node),
                why=f"node {node.name}",
            )


def _pin(terms: tuple[Term, ...], reason: Reason) -> None:
    for term in terms:
        mark(term, pin=reason)
