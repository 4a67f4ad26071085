"""A scheme for each operator: the least time at a given error and size, and the sensitive operator stays float."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.forms import FLOAT, forms, schemes
from edgesmith.compiler.mixed import Option, Timed, Unit, Wish, mixtures, solve, units
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.profile.operator_types import Category, OperatorProfile, OperatorTime
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.weighted import weighted
from edgesmith.passes.quantize.quantize import Quantize


class Branches(nn.Module):
    """Two convolutions whose sum a third reads, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.next = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.next(self.left(x) + self.right(x)).mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def branches() -> tuple[Model, Model, Split]:
    torch.manual_seed(0)
    twin = Model.from_module(Branches().eval(), (torch.randn(2, 4, 8, 8),))
    x = np.random.default_rng(0).standard_normal((32, 4, 8, 8)).astype(np.float32)
    split = Split((x,), twin(torch.from_numpy(x)).argmax(1).numpy())
    return Quantize().run(twin, PassContext(data=PassData(split, split))).model, twin, split


def profile(ms: Mapping[str, float]) -> OperatorProfile:
    """Of operators named like the source paths they compute; with a ``+`` two paths fused."""
    operators = tuple(OperatorTime(path, "any", tuple(p for p in path.split("+") if p), "", took, 0.0, Category.FAST) for path, took in ms.items())
    return OperatorProfile("instrumented", sum(ms.values()), sum(ms.values()), 20, 1, "1", operators)


def timed(forms: Mapping[str, Model], ms: Mapping[str, Mapping[str, float]]) -> list[Timed]:
    return [Timed(forms[name].quant.ops if forms[name].quant else {}, sum(took.values()), profile(took), 5000) for name, took in ms.items()]


def test_the_choice_is_the_fastest_within_the_limits() -> None:
    """Against every combination, on random cases."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        cases = tuple(
            Unit((str(n),), tuple(Option((Scheme.STATIC,), *rng.random(2).tolist(), int(rng.integers(1, 100))) for _ in range(rng.integers(1, 4))))
            for n in range(4)
        )
        noise, size = rng.uniform(0.5, 3.0), rng.uniform(100, 300)
        every = [c for c in product(*(unit.options for unit in cases)) if sum(o.noise for o in c) <= noise and sum(o.size_bytes for o in c) <= size]
        found = solve(cases, noise, size)
        if not every:
            assert found is None
        else:
            assert found is not None and sum(o.ms for o in found) == pytest.approx(min(sum(o.ms for o in c) for c in every))
            assert found in every


def test_operators_without_weights_count_with_those_before_them(branches: tuple[Model, Model, Split]) -> None:
    model, twin, _ = branches
    found = forms(model, twin)
    took = {
        FLOAT: {"left": 1.0, "right+add_tensor": 2.0, "next": 4.0, "mean_dim": 0.5, "head": 0.5},
        "auto": {"left": 0.5, "right": 1.0, "add_tensor": 0.5, "next": 3.0, "head": 1.0},
    }
    cases = units(model, timed(found, took), lambda node, scheme: 0.25)
    assert [[o.ms for o in unit.options] for unit in cases] == [pytest.approx(ms) for ms in ([1.0, 0.5], [2.0, 1.5], [4.5, 3.0], [0.5, 1.0])]
    assert [o.schemes for o in cases[0].options] == [(Scheme.FLOAT,), (Scheme.STATIC,)]
    assert [o.noise for o in cases[0].options] == [0.0, 0.25]
    assert [o.size_bytes for o in cases[0].options] == [4 * 4 * 4 * 9, 4 * 4 * 9]


def test_the_sensitive_operator_stays_float_and_its_weights_are_not_rounded(branches: tuple[Model, Model, Split]) -> None:
    model, twin, _ = branches
    found = forms(model, twin)
    took = {FLOAT: dict.fromkeys(("left", "right", "next", "head"), 1.0), "auto": dict.fromkeys(("left", "right", "next", "head"), 0.5)}
    (right,) = (n.name for n in graphs.operators(model.graph) if graphs.source(n) == "right")

    def noise(node: str, scheme: Scheme) -> float:
        return 1.0 if node == right else 1e-4

    first = next(mixtures(model, twin, timed(found, took), noise, Wish(lambda form: form.quant.scheme(right) is Scheme.FLOAT)))
    assert schemes(first) == {"left": Scheme.STATIC, "right": Scheme.FLOAT, "next": Scheme.STATIC, "head": Scheme.STATIC}
    kinds = {graphs.source(n): (n, weighted(n)) for n in graphs.operators(model.graph)}
    for path, exact in (("left", False), ("right", True)):
        node, kind = kinds[path]
        name = str(kind.argument(node, kind.weight).target)
        assert torch.equal(graphs.tensor(first.graph, name), graphs.tensor(twin.graph, name)) is exact
    sums = [n for n in graphs.operators(model.graph) if n.target is torch.ops.aten.add.Tensor]
    assert [model.quant.scheme(n.name) for n in sums] == [Scheme.STATIC] and [first.quant.scheme(n.name) for n in sums] == [Scheme.FLOAT]


def test_a_size_limit_takes_what_is_slower(branches: tuple[Model, Model, Split]) -> None:
    model, twin, _ = branches
    found = forms(model, twin)
    took = {FLOAT: dict.fromkeys(("left", "right", "next", "head"), 1.0), "auto": {"left": 1.5, "right": 1.4, "next": 1.2, "head": 1.3}}
    known = timed(found, took)
    one_convolution = 3 * 4 * 4 * 9
    first = next(mixtures(model, twin, known, lambda node, scheme: 1e-4, Wish(lambda form: True, size_bytes=5000 - one_convolution)))
    assert [path for path, scheme in schemes(first).items() if scheme is not Scheme.FLOAT] == ["next"]
    assert list(mixtures(model, twin, known, lambda node, scheme: 1e-4, Wish(lambda form: True, ms=4.0))) == [], "nothing is faster than the float file"
