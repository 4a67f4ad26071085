"""Each family of rules on a graph that fits a screen: its axes as text, and its operators before and after a removal.

Units of a group are written with a letter (``A8``: group A, 8 units), dimensions that must stay as plain numbers; B is the batch.
"""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any

import pytest
import torch
from axes_couplings import COUPLINGS, Net
from axes_operators import OPERATORS
from torch import fx, nn
from torch.nn import functional as F

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes import Axes, prove, remove, rules
from edgesmith.compiler.axes.axes import Axis, Term, resolve
from edgesmith.compiler.axes.groups import named_shapes
from edgesmith.compiler.errors import NumericsError
from edgesmith.compiler.model import Model


def axes_as_text(axes: Axes) -> str:
    letters = {group.axis: chr(ord("A") + i) for i, group in enumerate(axes.groups)}

    def show(term: Term) -> str:
        return "x".join(factor(axis) for axis in resolve(term)) or "1"

    def factor(axis: Axis) -> str:
        if axis.parts is not None:
            return "(" + " + ".join(show(part) for part in axis.parts) + ")"
        return f"{letters.get(axis, '')}{axis.size}"

    return "\n".join(f"{name}: {', '.join(show(term) for term in shape)}" for name, shape in named_shapes(axes.state))


def operators_as_text(model: Model) -> str:
    """The operators that have literal sizes, with their arguments."""

    def show(value: object) -> str:
        if isinstance(value, fx.Node):
            return "_" if isinstance(value.meta["val"], torch.Tensor) else str(value.meta["val"]).replace(str(graphs.BATCH), "B")
        return f"[{', '.join(show(v) for v in value)}]" if isinstance(value, (list, tuple)) else str(value)

    lines = []
    for node in graphs.operators(model.graph):
        arguments = [show(a) for a in node.args] + [f"{k}={show(v)}" for k, v in node.kwargs.items()]
        if isinstance(node.target, torch._ops.OpOverload) and any(c.isdigit() for c in "".join(arguments)):
            lines.append(f"{getattr(node.target, '_opname', node.target)}({', '.join(arguments)})")
    return "\n".join(lines)


def changed_lines(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if line[:2] not in {"--", "++", "@@"})


CASES = COUPLINGS | OPERATORS


@cache
def captured(case: str) -> Model:
    function, tensors, shape, *_ = CASES[case]
    return Model.from_module(Net(function, **tensors).double(), (torch.randn(shape, dtype=torch.float64),))


@pytest.mark.parametrize("case", CASES)
def test_axes_and_operators_before_and_after(case: str) -> None:
    *_, removals, axes_text, change = CASES[case]
    model = captured(case)
    axes = Axes.of(model)
    assert axes_as_text(axes) == axes_text
    pruned = remove(model, removals, axes=axes)
    assert changed_lines(operators_as_text(model), operators_as_text(pruned)) == change
    assert prove(model, pruned, removals, axes=axes, tolerance=1e-12) <= 1e-12
    everything = {group.name: range(0, group.size - 1, 2) for group in axes.groups}
    assert prove(model, remove(model, everything, axes=axes), everything, axes=axes, tolerance=1e-12) <= 1e-12


def test_every_rule_has_a_case() -> None:
    used = {rules.TABLE.get(node.target) for case in CASES for node in graphs.operators(captured(case).graph)}
    assert {rule.__name__ for rule in set(rules.TABLE.values()) - used} == {rules.recurrent.recurrent.__name__}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers(kind: Any, bidirectional: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(5, 6)
            self.cell = kind(6, 4, num_layers=2, batch_first=True, bidirectional=bidirectional)
            self.head = nn.Linear(8 if bidirectional else 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.cell(self.embed(x))[0][:, -1])
            return out

    torch.manual_seed(0)
    model = Model.from_module(Recurrent().double(), (torch.randn(2, 3, 5, dtype=torch.float64),))
    axes = Axes.of(model)
    text = axes_as_text(axes)
    gates = {nn.LSTM: "4xB4", nn.GRU: "3xB4", nn.RNN: "B4"}[kind]
    assert f"cell.weight_ih_l0: {gates}, A6" in text
    assert f"cell.weight_hh_l1: {gates}, B4" in text
    assert ("head.weight: 2, (B4 + B4)" if bidirectional else "head.weight: 2, B4") in text
    removals = {group.name: [1, 2] for group in axes.groups}
    pruned = remove(model, removals, axes=axes)
    assert prove(model, pruned, removals, axes=axes, tolerance=1e-12) <= 1e-12
    wrong = pruned.edit(tensors=True)
    rolled = graphs.tensor(wrong, "cell.weight_hh_l0").data.roll(1, 1)
    graphs.tensor(wrong, "cell.weight_hh_l0").data = rolled
    with pytest.raises(NumericsError):
        prove(model, pruned.with_graph(wrong), removals, axes=axes)


def test_an_operator_without_a_rule_pins_what_it_touches_and_says_so() -> None:
    model = Model.from_module(
        Net(lambda x, a, b, c: F.linear(F.linear(torch.fft.fft(F.linear(x, a)).real, b), c), a=(6, 5), b=(4, 6), c=(2, 4)), (torch.randn(2, 5),)
    )
    axes = Axes.of(model)
    assert [(group.name, group.size) for group in axes.groups] == [("b", 4)]
    assert [d.code for d in axes.diagnostics] == ["axes.no-rule"]
    (pin,) = [p for p in axes.pinned if p.where == "a" and p.dim == 0]
    assert pin.size == 6
    assert "fft" in pin.reason
