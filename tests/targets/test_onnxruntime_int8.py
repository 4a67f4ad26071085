"""INT8 files: exactly the plan's integers, in integer kernels, agreeing with the simulation of the plan; what is not honoured is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler import testing
from edgesmith.compiler.diagnostics import Severity
from edgesmith.compiler.errors import DefectError
from edgesmith.compiler.model import Model
from edgesmith.compiler.quantplan import QuantPlan, Scheme, TensorRange, WeightGrid
from edgesmith.compiler.simulate import DynamicGrid, simulated
from edgesmith.compiler.weighted import weighted
from edgesmith.kernels import affine
from edgesmith.targets.onnxruntime import OnnxRuntime
from edgesmith.targets.onnxruntime.export import OPSET
from edgesmith.targets.onnxruntime.legalise import FLOAT_BETWEEN_GRIDS, NOT_HONOURED
from edgesmith.targets.onnxruntime.runner import Session

F = nn.functional
aten = torch.ops.aten
BETWEEN = frozenset(
    {aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.max_pool2d.default, aten.adaptive_avg_pool2d.default, aten.gelu.default, aten.pad.default}
)
CLAMPS = frozenset({aten.relu.default, aten.relu6.default})


@pytest.fixture(autouse=True, scope="module")
def one_registry():
    """Read the exporter's table of conversions once: it is most of the time that a small export takes."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    registry = ONNXRegistry.from_torchlib(OPSET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", lambda self, opset_version: registry)
        yield


class Extents(fx.Interpreter):
    """Runs a graph and keeps the least and greatest value of every tensor."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node):
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.is_floating_point() and n.op != "get_attr":
            self.seen[n.name] = float(result.min()), float(result.max())
        return result


def planned(model: Model, scheme: Scheme, inputs: tuple[torch.Tensor, ...], between: frozenset = BETWEEN, leave: frozenset[str] = frozenset()) -> Model:
    """``model`` with its weights on grids and a plan: every weighted operator by ``scheme``, and those of ``between`` static with it."""
    graph = model.edit()
    ops, weights = {}, {}
    for node in graphs.operators(graph):
        kind = weighted(node)
        if node.name in leave:
            continue
        if kind is not None:
            name = str(kind.argument(node, kind.weight).target)
            value = graphs.tensor(graph, name).detach().numpy()
            grid = affine.weight_grid(value, kind.axis)
            graphs.set_tensor(graph, name, torch.from_numpy(affine.fake_quantize(value, grid)))
            weights[name] = WeightGrid(tuple(float(s) for s in grid.scale), kind.axis)
            ops[node.name] = scheme
        elif scheme is Scheme.STATIC and node.target in between | CLAMPS:
            ops[node.name] = scheme
    return model.with_graph(graph, quant=QuantPlan(ops, _ranges(graph, ops, inputs) if scheme is Scheme.STATIC else {}, weights))


def _ranges(graph: fx.GraphModule, ops: dict[str, Scheme], inputs: tuple[torch.Tensor, ...]) -> dict[str, TensorRange]:
    extents = Extents(graph)
    with torch.no_grad():
        extents.run(*inputs)
    covers = {}
    for node in graphs.operators(graph):
        if node.name in ops:
            source = node.args[0]
            if node.target in CLAMPS | {aten.max_pool2d.default, aten.pad.default} and source.name in ops:
                covers[source.name] = node.name  # on the grid of what follows
            if node.target is aten.cat.default:
                covers.update({part.name: node.name for part in source})
    ranges = {}
    for name, (low, high) in extents.seen.items():
        extent = affine.ends(affine.activation_grid(low, high))
        ranges[name] = TensorRange(*extent, "minmax")
    for name in reversed(list(covers)):
        ranges[name] = ranges[covers[name]]
    read = {a.name for node in graphs.operators(graph) if node.name in ops for a in node.all_input_nodes}
    return {name: extent for name, extent in ranges.items() if name in ops or name in read}


class Net(nn.Module):
    def __init__(self, function: Callable, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor):
        return self.function(self, x)


def captured(function: Callable, shape: tuple[int, ...], **layers: nn.Module) -> tuple[Model, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    for layer in layers.values():
        for value in layer.parameters():
            nn.init.normal_(value, 0, 0.5)
    x = torch.randn(8, *shape)
    return Model.from_module(Net(function, **layers), (x,)), (x,)


def kernels(path: Path, folder: Path) -> Counter:
    """Operators that ONNX Runtime runs after its own optimisation."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def outputs(path: Path, x: torch.Tensor) -> np.ndarray:
    session = Session(str(path), 1)
    return np.concatenate([session.run([sample[None].numpy()])[0] for sample in x])


