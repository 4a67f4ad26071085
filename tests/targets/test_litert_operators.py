"""What LiteRT says of its operators: each timed, traced to the layers that it computes, and put on the fast path or off it."""

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.errors import RunnerError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.profile.operator_types import Category, Executed
from edgesmith.compiler.profile.operators import profile_operators
from edgesmith.passes.quantize.quantize import Quantize
from edgesmith.targets.litert import LiteRT, runner
from edgesmith.targets.litert.barriers import guarded
from edgesmith.targets.litert.sources import Names


class Layers(nn.Module):
    """Operators that are fused, fused away, moved, converted, and one that XNNPACK has no kernel for: a pool padded with minus infinity."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.pool = nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.first, self.gelu, self.second = nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48)
        self.head = nn.Softmax(-1)

    def forward(self, x):
        x = self.pool(self.act(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head(self.second(self.gelu(self.first(x))))


class Ports(nn.Module):
    """An output twice, one that is an input, inputs that are told apart by value."""

    def forward(self, a, b):
        difference = a - 2 * b
        return difference, b, difference


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model.from_module(Layers(), (torch.randn(2, 3, 32, 32),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("operators")


@pytest.fixture(scope="module")
def plain(model, folder):
    return LiteRT().lower(model, folder, "plain").path


@pytest.fixture(scope="module")
def int8(model, folder):
    return LiteRT().lower(quantized(model, "static"), folder, "int8").path


def quantized(model, scheme):
    samples = tuple(x.numpy() for x in model.example_inputs(8, seed=1))
    data = Split(samples, np.zeros(8, dtype=np.int64))
    return Quantize(scheme=scheme, ranges="minmax", samples=8).run(model, PassContext(data=PassData(data, data))).model


def inputs_of(profiler):
    generator = np.random.default_rng(0)
    return [generator.standard_normal(port["shape"]).astype(port["dtype"]) for port in profiler._session.inputs]


def profiled(path, runs=5):
    profiler = runner.Profiler(str(path), 1)
    for _ in range(runs):
        profiler.run(inputs_of(profiler))
    return profiler.operators()


def summary(rows):
    return [(row["kind"].partition(" (")[0], row["name"], row["dtype"], row["sources"], row["delegate"]) for row in rows]


def test_every_operator_says_what_it_is_of_the_file_and_which_layers_it_computes(plain):
    rows = profiled(plain)
    assert summary(rows) == [
        ("Transpose", "TRANSPOSE 0", "float32", ["conv"], "XNNPACK"),
        ("Convolution", "CONV_2D 1", "float32", ["act", "conv"], "XNNPACK"),
        ("PADV2", "PADV2 2", "float32", ["pool"], ""),
        ("Max Pooling", "MAX_POOL_2D 3", "float32", ["pool"], "XNNPACK"),
        ("Transpose", "TRANSPOSE 4", "float32", ["pool"], "XNNPACK"),
        ("Static Reshape", "RESHAPE 5", "float32", ["flatten_using_ints"], "XNNPACK"),
        ("Transpose", "TRANSPOSE 6", "float32", ["transpose_int"], "XNNPACK"),
        ("Fully Connected", "FULLY_CONNECTED 7", "float32", ["first"], "XNNPACK"),
        ("GELU", "GELU 8", "float32", ["gelu"], "XNNPACK"),
        ("Fully Connected", "FULLY_CONNECTED 9", "float32", ["second"], "XNNPACK"),
        ("Softmax", "SOFTMAX 10", "float32", ["head"], "XNNPACK"),
    ]
    assert {len(row["ns"]) for row in rows} == {5}
    assert all(ns >= 0 for row in rows for ns in row["ns"])


def test_an_int8_file_shows_its_conversions_and_what_xnnpack_makes_one_operator_of(int8):
    rows = summary(profiled(int8))
    assert ("Convert", "QUANTIZE 1", "int8", ["conv"], "XNNPACK") in rows
    assert ("Fully Connected", "FULLY_CONNECTED 10", "int8", ["first"], "XNNPACK") in rows
    assert ("Invalid Unary Op", "DEQUANTIZE 11 + GELU 12 + QUANTIZE 13", "int8", ["first", "gelu"], "XNNPACK") in rows


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_the_operators_add_up_to_the_run_and_are_put_on_the_fast_path_or_off_it(kind, request):
    profile = profile_operators(request.getfixturevalue(kind), limit_s=2)
    assert profile.method == "instrumented"
    # Twice the tenth that is asked for on an idle machine.
    assert profile.total_ms == pytest.approx(profile.whole_ms, rel=0.2)
    assert profile.sourced_share > 0.95
    found = {operator.name.split()[0]: operator.category for operator in profile.operators}
    expected = {"PADV2": Category.UNDELEGATED, "TRANSPOSE": Category.LAYOUT, "RESHAPE": Category.LAYOUT, "CONV_2D": Category.FAST}
    expected |= {"SOFTMAX": Category.FAST if kind == "plain" else Category.FLOAT_ISLAND} | ({} if kind == "plain" else {"QUANTIZE": Category.QUANTIZE})
    assert found.items() >= expected.items()
    assert all(bool(operator.advice) != (operator.category is Category.FAST) for operator in profile.operators)


def test_what_is_profiled_computes_what_the_plain_run_computes(folder, int8):
    ports = LiteRT().lower(Model.from_module(Ports(), (torch.randn(2, 4), torch.randn(2, 4))), folder, "ports").path
    for path in (ports, int8):
        profiler = runner.Profiler(str(path), 1)
        inputs = inputs_of(profiler)
        profiler.run(inputs)
        for got, wanted in zip(profiler._compiled.outputs, runner.Session(str(path), 1).run(inputs), strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("of_what_is_read", [0.5, 0.9, 1.0, 1.05, 100.0])
def test_operators_take_together_what_plain_calls_do_where_a_quarter_or_half_a_microsecond_each_explains_it(plain, of_what_is_read):
    profiler = runner.Profiler(str(plain), 1)
    for _ in range(3):
        profiler.run(inputs_of(profiler))
    read_ns = np.stack(profiler._readings_us, axis=1) * 1000.0
    total = float(np.median(read_ns.sum(axis=0)))
    profiler._plain = [(2, of_what_is_read * total)] * 3
    rows = profiler.operators()
    cut_off_ns = min(500, max(0.0, of_what_is_read - 1) * total / sum(row["delegate"] != "" for row in rows))
    for reading, row in zip(read_ns, rows, strict=True):
        assert row["ns"] == pytest.approx(reading * min(1.0, max(0.75, of_what_is_read)) + (cut_off_ns if row["delegate"] else 0))


def test_a_foreign_file_has_the_runtimes_names_and_no_layers(plain, tmp_path):
    from ai_edge_litert.tools import flatbuffer_utils

    file = flatbuffer_utils.read_model(str(plain))
    for number, tensor in enumerate(file.subgraphs[0].tensors):
        tensor.name = f"module/layer;{number}".encode()
    flatbuffer_utils.write_model(file, str(tmp_path / "foreign.tflite"))
    foreign, ours = profiled(tmp_path / "foreign.tflite"), profiled(plain)
    assert [(row["kind"], row["name"]) for row in foreign] == [(row["kind"], row["name"]) for row in ours]
    assert all(row["sources"] == [] for row in foreign)


def test_inputs_of_another_shape_are_refused(plain):
    profiler = runner.Profiler(str(plain), 1)
    with pytest.raises(ValueError, match="float32"):
        profiler.run([np.zeros((1, 3, 32, 31), np.float32)])


def test_a_file_of_several_subgraphs_is_refused(plain, tmp_path):
    from ai_edge_litert.tools import flatbuffer_utils

    file = flatbuffer_utils.read_model(str(plain))
    file.subgraphs.append(file.subgraphs[0])
    flatbuffer_utils.write_model(file, str(tmp_path / "two.tflite"))
    with pytest.raises(RunnerError, match="one subgraph"):
        profile_operators(tmp_path / "two.tflite", limit_s=1)


def ops(text):
    """``A+B``: operators of a file, each reading what the one before it writes."""
    return [runner._Op(kind, i, frozenset({i}), frozenset({i + 1}), "float32", ()) for i, kind in enumerate(text.split())]


@pytest.mark.parametrize(
    ("file", "tags", "expected"),
    [
        ("ADD MEAN MUL", "Add|Mean|Multiply", "ADD|MEAN|MUL"),
        ("GELU FULLY_CONNECTED", "GELU|Static Reshape|Fully Connected", "GELU|FULLY_CONNECTED|FULLY_CONNECTED"),
        ("PAD CONV_2D", "Convolution", "PAD CONV_2D"),
        ("ADD PAD CONV_2D", "Add|Clamp|Convolution", "ADD|ADD|PAD CONV_2D"),
        ("CONV_2D RELU6 CONV_2D", "Convolution|Convolution", "CONV_2D RELU6|CONV_2D"),
        ("FULLY_CONNECTED DEQUANTIZE GELU QUANTIZE", "Fully Connected|Invalid Unary Op", "FULLY_CONNECTED|DEQUANTIZE GELU QUANTIZE"),
        ("ADD MYSTERY ADD", "Add|Nobody Knows|Add", "ADD|MYSTERY|ADD"),
        ("ADD SOFTMAX ADD SOFTMAX", "Add|Softmax|Add|Copy|Softmax", "ADD|SOFTMAX|ADD|SOFTMAX|SOFTMAX"),
    ],
)
def test_operators_of_xnnpack_are_told_apart_by_their_order(file, tags, expected):
    found = runner._aligned(ops(file), [f"{tag} (NC, F32) GEMM" for tag in tags.split("|")])
    assert "|".join(" ".join(op.kind for op in group) for group in found) == expected


def test_layers_that_a_shared_constant_ties_together_are_told_apart():
    torch.manual_seed(0)
    stages = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.ReLU()) for _ in range(3)))
    names = Names(guarded(Model.from_module(stages, (torch.randn(2, 4),))))
    assert names.of_tensor("layer:2.2;;layer:0.2;;layer:2.0;3", 7) == "layer:2.2;layer:2.0;7"
    assert names.of_tensor("layer:0.2;;layer:0.0;3", 8) == "layer:0.2;layer:0.0;8"
    assert names.of_tensor("layer:2.0;;layer:0.0;", 9) == "layer:2.0;9"
    assert names.of_tensor("arith.constant1", 10) == "arith.constant1"
    assert names.of_outputs(["logits"]) == ["layer:2.2;logits"]


def test_a_dynamic_convolution_in_float32_is_an_island_and_a_dynamic_layer_is_fast():
    conv = Executed("CONV_2D 0", "Convolution (NHWC, F32) IGEMM", ("conv",), "XNNPACK", "float32")
    layer = Executed("FULLY_CONNECTED 1", "Fully Connected (NC, QD8, F32, QC8W) GEMM", ("head",), "XNNPACK", "float32")
    norm = Executed("MUL 2", "Multiply (ND)", ("norm",), "XNNPACK", "float32")
    assert [p.category for p in LiteRT().place((conv, layer, norm))] == [Category.FLOAT_ISLAND, Category.FAST, Category.FAST]
    assert [p.category for p in LiteRT().place((conv, norm))] == [Category.FAST, Category.FAST]
