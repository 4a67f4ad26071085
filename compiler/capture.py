"""Source module -> Model. ``torch.export`` is called here and nowhere else."""

from __future__ import annotations

import inspect
import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree as pytree

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.errors import CaptureError
from edgesmith.compiler.foreign import PLAINER, write_in_aten
from edgesmith.compiler.functional import functionalize
from edgesmith.compiler.model import Model, TensorSpec, output_specs

_MAX_BATCH = 4096
_TRACING_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, torch._dynamo.exc.TorchDynamoException)
"""What torch.export raises, and what a module's own code raises while it is traced."""


def capture(module: nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> Model:
    """Capture ``module`` in eval mode as one functional graph of ATen operators.

    The batch (first dimension of every input, where all share it) is dynamic if the module allows it, else fixed at 1,
    which is what a phone runs. The module's train or eval mode is left as it was.

    Raises:
        CaptureError: no graph could be made, with torch's reason.
    """
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        program, inputs = _export_widest(module, example_inputs)
    finally:
        for m, mode in modes.items():
            m.training = mode
    specs = tuple(
        TensorSpec(name, shape, str(x.dtype).removeprefix("torch."))
        for name, shape, x in zip(_input_names(module, len(inputs)), inputs, example_inputs, strict=True)
    )
    return from_program(program, specs)


def _export_widest(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.export.ExportedProgram, tuple[tuple[int | None, ...], ...]]:
    """The program with a dynamic batch if there is one, else at one sample, and the shapes of its inputs."""
    batches = {tuple(x.shape)[:1] for x in inputs}
    if len(batches) == 1 and batches != {()}:
        doubled = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in inputs)
        try:
            return export_program(module, doubled, dynamic=True), tuple((None, *x.shape[1:]) for x in inputs)
        except CaptureError:
            inputs = tuple(x[:1] for x in inputs)  # the module computes with its batch size: one sample then, and Model.inputs says so
    return export_program(module, inputs, dynamic=False), tuple(tuple(x.shape) for x in inputs)


def export_program(module: nn.Module, inputs: tuple[torch.Tensor, ...], *, dynamic: bool) -> torch.export.ExportedProgram:
    """``torch.export.export`` with this project's settings, its errors translated."""
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    shapes: Any = tuple({0: batch} for _ in inputs) if dynamic else None
    if dynamic and any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values()):
        shapes = (shapes,)
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except _TRACING_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"{type(module).__name__} cannot be captured as one graph",
            why=reason,
            hint="torch.export must be able to trace it: no branches on tensor values, no data-dependent shapes",
        ) from error


def _input_names(module: nn.Module, count: int) -> tuple[str, ...]:
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    names = [p.name for p in parameters[:count]]
    return tuple(names) if len(names) == count else tuple(f"input_{i}" for i in range(count))


def from_program(program: torch.export.ExportedProgram, specs: tuple[TensorSpec, ...]) -> Model:
    """The normal form of an exported program: plain calling convention, functional operators, source paths, shapes."""
    raw = program.module(check_guards=False)
    assert isinstance(raw, fx.GraphModule)
    graph = _plain(raw, tuple(s.name for s in specs))
    write_in_aten(graph)
    try:
        functionalize(graph, specs)
        graphs.set_training(graph, False)
        graphs.clean(graph)
        graphs.infer_shapes(graph, tuple(s.shape for s in specs), tuple(s.torch_dtype for s in specs))
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise CaptureError(
            f"how much {error.func} gives depends on values",
            why="every shape has to be known when the model is captured",
            hint="select by a mask and torch.where, or by topk, instead of by an index of unknown length",
        ) from error
    return Model(graph, specs, output_specs(graph, _output_names(program)))


def _output_names(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(program.call_spec.out_spec.num_leaves)), program.call_spec.out_spec))
    return tuple("_".join(_key(k) for k in path) or "output" for path, _ in paths)


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            text = getattr(key, attribute)
            return f"output_{text}" if isinstance(text, int) else str(text)
    return str(key)


def _plain(raw: fx.GraphModule, names: tuple[str, ...]) -> fx.GraphModule:
    """Copy ``raw`` with positional placeholders, wrappers inlined, guards dropped, and tensors under the source's own names."""
    copier = _Copier(fx.Graph(), fx.GraphModule({}, fx.Graph()))
    inputs = {node: copier.placeholder(name) for node, name in zip(raw.graph.find_nodes(op="placeholder"), names, strict=True)}
    results = pytree.tree_leaves(copier.copy(raw, inputs, ""))
    tensors = tuple(r for r in results if isinstance(r, fx.Node))
    copier.graph.output(tensors[0] if len(tensors) == 1 else tensors).meta["source"] = ""
    copier.root.graph = copier.graph
    copier.root.recompile()
    return copier.root


