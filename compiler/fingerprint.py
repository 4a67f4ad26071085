"""Content hash of a graph, its tensors and its quantization plan."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.files import file_hash
from edgesmith.compiler.quantplan import QuantPlan

__all__ = ["file_hash", "fingerprint", "tensor_hash"]


def fingerprint(graph: fx.GraphModule, quant: QuantPlan | None) -> str:
    """Hex SHA-256 over operators, arguments, tensor contents and plan.

    Operators count by position and tensors by the order in which they are first read, not by name: where ``get_attr`` nodes stand
    makes no difference, whether two readers share a tensor does.
    """
    digest = hashlib.sha256()
    position = {node: index for index, node in enumerate(n for n in graph.graph.nodes if n.op != "get_attr")}
    by_name = {node.name: index for node, index in position.items()}
    tensors: dict[int, int] = {}
    weight_at: dict[str, int] = {}

    def canonical(value: Any) -> Any:
        if isinstance(value, fx.Node) and value.op == "get_attr":
            tensor = graphs.tensor(graph, str(value.target))
            if id(tensor) not in tensors:
                tensors[id(tensor)] = len(tensors)
                digest.update(json.dumps(["tensor", tensor_hash(tensor), tensor.requires_grad]).encode())
            weight_at[str(value.target)] = tensors[id(tensor)]
            return {"tensor": tensors[id(tensor)]}
        if isinstance(value, fx.Node):
            return {"node": position[value]}
        if isinstance(value, (tuple, list)):
            return [canonical(v) for v in value]
        if isinstance(value, dict):
            return {str(k): canonical(v) for k, v in value.items()}
        return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)

    for node in position:
        target = "" if node.op in {"placeholder", "output"} else str(node.target)
        digest.update(json.dumps([node.op, target, canonical(node.args), canonical(node.kwargs)]).encode())
    if quant is not None:
        plan = {
            "ops": sorted((by_name[k], v.value) for k, v in quant.ops.items()),
            "activations": sorted((by_name[k], v.low, v.high) for k, v in quant.activations.items()),
            "weights": sorted((weight_at[k], v.scales, v.axis) for k, v in quant.weights.items()),
            "alternatives": [(name, sorted((by_name[k], v.value) for k, v in ops.items())) for name, ops in sorted(quant.alternatives.items())],
        }
        digest.update(json.dumps(plan).encode())
    return digest.hexdigest()


def tensor_hash(value: torch.Tensor) -> str:
    """Hex SHA-256 over dtype, shape and bytes."""
    flat = value.detach().contiguous().reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0, dtype=torch.uint8)
    digest = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode())
    digest.update(flat.numpy().data)
    return digest.hexdigest()
