from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.diagnostics import errors
from edgesmith.compiler.errors import DataError, SpecError, UnsupportedError
from edgesmith.compiler.grid_operators import activations
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext, PassResult
from edgesmith.compiler.quantplan import QuantPlan, Scheme
from edgesmith.compiler.simulate import simulated
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, check_pass, tiny_data, tiny_model
from edgesmith.kernels.affine import activation_grid
from edgesmith.passes.graph.fold_batch_norm import FoldBatchNorm
from edgesmith.passes.quantize.quantize import Quantize


def split_of(*inputs: np.ndarray) -> PassData:
    split = Split(inputs, np.zeros(len(inputs[0]), np.int64))
    return PassData(split, split)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantized(module: nn.Module, *inputs: np.ndarray, **options: object) -> PassResult:
    """``module`` quantized with ``inputs`` to calibrate on; the plan is checked against its contract."""
    model = Model.from_module(module, tuple(torch.from_numpy(x[:2]) for x in inputs))
    result = Quantize(**options).run(model, PassContext(data=split_of(*inputs)))  # type: ignore[arg-type]
    check_plan(result.model)
    return result


def plan_of(result: PassResult) -> QuantPlan:
    assert result.model.quant is not None
    return result.model.quant


def check_plan(model: Model) -> None:
    """What QuantPlan promises of every plan."""
    plan = model.quant
    assert plan is not None
    nodes = {n.name: n for n in model.graph.graph.nodes}
    assert set(plan.ops) | set(plan.activations) <= set(nodes)
    for name, scheme in plan.ops.items():
        if scheme is Scheme.STATIC:
            assert {name, *(a.name for a in activations(nodes[name]))} <= set(plan.activations)
    for extent in plan.activations.values():
        grid = activation_grid(extent.low, extent.high)
        assert extent.low <= 0 <= extent.high
        assert extent.low < extent.high
        assert (extent.scale, extent.zero_point) == (float(grid.scale), int(grid.zero_point))
    for name, grid in plan.weights.items():
        weight = graphs.tensor(model.graph, name).detach().double().movedim(grid.axis, 0).flatten(1)
        steps = weight / torch.tensor(grid.scales, dtype=torch.float64)[:, None]
        assert torch.equal(steps, steps.round()), "every weight is exactly on its grid"
        assert set(steps.abs().amax(1).tolist()) <= {0.0, 127.0}


SCHEME = {Scheme.STATIC: "S", Scheme.DYNAMIC: "D", Scheme.FLOAT: "."}


def picture(result: PassResult) -> str:
    """One word per operator: its name and S, D or a dot."""
    plan = result.model.quant or QuantPlan()
    operators = (n for n in graphs.operators(result.model.graph) if isinstance(n.meta["val"], torch.Tensor))
    return " ".join(f"{str(n.target).split('.')[1]}:{SCHEME[plan.scheme(n.name)]}" for n in operators if n.target is not operator.getitem)


class Residual(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norm = nn.GroupNorm(1, 3) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(x + self.b(x))
        return self.c(self.norm(F.max_pool2d(x, 2)))


def test_a_residual_sum_between_convolutions_is_static() -> None:
    result = quantized(Residual(), normal(8, 3, 8, 8))
    assert picture(result) == "conv2d:S relu:S conv2d:S add:S relu:S max_pool2d:S conv2d:S"
    ranges = plan_of(result).activations
    assert ranges["add_tensor"] == ranges["relu_default_1"] == ranges["max_pool2d_default"], "a fused activation and a pool keep one grid"
    assert ranges["conv2d_default"] == ranges["relu_default"] != ranges["conv2d_default_1"]
    assert ranges["relu_default"].low == 0


def test_a_residual_sum_before_a_normalisation_stays_float() -> None:
    assert picture(quantized(Residual(norm=True), normal(8, 3, 8, 8))) == "conv2d:S relu:S conv2d:S add:. relu:. max_pool2d:. group_norm:. conv2d:S"


class HalfStatic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) + torch.sin(x))


def test_a_sum_with_a_float_operand_stays_float() -> None:
    assert picture(quantized(HalfStatic(), normal(8, 2, 4, 4))) == "conv2d:S sin:. add:. conv2d:S"


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4)
        self.down, self.up, self.head = nn.Linear(4, 2), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.a(x))
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        x = F.silu(self.b(x * gate[:, :, None, None]))
        return self.head(F.dropout(x.mean((2, 3)), 0.2, self.training))


def test_matrix_products_in_a_static_chain_are_static() -> None:
    result = quantized(SqueezeExcite(), normal(8, 2, 6, 6))
    assert picture(result).replace("slice:S ", "") == (
        "conv2d:S relu6:S mean:S linear:S relu:S linear:S sigmoid:S unsqueeze:S unsqueeze:S mul:S conv2d:S silu:S mean:S dropout:S linear:S"
    )
    sigmoid = plan_of(result).activations["sigmoid_default"]
    assert (sigmoid.low, sigmoid.high, sigmoid.method) == (0.0, 255 / 256, "fixed")


