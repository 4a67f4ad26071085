"""Make a captured graph functional: constants folded where tensors are written in place, then every in-place operator replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.errors import CaptureError

aten = torch.ops.aten

_VIEWS_ARE_FRESH = {aten.lift_fresh_copy.default, aten.clone.default, aten.contiguous.default}


def functionalize(graph: fx.GraphModule) -> None:
    """Rewrite ``graph`` in place so that no operator writes to its arguments.

    Subgraphs that depend on no input and contain a write (masks filled slice by slice) are evaluated. A write to a whole
    tensor becomes its functional twin, and later readers read the twin's result.

    Raises:
        CaptureError: a write through a view of a tensor that depends on the inputs.
    """
    _fold_written_constants(graph)
    for node in list(graphs.operators(graph)):
        if _is_write(node):
            _replace_write(graph, node)
    graph.recompile()


def _is_write(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_view(node: fx.Node) -> bool:
    """Whether the result may share memory with the first argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", "") == "getitem"
    schema = node.target._schema
    return node.target not in _VIEWS_ARE_FRESH and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _aliases(node: fx.Node) -> set[fx.Node]:
    """Every node that may share memory with ``node``: its bases and all views of them."""
    base = node
    while base.op == "call_function" and base.args and isinstance(base.args[0], fx.Node) and (_is_view(base) or _is_write(base)):
        base = base.args[0]
    found, queue = {base}, [base]
    while queue:
        current = queue.pop()
        for user in current.users:
            if user not in found and user.args and user.args[0] is current and (_is_view(user) or _is_write(user)):
                found.add(user)
                queue.append(user)
    return found


def _fold_written_constants(graph: fx.GraphModule) -> None:
    constant: set[fx.Node] = set()
    for node in graph.graph.nodes:
        stored = node.op == "get_attr" and not graphs.tensor(graph, str(node.target)).requires_grad
        computed = node.op == "call_function" and all(n in constant for n in node.all_input_nodes) and not _is_random(node)
        if stored or computed:
            constant.add(node)
    touched: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node in constant and _is_write(node):
            touched |= _aliases(node) & constant
    if not touched:
        return
    values = _evaluate(graph, constant, touched)
    for number, (node, value) in enumerate(values.items()):
        if any(user not in values for user in node.users):
            _replace_by_constant(graph, node, value, f"_constants.{node.name}_{number}")
    for node in reversed(list(values)):
        if not node.users or all(user not in graph.graph.nodes for user in node.users):
            graph.graph.erase_node(node)


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _evaluate(graph: fx.GraphModule, constant: set[fx.Node], touched: set[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """The final values of the ``touched`` tensors, and whatever is needed to compute them, in graph order."""
    needed, queue = set(touched), list(touched)
    while queue:
        for argument in queue.pop().all_input_nodes:
            if argument not in needed:
                needed.add(argument)
                queue.append(argument)
    environment: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.graph.nodes:
            if node not in needed or node not in constant:
                continue
            if node.op == "get_attr":
                environment[node] = graphs.tensor(graph, str(node.target)).clone()
            else:
                args = fx.map_arg(node.args, lambda n: environment[n])
                kwargs = fx.map_arg(node.kwargs, lambda n: environment[n])
                environment[node] = node.target(*args, **kwargs)
    return {n: v.detach().clone() for n, v in environment.items() if isinstance(v, torch.Tensor) and n in touched and n.op == "call_function"}


def _replace_by_constant(graph: fx.GraphModule, node: fx.Node, value: torch.Tensor, name: str) -> None:
    graphs.add_tensor(graph, name, value)
    with graph.graph.inserting_before(node):
        constant = graph.graph.get_attr(name)
    constant.meta["source"] = node.meta.get("source", "")
    node.replace_all_uses_with(constant)


def _replace_write(graph: fx.GraphModule, node: fx.Node) -> None:
    overload = node.target
    assert isinstance(overload, torch._ops.OpOverload)
    written = node.args[0]
    twin = _functional_twin(overload)
    if not isinstance(written, fx.Node) or twin is None:
        raise CaptureError(f"{overload} writes in place and has no functional form", where=graphs.source(node), hint="write it without in-place operators")
    order = {n: i for i, n in enumerate(graph.graph.nodes)}
    later = {a for a in _aliases(written) - {node, written} if any(order[u] > order[node] for u in a.users if u is not node) and not _comes_from(a, node)}
    if later or (written.op in {"placeholder", "get_attr"} and len(written.users) > 1):
        raise CaptureError(f"{overload} writes through a view that is read again", where=graphs.source(node), hint="write it without in-place operators")
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(twin, node.args, node.kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    written.replace_all_uses_with(new, delete_user_cb=lambda user: order.get(user, -1) > order[node])
    graph.graph.erase_node(node)


def _comes_from(node: fx.Node, ancestor: fx.Node) -> bool:
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if node is ancestor:
            return True
    return False


def _functional_twin(overload: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    name = overload._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None)
    if packet is None or not name.endswith("_"):
        return None
    twin = getattr(packet, overload._overloadname, None)
    return twin if isinstance(twin, torch._ops.OpOverload) else None
