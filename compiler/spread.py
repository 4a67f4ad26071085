"""Which operators follow the weighted ones onto integers: decided from the graph's structure alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler import grid_operators as ops
from edgesmith.compiler.quantplan import Scheme

Schemes = dict[fx.Node, Scheme]


def spread(graph: fx.GraphModule, choose: Callable[[fx.Node, Mapping[fx.Node, Scheme]], Scheme | None], may_follow: Callable[[fx.Node], bool]) -> Schemes:
    """A scheme for operators with weights and for those between static ones. Absent means float.

    ``choose`` says how an operator with a weight runs, given the schemes of those before it; of any other it says None. Operators without weights
    that ``may_follow`` are static where all they read is on a grid already and a static weighted operator reads their result, through others of
    their kind: a residual addition between convolutions, not one whose result goes to a layer normalisation.
    """
    fed: Schemes = {}
    weighted: set[fx.Node] = set()
    for node in graphs.operators(graph):
        chosen = choose(node, fed)
        if chosen is not None:
            weighted.add(node)
            if chosen is not Scheme.FLOAT:
                fed[node] = chosen
        elif _on_grid(node, fed) and may_follow(node):
            fed[node] = Scheme.STATIC
    wanted: set[fx.Node] = set()
    for node in reversed(list(graphs.operators(graph))):
        if node in weighted or any(user in wanted and fed.get(user) is Scheme.STATIC for user in node.users):
            wanted.add(node)
    kept = {node: scheme for node, scheme in fed.items() if node in wanted}
    for node in [n for n, scheme in kept.items() if scheme is Scheme.STATIC and not ops.keeps_grid(n)]:
        clamp = ops.fused_clamp(node)
        if clamp is not None and clamp in fed:
            kept[clamp] = Scheme.STATIC
    return kept


def _on_grid(node: fx.Node, fed: Mapping[fx.Node, Scheme]) -> bool:
    """Whether ``node`` could run on integers because what it reads is on a static grid."""
    if not ops.is_float(node):
        return False
    read = [a for a in node.all_input_nodes if isinstance(a.meta["val"], torch.Tensor)]
    static = [a for a in read if fed.get(a) is Scheme.STATIC]
    if ops.keeps_grid(node) or node.target in ops.UNARY:
        return node.args[0] in static
    if node.target in ops.SUMS:
        return len(read) == 2 and static == read and "alpha" not in node.kwargs
    if node.target in ops.PRODUCTS:
        return len(read) == 2 and max(read, key=lambda a: a.meta["val"].numel()) in static and len(ops.activations(node)) == 2
    return node.target in ops.CONCATENATIONS and static == read
