"""Training with the roundings in place: it gets back what coarse grids took, and is not done where there is nothing to get."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from digits_networks import TEST, TRAIN, ConvNet, trained_on_digits

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.quantplan import TensorRange
from edgesmith.compiler.simulate import simulated
from edgesmith.compiler.weighted import weighted
from edgesmith.kernels.affine import activation_grid, ends
from edgesmith.passes.quantize.qat import Qat, trainable
from edgesmith.passes.quantize.quantize import Quantize

VALIDATION = Split((TRAIN.inputs[0][1000:],), TRAIN.labels[1000:])
DATA = PassData(Split((TRAIN.inputs[0][:1000],), TRAIN.labels[:1000]), VALIDATION)


def evaluate(model: Model) -> float:
    return float((model(torch.from_numpy(VALIDATION.inputs[0])).argmax(1).numpy() == VALIDATION.labels).mean())


def accuracy(model: Model) -> float:
    """As the plan says it runs, on images that no pass saw."""
    return float((simulated(model)(torch.from_numpy(TEST.inputs[0])).argmax(1).numpy() == TEST.labels).mean())


@pytest.fixture(scope="module")
def case() -> tuple[Model, Model, PassContext]:
    """A float network, its plan with grids forty times too coarse, and what is trained with."""
    teacher = trained_on_digits(ConvNet)
    ctx = PassContext(data=DATA, teacher=teacher, evaluate=evaluate)
    model = Quantize(scheme="static").run(teacher, ctx).model
    coarse = {k: TensorRange(*ends(activation_grid(r.low * 40, r.high * 40)), "coarse") for k, r in model.quant.activations.items()}
    return teacher, replace(model, quant=replace(model.quant, activations=coarse)), ctx


def test_it_gets_back_what_coarse_grids_took(case: tuple[Model, Model, PassContext]) -> None:
    teacher, coarse, ctx = case
    lost = accuracy(teacher) - accuracy(coarse)
    assert lost > 0.15
    result = Qat(epochs=4, lr=3e-3).run(coarse, ctx)
    assert accuracy(result.model) > accuracy(coarse) + lost / 3, "half of it, in fact: six steps hold no more"
    assert result.model.quant.activations == coarse.quant.activations
    for node in graphs.operators(result.model.graph):
        if weighted(node):
            name = str(node.args[1].target)
            weight = graphs.tensor(result.model.graph, name).detach().flatten(1).numpy()
            integers = weight / np.array(result.model.quant.weights[name].scales, np.float32)[:, None]
            assert (integers == np.round(integers)).all() and np.abs(integers).max() == 127


def test_what_is_trained_computes_what_the_plan_says(case: tuple[Model, Model, PassContext]) -> None:
    """But for biases, whose rounding is finer than anything."""
    _, coarse, _ = case
    x = torch.from_numpy(TEST.inputs[0][:64])
    with torch.no_grad():
        found = trainable(coarse, coarse.quant.ops)(x)
    assert (found.argmax(1) == simulated(coarse)(x).argmax(1)).float().mean() > 0.95


def test_nothing_is_trained_where_nothing_is_lost_or_nothing_rounded(case: tuple[Model, Model, PassContext]) -> None:
    teacher, _, ctx = case
    fine = Quantize(scheme="static").run(teacher, ctx).model
    for model, code in ((fine, "qat.not-needed"), (teacher, "qat.not-quantized")):
        result = Qat(epochs=1, max_drop=0.05).run(model, ctx)
        assert result.model is model and not result.changed
        assert [d.code for d in result.diagnostics] == [code]