@pytest.mark.parametrize(("scheme", "conv", "linear"), [("auto", "S", "D"), ("static", "S", "S"), ("dynamic", ".", "D")])
def test_schemes_on_a_transformer(scheme: str, conv: str, linear: str) -> None:
    model = tiny_model(TinyTransformer)
    result = Quantize(scheme=scheme).run(model, PassContext(data=tiny_data().for_passes()))
    check_plan(result.model)
    words = picture(result).split()
    assert {w for w in words if w.startswith("conv2d")} == {f"conv2d:{conv}"}
    assert {w for w in words if w.startswith("linear")} == {f"linear:{linear}"}
    assert {w for w in words if w.startswith(("add", "layer_norm", "scaled_dot"))} == {"add:.", "layer_norm:.", "scaled_dot_product_attention:."}


class Cat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.cat([torch.relu(self.a(x)), self.b(x)], 1))


def test_a_concatenation_has_one_grid() -> None:
    ranges = plan_of(result := quantized(Cat(), normal(8, 2, 4, 4))).activations
    assert picture(result).split()[-2:] == ["cat:S", "conv2d:S"]
    assert ranges["cat_default"] == ranges["relu_default"] == ranges["conv2d_default"] == ranges["conv2d_default_1"]


class Padded(nn.Module):
    def __init__(self, mode: str, value: float) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 2)
        self.mode, self.value = mode, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.pad(torch.relu(self.a(x)), (1, 0, 1, 0), self.mode, self.value or None))


@pytest.mark.parametrize(("mode", "value", "scheme"), [("constant", 0.0, "S"), ("constant", 2.0, "."), ("reflect", 0.0, ".")])
def test_zero_padding_keeps_the_grid(mode: str, value: float, scheme: str) -> None:
    result = quantized(Padded(mode, value), normal(8, 2, 4, 4))
    assert picture(result) == f"conv2d:S relu:S pad:{scheme} conv2d:S"
    ranges = plan_of(result).activations
    assert scheme == "." or ranges["pad_default"] == ranges["relu_default"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (8, 4, 9)),
        (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (8, 4, 6, 6)),
        (nn.ConvTranspose2d(4, 6, 2, 2), (8, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), (8, 4, 5, 5)),
        (nn.Linear(5, 7), (8, 5)),
        (nn.Linear(5, 7, bias=False), (8, 3, 5)),
    ],
)
@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse", "entropy"])
def test_every_kind_of_weight_and_range_keeps_the_signal(layer: nn.Module, shape: tuple[int, ...], ranges: str) -> None:
    torch.manual_seed(0)
    layer.reset_parameters()  # type: ignore[operator]
    x = normal(*shape)
    result = quantized(nn.Sequential(layer), x, scheme="static", ranges=ranges)
    with torch.no_grad():
        float_ = layer(torch.from_numpy(x))
    noise = simulated(result.model)(torch.from_numpy(x)) - float_
    assert 0 < float(noise.square().mean()) < 1e-3 * float(float_.square().mean())


