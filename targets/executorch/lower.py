"""Model -> ``.pte``: legalise, export at batch 1, partition to XNNPACK, write."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path

from edgesmith.compiler.capture import program_at
from edgesmith.compiler.diagnostics import errors
from edgesmith.compiler.errors import MissingExtraError, UnsupportedError
from edgesmith.compiler.files import written_whole
from edgesmith.compiler.model import Model
from edgesmith.compiler.plain import plain
from edgesmith.compiler.quiet import quiet
from edgesmith.compiler.target import Artifact
from edgesmith.targets.executorch.legalise import legalise
from edgesmith.targets.executorch.profiling.ptefile import PteFile
from edgesmith.targets.executorch.runner import SIGNATURE, SOURCES
from edgesmith.targets.executorch.sources import mark, paths
from edgesmith.targets.executorch.support import unsupported

_BUILT_WITH = ("executorch", "torch", "torchao")


def lower(model: Model, folder: Path, filename: str) -> Artifact:
    """Write ``folder/filename`` whole or not at all; see ``Target.lower``."""
    source, model = model, plain(model)
    refused = errors(unsupported(model))
    if refused:
        raise UnsupportedError("ExecuTorch cannot run this model", where=refused[0].where, why="; ".join(f"{d.where}: {d.message}" for d in refused))
    _require_executorch()
    legal, diagnostics = legalise(model)
    content = serialised(legal)
    path = folder / filename
    with written_whole(path) as temporary:
        temporary.write_bytes(content)
    versions = {name: importlib.metadata.version(name) for name in _BUILT_WITH}
    return Artifact(path, "executorch", len(content), hashlib.sha256(content).hexdigest(), source.fingerprint, versions, diagnostics)


def _require_executorch() -> None:
    for module in ("executorch", "torchao"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, "executorch")


def serialised(model: Model) -> bytes:
    """The ``.pte`` of a legalised model: XNNPACK delegates, portable kernels between them, the names of inputs and outputs, and where operators come from.

    Raises:
        UnsupportedError: ExecuTorch refuses the graph, with its reason.
    """
    program, names = program_at(model, batch=1)
    mark(program, names, model.graph)
    signature = json.dumps({"inputs": [s.name for s in model.inputs], "outputs": [s.name for s in model.outputs]})
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.exir.error import ExportError, InternalError
        from torch._export.verifier import SpecViolationError

        try:
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods={SIGNATURE: signature})
            lowered = edge.to_executorch()
        except (ExportError, InternalError, SpecViolationError, RuntimeError) as error:
            raise UnsupportedError("ExecuTorch cannot lower this model", why=str(error).strip().splitlines()[0]) from error
    return PteFile.read(lowered.buffer, _package()).with_text(SOURCES, json.dumps(paths(lowered.exported_program(), model.graph))).written()


def _package() -> Path:
    spec = importlib.util.find_spec("executorch")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
