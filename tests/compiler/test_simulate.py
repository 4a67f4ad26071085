from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler import registry
from edgesmith.compiler.errors import DefectError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.quantplan import QuantPlan, Scheme, TensorRange, WeightGrid
from edgesmith.compiler.simulate import (
    DynamicGrid,
    fake_quantize,
    fake_quantize_rows,
    fake_quantize_rows_symmetric,
    fake_quantize_tensor,
    simulated,
    simulated_graph,
)
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, tiny_data, tiny_model
from edgesmith.kernels import affine
from edgesmith.passes.graph.fold_batch_norm import FoldBatchNorm
from edgesmith.passes.quantize.quantize import Quantize

VALUES = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-6 else 0.0)
)


def planned(low: float, high: float) -> TensorRange:
    return TensorRange(*affine.ends(affine.activation_grid(low, high)), "test")


@given(values=VALUES, low=st.floats(-1e4, 0, width=32), high=st.floats(0.0625, 1e4, width=32))
def test_rounding_is_that_of_the_kernels_to_the_last_bit(values: np.ndarray, low: float, high: float) -> None:
    grid, extent = affine.activation_grid(low, high), planned(low, high)
    assert (extent.scale, extent.zero_point) == (float(grid.scale), int(grid.zero_point))
    ours = fake_quantize(torch.from_numpy(values), extent.scale, extent.zero_point)
    assert (ours.numpy() == affine.fake_quantize(values, grid)).all()


def test_ties_go_to_the_even_integer() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert fake_quantize(x, 1.0, 0).tolist() == [0, 2, 2, 0, -2]
    assert fake_quantize(x, 1.0, -3).tolist() == [0, 2, 2, 0, -2]


@given(values=VALUES)
def test_rows_are_rounded_within_half_of_their_own_step(values: np.ndarray) -> None:
    x = torch.from_numpy(values).double()
    magnitude = x.abs().amax(-1, keepdim=True)
    extent = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
    assert ((fake_quantize_rows_symmetric(x) - x).abs() <= magnitude / 254 * 1.0001).all()
    # the zero point is rounded too, so the grid may end half a step before the extreme value
    assert ((fake_quantize_rows(x) - x).abs() <= extent / 255 * 1.0001).all()
    assert ((fake_quantize_tensor(x) - x).abs() <= (x.max().clamp(min=0) - x.min().clamp(max=0)) / 255 * 1.0001).all()


