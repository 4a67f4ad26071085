"""Source paths, from the captured graph through ExecuTorch's lowering to the operators of the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx

from edgesmith.compiler import graph as graphs

_KEY = "edgesmith_source"
_HANDLE = "debug_handle"
_CUSTOM = "custom"
"""Key in a node's ``meta`` of what torch carries along through decompositions and ExecuTorch through its passes."""


def mark(program: torch.export.ExportedProgram, names: Mapping[str, str], graph: fx.GraphModule) -> None:
    """Note on each node of ``program`` the source path of its counterpart in ``graph``; ``names`` as of ``program_at``."""
    sources = {node.name: graphs.source(node) for node in graph.graph.nodes}
    for node in program.graph.nodes:
        if node.name in names:
            node.meta[_CUSTOM] = {_KEY: sources[names[node.name]]}


def paths(lowered: torch.export.ExportedProgram) -> dict[str, dict[str, str]]:
    """Source paths in a program that was marked and is emitted.

    ``kernels``: by the number of the instruction in the method; ``operators``: of the delegates, by debug handle.
    """
    from executorch.exir.lowered_backend_module import get_lowered_submodules

    delegated = [lowered for _, lowered, _ in get_lowered_submodules(lowered.graph_module)]
    inner = [item for module in delegated for item in _marked(module.original_module.graph)]
    return {"kernels": dict(_marked(lowered.graph_module.graph)), "operators": dict(inner)}


def _marked(graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """Debug handle, which emission makes the number of the instruction, and source path."""
    for node in graph.nodes:
        source = (node.meta.get(_CUSTOM) or {}).get(_KEY)
        handle = node.meta.get(_HANDLE)
        if node.op == "call_function" and source is not None and handle is not None:
            yield str(handle), source
