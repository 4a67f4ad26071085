"""Which operator of a ``.tflite`` file computes which node of a captured graph: found by value, for names do not survive.

Both sides run on one probe input. Activations are compared by fingerprints that no change of layout alters, weights by
their sorted elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.model import Model
from edgesmith.compiler.quiet import quiet
from edgesmith.compiler.weighted import weighted
from edgesmith.targets.litert.flatfile import Array, FlatFile, Op, Tensor

CHANNEL_AXIS = {"FULLY_CONNECTED": 0, "CONV_2D": 0, "DEPTHWISE_CONV_2D": 3}
"""Operators of the runtime with a constant weight, and the axis of it that is the output channel."""
_RTOL = 1e-3
"""Two float32 programs for one graph differ by about 1e-6; different tensors differ by far more."""
_CHAIN = 3
"""How many nodes behind an operator the converter may have fused into it: a bias, an activation, a view."""


@dataclass(frozen=True)
class Print:
    """A fingerprint: the same for every layout of a tensor and, ``size`` apart, with zeros padded to it."""

    size: int
    total: float
    squares: float

    @classmethod
    def of(cls, values: Array) -> Print:
        """The fingerprint of ``values``."""
        wide = values.astype(np.float64)
        return cls(values.size, float(wide.sum()), float(np.square(wide).sum()))

    def near(self, other: Print) -> bool:
        """Whether both are of one tensor, layout, zero padding and float32 rounding apart."""
        scale = max(self.squares, other.squares)
        width = (scale * max(self.size, other.size)) ** 0.5
        return abs(self.squares - other.squares) <= _RTOL * scale and abs(self.total - other.total) <= _RTOL * width


@dataclass(frozen=True)
class Match:
    """``op`` computes ``node``.

    ``reads``: its activation inputs, each with the input of ``node`` that it holds. ``results``: the nodes whose value it writes, the likeliest
    first: ``node``, or what was fused behind it.
    """

    op: Op
    node: fx.Node
    reads: tuple[tuple[Tensor, fx.Node], ...]
    results: tuple[fx.Node, ...]


class Correspondence:
    """A graph and its file, run on one probe input; each operator of the file is matched with one node at most."""

    def __init__(self, model: Model, file: FlatFile, nodes: Iterable[fx.Node]) -> None:
        probe = model.example_inputs(1, seed=1)
        self._model = model
        self._ours = _graph_prints(model, probe, {n for node in nodes for n in (*_chain(node), *node.all_input_nodes)})
        self._theirs = _file_prints(file, [x.numpy() for x in probe])
        self._free = [op for op in file.ops if len(op.outputs) == 1 and op.outputs[0].index in self._theirs]

    def match(self, node: fx.Node) -> Match | str:
        """The operator that computes ``node``; or why there is none."""
        found = [op for op in self._free if weight_of(op) is not None] if weighted(node) else [op for op in self._free if weight_of(op) is None]
        written = [op for op in found if self._results(node, op)]
        if weighted(node):
            mine = graphs.tensor(self._model.graph, weight_name(node)).detach().numpy()
            written = [op for op in written if _same_elements(mine, weight_of(op))]
        for op in written:
            reads = self._reads(node, op)
            if reads is not None:
                self._free.remove(op)
                return Match(op, node, reads, self._results(node, op))
        if not weighted(node):
            return "the converter made other operators of it"
        return "the converter changed what it reads" if written else "no operator of the converted file has its weight and its result"

    def _reads(self, node: fx.Node, op: Op) -> tuple[tuple[Tensor, fx.Node], ...] | None:
        kind = weighted(node)
        inputs = op.inputs[:1] if kind else tuple(t for t in op.inputs if t.index in self._theirs or (t.data is not None and t.dtype.kind == "f"))
        mine = [kind.argument(node, kind.activation)] if kind else node.all_input_nodes
        pairs = []
        for tensor in inputs:
            same = [n for n in mine if n in self._ours and tensor.index in self._theirs and self._ours[n].near(self._theirs[tensor.index])]
            if not same or same[0] is None:
                return None
            pairs.append((tensor, same[0]))
        return tuple(pairs)

    def _results(self, node: fx.Node, op: Op) -> tuple[fx.Node, ...]:
        written = self._theirs[op.outputs[0].index]
        same = tuple(n for n in _chain(node) if n in self._ours and self._ours[n].size == written.size and self._ours[n].near(written))
        # Values that an activation leaves alone on this probe do not tell whether it was fused; the operator does.
        return same[::-1] if op.fused else same


def weight_of(op: Op) -> Tensor | None:
    """The constant weight of a linear or convolution operator of the file; None for any other operator."""
    return op.inputs[1] if op.kind in CHANNEL_AXIS and op.inputs[1].data is not None else None


def weight_name(node: fx.Node) -> str:
    """The name of the tensor that the weighted operator ``node`` takes as its weight."""
    kind = weighted(node)
    weight = kind.argument(node, kind.weight) if kind else None
    assert weight is not None
    return str(weight.target)


def _same_elements(ours: Array, theirs: Tensor | None) -> bool:
    if theirs is None or theirs.data is None or ours.size != theirs.data.size:
        return False
    return bool(np.allclose(np.sort(ours, axis=None), np.sort(theirs.data, axis=None), rtol=1e-6, atol=0))


def _chain(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and the nodes behind it, each the only reader of the one before."""
    yield node
    for _ in range(_CHAIN):
        if len(node.users) != 1 or next(iter(node.users)).op != "call_function":
            return
        node = next(iter(node.users))
        yield node


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.prints: dict[fx.Node, Print] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted and isinstance(value, torch.Tensor) and value.is_floating_point():
            self.prints[n] = Print.of(value.detach().numpy())
        return value


def _graph_prints(model: Model, probe: tuple[torch.Tensor, ...], wanted: set[fx.Node]) -> dict[fx.Node, Print]:
    recorder = _Recorder(model.graph, wanted)
    with torch.no_grad():
        recorder.run(*probe)
    return recorder.prints


def _file_prints(file: FlatFile, probe: list[Array]) -> dict[int, Print]:
    """Fingerprints of everything in the file that is computed, and of its inputs, by tensor index."""
    with quiet():
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = Interpreter(model_content=file.content, experimental_op_resolver_type=plain, experimental_preserve_all_tensors=True)
        interpreter.allocate_tensors()
        for detail, value in zip(interpreter.get_input_details(), probe, strict=True):
            interpreter.set_tensor(detail["index"], value)
        interpreter.invoke()
        return {t.index: Print.of(interpreter.get_tensor(t.index)) for t in file.tensors if t.data is None and t.dtype == np.float32}
