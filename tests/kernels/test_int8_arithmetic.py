"""Integer arithmetic against the reals, and against its definition at ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgesmith.kernels.affine import Grid
from edgesmith.kernels.int8 import elementwise, products
from edgesmith.kernels.int8.requantize import Requantize, by_float, by_multiplier, by_shift, multiplier_of

WIDE = Grid(np.array(1.0), np.array(0), -128, 127)


@pytest.mark.parametrize(
    ("requantize", "halves"),
    [(by_float, [-2, -2, 0, 0, 2, 2]), (by_multiplier, [-2, -1, 0, 1, 2, 3]), (by_shift, [-2, -1, 0, 1, 2, 3])],
    ids=["float", "multiplier", "shift"],
)
def test_halves_are_rounded_as_the_runtime_does(requantize: Requantize, halves: list[int]) -> None:
    sums = np.array([-5, -3, -1, 1, 3, 5])
    assert requantize(sums, np.array([0.5], np.float32), WIDE).tolist() == halves


def test_a_shift_rounds_halves_away_from_zero_only_in_tensorflow_lite() -> None:
    sums, quarter = np.array([-6, -2, 2, 6]), np.array([0.25], np.float32)
    assert by_multiplier(sums, quarter, WIDE).tolist() == [-2, -1, 1, 2]
    assert by_shift(sums, quarter, WIDE).tolist() == [-1, 0, 1, 2]
    assert by_float(sums, quarter, WIDE).tolist() == [-2, 0, 0, 2]


@pytest.mark.parametrize("requantize", [by_float, by_multiplier, by_shift], ids=["float", "multiplier", "shift"])
@given(
    sums=st.lists(st.integers(-(2**26), 2**26), min_size=1, max_size=20),
    factor=st.floats(2.0**-24, 2.0**4, width=32),
    zero=st.integers(-128, 127),
)
def test_every_way_is_within_a_step_of_the_real_product(requantize: Requantize, sums: list[int], factor: float, zero: int) -> None:
    grid = Grid(np.array(1.0), np.array(zero), -128, 127)
    exact = np.clip(np.array(sums) * float(factor) + zero, -128, 127)
    found = requantize(np.array(sums), np.array([factor], np.float32), grid)
    assert found.dtype == np.int8
    # Half a step by rounding, another half by what 24 or 31 bits of a factor leave out of a product that is not saturated.
    assert np.abs(found - exact).max() <= 1.0


def test_a_multiplier_has_thirty_one_bits() -> None:
    multiplier, exponent = multiplier_of(np.array([1.0, 0.3, np.nextafter(np.float32(1), np.float32(0))], np.float32))
    assert (multiplier >= (1 << 30)).all() and (multiplier < 1 << 31).all()
    np.testing.assert_allclose(multiplier * 2.0 ** (exponent - 31), [1.0, np.float32(0.3), 1.0], rtol=2.0**-23)


def test_what_no_runtime_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bits"):
        by_float(np.array([2**31]), np.array([1.0], np.float32), WIDE)
    with pytest.raises(ValueError, match="not positive"):
        by_multiplier(np.array([1]), np.array([0.0], np.float32), WIDE)


@pytest.mark.parametrize(("groups", "options"), [(1, {}), (2, {"stride": (2, 1), "padding": (1, 2)}), (4, {"dilation": (2, 1), "padding": (2, 0)})])
def test_a_convolution_is_exact(groups: int, options: dict[str, tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = rng.integers(-128, 128, (2, 4, 9, 8)), rng.integers(-127, 128, (8, 4 // groups, 3, 3)), rng.integers(-(2**20), 2**20, 8)
    found = products.convolution(x, 5, weight, bias, groups=groups, **options)
    real = torch.nn.functional.conv2d(*(torch.from_numpy(a).double() for a in (x - 5, weight, bias)), groups=groups, **options)
    np.testing.assert_array_equal(found, real.numpy())


def test_matrix_products_are_exact() -> None:
    rng = np.random.default_rng(1)
    a, b, weight = rng.integers(-128, 128, (3, 5, 7)), rng.integers(-128, 128, (3, 7, 4)), rng.integers(-127, 128, (6, 7))
    np.testing.assert_array_equal(products.matmul(a, -3, b, 9), np.einsum("nmk,nkp->nmp", a + 3, b - 9))
    np.testing.assert_array_equal(products.linear(a, -3, weight), np.einsum("nmk,pk->nmp", a + 3, weight))


@pytest.mark.parametrize("add", [elementwise.add_by_float, elementwise.add_by_shift], ids=["float", "shift"])
def test_a_sum_is_within_a_step_of_the_real_one(add) -> None:
    rng = np.random.default_rng(2)
    grids = [Grid(np.array(scale), np.array(zero)) for scale, zero in ((0.02, 3), (0.5, -70), (0.6, -20))]
    a, b = (rng.integers(-128, 128, 4000).astype(np.int8) for _ in range(2))
    found = add(a, grids[0], b, grids[1], grids[2])
    real = sum((x.astype(float) - grid.zero_point) * grid.scale for x, grid in zip((a, b), grids, strict=False)) / grids[2].scale + grids[2].zero_point
    # Rounding, and two multipliers of 20 bits.
    assert np.abs(found - np.clip(real, -128, 127)).max() <= 0.5 + 512 * 2.0**-20
