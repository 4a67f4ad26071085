"""The reference integer arithmetic against files of one operator in their runtimes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler import registry
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.quantplan import QuantPlan, Scheme, TensorRange, WeightGrid
from edgesmith.compiler.weighted import weighted
from edgesmith.kernels.affine import Grid, activation_grid, dequantize, ends, fake_quantize, quantize, weight_grid
from edgesmith.kernels.int8 import elementwise, products
from edgesmith.kernels.int8.requantize import Requantize, by_float, by_multiplier

TARGETS = ("onnxruntime", "litert", "executorch")
SAMPLES = 32
IMAGE = (8, 12, 12)


class Case(NamedTuple):
    """A module of one operator, the shapes of its inputs, and its arithmetic on integers."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    arithmetic: Callable[..., Any]


class Sum(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


class Product(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True)


def convolution(**options: Any) -> Case:
    """8 channels to 16, on an image of 12x12."""
    used = {"kernel_size": 3, **options}
    own = {name: (value, value) if name != "groups" else value for name, value in options.items() if name != "kernel_size"}
    return Case(lambda: nn.Conv2d(8, 16, **used), (IMAGE,), partial(products.convolution, **own))


WEIGHTED = {
    "linear": Case(lambda: nn.Linear(48, 32), ((48,),), products.linear),
    "convolution": convolution(padding=1),
    "pointwise": convolution(kernel_size=1),
    "strided": convolution(stride=2, padding=1),
    "dilated": convolution(dilation=2, padding=2),
    "grouped": convolution(groups=4),
    "depthwise": Case(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (IMAGE,), partial(products.convolution, padding=(1, 1), groups=8)),
}
QUICK = ("linear", "convolution", "depthwise")
SUMS = {"onnxruntime": elementwise.add_by_float, "litert": elementwise.add_by_shift, "executorch": elementwise.add_by_shift}


def extent(values: np.ndarray) -> tuple[Grid, TensorRange]:
    grid = activation_grid(float(values.min()), float(values.max()))
    return grid, TensorRange(*ends(grid), "minmax")


def inputs_of(case: Case, seed: int = 0) -> list[np.ndarray]:
    """Values of different extent on either side of zero, on every input."""
    rng = np.random.default_rng(seed)
    return [((n + 1) * rng.standard_normal((SAMPLES, *shape)) + 0.3).astype(np.float32) for n, shape in enumerate(case.shapes)]


def ran(model: Model, name: str, folder: Path, inputs: list[np.ndarray]) -> np.ndarray:
    target = registry.target(name)
    artifact = target.lower(model, folder)
    assert not artifact.diagnostics, "everything runs as planned"
    with open_session(artifact.path, target.runner) as session:
        (result,) = session.run(inputs)
    return result


def planned(case: Case, inputs: list[np.ndarray]) -> tuple[Model, list[Grid]]:
    """The module with all of it static, and the grids of what it reads and gives."""
    torch.manual_seed(0)
    model = Model.from_module(case.make().eval(), tuple(torch.from_numpy(x[:2]) for x in inputs))
    graph = model.edit()
    (node,) = graphs.operators(graph)
    with torch.no_grad():
        result = graph(*(torch.from_numpy(x) for x in inputs)).numpy()
    found = [extent(values) for values in (*inputs, result)]
    kind, weights = weighted(node), {}
    if kind is not None:
        name = str(kind.argument(node, kind.weight).target)
        value = graphs.tensor(graph, name).detach().numpy()
        grid = weight_grid(value, kind.axis)
        graphs.add_tensor(graph, name, torch.from_numpy(fake_quantize(value, grid)))
        weights[name] = WeightGrid(tuple(grid.scale.tolist()), kind.axis)
    names = [*(n.name for n in graph.graph.find_nodes(op="placeholder")), node.name]
    ranges = {name: planned_range for name, (_, planned_range) in zip(names, found, strict=True)}
    return model.with_graph(graph, quant=QuantPlan({node.name: Scheme.STATIC}, ranges, weights)), [grid for grid, _ in found]


def steps_apart(seen: np.ndarray, predicted: np.ndarray, grid: Grid) -> np.ndarray:
    """How many steps of ``grid`` lie between what a file gave and the integers predicted."""
    return np.abs(np.rint((seen - dequantize(predicted, grid)) / float(grid.scale)))


def predicted_sums(case: Case, model: Model, x: np.ndarray, grids: list[Grid], requantize: Requantize) -> np.ndarray:
    """The integers that the weighted operator of ``model`` gives for ``x``."""
    (read, given), plan = grids, model.quant
    assert plan is not None
    (own,) = plan.weights.values()
    scales = np.asarray(own.scales)
    weight, bias = (graphs.tensor(model.graph, n).detach().double().numpy() for n in ("weight", "bias"))
    integers = np.rint(weight / scales.reshape(-1, *(1,) * (weight.ndim - 1))).astype(np.int8)
    steps = np.rint(bias / (scales * float(read.scale))).astype(np.int32)
    sums = case.arithmetic(quantize(x, read), int(read.zero_point), integers, steps)
    factors = (np.float32(read.scale) * scales.astype(np.float32) / np.float32(given.scale)).astype(np.float32)
    return requantize(sums, factors.reshape(-1, *(1,) * (weight.ndim - 2)), given)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WEIGHTED])
def test_sums_of_products_are_predicted(tmp_path: Path, target: str, name: str) -> None:
    case = WEIGHTED[name]
    inputs = inputs_of(case)
    model, grids = planned(case, inputs)
    apart = steps_apart(ran(model, target, tmp_path, inputs), predicted_sums(case, model, inputs[0], grids, by_float), grids[-1])
    assert np.mean(apart <= 1) >= 0.999
    assert np.mean(apart == 0) >= 0.999, "not only within a step: the rounding is the same"


@pytest.mark.parametrize("name", QUICK)
def test_tensorflow_lites_own_kernels_are_predicted(tmp_path: Path, name: str) -> None:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    case = WEIGHTED[name]
    inputs = inputs_of(case)
    model, grids = planned(case, inputs)
    path = registry.target("litert").lower(model, tmp_path).path
    interpreter = Interpreter(str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    run = interpreter.get_signature_runner()
    (given,) = run.get_input_details()
    seen = np.concatenate([next(iter(run(**{given: x[None]}).values())) for x in inputs[0]])
    by_fixed_point, in_float = (predicted_sums(case, model, inputs[0], grids, requantize) for requantize in (by_multiplier, by_float))
    np.testing.assert_array_equal(steps_apart(seen, by_fixed_point, grids[-1]), 0)
    assert np.abs(by_fixed_point.astype(int) - in_float.astype(int)).max() <= 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["sum", "product", "mean"])
def test_what_has_no_weight_is_predicted(tmp_path: Path, target: str, name: str) -> None:
    pair = (IMAGE, IMAGE)
    case = {"sum": Case(Sum, pair, SUMS[target]), "product": Case(Product, pair, elementwise.multiply), "mean": Case(Mean, (IMAGE,), elementwise.image_mean)}[
        name
    ]
    inputs = inputs_of(case)
    model, grids = planned(case, inputs)
    operands = [part for x, grid in zip(inputs, grids, strict=False) for part in (quantize(x, grid), grid)]
    predicted = case.arithmetic(*operands, grids[-1])
    apart = steps_apart(ran(model, target, tmp_path, inputs), predicted, grids[-1])
    assert np.mean(apart <= 1) >= 0.999
