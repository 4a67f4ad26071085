"""INT8 .tflite files hold the plan's integers and grids, and compute what the plan's simulation computes."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.diagnostics import Severity
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.quantplan import QuantPlan, Scheme, TensorRange, WeightGrid
from edgesmith.compiler.simulate import DynamicGrid, simulated
from edgesmith.compiler.testing import randomise_norms
from edgesmith.compiler.weighted import weighted
from edgesmith.targets.litert import LiteRT
from edgesmith.targets.litert.flatfile import FlatFile

aten = torch.ops.aten


def planned(model, scheme_of, *, also=(), seed=1):
    """``model`` with its weights on grids and a plan: ``scheme_of(source)`` for operators with weights, STATIC for those of ``also``."""
    graph = model.edit()
    ops, weights, watched = {}, {}, {}
    for node in graphs.operators(graph):
        kind = weighted(node)
        scheme = scheme_of(node.meta["source"]) if kind else Scheme.STATIC if node.target in also else Scheme.FLOAT
        if scheme is Scheme.FLOAT:
            continue
        ops[node.name] = scheme
        if kind:
            name = str(kind.argument(node, kind.weight).target)
            if name not in weights:
                weights[name] = put_on_grid(graph, name)
        if scheme is Scheme.STATIC:
            follower = next(iter(node.users))
            fused = [follower] if len(node.users) == 1 and follower.target in {aten.relu.default, aten.relu6.default} else []
            reads = [n for n in node.all_input_nodes if n.op != "get_attr"]
            watched |= dict.fromkeys((*reads, *([] if fused else [node]), *fused)) | dict.fromkeys(fused)
            watched[node] = fused[0] if fused else None
    values = seen(graph, model.example_inputs(8, seed))
    ends = {n: (float(values[of or n].min().clamp(max=0)), float(values[of or n].max().clamp(min=0))) for n, of in watched.items()}
    activations = {n.name: TensorRange(low, high, "minmax") for n, (low, high) in ends.items()}
    return model.with_graph(graph, quant=QuantPlan(ops, activations, weights))


def put_on_grid(graph, name):
    weight = graphs.tensor(graph, name).detach()
    shape = (-1, *[1] * (weight.dim() - 1))
    scales = weight.abs().flatten(1).amax(1) / 127
    scales = torch.where(scales > 0, scales, torch.full_like(scales, 1e-12))
    graphs.set_tensor(graph, name, torch.round(weight / scales.view(shape)) * scales.view(shape))
    return WeightGrid(tuple(scales.tolist()), 0)


def seen(graph, inputs):
    values = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Recorder(graph).run(*inputs)
    return values


def lowered(model, folder):
    artifact = LiteRT().lower(model, folder)
    return artifact, FlatFile(artifact.path.read_bytes())


def outputs(artifact, inputs):
    with open_session(artifact.path, LiteRT.runner, 1) as session:
        return session.run([x.numpy() for x in inputs])[0]


def integers_in_file(file):
    return [np.sort(op.inputs[1].data, axis=None) for op in file.ops if op.kind in {"FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"}]


def integers_in_plan(model):
    found = []
    for name, grid in model.quant.weights.items():
        weight = graphs.tensor(model.graph, name).detach().flatten(1)
        found.append(np.sort(torch.round(weight / torch.tensor(grid.scales)[:, None]).to(torch.int8).numpy(), axis=None))
    return found


class Mixed(nn.Module):
    """A normalisation before each matrix product, whose gain the converter would multiply into the weight; one channel is all zero."""

    def __init__(self):
        super().__init__()
        self.norm1, self.dynamic = nn.LayerNorm(24), nn.Linear(24, 40)
        self.norm2, self.static = nn.LayerNorm(40), nn.Linear(40, 24)
        self.norm3, self.plain = nn.LayerNorm(24), nn.Linear(24, 6)
        with torch.no_grad():
            self.static.weight[3] = 0
            self.static.bias[3] = 2.5

    def forward(self, x):
        return self.plain(self.norm3(self.static(self.norm2(F.gelu(self.dynamic(self.norm1(x)))))))


SCHEMES = {"dynamic": Scheme.DYNAMIC, "static": Scheme.STATIC, "plain": Scheme.FLOAT}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    torch.manual_seed(0)
    model = Model.from_module(randomise_norms(Mixed()), (torch.randn(2, 5, 24),))
    model = planned(model, SCHEMES.__getitem__)
    return model, *lowered(model, tmp_path_factory.mktemp("mixed"))


def test_each_operator_runs_by_its_own_scheme(mixed):
    _, artifact, file = mixed
    assert artifact.diagnostics == ()
    kinds = [tuple(str(t.dtype) for t in (*op.inputs, *op.outputs)) for op in file.ops if op.kind == "FULLY_CONNECTED"]
    assert kinds == [("float32", "int8", "float32", "float32"), ("int8", "int8", "int32", "int8"), ("float32",) * 4]
    assert Counter(op.kind for op in file.ops if "QUANTIZE" in op.kind) == {"QUANTIZE": 1, "DEQUANTIZE": 1}
    assert [file.tensors[op.outputs[0].index].dtype for op in file.ops][-1] == np.float32


def test_the_weights_are_the_plans_integers(mixed):
    model, _, file = mixed
    for got, wanted in zip(integers_in_file(file)[:2], integers_in_plan(model), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_the_activations_have_the_plans_grids(mixed):
    model, _, file = mixed
    (static,) = [op for op in file.ops if op.kind == "FULLY_CONNECTED" and op.inputs[0].grid]
    node = next(n for n in graphs.operators(model.graph) if n.meta["source"] == "static" and weighted(n))
    for tensor, key in ((static.inputs[0], node.args[0].name), (static.outputs[0], node.name)):
        wanted = model.quant.activations[key]
        assert tensor.grid.scales[0] == pytest.approx(wanted.scale, rel=1e-6)
        assert tensor.grid.zero_points[0] == wanted.zero_point


def test_the_bias_of_a_channel_without_weights_survives(mixed):
    _, _, file = mixed
    (static,) = [op for op in file.ops if op.kind == "FULLY_CONNECTED" and op.inputs[0].grid]
    bias = static.inputs[2]
    assert bias.data[3] * bias.grid.scales[3] == pytest.approx(2.5, rel=1e-3)


def test_the_file_computes_what_the_plan_says(mixed):
    model, artifact, _ = mixed
    inputs = model.example_inputs(16, seed=7)
    got, wanted, plain = outputs(artifact, inputs), simulated(model, DynamicGrid.ROW_ASYMMETRIC)(*inputs).numpy(), model(*inputs).numpy()
    # Both round the same numbers to the same grids; a few that fall beside a tie go one step the other way, the rest agree.
    plan_error = np.sqrt(np.mean((wanted - plain) ** 2))
    assert np.sqrt(np.mean((got - wanted) ** 2)) < 0.3 * plan_error
    assert np.sqrt(np.mean((simulated(model, DynamicGrid.TENSOR_ASYMMETRIC)(*inputs).numpy() - wanted) ** 2)) > 0.3 * plan_error


class Convolutions(nn.Module):
    """Fused activations, strided padding, a depthwise layer, a residual addition, a view before the head."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.point, self.side = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = F.relu6(self.depthwise(F.relu(self.stem(x))))
        return self.head(F.relu(self.point(x) + self.side(x)).flatten(1))


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory):
    torch.manual_seed(1)
    model = Model.from_module(Convolutions(), (torch.randn(2, 3, 8, 8),))
    also = {aten.relu.default, aten.relu6.default, aten.add.Tensor, aten.flatten.using_ints, aten.view.default, aten.reshape.default}
    model = planned(model, lambda _: Scheme.STATIC, also=also)
    return model, *lowered(model, tmp_path_factory.mktemp("convolutions"))