@dataclass(frozen=True)
class _Copier:
    """Copies exported graphs, one inside the other, into ``graph``; their tensors go to ``root``."""

    graph: fx.Graph
    root: fx.GraphModule

    def placeholder(self, name: str) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["source"] = ""
        return node

    def copy(self, raw: fx.GraphModule, mapping: dict[fx.Node, Any], path: str) -> Any:
        """Copy the nodes of ``raw``, whose placeholders are in ``mapping``; what its output becomes."""
        bodies: dict[fx.Node, fx.GraphModule] = {}
        for node in raw.graph.nodes:
            if node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(raw)
                if isinstance(value, fx.GraphModule):
                    bodies[node] = value
                elif not isinstance(value, torch.Tensor):
                    raise CaptureError(f"the exported graph calls a function of Python ({node.target})", where=path, hint=PLAINER)
                else:
                    mapping[node] = self._tensor(str(node.target), value)
            elif node.op == "call_function" and "wrap_with" in str(node.target):
                mapping[node] = self._inlined(node, bodies, mapping, path)
            elif node.op == "call_function":
                mapping[node] = self._call(node, mapping, path)
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda n: mapping[n])
        raise CaptureError("the exported graph has no output")

    def _tensor(self, name: str, value: torch.Tensor) -> fx.Node:
        taken = {str(n.target) for n in self.graph.find_nodes(op="get_attr")}
        unique = next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in taken or graphs.tensor(self.root, n) is value)
        if unique not in taken:
            graphs.add_tensor(self.root, unique, value)
        node = self.graph.get_attr(unique)
        node.meta["source"] = unique
        return node

    def _call(self, node: fx.Node, mapping: dict[fx.Node, Any], path: str) -> Any:
        args = fx.map_arg(node.args, lambda n: mapping[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: mapping[n])
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            return args[0][args[1]]  # type: ignore[index]
        new = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        new.meta["source"] = _source(node) or path
        return new

    def _inlined(self, node: fx.Node, bodies: dict[fx.Node, fx.GraphModule], mapping: dict[fx.Node, Any], path: str) -> Any:
        """The body of a higher-order wrapper (grad mode, autocast) in its place."""
        if "autocast" in str(node.target) and True in node.args[1:4]:
            raise CaptureError("the model switches autocast on inside its forward", where=_source(node), hint="export it in float32")
        at = next(i for i, a in enumerate(node.args) if a in bodies)
        body = bodies[node.args[at]]  # type: ignore[index]
        actual = fx.map_arg(node.args[at + 1 :], lambda n: mapping[n])
        inner = dict(zip(body.graph.find_nodes(op="placeholder"), actual, strict=True))
        return self.copy(body, inner, _source(node) or path)


def _source(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return "" if path.startswith("_empty") else path


def program_at(model: Model, batch: int = 1) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """``model`` exported again at a fixed ``batch``, in eval mode, for a target to lower.

    Returns the program and a map from its node names to those of ``model.graph`` (the keys of a quantization plan):
    every computing node of the model's graph has exactly one counterpart. Sizes are plain integers in it.
    """
    fixed = graphs.at_fixed_batch(model.graph, model.inputs[0].at_batch(batch)[0] if model.dynamic_batch else 0)
    _parts_behind_wholes(fixed.graph)
    program = export_program(fixed, tuple(torch.zeros(s.at_batch(batch), dtype=s.torch_dtype) for s in model.inputs), dynamic=False)
    return program, _counterparts(program.graph, fixed.graph)


def _parts_behind_wholes(graph: fx.Graph) -> None:
    """Move each part of an operator's several results right behind it, where the export will put it."""
    for node in list(graph.nodes):
        parts = [user for user in node.users if user.target is operator.getitem]
        for part in sorted(parts, reverse=True):
            node.append(part)


def _counterparts(exported: fx.Graph, original: fx.Graph) -> dict[str, str]:
    names: dict[str, str] = {}
    wanted = iter([n for n in original.nodes if n.op == "call_function"])
    following = next(wanted, None)
    for node in exported.nodes:
        if following is not None and node.op == "call_function" and node.target == following.target:
            names[node.name] = following.name
            following = next(wanted, None)
    if following is not None:
        raise CaptureError(f"{following.target} was lost when the graph was exported at a fixed batch", where=graphs.source(following))
    user_inputs = [n for n in exported.nodes if n.op == "placeholder"][-len(original.find_nodes(op="placeholder")) :]
    names.update({e.name: o.name for e, o in zip(user_inputs, original.find_nodes(op="placeholder"), strict=True)})
    return names