SINGLE = {
    "linear of images": ((6, 16), lambda net, x: net.a(x), {"a": nn.Linear(16, 24)}, {"QGemm": 1}),
    "linear of vectors without bias": ((16,), lambda net, x: net.a(x), {"a": nn.Linear(16, 24, bias=False)}, {"QGemm": 1}),
    "linear and relu": ((6, 16), lambda net, x: torch.relu(net.a(x)), {"a": nn.Linear(16, 24)}, {"QGemm": 1}),
    "product with a parameter": ((6, 24), lambda net, x: x @ net.a.weight, {"a": nn.Linear(16, 24)}, {"QGemm": 1}),
    "convolution": ((3, 9, 9), lambda net, x: net.a(x), {"a": nn.Conv2d(3, 8, 3, 2, 1)}, {"QLinearConv": 1}),
    "convolution and relu6": ((3, 9, 9), lambda net, x: F.relu6(net.a(x) * 4), {"a": nn.Conv2d(3, 8, 3, dilation=2)}, {"QLinearConv": 1}),
    "depthwise": ((8, 9, 9), lambda net, x: net.a(x), {"a": nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False)}, {"QLinearConv": 1}),
    "grouped": ((8, 9, 9), lambda net, x: net.a(x), {"a": nn.Conv2d(8, 12, 1, groups=4)}, {"QLinearConv": 1}),
    "one dimension": ((4, 20), lambda net, x: net.a(x), {"a": nn.Conv1d(4, 6, 5)}, {"QLinearConv": 1}),
    "three dimensions": ((2, 5, 5, 5), lambda net, x: net.a(x), {"a": nn.Conv3d(2, 4, 3)}, {"QLinearConv": 1}),
    "residual": (
        (8, 9, 9),
        lambda net, x: torch.relu(net.b(F.relu(net.a(x))) + net.c(x)),
        {"a": nn.Conv2d(8, 8, 1), "b": nn.Conv2d(8, 8, 1), "c": nn.Conv2d(8, 8, 1)},
        {"QLinearAdd": 1},
    ),
    "zero padding": ((3, 8, 8), lambda net, x: net.b(F.pad(net.a(x), (0, 1, 0, 1))), {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 4, 3)}, {"QLinearConv": 2}),
    "pools": ((3, 8, 8), lambda net, x: F.adaptive_avg_pool2d(F.max_pool2d(net.a(x), 2), 1), {"a": nn.Conv2d(3, 8, 3)}, {"QLinearGlobalAveragePool": 1}),
    "concatenation": ((3, 8, 8), lambda net, x: torch.cat([net.a(x), net.b(x)], 1), {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(3, 4, 3)}, {"QLinearConcat": 1}),
}
"""Shape of a sample, function, layers, and integer kernels that have to come out of it."""


@pytest.mark.parametrize("name", SINGLE)
def test_a_static_operator_runs_on_integers_and_agrees_with_the_simulation(name, tmp_path):
    shape, function, layers, wanted = SINGLE[name]
    model, inputs = captured(function, shape, **layers)
    model = planned(model, Scheme.STATIC, inputs)
    artifact = OnnxRuntime().lower(model, tmp_path)
    assert [d for d in artifact.diagnostics if d.severity is not Severity.INFO] == []
    found = kernels(artifact.path, tmp_path)
    assert {op: found[op] for op in wanted} == wanted
    assert not set(found) & {"Conv", "Gemm", "MatMul", "Relu", "Clip", "Add", "FusedConv", "FusedGemm"}
    (result,) = (n for n in model.graph.graph.find_nodes(op="output")[0].all_input_nodes)
    steps = np.abs(outputs(artifact.path, inputs[0]) - simulated(model)(*inputs).numpy()) / model.quant.activations[result.name].scale
    assert steps.max() < 2.01  # a sum of two integers, each of which may round the other way at a tie
    assert (steps > 0.01).mean() < 0.01


