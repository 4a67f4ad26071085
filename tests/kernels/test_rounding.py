from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgesmith.kernels.rounding import half_away, half_to_even, short

FINITE = st.floats(-1e30, 1e30).filter(lambda x: x == 0 or abs(x) > 1e-30)


def test_ties() -> None:
    ties = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
    assert half_to_even(ties).tolist() == [-2, -2, 0, 0, 2, 2]
    assert half_away(ties).tolist() == [-3, -2, -1, 1, 2, 3]


def test_a_number_just_below_a_tie_is_not_rounded_up() -> None:
    below = np.nextafter(0.5, 0)  # adding 0.5 first would give 1
    assert half_away(below) == 0


@given(x=FINITE, bits=st.integers(2, 24))
def test_short_numbers_are_near_and_exact_in_products(x: float, bits: int) -> None:
    near, above = float(short(x, bits)), float(short(x, bits, up=True))
    assert abs(near - x) <= abs(x) * 2.0**-bits
    assert x <= above <= x + abs(x) * 2.0 ** (1 - bits)
    factor = 2 ** (24 - bits) - 1
    assert np.float32(near) == near
    assert float(np.float32(near) * np.float32(factor)) == near * factor


def test_one_bit_more_is_not_exact() -> None:
    scale = 2**18 - 1
    assert float(np.float32(scale) * np.float32(127)) != scale * 127
    assert short(scale, 17) == pytest.approx(scale, rel=2**-17)