def test_a_convolutional_net_stays_in_integers_from_end_to_end(convolutions):
    model, artifact, file = convolutions
    assert artifact.diagnostics == ()
    kinds = Counter(op.kind for op in file.ops)
    assert (kinds["QUANTIZE"], kinds["DEQUANTIZE"], kinds["RELU"], kinds["DEPTHWISE_CONV_2D"]) == (1, 1, 0, 1)
    for got, wanted in zip(integers_in_file(file), integers_in_plan(model), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_its_results_are_those_of_the_simulation_to_a_step(convolutions):
    model, artifact, _ = convolutions
    inputs = model.example_inputs(16, seed=7)
    got, wanted = outputs(artifact, inputs), simulated(model)(*inputs).numpy()
    head = next(n for n in graphs.operators(model.graph) if n.meta["source"] == "head" and weighted(n))
    steps = np.abs(got - wanted) / model.quant.activations[head.name].scale
    # Both are on one grid. Values beside a tie, and the fixed-point addition of the runtime, move an input of the head by one step here
    # and there; 128 inputs of random sign move a result by a step or two.
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    assert steps.max() < 2.5
    assert steps.mean() < 0.6
    plain = np.abs(model(*inputs).numpy() - wanted) / model.quant.activations[head.name].scale
    assert plain.mean() > steps.mean()
    assert np.abs(plain - np.rint(plain)).max() > 0.1


def test_what_cannot_be_honoured_is_said(tmp_path):
    class Unfolded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x):
            return F.softmax(self.head(self.norm(self.conv(x)).mean((2, 3))), -1)

    torch.manual_seed(0)
    model = Model.from_module(randomise_norms(Unfolded()), (torch.randn(2, 2, 4, 4),))
    model = planned(model, lambda _: Scheme.STATIC, also={aten.softmax.int})
    artifact, file = lowered(model, tmp_path)
    assert [(d.code, d.where, d.severity) for d in artifact.diagnostics] == [
        ("litert.not-honoured", "conv", Severity.WARNING),
        ("litert.not-honoured", "softmax_int", Severity.INFO),
    ]
    assert [str(op.inputs[1].dtype) for op in file.ops if op.kind in {"CONV_2D", "FULLY_CONNECTED"}] == ["float32", "int8"]
    inputs = model.example_inputs(4, seed=3)
    assert np.abs(outputs(artifact, inputs) - model(*inputs).numpy()).max() < 0.02
