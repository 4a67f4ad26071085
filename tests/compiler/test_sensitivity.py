"""What one operator costs alone: nothing where nothing is rounded, most where a grid is worst."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.quantplan import TensorRange
from edgesmith.compiler.sensitivity import Sensitivities
from edgesmith.compiler.simulate import simulated
from edgesmith.kernels.affine import activation_grid, ends
from edgesmith.passes.quantize.quantize import Quantize


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10))


@pytest.fixture(scope="module")
def case() -> tuple[Model, Model, Split]:
    twin = Model.from_module(Net().eval(), (torch.randn(2, 3, 8, 8),))
    x = np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32)
    split = Split((x,), twin(torch.from_numpy(x)).argmax(1).numpy())
    return Quantize(scheme="static").run(twin, PassContext(data=PassData(split, split))).model, twin, split


def score(outputs: tuple[np.ndarray, ...], labels: np.ndarray) -> float:
    return float((outputs[0].argmax(1) == labels).mean())


def test_every_weighted_operator_is_looked_at_alone(case: tuple[Model, Model, Split]) -> None:
    model, twin, split = case
    told: list[tuple[int, int]] = []
    found = Sensitivities(model, twin, split, score, lambda done, of: told.append((done, of))).of(model.quant.ops)
    assert [(s.where, s.samples) for s in found] == [("0", 96), ("2", 96), ("5", 96)]
    assert told == [(1, 3), (2, 3), (3, 3)]
    x = torch.from_numpy(split.inputs[0])
    together = float((simulated(model)(x) - twin(x)).square().sum() / twin(x).square().sum())
    alone = [10 ** (-s.sqnr_db / 10) for s in found]
    # Errors of operators are nearly independent: their squares add up, and none is larger than the whole.
    assert max(alone) < together < 2 * sum(alone)
    assert all(-0.05 <= s.drop <= 0.1 for s in found)


def test_a_bad_range_is_the_most_sensitive(case: tuple[Model, Model, Split]) -> None:
    model, twin, split = case
    node = next(n for n in model.graph.graph.nodes if n.meta.get("source") == "2" and n.op == "call_function")
    plan = model.quant
    assert plan is not None
    tight = TensorRange(*ends(activation_grid(0.0, plan.activations[node.args[0].name].high / 8)), "spoiled")
    spoiled = replace(model, quant=replace(plan, activations={**plan.activations, node.args[0].name: tight}))
    before, after = (Sensitivities(m, twin, split, score).of(m.quant.ops) for m in (model, spoiled))
    assert after[1].sqnr_db < before[1].sqnr_db - 10
    assert after[1].sqnr_db == min(s.sqnr_db for s in after)
    assert after[1].drop > before[1].drop
    assert after[2].sqnr_db == before[2].sqnr_db
