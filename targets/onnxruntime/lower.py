"""Model -> .onnx: one file with its weights inside, written whole or not at all."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import itertools
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.errors import MissingExtraError, OutputError
from edgesmith.compiler.model import Model
from edgesmith.compiler.plain import plain
from edgesmith.targets.onnxruntime.export import ORIGIN, export
from edgesmith.targets.onnxruntime.legalise import legalise, watched

if TYPE_CHECKING:
    import onnx_ir as ir

SOURCE = "edgesmith.source"
"""Metadata key of an ONNX node in the file: the source path of the module that it computes (a part of)."""


def lower(model: Model, path: Path) -> tuple[Diagnostic, ...]:
    """Write ``model`` to ``path``; what of its quantization plan could not be honoured comes back.

    Inputs and outputs have the names, the order and the dtypes of the model's; an output called like an input gets ``_out`` appended.

    Raises:
        UnsupportedError: an operator does not convert, or the weights do not fit into one file.
        OutputError: the folder cannot be written, or the disk is full.
    """
    model = plain(model)
    exported = export(model, watched(model))
    diagnostics = legalise(exported, model)
    name_ports(exported.model, tuple(s.name for s in model.inputs), tuple(s.name for s in model.outputs))
    name_nodes(exported.model, {node.name: graphs.source(node) for node in model.graph.graph.nodes})
    write(exported.model, path)
    return diagnostics


def name_ports(model: ir.Model, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    """Name the graph's inputs and outputs, in place: every output a value of its own, inner values that had one of the names renamed."""
    from onnx_ir.passes.common import OutputFixPass

    OutputFixPass()(model)
    outputs = tuple(f"{name}_out" if name in inputs else name for name in outputs)
    ports = [*model.graph.inputs, *model.graph.outputs]
    for number, value in enumerate(ports):
        value.name = f"edgesmith.port.{number}"
    taken = {*inputs, *outputs}
    inner = [*model.graph.initializers.values(), *(v for node in model.graph.all_nodes() for v in node.outputs)]
    names = taken | {str(v.name) for v in inner}
    fresh = (name for number in itertools.count() if (name := f"value_{number}") not in names)
    for value in inner:
        if value.name in taken:
            value.name = next(fresh)
    for value, name in zip(ports, (*inputs, *outputs), strict=True):
        value.name = name


def name_nodes(model: ir.Model, sources: dict[str, str]) -> None:
    """Call each node ``source path/operator`` (numbered from the second on), so that a runtime's profile speaks the language of the source."""
    count: dict[str, int] = {}
    for node in model.graph.all_nodes():
        source = sources.get(node.metadata_props.pop(ORIGIN, ""), "")
        if source:
            node.metadata_props[SOURCE] = source
        name = f"{source}/{node.op_type}" if source else node.op_type
        count[name] = count.get(name, 0) + 1
        node.name = name if count[name] == 1 else f"{name}_{count[name]}"


def write(model: ir.Model, path: Path) -> None:
    """Write ``path`` whole or not at all: to a temporary name beside it, then renamed.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    import onnx_ir as ir

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OutputError("cannot be written", where=str(path), why=error.strerror or str(error)) from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(ir.to_proto(model).SerializeToString(deterministic=True))
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise OutputError("cannot be written", where=str(path), why=error.strerror or str(error)) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()


def need(modules: tuple[str, ...], extra: str) -> None:
    """Import each of ``modules``.

    Raises:
        MissingExtraError: one is not installed.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise MissingExtraError(name, extra) from error


def versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Distribution name -> installed version."""
    return {name: importlib.metadata.version(name) for name in distributions}
