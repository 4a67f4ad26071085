"""Models on disk: ``.pt2`` archives that plain torch runs, read without executing anything they contain.

A ``.pt2`` archive may hold pickles (weights, constants, sample inputs), compiled libraries, operator names that torch looks up by
attribute from its root module, and size expressions that it evaluates as Python. ``load`` accepts an archive only after
each of these was looked at: raw tensors, ATen operators, arithmetic, and nothing else.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.candidate import Candidate
from edgesmith.compiler.capture import export_program, from_program
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.errors import CaptureError, SourceError
from edgesmith.compiler.files import written_whole
from edgesmith.compiler.model import Model, PassRecord, TensorSpec
from edgesmith.compiler.quantplan import QuantPlan, Scheme, TensorRange, WeightGrid

_EXTRA = "edgesmith.json"
_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version|\.storage_alignment|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt|extra/[\w.]+"
)
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|torch\.ops\.higher_order\.wrap_with_\w+|torch\.sym_(int|float|max|min|not)"
    r"|_operator\.(getitem|add|sub|mul|floordiv|mod|neg|truediv|eq|ne|lt|le|gt|ge|and_|or_)|math\.(trunc|ceil|floor)"
)
_EXPRESSION = re.compile(
    r"(\s|[-+*/(),]|\d+(\.\d+)?|Symbol\('(s|u|zuf|zf)\d+'(, (positive|integer|nonnegative|real)=(True|False))*\)|\b(s|u|zuf|zf)\d+\b"
    r"|\b(Integer|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilToInt|FloorToInt|TruncToInt|IntTrueDiv|ToFloat|int_oo)\b)*"
)


def save(model: Model, path: Path) -> None:
    """Write ``model`` to ``path``, whole or not at all. ``torch.export.load(path).module()`` runs it.

    Raises:
        OutputError: the folder cannot be written or the disk is full.
    """
    program = export_program(model.graph, model.example_inputs(), dynamic=model.dynamic_batch)
    extra = {_EXTRA: json.dumps(_description(model))}
    archive = io.BytesIO()  # torch's own writer aborts the process where the disk is full
    torch.export.save(program, archive, extra_files=extra)
    with written_whole(path) as temporary:
        temporary.write_bytes(archive.getbuffer())


def load(path: Path) -> Model:
    """Read what ``save`` wrote, or a foreign ``.pt2`` with one dynamic dimension at most (the batch).

    Raises:
        SourceError: missing, truncated, not a ``.pt2``, or holding something that would be executed.
    """
    _inspect(path)
    extra = {_EXTRA: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except (RuntimeError, ValueError, KeyError, AssertionError, TypeError) as error:
        raise SourceError("torch cannot read this archive", where=str(path), why=str(error).splitlines()[0]) from error
    description = json.loads(extra[_EXTRA]) if extra[_EXTRA] else None
    specs = _inputs(program, path)
    if description:
        specs = tuple(TensorSpec(given["name"], s.shape, s.dtype) for given, s in zip(description["inputs"], specs, strict=True))
    model = from_program(program, specs)
    return _described(model, description, path) if description else model


def _inputs(program: torch.export.ExportedProgram, path: Path) -> tuple[TensorSpec, ...]:
    wanted = set(program.graph_signature.user_inputs)
    specs = []
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name not in wanted:
            continue
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            raise SourceError(f"input {node.name!r} is not a tensor", where=str(path))
        symbolic = [dim for dim, size in enumerate(value.shape) if not str(size).isdigit()]
        if symbolic not in ([], [0]):
            what = f"input {node.name!r} has dynamic dimensions {symbolic}"
            raise CaptureError(what, where=str(path), hint="only the first dimension, the batch, may be dynamic")
        shape = tuple(None if dim in symbolic else int(size) for dim, size in enumerate(value.shape))
        specs.append(TensorSpec(node.name, shape, str(value.dtype).removeprefix("torch.")))
    return tuple(specs)


def _inspect(path: Path) -> None:
    """Refuse an archive that holds anything torch would execute while loading or running it."""
    if not path.is_file():
        raise SourceError("there is no such file", where=str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            for name, full in members.items():
                if name.endswith("_config.json"):
                    _inspect_tensors(json.loads(archive.read(full)), path)
                elif name == "models/model.json":
                    _inspect_program(json.loads(archive.read(full)), path)
                elif name == "data/sample_inputs/model.pt":
                    with archive.open(full) as stream:
                        torch.load(stream, weights_only=True)
    except (zipfile.BadZipFile, EOFError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise SourceError("not a .pt2 archive, or a damaged one", where=str(path), why=str(error), hint="write it with torch.export.save") from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise _refused(path, "its sample inputs are pickled objects") from error


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, str]:
    members: dict[str, str] = {}
    for full in archive.namelist():
        name = full.partition("/")[2]
        if name in members:
            raise _refused(path, f"it holds {name} twice")
        if not _MEMBERS.fullmatch(name):
            raise _refused(path, f"it holds {full}")
        members[name] = full
    if "models/model.json" not in members:
        raise SourceError("not a .pt2 archive of one model", where=str(path), hint="write it with torch.export.save")
    return members


def _refused(path: Path, why: str) -> SourceError:
    return SourceError("refused, because loading it could execute code", where=str(path), why=why, hint="save it again from tensors and ATen operators only")


def _inspect_tensors(config: dict[str, Any], path: Path) -> None:
    for name, entry in config["config"].items():
        if entry.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
            raise _refused(path, f"{name} is a pickled object")


def _inspect_program(program: dict[str, Any], path: Path) -> None:
    for key, value in _strings(program):
        if key in {"target", "as_operator"} and not _OPERATOR.fullmatch(value):
            raise _refused(path, f"it calls {value}")
        if key == "expr_str" and not _EXPRESSION.fullmatch(value):
            raise _refused(path, f"it evaluates {value[:80]!r}")
    for name in program.get("range_constraints", {}):
        if not _EXPRESSION.fullmatch(name):
            raise _refused(path, f"it evaluates {name[:80]!r}")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for inner, item in value.items():
            yield from _strings(item, inner)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, str):
        yield key, value


def _description(model: Model) -> dict[str, Any]:
    nodes = [{"name": n.name, "source": n.meta.get("source", "")} for n in _kept(model.graph.graph)]
    return {
        "inputs": [dataclasses.asdict(s) for s in model.inputs],
        "outputs": [s.name for s in model.outputs],
        "nodes": nodes,
        "quant": None if model.quant is None else plan_to_json(model.quant),
        "history": [record_to_json(r) for r in model.history],
    }


def _kept(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and not isinstance(n.meta.get("val"), int)]


def _described(model: Model, description: dict[str, Any], path: Path) -> Model:
    nodes = _kept(model.graph.graph)
    if len(nodes) != len(description["nodes"]):
        raise SourceError("its description does not fit its graph", where=str(path), hint="the file was changed after edgesmith wrote it")
    names = {node: str(known["name"]) for node, known in zip(nodes, description["nodes"], strict=True)}
    for node, known in zip(nodes, description["nodes"], strict=True):
        node.meta["source"] = known["source"]
    graph = graphs.renamed(model.graph, names)
    quant = None if description["quant"] is None else plan_from_json(description["quant"])
    outputs = tuple(dataclasses.replace(s, name=name) for s, name in zip(model.outputs, description["outputs"], strict=True))
    return Model(graph, model.inputs, outputs, quant, tuple(map(record_from_json, description["history"])))


def plan_to_json(plan: QuantPlan) -> dict[str, Any]:
    """The plan as plain data."""
    return {
        "ops": {k: v.value for k, v in plan.ops.items()},
        "activations": {k: dataclasses.asdict(v) for k, v in plan.activations.items()},
        "weights": {k: dataclasses.asdict(v) for k, v in plan.weights.items()},
        "alternatives": {name: {k: v.value for k, v in ops.items()} for name, ops in plan.alternatives.items()},
    }


def plan_from_json(data: dict[str, Any]) -> QuantPlan:
    """The inverse of ``plan_to_json``."""
    return QuantPlan(
        {k: Scheme(v) for k, v in data["ops"].items()},
        {k: TensorRange(**v) for k, v in data["activations"].items()},
        {k: WeightGrid(tuple(v["scales"]), v["axis"]) for k, v in data["weights"].items()},
        {name: {k: Scheme(v) for k, v in ops.items()} for name, ops in data["alternatives"].items()},
    )


def record_to_json(record: PassRecord) -> dict[str, Any]:
    """The record as plain data."""
    data = dataclasses.asdict(record)
    for diagnostic in data["diagnostics"]:
        diagnostic["severity"] = diagnostic["severity"].value
    return data


def record_from_json(data: dict[str, Any]) -> PassRecord:
    """The inverse of ``record_to_json``."""
    diagnostics = tuple(Diagnostic(**{**d, "severity": Severity(d["severity"])}) for d in data["diagnostics"])
    return PassRecord(**{**data, "diagnostics": diagnostics, "candidates": tuple(Candidate(**c) for c in data["candidates"])})