def test_the_file_holds_the_integers_of_the_plan_and_int32_biases(tmp_path):
    import onnx
    from onnx import numpy_helper

    model, inputs = captured(lambda net, x: net.b(net.a(x).mean((2, 3))), (3, 9, 9), a=nn.Conv2d(3, 8, 3), b=nn.Linear(8, 5))
    model = planned(model, Scheme.STATIC, inputs)
    held = [numpy_helper.to_array(t) for t in onnx.load(OnnxRuntime().lower(model, tmp_path).path).graph.initializer]
    for name, grid in model.quant.weights.items():
        weight = graphs.tensor(model.graph, name).detach().double().numpy()
        scales = np.array(grid.scales)
        expected = np.rint(weight / scales.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
        assert any(
            a.dtype == np.int8 and a.shape in {expected.shape, expected.T.shape} and (np.array_equal(a, expected) or np.array_equal(a, expected.T))
            for a in held
        )
        assert any(a.dtype == np.float32 and np.array_equal(a, scales.astype(np.float32)) for a in held)
        bias = graphs.tensor(model.graph, name.replace("weight", "bias")).detach().double().numpy()
        read = next(n for n in graphs.operators(model.graph) if any(str(a.target) == name for a in n.all_input_nodes)).args[0]
        steps = bias / (model.quant.activations[read.name].scale * scales)
        assert any(a.dtype == np.int32 and a.shape == steps.shape and np.abs(a - steps).max() <= 0.51 for a in held)
    assert not any(a.dtype == np.float32 and a.size > 8 for a in held)


@pytest.mark.parametrize("kind", [testing.TinyTransformer, testing.TinyConvNet])
def test_whole_networks_agree_with_the_simulation(kind, tmp_path):
    torch.manual_seed(1)
    inputs = (torch.randn(16, 1, 8, 8),)
    model = planned(testing.tiny_model(kind), Scheme.STATIC, inputs)
    artifact = OnnxRuntime().lower(model, tmp_path)
    found = kernels(artifact.path, tmp_path)
    products = [n for n in graphs.operators(model.graph) if weighted(n) is not None]
    assert found["QGemm"] + found["QLinearConv"] == len(products)
    given, expected, exact = outputs(artifact.path, inputs[0]), simulated(model)(*inputs).numpy(), model(*inputs).numpy()
    assert np.abs(given - expected).mean() < 0.2 * np.abs(expected - exact).mean()  # far nearer to the plan than the plan is to float


@pytest.mark.parametrize("kind", [testing.TinyTransformer, testing.TinyConvNet])
def test_dynamic_products_run_on_integers_and_agree_with_the_simulation(kind, tmp_path):
    torch.manual_seed(1)
    inputs = (torch.randn(4, 1, 8, 8),)
    model = testing.tiny_model(kind)
    convolutions = frozenset(n.name for n in graphs.operators(model.graph) if n.target is aten.conv2d.default)
    model = planned(model, Scheme.DYNAMIC, inputs, leave=convolutions)
    artifact = OnnxRuntime().lower(model, tmp_path)
    found = kernels(artifact.path, tmp_path)
    assert found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] == len(model.quant.ops)
    assert artifact.diagnostics == ()
    simulation = simulated(model, DynamicGrid.TENSOR_ASYMMETRIC)
    expected = np.concatenate([simulation(x[None]).numpy() for x in inputs[0]])
    assert np.abs(outputs(artifact.path, inputs[0]) - expected).max() < 1e-5 * np.abs(expected).max()


def test_readers_of_one_dynamic_tensor_share_its_integers(tmp_path):
    layers = {name: nn.Linear(16, 16) for name in "qkv"}
    model, inputs = captured(lambda net, x: F.scaled_dot_product_attention(net.q(x)[:, None], net.k(x)[:, None], net.v(x)[:, None]), (6, 16), **layers)
    model = planned(model, Scheme.DYNAMIC, inputs)
    found = kernels(OnnxRuntime().lower(model, tmp_path).path, tmp_path)
    assert (found["DynamicQuantizeLinear"], found["MatMulIntegerToFloat"]) == (1, 3)


def test_dynamic_convolutions_are_honoured(tmp_path):
    model, inputs = captured(lambda net, x: net.a(x), (3, 9, 9), a=nn.Conv2d(3, 8, 3))
    model = planned(model, Scheme.DYNAMIC, inputs)
    artifact = OnnxRuntime().lower(model, tmp_path)
    assert kernels(artifact.path, tmp_path)["ConvInteger"] == 1
    simulation = simulated(model, DynamicGrid.TENSOR_ASYMMETRIC)
    expected = np.concatenate([simulation(x[None]).numpy() for x in inputs[0]])
    assert np.abs(outputs(artifact.path, inputs[0]) - expected).max() < 1e-5 * np.abs(expected).max()


