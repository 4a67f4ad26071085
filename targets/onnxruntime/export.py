"""Model -> ONNX graph in memory, and where each tensor of the model's graph is in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.capture import program_at
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.quiet import quiet
from edgesmith.targets.onnxruntime.patterns import recognisable
from edgesmith.targets.onnxruntime.rewrite import prepare

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 20
"""The first with GELU as one operator, which no Q/DQ around it can tear apart. At 21 ONNX Runtime's optimiser has built an ill-typed node from Q/DQ pairs."""

MAX_BYTES = 2_000_000_000
"""A protocol buffer holds less than 2 GiB; larger weights would have to lie in a second file."""

ORIGIN = "edgesmith.origin"
"""Metadata key of an ONNX node: the name of the node of ``Model.graph`` that it computes (a part of)."""

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Exported:
    """An ONNX graph whose nodes say under ``ORIGIN`` where they came from, and the value of each watched node of ``Model.graph``."""

    model: ir.Model
    values: Mapping[str, ir.Value]


def export(model: Model, watched: Sequence[str] = ()) -> Exported:
    """``model`` at batch 1 as an ONNX graph. The tensors of the nodes ``watched`` stay tensors of their own: no optimisation goes across them.

    Raises:
        UnsupportedError: the exporter has no conversion for an operator, or the weights exceed ``MAX_BYTES``.
    """
    _check_size(model)
    program, names = program_at(_also_giving(model, watched))
    prepare(program)
    _mark(program, names)
    try:
        with quiet():
            exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=True, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise UnsupportedError("the model does not convert to ONNX", why=_reason(error)) from error
    assert exported is not None
    graph = exported.model.graph
    _keep_origin_only(exported.model)
    recognisable(exported.model)
    extra = [_before_identity(v) for v in graph.outputs[len(model.outputs) :]]
    del graph.outputs[len(model.outputs) :]
    placeholders = [n.name for n in model.graph.graph.find_nodes(op="placeholder")]
    return Exported(exported.model, {**dict(zip(watched, extra, strict=True)), **dict(zip(placeholders, graph.inputs, strict=True))})


def _check_size(model: Model) -> None:
    tensors = {id(t): t for t in [*model.graph.parameters(), *model.graph.buffers()]}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if size > MAX_BYTES:
        raise UnsupportedError(f"the weights take {size / 1e6:.0f} MB", why=f"one .onnx file holds at most {MAX_BYTES / 1e6:.0f} MB", hint="prune it")


def _also_giving(model: Model, watched: Sequence[str]) -> Model:
    """``model`` with the results of the nodes ``watched`` as further outputs."""
    if not watched:
        return model
    graph = model.edit()
    nodes = {node.name: node for node in graph.graph.nodes}
    (output,) = graph.graph.find_nodes(op="output")
    own = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    output.args = ((*own, *(nodes[name] for name in watched)),)
    return model.with_graph(graph)


def _mark(program: torch.export.ExportedProgram, names: Mapping[str, str]) -> None:
    """Give each node its counterpart's name as its module stack, the one piece of metadata that outlives decomposition and export."""
    for node in graphs.operators(program.graph_module):
        node.meta["nn_module_stack"] = {ORIGIN: (names.get(node.name, ""), ORIGIN)}
        node.meta.pop("stack_trace", None)


def _keep_origin_only(model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(_SCOPES, "")
        node.metadata_props.clear()
        node.metadata_props[ORIGIN] = scopes.removeprefix("['").split("'")[0]
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()


def _before_identity(value: ir.Value) -> ir.Value:
    """What the graph itself reads: an output that is some inner tensor may be given through an Identity."""
    producer = value.producer()
    while producer is not None and producer.op_type == "Identity" and not value.uses():
        (value,) = (v for v in producer.inputs if v is not None)
        producer = value.producer()
    return value


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def tensor_nodes(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """Name -> node, for nodes whose value is one tensor."""
    return {n.name: n for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
