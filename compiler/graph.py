"""Plain operations on the captured graph: tensors by name, copies, shapes, train and eval mode.

A captured graph is a ``torch.fx.GraphModule`` with positional placeholders, ``get_attr`` nodes for parameters, buffers and
constants, functional ATen operators, ``operator.getitem`` and arithmetic on sizes, and one output (a tensor or a tuple of
tensors). Every node carries ``meta["val"]`` (fake tensors; a dynamic batch has the size ``BATCH``) and ``meta["source"]``,
the path of the source module it came from.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

BATCH = 10_007
"""The size that a dynamic batch has in shape metadata: a prime, so that divisibility is plain integer arithmetic."""

_TRAIN_ARGUMENTS = frozenset({"train", "training", "use_input_stats"})
"""What the operators that behave differently in training call the switch: dropouts, batch and instance norm, RReLU, recurrent layers."""


def tensor(graph: fx.GraphModule, name: str) -> torch.Tensor:
    """The parameter, buffer or constant that ``get_attr`` nodes call ``name``."""
    value = operator.attrgetter(name)(graph)
    assert isinstance(value, torch.Tensor)
    return value


def set_tensor(graph: fx.GraphModule, name: str, value: torch.Tensor) -> None:
    """Put ``value`` under ``name``; a Parameter stays a Parameter (same ``requires_grad``), a buffer a buffer."""
    path, _, leaf = name.rpartition(".")
    module = graph.get_submodule(path)
    old = getattr(module, leaf, None)
    if isinstance(old, nn.Parameter):
        setattr(module, leaf, nn.Parameter(value.detach(), requires_grad=old.requires_grad))
    elif leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        add_tensor(graph, name, value)


def add_tensor(graph: fx.GraphModule, name: str, value: torch.Tensor) -> None:
    """Register ``value`` under the dotted ``name``: a Parameter if it is one, else a buffer. Missing modules are made."""
    path, _, leaf = name.rpartition(".")
    module: nn.Module = graph
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if hasattr(module, leaf):
        delattr(module, leaf)
    if isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value)


def same_tensor(graph: fx.GraphModule, name: str) -> tuple[str, ...]:
    """Every ``get_attr`` name under which the tensor called ``name`` is reached (tied weights have several)."""
    wanted = tensor(graph, name)
    return tuple(sorted({str(n.target) for n in graph.graph.find_nodes(op="get_attr") if tensor(graph, str(n.target)) is wanted}))


def copied(graph: fx.GraphModule, *, tensors: bool = False) -> fx.GraphModule:
    """A copy whose structure may be changed. Tensors are shared, or copied too when ``tensors`` is set (ties are kept)."""
    memo: dict[int, torch.Tensor] = {}
    result = fx.GraphModule({}, fx.Graph())
    for node in graph.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = tensor(graph, name)
        if tensors:
            if id(value) not in memo:
                fresh = value.detach().clone()
                memo[id(value)] = nn.Parameter(fresh, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else fresh
            value = memo[id(value)]
        add_tensor(result, name, value)
    new_graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = new_graph.graph_copy(graph.graph, mapping)
    old_output = next(iter(graph.graph.find_nodes(op="output")))
    new_graph.output(output).meta = dict(old_output.meta)
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
    result.graph = new_graph
    result.recompile()
    return result


def renamed(graph: fx.GraphModule, names: Mapping[fx.Node, str]) -> fx.GraphModule:
    """A copy that shares all tensors and whose nodes are called ``names``; the others get names of their own."""
    result = copied(graph)
    new_graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: mapping[n])
        name = names.get(node, f"size_{node.name}" if node.op == "call_function" else None)
        mapping[node] = new_graph.create_node(node.op, node.target, args, kwargs, name)
        mapping[node].meta = dict(node.meta)
    result.graph = new_graph
    result.recompile()
    return result


def operators(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes that compute, in order."""
    return (node for node in graph.graph.nodes if node.op == "call_function")


def is_write(node: fx.Node) -> bool:
    """Whether ``node`` writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def source(node: fx.Node) -> str:
    """The path of the source module that ``node`` came from, or the node's own name where there is none."""
    return str(node.meta.get("source") or node.name)