class Conv1D(nn.Module):
    """A matrix product with bias whose weight is stored input first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight) @ self.weight.t()


def test_a_weight_stored_the_other_way_round_has_its_channels_on_axis_1_and_a_computed_one_stays_float() -> None:
    torch.manual_seed(0)
    model = Model.from_module(Conv1D(), (torch.randn(2, 5),))
    result = Quantize(scheme="dynamic").run(model, PassContext())
    assert not result.changed
    assert [d.code for d in result.diagnostics] == ["quantize.shared-weight", "quantize.nothing"]

    class First(Conv1D):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight)

    plan = plan_of(quantized(First(), normal(8, 5), scheme="static"))
    assert plan.weights["weight"].axis == 1
    assert len(plan.weights["weight"].scales) == 7


class Tied(nn.Module):
    def __init__(self, embed: bool) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.embed = embed
        self.c = nn.Linear(4, 4)
        self.c.weight = self.a.weight
        if embed:
            self.b.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.b(self.c(torch.relu(self.a(self.table(ids)))))


def test_tied_weights_stay_tied_and_an_embedding_keeps_its_values() -> None:
    ids = np.random.default_rng(0).integers(0, 6, (8, 3))
    result = quantized(Tied(embed=True), ids, scheme="dynamic")
    assert picture(result) == "embedding:. linear:D relu:. linear:D linear:."
    (remark,) = result.diagnostics
    assert (remark.code, remark.where) == ("quantize.shared-weight", "b")
    weights = {id(graphs.tensor(result.model.graph, name)) for name in plan_of(result).weights}
    assert len(weights) == 1
    assert result.model.params == 4 * 4 + 4 + 4 + 6 * 4
    assert picture(quantized(Tied(embed=False), ids, scheme="dynamic")) == "embedding:. linear:D relu:. linear:D linear:D"


def test_excluded_layers_stay_float_and_are_named() -> None:
    result = quantized(SqueezeExcite(), normal(8, 2, 6, 6), exclude=("a", "he*"))
    words = picture(result).split()
    assert words[0] == "conv2d:."
    assert words[-1] == "linear:."
    assert {(d.code, d.where) for d in result.diagnostics} == {("quantize.excluded", "a"), ("quantize.excluded", "head")}


def test_zero_channels_constant_activations_and_vanishing_channels() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 1)
    assert first.bias is not None
    with torch.no_grad():
        first.weight[0] = 0.0
        first.weight[1] = 1e-13
        first.bias.copy_(torch.tensor([0.7, 1.0, -50.0]))
    x = normal(8, 1, 4, 4)
    model = Model.from_module(nn.Sequential(first, nn.ReLU(), second), (torch.from_numpy(x),))
    result = Quantize().run(model, PassContext(data=split_of(x)))
    plan = plan_of(result)
    grid, extent = plan.weights["0.weight"], plan.activations["input_1"]
    steps = first.bias.detach().double() / (torch.tensor(grid.scales, dtype=torch.float64) * extent.scale)
    assert float(steps.abs().max()) <= 2**30
    assert grid.scales[1] > 1e-13
    assert (graphs.tensor(result.model.graph, "0.weight")[:2] == 0).all()
    y = model(torch.from_numpy(x))
    assert (simulated(result.model)(torch.from_numpy(x)) - y).abs().max() < 0.02 * y.abs().max()


def test_one_sample_and_constant_inputs_are_enough_for_a_valid_plan() -> None:
    result = quantized(Residual(), np.zeros((1, 3, 8, 8), np.float32) + 2)
    assert torch.isfinite(simulated(result.model)(torch.randn(2, 3, 8, 8))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_place(bad: float) -> None:
    x = normal(8, 3, 8, 8)
    x[3, 1, 2, 2] = bad
    with pytest.raises(DataError, match="NaN or infinity"):
        quantized(Residual(), x)
    module = Residual()
    with torch.no_grad():
        module.b.weight[0, 0, 0, 0] = bad
    with pytest.raises(DataError, match="b: a weight is NaN"):
        quantized(module, normal(8, 3, 8, 8))


def test_data_that_does_not_fit_is_refused() -> None:
    model = tiny_model()
    for array, what in ((normal(4, 1, 8, 7), "shape|takes"), (normal(4, 1, 8, 8).astype(np.float64), "float64")):
        with pytest.raises(DataError, match=what):
            Quantize().run(model, PassContext(data=split_of(array)))


def test_static_without_data_is_refused_and_dynamic_is_not() -> None:
    for scheme in ("static", "auto"):
        with pytest.raises(UnsupportedError, match="needs data"):
            Quantize(scheme=scheme).run(tiny_model(), PassContext())
    result = Quantize(scheme="dynamic").run(tiny_model(), PassContext())
    check_plan(result.model)


@pytest.mark.parametrize("make", [lambda: Quantize(scheme="int4"), lambda: Quantize(ranges="max"), lambda: Quantize(samples=0)])
def test_options_are_checked(make: Callable[[], Quantize]) -> None:
    with pytest.raises(SpecError, match="quantize"):
        make()


def test_a_quantized_model_is_not_quantized_again() -> None:
    model = Quantize(scheme="dynamic").run(tiny_model(), PassContext()).model
    assert errors(tuple(Quantize().requires(model)))
    assert not errors(tuple(Quantize().requires(tiny_model())))


def test_a_model_without_weights_is_left_alone() -> None:
    model = Model.from_module(nn.ReLU(), (torch.randn(2, 3),))
    result = Quantize().run(model, PassContext(data=split_of(normal(4, 3))))
    assert not result.changed
    assert [d.code for d in result.diagnostics] == ["quantize.nothing"]


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(1, 6))


def test_a_fixed_batch_is_calibrated_batch_by_batch() -> None:
    model = Model.from_module(FixedBatch(), (torch.randn(1, 6),))
    assert not model.dynamic_batch
    check_plan(Quantize(scheme="static").run(model, PassContext(data=split_of(normal(7, 6)))).model)


@pytest.mark.parametrize("kind", [TinyTransformer, TinyConvNet])
@pytest.mark.parametrize("scheme", ["auto", "static"])
def test_the_contract_of_passes(kind: type[nn.Module], scheme: str, tmp_path: Path) -> None:
    folded = FoldBatchNorm().run(tiny_model(kind), PassContext()).model
    result = check_pass(Quantize(scheme=scheme, samples=40), folder=tmp_path, model=folded)
    check_plan(result.model)
    x = torch.from_numpy(tiny_data().validation.inputs[0])
    signal = folded(x)
    assert float((simulated(result.model)(x) - signal).norm() / signal.norm()) < 0.03


def test_calibration_frees_what_it_has_seen() -> None:
    """Activations of 40 layers never stand in memory together: what is alive stays below a few of them."""
    layers = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(40)]
    model = Model.from_module(nn.Sequential(*layers), (torch.randn(2, 4, 8, 8),))
    graph = model.edit()
    from edgesmith.passes.observe import visit

    alive: list[int] = []

    class Counting(visit._Visitor):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            alive.append(sum(isinstance(v, torch.Tensor) and k.op == "call_function" for k, v in self.env.items()))
            return result

    Counting(graph, {}).run(torch.randn(2, 4, 8, 8))
    assert max(alive) <= 2
