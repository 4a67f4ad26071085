"""Model -> .onnx: exported at batch 1, opset 18, one file with its weights inside."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.capture import program_at
from edgesmith.compiler.errors import MissingExtraError, OutputError, UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.quiet import quiet
from edgesmith.targets.onnxruntime.rewrite import prepare

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 18
"""From 19 on QuantizeLinear has other types, and at 21 ONNX Runtime's optimiser builds an ill-typed node from Q/DQ pairs."""

MAX_BYTES = 2_000_000_000
"""A protocol buffer holds less than 2 GiB; larger weights would have to lie in a second file."""

ORIGIN = "edgesmith.origin"
"""Metadata key of an ONNX node: the name of the node of ``Model.graph`` that it computes (a part of)."""

_SCOPES = "pkg.torch.onnx.name_scopes"


def export(model: Model) -> ir.Model:
    """``model`` at batch 1 as an ONNX graph in memory; each of its nodes says under ``ORIGIN`` where it came from.

    Inputs and outputs have the names, the order and the dtypes of the model's.

    Raises:
        UnsupportedError: the exporter has no conversion for an operator, or the weights exceed ``MAX_BYTES``.
    """
    _check_size(model)
    program, names = program_at(model)
    prepare(program)
    _mark(program, names)
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in model.inputs],
                output_names=[spec.name for spec in model.outputs],
                optimize=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UnsupportedError("the model does not convert to ONNX", why=_reason(error)) from error
    assert exported is not None
    _keep_origin_only(exported.model)
    return exported.model


def _check_size(model: Model) -> None:
    tensors = {id(t): t for t in [*model.graph.parameters(), *model.graph.buffers()]}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if size > MAX_BYTES:
        raise UnsupportedError(f"the weights take {size / 1e6:.0f} MB", why=f"one .onnx file holds at most {MAX_BYTES / 1e6:.0f} MB", hint="prune or quantize")


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


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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
        os.replace(temporary, path)
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


def versions(distributions: tuple[str, ...]) -> dict[str, Any]:
    """Distribution name -> installed version."""
    return {name: importlib.metadata.version(name) for name in distributions}