@settings(max_examples=20, deadline=None)
@given(values=VALUES)
def test_dynamic_rounding_of_a_tensor_is_that_of_onnx(values: np.ndarray) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    shapes = [helper.make_tensor_value_info(n, kind.FLOAT, values.shape) for n in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", shapes[:1], shapes[1:]), opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"x": values})[0]
    step = (max(values.max(), 0) - min(values.min(), 0)) / 255
    ours = fake_quantize_tensor(torch.from_numpy(values)).numpy()
    assert np.abs(ours - theirs).max() <= step * 1.01  # a tie may fall to the other side
    assert np.mean(np.abs(ours - theirs) <= step * 1e-3) >= 0.75


class Branches(nn.Module):
    """A static convolution whose input a float operator reads too, with a fused activation and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.sin(x)
        return torch.relu(self.conv(y)), torch.cos(y)


def branches() -> tuple[Model, QuantPlan]:
    torch.manual_seed(0)
    model = Model.from_module(Branches(), (torch.randn(2, 1, 3, 3),))
    extent = {"sin_default": planned(-0.5, 0.5), "conv2d_default": planned(0, 0.4), "relu_default": planned(0, 0.4)}
    return model, QuantPlan({"conv2d_default": Scheme.STATIC, "relu_default": Scheme.STATIC}, extent)


def test_where_values_are_rounded() -> None:
    model, plan = branches()
    quantized = model.with_graph(model.edit(), quant=plan)
    x = torch.randn(4, 1, 3, 3)
    static, other = simulated(quantized)(x)
    y = torch.sin(x)
    rounded = fake_quantize(y, plan.activations["sin_default"].scale, plan.activations["sin_default"].zero_point)
    weight = graphs.tensor(model.graph, "conv.weight").detach()
    extent = plan.activations["relu_default"]
    assert torch.equal(static, fake_quantize(torch.relu(nn.functional.conv2d(rounded, weight)), extent.scale, extent.zero_point))
    assert torch.equal(other, torch.cos(y)), "a float reader of a float result sees no rounding"
    assert not torch.allclose(static, model(x)[0], atol=1e-3)


def test_a_plan_is_written_out_node_by_node() -> None:
    model, plan = branches()
    graph = simulated_graph(model.with_graph(model.edit(), quant=plan))
    names = [n.target.__name__ if n.target is fake_quantize else str(n.target) for n in graphs.operators(graph)]
    assert names == ["aten.sin.default", "fake_quantize", "aten.conv2d.default", "fake_quantize", "aten.relu.default", "fake_quantize", "aten.cos.default"]
    assert {n.name for n in graphs.operators(model.graph)} <= {n.name for n in graphs.operators(graph)}


def test_the_bias_of_a_static_operator_is_a_whole_number_of_steps() -> None:
    torch.manual_seed(0)
    model = Model.from_module(nn.Sequential(nn.Conv2d(1, 3, 1)), (torch.randn(2, 1, 3, 3),))
    plan = QuantPlan(
        {"conv2d_default": Scheme.STATIC}, {"input_1": planned(-1, 1), "conv2d_default": planned(-2, 2)}, {"0.weight": WeightGrid((0.5, 0.25, 2.0), 0)}
    )
    graph = simulated_graph(model.with_graph(model.edit(), quant=plan))
    (conv,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    bias, exact = graphs.tensor(graph, str(conv.args[2].target)), graphs.tensor(model.graph, "0.bias")
    step = plan.activations["input_1"].scale * torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64)
    assert torch.equal((torch.round(exact.detach().double() / step) * step).float(), bias)
    assert not torch.equal(bias, exact)
    assert (bias - exact).abs().le(step / 2).all()


@pytest.mark.parametrize(("kind", "scheme"), [(TinyConvNet, "static"), (TinyTransformer, "static")])
def test_it_is_what_a_runtime_computes(kind: type[nn.Module], scheme: str, tmp_path: Path) -> None:
    """The file that ONNX Runtime runs gives the simulation's numbers: the same grid points where the result is on a grid."""
    pytest.importorskip("onnxruntime")
    model = FoldBatchNorm().run(tiny_model(kind), PassContext()).model
    model = Quantize(scheme=scheme).run(model, PassContext(data=tiny_data().for_passes())).model
    target = registry.target("onnxruntime")
    artifact = target.lower(model, tmp_path)
    images = tiny_data().validation.inputs[0]
    with open_session(artifact.path, target.runner, 1, log=tmp_path / "log") as session:
        theirs = np.concatenate([session.run((image[None],))[0] for image in images])
    run = simulated(model, DynamicGrid.TENSOR_ASYMMETRIC)
    ours = np.concatenate([run(torch.from_numpy(image[None])).numpy() for image in images])
    noise = np.abs(model(torch.from_numpy(images)).numpy() - ours).mean()
    assert np.mean(np.abs(ours - theirs) <= 1e-3 * noise) >= 0.98
    assert np.abs(ours - theirs).max() <= 10 * noise


def test_without_a_plan_it_is_the_model() -> None:
    model = tiny_model()
    x = model.example_inputs(3)
    assert torch.equal(simulated(model)(*x), model(*x))


@pytest.mark.parametrize("dynamic", DynamicGrid)
def test_dynamic_products_round_what_they_read(dynamic: DynamicGrid) -> None:
    torch.manual_seed(0)
    model = Model.from_module(nn.Sequential(nn.Linear(8, 4)), (torch.randn(2, 8),))
    quantized = model.with_graph(model.edit(), quant=QuantPlan({"linear_default": Scheme.DYNAMIC}))
    x = torch.randn(5, 8) * torch.tensor([1.0, 10, 100, 1, 0]).unsqueeze(1)
    error = (simulated(quantized, dynamic)(x) - model(x)).abs().amax(1)
    assert error[4] == 0
    assert 0 < error[1] < 1.0
    # one grid for all rows is spoiled by the greatest of them, a grid per row is not
    assert (error[0] > 0.05) == (dynamic is DynamicGrid.TENSOR_ASYMMETRIC)


def test_a_dynamic_operator_without_a_weight_is_refused() -> None:
    model, _ = branches()
    with pytest.raises(DefectError, match="multiplies by no weight"):
        simulated(model.with_graph(model.edit(), quant=QuantPlan({"relu_default": Scheme.DYNAMIC})))
