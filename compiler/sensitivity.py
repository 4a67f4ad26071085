"""What each INT8 operator costs by itself: the model in float with that one operator quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    """One operator, quantized alone by ``scheme``: the outputs' signal to quantization noise, and how much of the metric is lost on ``samples``."""

    where: str
    kind: str
    scheme: Scheme
    sqnr_db: float
    drop: float
    samples: int


def sensitivities(model: Model, twin: Model, split: Split, score: Score, progress: Callable[[int, int], None]) -> tuple[Sensitivity, ...]:
    """Every INT8 operator of ``model``, in graph order; ``twin`` is the model before quantization, with the same node names.

    ``split`` is data that calibration did not see. Only operators that multiply by a weight are looked at: the others follow them.
    """
    plan = model.quant
    assert plan is not None
    nodes = [n for n in graphs.operators(model.graph) if plan.scheme(n.name) is not Scheme.FLOAT and weighted(n) is not None]
    count = int(min(len(split), MOST, max(FEWEST, LARGEST_WORK_MACS / max(1, model.macs) / max(1, len(nodes)))))
    some = Split(split.batch(slice(0, count)), split.labels[:count])
    exact = model_outputs_of(twin, some)
    baseline = score(exact, some.labels)
    found = []
    for number, node in enumerate(nodes):
        alone = _alone(model, twin, node, plan)
        outputs = model_outputs_of(replace(alone, graph=simulated_graph(alone)), some)
        found.append(
            Sensitivity(graphs.source(node), str(node.target), plan.scheme(node.name), _sqnr_db(exact, outputs), baseline - score(outputs, some.labels), count)
        )
        progress(number + 1, len(nodes))
    return tuple(found)


def _alone(model: Model, twin: Model, node: fx.Node, plan: QuantPlan) -> Model:
    """``twin`` with ``node`` as the plan has it, its weight and bias included."""
    kind, graph = weighted(node), twin.edit()
    assert kind is not None
    for place in (kind.weight, kind.bias):
        parameter = kind.argument(node, place)
        if parameter is not None and parameter.op == "get_attr":
            graphs.add_tensor(graph, str(parameter.target), graphs.tensor(model.graph, str(parameter.target)))
    return replace(twin, graph=graph, quant=QuantPlan({node.name: plan.scheme(node.name)}, plan.activations, plan.weights))


def _sqnr_db(exact: Sequence[np.ndarray[Any, Any]], seen: Sequence[np.ndarray[Any, Any]]) -> float:
    """10 log10 of the outputs' energy over that of their error."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(exact, seen, strict=True) if a.dtype.kind == "f"]
    noise = sum(float(np.square(a - b).sum()) for a, b in pairs)
    signal = sum(float(np.square(a).sum()) for a, _ in pairs)
    return QUIET_DB if noise == 0 or signal == 0 else min(QUIET_DB, 10 * float(np.log10(signal / noise)))
