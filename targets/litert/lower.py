"""Model -> ``.tflite``: conversion by litert-torch in float32, then the quantization plan."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.errors import MissingExtraError, UnsupportedError
from edgesmith.compiler.files import written_whole
from edgesmith.compiler.fingerprint import file_hash
from edgesmith.compiler.model import Model
from edgesmith.compiler.plain import plain
from edgesmith.compiler.quiet import quiet
from edgesmith.compiler.target import Artifact
from edgesmith.targets.litert import flatfile
from edgesmith.targets.litert.barriers import guarded
from edgesmith.targets.litert.legalise import legalised
from edgesmith.targets.litert.sources import Marked, Names
from edgesmith.targets.litert.support import unsupported

_MODULES = ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")
_DISTRIBUTIONS = ("torch", "litert-torch", "litert-converter", "ai-edge-quantizer", "ai-edge-litert")


def lower(model: Model, folder: Path, stem: str = "model") -> Artifact:
    """Write ``folder/stem.tflite``: batch 1, the Model's inputs and outputs in its order, under its names and dtypes.

    Raises:
        UnsupportedError: the converter lacks an operator of the model, or refuses the graph.
        MissingExtraError: the converter or the runtime is not installed.
        OutputError: the folder cannot be written, or the disk is full.
    """
    for module in _MODULES:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, "litert")
    source, model = model, plain(model)
    if refused := unsupported(model):
        raise UnsupportedError(refused[0].message, where=refused[0].where, hint=refused[0].hint)
    diagnostics: tuple[Diagnostic, ...] = ()
    content = converted(model)
    if model.quant is not None:
        content, diagnostics = legalised(model, content)
    path = folder / f"{stem}.tflite"
    with written_whole(path) as temporary:
        temporary.write_bytes(content)
    return Artifact(
        path=path,
        target="litert",
        size_bytes=path.stat().st_size,
        sha256=file_hash(path),
        source_fingerprint=source.fingerprint,
        built_with={name: importlib.metadata.version(name) for name in _DISTRIBUTIONS},
        diagnostics=diagnostics,
    )


def converted(model: Model) -> bytes:
    """The float32 ``.tflite`` of ``model`` at batch 1. What its quantization plan names is kept as it is, for ``legalised`` to find.

    Raises:
        UnsupportedError: the converter refuses the graph, with its reason.
    """
    wide = any(spec.dtype in {"int64", "float64"} for spec in (*model.inputs, *model.outputs))
    with quiet():
        import litert_torch
        from litert_converter.mlir import ir  # type: ignore[import-untyped]

        graph = guarded(model)
        try:
            edge = litert_torch.convert(Marked(graph), model.example_inputs(1), enable_x64=wide)
            content = edge.model_content()
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, ir.MLIRError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UnsupportedError("litert-torch does not convert this model", why=lines[0]) from error
    return flatfile.with_names(content, [s.name for s in model.inputs], [s.name for s in model.outputs], Names(graph))
