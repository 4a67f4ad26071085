"""From int32 sums to 8-bit integers: the three ways that runtimes have.

- ``by_float``: ONNX Runtime (MLAS) and XNNPACK on x86: a product in float32, rounded half to even.
- ``by_multiplier``: TensorFlow Lite's own kernels: a 32-bit fixed-point multiplier, rounded half up, and a shift, rounded half away from zero
  (Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018, section 2.2).
- ``by_shift``: XNNPACK on ARM ("rndnu"): one multiplier, one shift, rounded half up.

Two of them differ by at most one step, where a value lies next to a tie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edgesmith.kernels.affine import Grid

Sums: TypeAlias = npt.NDArray[np.int64]
Factors: TypeAlias = npt.NDArray[np.float32]
Requantize: TypeAlias = Callable[[Sums, Factors, Grid], npt.NDArray[np.integer]]
"""Sums that fit 32 bits, the step of a sum over that of the result (broadcast against the sums), the result's grid -> integers on that grid."""

_ONE = 31
"""Fraction bits of a multiplier."""
_SHIFT_RANGE = (-30, 62)


def by_float(sums: Sums, factors: Factors, grid: Grid) -> npt.NDArray[np.integer]:
    """``rint(float32(sum) * factor)``, all in float32."""
    steps = np.rint(_checked(sums).astype(np.float32) * factors.astype(np.float32)).astype(np.int64)
    return saturated(steps, grid)


def by_multiplier(sums: Sums, factors: Factors, grid: Grid) -> npt.NDArray[np.integer]:
    """The high half of the doubled product with a 32-bit multiplier, then a shift to the right (gemmlowp's fixed point)."""
    multiplier, exponent = multiplier_of(factors)
    left, right = np.maximum(exponent, 0), np.maximum(-exponent, 0)
    product = _checked(_checked(sums) << left) * multiplier
    nudge = np.where(product >= 0, 1 << (_ONE - 1), 1 - (1 << (_ONE - 1)))
    high = _towards_zero(product + nudge, _ONE)
    return saturated(_half_away(high, right), grid)


def by_shift(sums: Sums, factors: Factors, grid: Grid) -> npt.NDArray[np.integer]:
    """``floor(sum * multiplier / 2^shift + 1/2)`` with a 31-bit multiplier."""
    multiplier, exponent = multiplier_of(factors)
    shift = np.clip(_ONE - exponent, 1, _SHIFT_RANGE[1])
    return saturated((_checked(sums) * multiplier + (np.int64(1) << (shift - 1))) >> shift, grid)


def multiplier_of(factors: Factors) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positive ``factors`` as ``multiplier * 2^(exponent - 31)``, multiplier in [2^30, 2^31).

    Raises:
        ValueError: a factor is not positive and finite.
    """
    values = np.asarray(factors, dtype=np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError("a factor is not positive and finite")
    mantissa, exponent = np.frexp(values)
    multiplier = np.floor(mantissa * 2.0**_ONE + 0.5).astype(np.int64)
    over = multiplier == 1 << _ONE
    return np.where(over, multiplier // 2, multiplier), np.clip(exponent.astype(np.int64) + over, *_SHIFT_RANGE)


def saturated(steps: npt.NDArray[np.integer], grid: Grid) -> npt.NDArray[np.integer]:
    """Integers of any size, counted from ``grid``'s zero point, as integers of the grid; those beyond its ends are moved to them."""
    clipped: npt.NDArray[np.integer] = np.clip(steps + grid.zero_point, grid.low, grid.high).astype(grid.dtype)
    return clipped


def _checked(sums: Sums) -> Sums:
    """``sums`` as 64-bit integers.

    Raises:
        ValueError: one of them does not fit into the 32 bits that runtimes have.
    """
    if sums.size and not -(1 << _ONE) <= int(sums.min()) <= int(sums.max()) < 1 << _ONE:
        raise ValueError("a sum of products does not fit into 32 bits")
    return sums.astype(np.int64)


def _towards_zero(x: Sums, bits: int) -> Sums:
    return np.where(x >= 0, x >> bits, -(-x >> bits))


def _half_away(x: Sums, bits: npt.NDArray[np.int64]) -> Sums:
    """``x / 2^bits`` rounded to the nearest, ties away from zero."""
    mask = (np.int64(1) << bits) - 1
    threshold = (mask >> 1) + (x < 0)
    return (x >> bits) + ((x & mask) > threshold)
