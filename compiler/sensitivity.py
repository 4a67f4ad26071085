"""What each INT8 operator costs by itself: the model in float with that one operator quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.accuracy import model_outputs_of
from edgesmith.compiler.data import Split
from edgesmith.compiler.model import Model
from edgesmith.compiler.quantplan import QuantPlan, Scheme
from edgesmith.compiler.simulate import simulated_graph
from edgesmith.compiler.weighted import weighted

Score = Callable[[tuple[np.ndarray[Any, Any], ...], np.ndarray[Any, Any]], float]
"""Outputs and labels -> a metric of which more is better."""

LARGEST_WORK_MACS = 2e11
"""Multiply-accumulates of all runs together: a few minutes at most, and the number of samples follows from it, not from the clock."""
FEWEST, MOST = 8, 256
QUIET_DB = 200.0
"""Shown where rounding changes nothing."""


@dataclass(frozen=True)
class Sensitivity:
    """One operator, ``node`` of the graph, quantized alone by ``scheme``: the outputs' signal to quantization noise, and the loss of metric on ``samples``."""

    node: str
    where: str
    kind: str
    scheme: Scheme
    sqnr_db: float
    drop: float
    samples: int


@dataclass
class Sensitivities:
    """What the INT8 operators of ``model`` cost, each quantized alone, by any of the plan's schemes; looked at when asked for, and once.

    ``twin`` is the model before quantization, with the same node names; ``split`` data that calibration did not see. Only operators that multiply by
    a weight are looked at: the others follow them. ``progress`` is told how many of those asked for are done.
    """

    model: Model
    twin: Model
    split: Split
    score: Score
    progress: Callable[[int, int], None] = lambda done, of: None
    _known: dict[tuple[str, Scheme], Sensitivity] = field(default_factory=dict)

    def of(self, ops: Mapping[str, Scheme]) -> tuple[Sensitivity, ...]:
        """Those of the operators ``ops``, by these schemes, in graph order."""
        nodes = [n for n in self._weighted if ops.get(n.name, Scheme.FLOAT) is not Scheme.FLOAT]
        for number, node in enumerate(nodes):
            key = node.name, ops[node.name]
            if key not in self._known:
                self._known[key] = self._look(node, ops[node.name])
            self.progress(number + 1, len(nodes))
        return tuple(self._known[node.name, ops[node.name]] for node in nodes)

    def noise(self, node: str, scheme: Scheme) -> float:
        """The power of the outputs' error over that of the outputs with the operator ``node`` alone quantized by ``scheme``."""
        (found,) = self.of({node: scheme})
        return float(10 ** (-found.sqnr_db / 10))

    @cached_property
    def _weighted(self) -> list[fx.Node]:
        return [n for n in graphs.operators(self.model.graph) if weighted(n) is not None]

    @cached_property
    def _some(self) -> Split:
        count = int(min(len(self.split), MOST, max(FEWEST, LARGEST_WORK_MACS / max(1, self.model.macs) / max(1, len(self._weighted)))))
        return Split(self.split.batch(slice(0, count)), self.split.labels[:count])

    @cached_property
    def _exact(self) -> tuple[np.ndarray[Any, Any], ...]:
        return model_outputs_of(self.twin, self._some)

    def _look(self, node: fx.Node, scheme: Scheme) -> Sensitivity:
        alone, labels = _alone(self.model, self.twin, node, scheme), self._some.labels
        outputs = model_outputs_of(replace(alone, graph=simulated_graph(alone)), self._some)
        drop = self.score(self._exact, labels) - self.score(outputs, labels)
        return Sensitivity(node.name, graphs.source(node), str(node.target), scheme, _sqnr_db(self._exact, outputs), drop, len(labels))


def _alone(model: Model, twin: Model, node: fx.Node, scheme: Scheme) -> Model:
    """``twin`` with ``node`` by ``scheme`` and as ``model`` has it, its weight and bias included."""
    kind, graph, plan = weighted(node), twin.edit(), model.quant
    assert kind is not None and plan is not None
    for place in (kind.weight, kind.bias):
        parameter = kind.argument(node, place)
        if parameter is not None and parameter.op == "get_attr":
            graphs.add_tensor(graph, str(parameter.target), graphs.tensor(model.graph, str(parameter.target)))
    return replace(twin, graph=graph, quant=QuantPlan({node.name: scheme}, plan.activations, plan.weights))


def _sqnr_db(exact: Sequence[np.ndarray[Any, Any]], seen: Sequence[np.ndarray[Any, Any]]) -> float:
    """10 log10 of the outputs' energy over that of their error."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(exact, seen, strict=True) if a.dtype.kind == "f"]
    noise = sum(float(np.square(a - b).sum()) for a, b in pairs)
    signal = sum(float(np.square(a).sum()) for a, _ in pairs)
    return QUIET_DB if noise == 0 or signal == 0 else min(QUIET_DB, 10 * float(np.log10(signal / noise)))
