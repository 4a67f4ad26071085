"""Source paths, from the captured graph through ExecuTorch's lowering to the operators of the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs

_KEY = "edgesmith_source"
_HANDLE = "debug_handle"
_CUSTOM = "custom"
"""Key in a node's ``meta`` of what torch carries along through decompositions and ExecuTorch through its passes."""


def mark(program: torch.export.ExportedProgram, names: Mapping[str, str], graph: fx.GraphModule) -> None:
    """Note on each operator of ``program`` the source path of its counterpart in ``graph``; ``names`` as of ``program_at``."""
    sources = {node.name: graphs.source(node) for node in graphs.operators(graph)}
    for node in program.graph.nodes:
        if names.get(node.name) in sources:
            node.meta[_CUSTOM] = {_KEY: sources[names[node.name]]}


def paths(lowered: torch.export.ExportedProgram, graph: fx.GraphModule) -> dict[str, Any]:
    """Source paths in a program that was marked and is emitted.

    ``kernels``: by the number of the instruction in the method; ``operators``: of the delegates, by debug handle; ``inputs`` and ``outputs``: of what
    reads the inputs of ``graph`` and makes its outputs, for which the runtime copies them.
    """
    from executorch.exir.lowered_backend_module import get_lowered_submodules

    delegated = [module for _, module, _ in get_lowered_submodules(lowered.graph_module)]
    return {
        "kernels": dict(_marked(lowered.graph_module.graph)),
        "operators": dict(item for module in delegated for item in _marked(module.original_module.graph)),
        "inputs": _distinct(reader for node in graph.graph.find_nodes(op="placeholder") for reader in node.users),
        "outputs": _distinct(graph.graph.output_node().all_input_nodes),
    }


def _distinct(nodes: Iterable[fx.Node]) -> list[str]:
    return list(dict.fromkeys(graphs.source(node) for node in nodes if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor)))


def _marked(graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """Debug handle, which emission makes the number of the instruction, and source path."""
    for node in graph.nodes:
        source = (node.meta.get(_CUSTOM) or {}).get(_KEY)
        handle = node.meta.get(_HANDLE)
        if node.op == "call_function" and source is not None and handle is not None:
            yield str(handle), source
