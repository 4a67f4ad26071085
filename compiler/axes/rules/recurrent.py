"""Recurrent layers: one width runs through the states of all layers, and through every gate's rows."""

from __future__ import annotations

import torch

from edgesmith.compiler.axes.axes import Term, concatenation, factored, size
from edgesmith.compiler.axes.op import Op, Result
from edgesmith.compiler.axes.rules.table import rule

aten = torch.ops.aten

_GATES = {aten.lstm.input: 4, aten.gru.input: 3, aten.rnn_tanh.input: 1, aten.rnn_relu.input: 1}


@rule(*_GATES)
def recurrent(op: Op) -> Result:
    """(..., in) with states (layers x directions, batch, h), rows gates x h -> (..., directions x h) and the last states."""
    states = op.arg("hx") if isinstance(op.arg("hx"), (list, tuple)) else [op.arg("hx")]
    gates = next(n for target, n in _GATES.items() if target is op.node.target)
    per_layer = 4 if op.arg("has_biases") else 2
    directions = 2 if op.arg("bidirectional") else 1
    weights = list(op.arg("params"))
    if len(weights) != per_layer * directions * op.arg("num_layers"):
        return op.unknown(f"{op.node.target} with a projection")
    hidden = op.of(states[0])[-1]
    for state in states[1:]:
        op.unify_shapes(op.of(state), op.of(states[0]))
    inputs = op.terms("input")[-1]
    while weights:
        for _ in range(directions):
            _cell(op, weights[:per_layer], gates, inputs, hidden)
            del weights[:per_layer]
        inputs = concatenation([hidden] * directions)
    shape = (*op.terms("input")[:-1], inputs)
    return [shape, *(op.of(state) for state in states)]


def _cell(op: Op, weights: list[object], gates: int, inputs: Term, hidden: Term) -> None:
    """Input weights (gates x h, in), state weights (gates x h, h) and their biases."""
    into, again = weights[:2]
    for weight in weights:
        rows = op.of(weight)[0]  # type: ignore[arg-type]
        gate, units = factored(rows, [gates, size(hidden)], op.reason)
        op.pin([gate], "the gates of a recurrent layer")
        op.unify(units, hidden)
        op.role(weight, producer=0)
    op.unify(op.of(into)[1], inputs)  # type: ignore[arg-type]
    op.unify(op.of(again)[1], hidden)  # type: ignore[arg-type]
    op.role(into, consumer=1)
    op.role(again, consumer=1)