def test_an_operator_that_is_computed_twice_is_merged_only_on_one_grid(tmp_path):
    model, inputs = captured(lambda net, x: net.b(net.a(x)) + net.a(x), (8, 9, 9), a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1))
    same = planned(model, Scheme.STATIC, inputs)
    artifact = OnnxRuntime().lower(same, tmp_path)
    assert artifact.diagnostics == ()
    assert kernels(artifact.path, tmp_path)["QLinearConv"] == 2
    second = [n.name for n in graphs.operators(same.graph) if n.target is aten.conv2d.default][-1]
    ranges = {**same.quant.activations, second: TensorRange(-0.1, 0.1, "minmax")}
    different = same.with_graph(same.edit(), quant=QuantPlan(same.quant.ops, ranges, same.quant.weights))
    artifact = OnnxRuntime().lower(different, tmp_path)
    assert [d.code for d in artifact.diagnostics] == [NOT_HONOURED, NOT_HONOURED]
    total = next(n.name for n in graphs.operators(model.graph) if n.target is aten.add.Tensor)
    steps = np.abs(outputs(artifact.path, inputs[0]) - simulated(different)(*inputs).numpy()) / different.quant.activations[total].scale
    assert steps.mean() < 1  # the first of the two is not rounded to its own grid before its reader rounds it


