"""Source paths inside a ``.tflite`` file: its tensors are named after the layers that compute them, ``layer:blocks.0.attn.qkv;88``.

The converter names a tensor after the module stack of the nodes that it was made from, of several where it fused them. Here each node's stack is
its source path behind ``MARK``, which tells a path from anybody else's name. A constant that layers share brings the name of the first of them
along to all others; such names are dropped again.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.fx import traceback

from edgesmith.compiler import graph as graphs

MARK = "layer:"
"""What a source path in a tensor's name begins with; the runner looks for it."""
ELSEWHERE = "node:"
"""What stands before the name of an input or constant that belongs to no layer."""
SEPARATOR = ";"
_aten = torch.ops.aten
_NOTHING = frozenset({operator.getitem, _aten.dropout.default, _aten.alias.default, _aten.clone.default, _aten.contiguous.default, _aten.detach.default})
"""What the converter leaves no operator of."""


class Marked(nn.Module):
    """A captured graph as the converter wants it: its nodes carry their source, its outputs are a tuple, and its mode is fixed.

    The nodes of ``graph`` are changed: it has to be a copy of a model's own.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.captured = graph
        self.training = False
        for node in graph.graph.nodes:
            node.meta["nn_module_stack"] = {"": ("", _label(node))}

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs of the graph."""
        with traceback.preserve_node_meta():
            result = fx.Interpreter(self.captured).run(*inputs)
        return result if isinstance(result, tuple) else (result,)

    def train(self, mode: bool = True) -> Marked:
        """Itself, unchanged."""
        return self


class Names:
    """Names for the tensors of the file that ``graph`` is converted to."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._neighbours = {frozenset((graphs.source(node), graphs.source(user))) for node in graph.graph.nodes for user in _users(node)}

    def of_tensor(self, name: str, index: int) -> str:
        """A name for tensor number ``index``, which the converter calls ``name``: the layers that compute it; ``name`` itself where it says none."""
        parts = (part for part in name.split(SEPARATOR) if part.startswith(MARK))
        layers = self._related(list(dict.fromkeys(part.removeprefix(MARK) for part in parts)))
        return SEPARATOR.join((*(MARK + layer for layer in layers), str(index))) if layers else name

    def of_outputs(self, names: Sequence[str]) -> list[str]:
        """A name for each output: the layer or node that it comes from, and what the output is called in ``names``."""
        returned = self._graph.graph.output_node().args[0]
        nodes = returned if isinstance(returned, (tuple, list)) else (returned,)
        return [f"{_label(node)}{SEPARATOR}{name}" for node, name in zip(nodes, names, strict=True) if isinstance(node, fx.Node)]

    def _related(self, layers: list[str]) -> list[str]:
        """The largest group of ``layers`` that hang together in the graph, the first of several."""
        groups: list[list[str]] = []
        for layer in layers:
            near = [group for group in groups if any(frozenset((layer, other)) in self._neighbours for other in group)]
            groups = [group for group in groups if group not in near]
            groups.append([*(other for group in near for other in group), layer])
        largest = max(groups, key=len, default=[])
        return [layer for layer in layers if layer in largest]


def _label(node: fx.Node) -> str:
    return (MARK if node.meta.get("source") or node.op == "call_function" else ELSEWHERE) + graphs.source(node)


def _users(node: fx.Node) -> list[fx.Node]:
    """The readers of ``node``, beyond those that do nothing."""
    return [found for user in node.users for found in ([user, *_users(user)] if user.target in _NOTHING else [user])]
