"""Which tensors share one int8 grid, and which of them have to be watched to find its range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from edgesmith.compiler import grid_operators as ops
from edgesmith.compiler.quantplan import Scheme


@dataclass(frozen=True)
class GridGroup:
    """Tensors on one grid. ``watched``: those whose values together are all that a runtime has to represent; none where the range is ``fixed``."""

    members: tuple[fx.Node, ...]
    watched: tuple[fx.Node, ...]
    fixed: tuple[float, float] | None = None


def grid_groups(schemes: Mapping[fx.Node, Scheme]) -> tuple[GridGroup, ...]:
    """The grids that the STATIC operators of ``schemes`` read and write, in graph order.

    A fused clamp and the operator before it share a grid (that of the clamp's result), so do a pool or view and what it reads (that of the
    latter), and a concatenation and its parts (that of the whole).
    """
    static = [node for node, scheme in schemes.items() if scheme is Scheme.STATIC]
    parent: dict[fx.Node, fx.Node] = {}
    for node in static:
        for member in (*ops.activations(node), node):
            parent.setdefault(member, member)
    covered: set[fx.Node] = set()
    for node in static:
        for member, cover in _ties(node, schemes):
            covered.add(member)
            parent[_root(parent, member)] = _root(parent, cover)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for member in sorted(parent):
        groups.setdefault(_root(parent, member), []).append(member)
    return tuple(_group(members, covered, schemes) for members in groups.values())


def _group(members: list[fx.Node], covered: set[fx.Node], schemes: Mapping[fx.Node, Scheme]) -> GridGroup:
    watched = tuple(m for m in members if m not in covered)
    fixed = ops.FIXED.get(watched[0].target) if len(watched) == 1 and schemes.get(watched[0]) is Scheme.STATIC else None
    return GridGroup(tuple(members), () if fixed else watched, fixed)


def _root(parent: Mapping[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    while parent[node] is not node:
        node = parent[node]
    return node


def _ties(node: fx.Node, schemes: Mapping[fx.Node, Scheme]) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs (tensor, tensor whose values cover its own) that share a grid because of ``node``."""
    if ops.keeps_grid(node):
        return [(node, ops.activations(node)[0])]
    if node.target in ops.CONCATENATIONS:
        return [(part, node) for part in ops.activations(node)]
    clamp = ops.fused_clamp(node)
    return [(node, clamp)] if clamp is not None and schemes.get(clamp) is Scheme.STATIC else []