def _extreme(folder: Path, scheme: Scheme) -> tuple[Path, torch.Tensor, np.ndarray]:
    """All weights at 127 steps and inputs at 255: the largest sums that int8 products can give, 510 times what 16 bits hold."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    x = torch.cat([torch.zeros(1, 4, 64), torch.ones(3, 4, 64)])
    model = planned(Model.from_module(layer, (x,)), scheme, (x,))
    return OnnxRuntime().lower(model, folder).path, x, simulated(model, DynamicGrid.TENSOR_ASYMMETRIC)(x).numpy()


@pytest.mark.parametrize("scheme", [Scheme.STATIC, Scheme.DYNAMIC])
def test_the_largest_sums_do_not_saturate(scheme, tmp_path):
    path, x, expected = _extreme(tmp_path, scheme)
    assert np.allclose(outputs(path, x), expected, rtol=1e-2)


@pytest.mark.skipif("vnni" in Path("/proc/cpuinfo").read_text() or "avx" not in Path("/proc/cpuinfo").read_text(), reason="this processor does not saturate")
def test_without_the_runners_setting_they_do(tmp_path):
    import onnxruntime

    path, x, expected = _extreme(tmp_path, Scheme.STATIC)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = np.concatenate([session.run(None, {session.get_inputs()[0].name: sample[None].numpy()})[0] for sample in x])
    assert not np.allclose(given, expected, rtol=1e-2)


def test_operators_that_share_a_weight_load(tmp_path):
    model, inputs = captured(lambda net, x: net.a(torch.relu(net.a(x))), (6, 16), a=nn.Linear(16, 16))
    for scheme in (Scheme.STATIC, Scheme.DYNAMIC):
        path = OnnxRuntime().lower(planned(model, scheme, inputs), tmp_path, scheme.value).path
        assert np.isfinite(outputs(path, inputs[0])).all()


def test_a_channel_that_has_vanished_beside_its_bias_keeps_the_bias(tmp_path):
    layer = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        layer.weight[1] = 1e-13
        layer.bias[:] = 1.0
    x = torch.randn(8, 3, 5, 5)
    model = planned(Model.from_module(layer, (x,)), Scheme.STATIC, (x,))
    given = outputs(OnnxRuntime().lower(model, tmp_path).path, x)
    assert np.abs(given[:, 1] - 1.0).max() < 0.6 * next(iter(model.quant.activations.values())).scale + 1e-2


def test_a_batch_norm_that_was_not_folded_does_not_break_the_plan(tmp_path):
    model, inputs = captured(lambda net, x: net.b(net.a(x)), (3, 9, 9), a=nn.Conv2d(3, 8, 3), b=nn.BatchNorm2d(8))
    model = planned(model, Scheme.STATIC, inputs)
    artifact = OnnxRuntime().lower(model, tmp_path)
    assert kernels(artifact.path, tmp_path)["QLinearConv"] == 1
    assert np.abs(outputs(artifact.path, inputs[0]) - simulated(model)(*inputs).numpy()).mean() < 1e-3


def test_a_function_that_has_no_integer_kernel_is_rounded_as_planned_and_named(tmp_path):
    model, inputs = captured(lambda net, x: net.b(F.gelu(net.a(x))), (6, 16), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    model = planned(model, Scheme.STATIC, inputs)
    artifact = OnnxRuntime().lower(model, tmp_path)
    (remark,) = artifact.diagnostics
    assert (remark.severity, remark.code) == (Severity.INFO, FLOAT_BETWEEN_GRIDS)
    assert "Gelu" in remark.message
    found = kernels(artifact.path, tmp_path)
    assert (found["QGemm"], found["Gelu"]) == (2, 1)


def _one_layer() -> tuple[Model, tuple[torch.Tensor, ...]]:
    model, inputs = captured(lambda net, x: torch.relu(net.a(x)), (6, 16), a=nn.Linear(16, 16))
    return planned(model, Scheme.STATIC, inputs), inputs


def _without_range() -> tuple[Model, tuple[torch.Tensor, ...]]:
    model, inputs = _one_layer()
    (product,) = (n for n in graphs.operators(model.graph) if weighted(n) is not None)
    return model.with_graph(model.edit(), quant=QuantPlan({product.name: Scheme.STATIC}, {}, model.quant.weights)), inputs


def _without_grid() -> tuple[Model, tuple[torch.Tensor, ...]]:
    model, inputs = _one_layer()
    return model.with_graph(model.edit(), quant=QuantPlan(model.quant.ops, model.quant.activations, {})), inputs


def _transposed() -> tuple[Model, tuple[torch.Tensor, ...]]:
    model, inputs = captured(lambda net, x: net.a(x), (3, 9, 9), a=nn.ConvTranspose2d(3, 8, 3))
    return planned(model, Scheme.STATIC, inputs), inputs


def _computed_bias() -> tuple[Model, tuple[torch.Tensor, ...]]:
    model, inputs = captured(lambda net, x: F.linear(x, net.a.weight, net.a.bias * 2), (6, 16), a=nn.Linear(16, 16))
    return planned(model, Scheme.STATIC, inputs), inputs


def _dynamic_sum() -> tuple[Model, tuple[torch.Tensor, ...]]:
    model, inputs = captured(lambda net, x: net.a(x) + 1, (6, 16), a=nn.Linear(16, 16))
    (total,) = (n for n in graphs.operators(model.graph) if n.target is aten.add.Tensor)
    return model.with_graph(model.edit(), quant=QuantPlan({total.name: Scheme.DYNAMIC}, {}, {})), inputs


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_without_range, "no range for"),
        (_without_grid, "planned grid"),
        (_transposed, "transposed convolutions"),
        (_computed_bias, "bias is not one constant"),
        (_dynamic_sum, "multiply by a weight"),
    ],
)
def test_what_cannot_be_honoured_is_said_and_runs_in_float(make, reason, tmp_path):
    model, (x,) = make()
    artifact = OnnxRuntime().lower(model, tmp_path)
    remark = next(d for d in artifact.diagnostics if d.code == NOT_HONOURED)
    assert remark.severity is Severity.WARNING
    assert remark.where
    assert reason in remark.message
    expected = model(x).numpy()
    assert np.abs(outputs(artifact.path, x) - expected).max() < 0.02 * np.abs(expected).max()


def test_a_weight_off_its_grid_is_a_defect(tmp_path):
    model, _ = _one_layer()
    graph = model.edit()
    (name,) = model.quant.weights
    graphs.set_tensor(graph, name, graphs.tensor(graph, name).detach() * 1.003)
    with pytest.raises(DefectError, match="grid"):
        OnnxRuntime().lower(model.with_graph(graph, quant=model.quant), tmp_path)


def test_operators_in_the_file_carry_the_source_path(tmp_path):
    import onnx

    artifact = OnnxRuntime().lower(testing.tiny_model(), tmp_path)
    nodes = onnx.load(artifact.path).graph.node
    assert len({n.name for n in nodes}) == len(nodes)
    assert any(n.name.startswith("blocks.1.fc2/") for n in nodes)
