from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgesmith.kernels.affine import activation_grid, dequantize, ends, fake_quantize, quantize, weight_grid

BOUND = st.floats(-1e6, 1e6, width=32)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 9))
ROUND = arrays.arrays(np.float32, SHAPES, elements=st.floats(-100, 100, width=32))
RANDOM = st.builds(lambda seed, shape: np.random.default_rng(seed).normal(size=shape).astype(np.float32), st.integers(0, 2**32), SHAPES)
WEIGHTS = st.one_of(ROUND, RANDOM)


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [(0.0, 255.0, 1.0, -128), (-128.0, 127.0, 1.0, 0), (-255.0, 0.0, 1.0, 127), (-1.0, 3.0, 4 / 255, -64), (2.0, 51.0, 0.2, -128), (0.0, 0.0, 1 / 256, -128)],
)
def test_golden_activation_grids(low: float, high: float, scale: float, zero_point: int) -> None:
    grid = activation_grid(low, high)
    assert float(grid.scale) == pytest.approx(scale, rel=2**-15)
    assert int(grid.zero_point) == zero_point
    assert int(activation_grid(low, high, signed=False).zero_point) == zero_point + 128


def test_golden_integers_round_half_to_even_and_saturate() -> None:
    grid = activation_grid(-128.0, 127.0)
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1000.0, -1000.0, np.inf, -np.inf], np.float32)
    assert quantize(x, grid).tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, 127, -128]
    assert quantize(x, grid).dtype == np.int8


@given(low=BOUND, high=BOUND)
def test_zero_is_on_every_grid_and_the_interval_is_covered_to_half_a_step(low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    grid = activation_grid(low, high)
    bottom, top = ends(grid)
    assert fake_quantize(np.zeros(1, np.float32), grid)[0] == 0.0
    assert bottom <= 0.0 <= top
    assert bottom <= low + grid.scale / 2
    assert top >= high - grid.scale / 2


@given(low=BOUND, high=BOUND, values=arrays.arrays(np.float32, 16, elements=BOUND), signed=st.booleans())
def test_error_is_at_most_half_a_step_inside_and_the_distance_to_the_end_outside(low: float, high: float, values: np.ndarray, signed: bool) -> None:
    grid = activation_grid(min(low, high), max(low, high), signed=signed)
    bottom, top = ends(grid)
    error = np.abs(fake_quantize(values, grid).astype(np.float64) - np.clip(values, bottom, top))
    rounding = np.abs(values) * 2.0**-22  # the division x / scale in float32 may cross a tie
    assert (error <= grid.scale / 2 + rounding).all()


def test_the_bound_of_half_a_step_is_tight() -> None:
    grid = activation_grid(0.0, 255.0)
    assert np.abs(fake_quantize(np.array([10.5], np.float32), grid) - 10.5).max() == grid.scale / 2


@given(low=BOUND, high=BOUND)
def test_ends_are_exact_so_that_the_grid_can_be_derived_from_them_again(low: float, high: float) -> None:
    grid = activation_grid(min(low, high), max(low, high))
    bottom, top = ends(grid)
    assert np.float32(bottom) == bottom
    assert np.float32(top) == top
    for kind in (np.float32, np.float64):
        scale = (kind(top) - kind(bottom)) / kind(255)
        assert scale == grid.scale
        assert np.rint(-128 - kind(bottom) / scale) == grid.zero_point
    again = activation_grid(bottom, top)
    assert (again.scale, again.zero_point) == (grid.scale, grid.zero_point)


@given(weight=WEIGHTS, axis=st.sampled_from([0, 1, None]))
def test_weights_lie_on_the_grid_exactly_and_min_max_recovers_the_integers(weight: np.ndarray, axis: int | None) -> None:
    grid = weight_grid(weight, axis)
    integers = quantize(weight, grid)
    placed = dequantize(integers, grid)
    scale, _ = grid.along(2)
    others = None if axis is None else 1 - axis
    extreme = np.abs(placed).max(axis=others, keepdims=True)
    dead = extreme == 0
    recovered = np.where(dead, scale, extreme / np.float32(127))  # a toolchain's min-max in float32
    assert (recovered == scale).all()
    assert (placed.astype(np.float64) == integers * scale.astype(np.float64)).all()
    assert (np.rint(placed / recovered) == integers).all()
    assert (np.abs(integers).max(axis=others, keepdims=True)[~dead] == 127).all()
    assert (quantize(placed, weight_grid(placed, axis)) == integers).all()
    assert (np.abs(placed - weight) <= scale / 2 * (1 + 2**-10)).all()


def test_a_channel_of_zeros_takes_the_scale_of_its_neighbours() -> None:
    weight = np.array([[1.0, -2.0], [0.0, 0.0], [4.0, 0.5]], np.float32)
    grid = weight_grid(weight, 0)
    assert grid.scale[1] == pytest.approx((grid.scale[0] + grid.scale[2]) / 2, rel=2**-15)
    assert (fake_quantize(weight, grid)[1] == 0).all()
    assert weight_grid(np.zeros((2, 2), np.float32), 0).scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        weight_grid(np.array([[1.0, bad]], np.float32), 0)
    with pytest.raises(ValueError, match="finite"):
        activation_grid(min(bad, 0.0), bad)


@settings(max_examples=20, deadline=None)
@given(weight=WEIGHTS)
def test_integers_are_those_of_the_runtime(weight: np.ndarray) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    grid = activation_grid(float(weight.min()), float(weight.max()))
    helper, kind = onnx.helper, onnx.TensorProto
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    graph = helper.make_graph(
        [node],
        "quantize",
        [helper.make_tensor_value_info("x", kind.FLOAT, weight.shape)],
        [helper.make_tensor_value_info("y", kind.INT8, weight.shape)],
        [helper.make_tensor("scale", kind.FLOAT, [], [float(grid.scale)]), helper.make_tensor("zero", kind.INT8, [], [int(grid.zero_point)])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert (session.run(None, {"x": weight})[0] == quantize(weight, grid)).all()