class _ShapeInterpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self._mode = mode
        self._seen: dict[int, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        if id(value) not in self._seen:
            self._seen[id(value)] = self._mode.from_tensor(value.detach(), static_shapes=True)
        return self._seen[id(value)]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["val"] = result
        return result


def any_batch(size: int) -> int:
    """``size`` as a view takes it: -1, which is inferred, where it is a dynamic batch or a multiple of one."""
    return -1 if size % BATCH == 0 else int(size)


def infer_shapes(graph: fx.GraphModule, shapes: tuple[tuple[int | None, ...], ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Compute ``meta["val"]`` of every node anew; None in ``shapes`` (a dynamic batch) is taken as ``BATCH``."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        inputs = [torch.empty([BATCH if size is None else size for size in shape], dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        _ShapeInterpreter(graph, mode).run(*inputs)


def set_training(graph: fx.GraphModule, training: bool, *, noise: bool = True) -> None:
    """Switch dropout and normalisation operators to train or eval mode in place, leaving every other literal as it was.

    Without ``noise`` only the norms are switched to training: dropouts and other random operators stay in eval mode.

    The library's own switch replaces patterns and resets dropout's p and batch norm's eps and momentum; this sets
    the one literal argument.
    """
    for node in operators(graph):
        argument = _train_argument(node)
        if argument is not None:
            position, name = argument
            value = training and (noise or _has_statistics(node))
            if name in node.kwargs or position >= len(node.args):
                node.update_kwarg(name, value)
            else:
                node.update_arg(position, value)
    graph.recompile()


def _train_argument(node: fx.Node) -> tuple[int, str] | None:
    """Position and name of the train switch of ``node``; none where it has no choice, as a norm without running statistics."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    arguments = node.target._schema.arguments
    given = {a.name: value for a, value in zip(arguments, node.args, strict=False)} | node.kwargs
    if _has_statistics(node) and given.get("running_mean") is None:
        return None
    return next(((position, a.name) for position, a in enumerate(arguments) if a.name in _TRAIN_ARGUMENTS), None)


def _has_statistics(node: fx.Node) -> bool:
    """Whether ``node`` is a norm that may keep running statistics."""
    return isinstance(node.target, torch._ops.OpOverload) and any(a.name == "running_mean" for a in node.target._schema.arguments)


def clean(graph: fx.GraphModule) -> None:
    """Drop nodes whose results nobody uses and tensors that no node reads; check and recompile."""
    graph.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in {"placeholder", "output"})
    used = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    for name, module in list(graph.named_modules()):
        prefix = f"{name}." if name else ""
        for leaf in [*module._parameters, *module._buffers]:
            if prefix + leaf not in used:
                delattr(module, leaf)
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()


def at_fixed_batch(graph: fx.GraphModule, batch: int) -> fx.GraphModule:
    """A copy whose sizes are plain integers, for a dynamic batch of ``batch``. Node names are kept; size nodes vanish."""
    fixed = copied(graph)
    values: dict[fx.Node, int] = {}
    for node in list(operators(fixed)):
        if isinstance(node.meta["val"], int):
            values[node] = _size_value(node, values, batch)
            for user in list(node.users):
                user.args = fx.map_arg(user.args, lambda n: values.get(n, n))
                user.kwargs = fx.map_arg(user.kwargs, lambda n: values.get(n, n))
    clean(fixed)
    return fixed


def _size_value(node: fx.Node, values: dict[fx.Node, int], batch: int) -> int:
    if node.target is torch.ops.aten.sym_size.int:
        tensor_node, dim = node.args
        assert isinstance(tensor_node, fx.Node) and isinstance(dim, int)
        return _at_batch(tensor_node.meta["val"].shape[dim], batch)
    args = fx.map_arg(node.args, lambda n: values[n])
    return int(node.target(*args))  # type: ignore[operator]


def _at_batch(size: int, batch: int) -> int:
    return size // BATCH * batch if size % BATCH == 0 and batch else int(size)
