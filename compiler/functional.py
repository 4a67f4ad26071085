"""Make a captured graph functional: constants folded where tensors are written in place, then every in-place operator replaced."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.errors import CaptureError
from edgesmith.compiler.model import TensorSpec
from edgesmith.compiler.views import Memory

aten = torch.ops.aten

_VIEWS_ARE_FRESH = {aten.lift_fresh_copy.default, aten.clone.default, aten.contiguous.default}


def functionalize(graph: fx.GraphModule, specs: Sequence[TensorSpec]) -> None:
    """Rewrite ``graph``, whose inputs are ``specs``, in place so that no operator writes to its arguments.

    Subgraphs that depend on no input and contain a write (masks filled slice by slice) are evaluated. Any other write becomes
    its functional twin, and whatever shares memory with its result and is read later is made from that.

    Raises:
        CaptureError: a write through a view that cannot be put back into the whole, or to a parameter.
    """
    _fold_written_constants(graph)
    for node in [node for node in graphs.operators(graph) if torch.Tag.inplace_view in getattr(node.target, "tags", ())]:
        _replace_view(graph, node)
    writes = [node for node in graphs.operators(graph) if graphs.is_write(node)]
    if writes:
        graph.recompile()
        graphs.infer_shapes(graph, tuple(s.shape for s in specs), tuple(s.torch_dtype for s in specs))
        memory = Memory(graph)
        for node in writes:
            memory.replace(node, _functional_twin(node))
        memory.close()
    graph.recompile()


def _replace_view(graph: fx.GraphModule, node: fx.Node) -> None:
    """Replace an operator that changes the shape of its argument in place, not what it holds, by a view that is read from then on."""
    twin, changed = _functional_twin(node), node.args[0]
    assert isinstance(changed, fx.Node)
    later = set(itertools.dropwhile(lambda n: n is not node, graph.graph.nodes))
    with graph.graph.inserting_before(node):
        view = graph.graph.call_function(twin, node.args, node.kwargs)
    view.meta = dict(node.meta)
    node.replace_all_uses_with(view)
    changed.replace_all_uses_with(view, delete_user_cb=lambda user: user in later)
    graph.graph.erase_node(node)


def _is_view(node: fx.Node) -> bool:
    """Whether the result may share memory with the first argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", "") == "getitem"
    schema = node.target._schema
    return node.target not in _VIEWS_ARE_FRESH and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _aliases(node: fx.Node) -> set[fx.Node]:
    """Every node that may share memory with ``node``: its bases and all views of them."""
    base = node
    while base.op == "call_function" and base.args and isinstance(base.args[0], fx.Node) and (_is_view(base) or graphs.is_write(base)):
        base = base.args[0]
    found, queue = {base}, [base]
    while queue:
        current = queue.pop()
        for user in current.users:
            if user not in found and user.args and user.args[0] is current and (_is_view(user) or graphs.is_write(user)):
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
        if node in constant and graphs.is_write(node):
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


def _functional_twin(node: fx.Node) -> Any:
    overload: Any = node.target
    name = overload._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    if packet is not None and isinstance(node.args[0], fx.Node):
        twins = [getattr(packet, other) for other in packet.overloads()]
        alike = [twin for twin in twins if not twin._schema.is_mutable and _types(twin) == _types(overload)]
        if alike:
            return next((twin for twin in alike if twin._overloadname == overload._overloadname), alike[0])
    raise CaptureError(f"{overload} writes in place and has no functional form", where=graphs.source(node), hint="write it without in-place operators")


def _types(overload: Any) -> list[str]:
    return [str(argument.type) for argument in overload._schema.arguments]
