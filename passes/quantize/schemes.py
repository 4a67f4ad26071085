"""Which operator runs by which scheme: decided from the graph's structure alone."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler import grid_operators as ops
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.spread import Schemes, spread
from edgesmith.compiler.weighted import CONVOLUTIONS, LINEARS, Weighted, weighted

SCHEMES = ("auto", "dynamic", "static", "static16x8")
"""What ``assign`` takes."""

Candidates = dict[fx.Node, Weighted]
"""The weighted operators that may run in int8."""


def candidates(graph: fx.GraphModule, scheme: str, exclude: tuple[str, ...]) -> tuple[Candidates, tuple[Diagnostic, ...]]:
    """The weighted operators that ``scheme`` can quantize, and why the others stay float."""
    found: Candidates = {}
    remarks: list[Diagnostic] = []
    for node in graphs.operators(graph):
        kind = weighted(node)
        if kind is None:
            continue
        reason = _excluded(node, exclude) or _unfit(node, kind, graph) or _no_scheme(node, scheme)
        if reason:
            remarks.append(_stays_float(node, *reason))
        else:
            found[node] = kind
    for node in _sharing_badly(graph, found):
        remarks.append(_stays_float(node, "quantize.shared-weight", "its weight is also used by an operator that does not read it on the same grid"))
        del found[node]
    return found, tuple(remarks)


def _stays_float(node: fx.Node, code: str, message: str) -> Diagnostic:
    return Diagnostic(Severity.INFO, code, graphs.source(node), f"{node.target} stays float: {message}")


def _excluded(node: fx.Node, exclude: tuple[str, ...]) -> tuple[str, str] | None:
    path = graphs.source(node)
    pattern = next((p for p in exclude if fnmatchcase(path, p)), None)
    return ("quantize.excluded", f"excluded by {pattern!r}") if pattern else None


def _unfit(node: fx.Node, kind: Weighted, graph: fx.GraphModule) -> tuple[str, str] | None:
    weight, activation = kind.argument(node, kind.weight), kind.argument(node, kind.activation)
    if weight is None or weight.op != "get_attr":
        return "quantize.computed-weight", "its weight is computed (fold-constants makes one of it, if it depends on no input)"
    if activation is None or activation.op == "get_attr":
        return "quantize.constant-input", "its input is a constant"
    if graphs.tensor(graph, str(weight.target)).dtype != torch.float32 or not ops.is_float(activation):
        return "quantize.not-float32", "it does not compute in float32"
    return None


def _no_scheme(node: fx.Node, scheme: str) -> tuple[str, str] | None:
    if scheme == "dynamic" and node.target in CONVOLUTIONS:
        return "quantize.no-dynamic-convolution", "no runtime gains from convolutions with dynamic ranges (scheme=static or auto quantizes them)"
    return None


def _sharing_badly(graph: fx.GraphModule, found: Candidates) -> list[fx.Node]:
    """Candidates whose weight tensor has a reader that is no candidate, or one that counts channels along another axis."""
    readers: dict[int, list[tuple[fx.Node, fx.Node]]] = {}
    for attribute in graph.graph.find_nodes(op="get_attr"):
        readers.setdefault(id(graphs.tensor(graph, str(attribute.target))), []).extend((attribute, user) for user in attribute.users)
    bad: list[fx.Node] = []
    for uses in readers.values():
        axes = {found[user].axis if user in found and found[user].argument(user, found[user].weight) is attribute else None for attribute, user in uses}
        if len(axes) > 1:
            bad += [user for attribute, user in uses if user in found and found[user].argument(user, found[user].weight) is attribute]
    return sorted(set(bad))


def assign(graph: fx.GraphModule, found: Candidates, scheme: str, exclude: tuple[str, ...]) -> Schemes:
    """A scheme for each of ``found``, and for what follows them (``spread``). Absent means float.

    ``static``: every candidate is static; so it is for ``static16x8``, whose operators differ in nothing but the grids that a target makes of their
    ranges. ``dynamic``: every candidate is dynamic. ``auto``: convolutions are static; a matrix product is static where its input already lies on a
    static grid (the head of a convolutional net, squeeze-excite), else dynamic.
    """

    def choose(node: fx.Node, fed: Mapping[fx.Node, Scheme]) -> Scheme | None:
        return _weighted_scheme(node, found[node], scheme, fed) if node in found else None

    return spread(graph, choose, lambda node: not _excluded(node, exclude))


def _weighted_scheme(node: fx.Node, kind: Weighted, scheme: str, fed: Mapping[fx.Node, Scheme]) -> Scheme:
    activation = kind.argument(node, kind.activation)
    assert activation is not None
    if scheme == "auto":
        return Scheme.STATIC if node.target not in LINEARS or fed.get(activation) is Scheme.STATIC else Scheme.DYNAMIC
    return Scheme.DYNAMIC if scheme == "dynamic" else Scheme.STATIC
