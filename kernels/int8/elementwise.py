"""Operators that combine two tensors of integers, each on its own grid, and the mean over an image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgesmith.kernels.affine import Grid
from edgesmith.kernels.int8.requantize import by_float, saturated

Integers = npt.NDArray[np.integer]

_SUM_BITS = 20
"""Fraction bits of the larger multiplier of a sum in XNNPACK: it lies in [2^20, 2^21)."""


def add_by_float(a: Integers, a_grid: Grid, b: Integers, b_grid: Grid, grid: Grid) -> Integers:
    """ONNX Runtime's ``QLinearAdd``: both sides in steps of the result, added in float32, rounded half to even."""
    left, right = (_centred(x, own).astype(np.float32) * _ratio(own, grid) for x, own in ((a, a_grid), (b, b_grid)))
    return saturated(np.rint(left + right).astype(np.int64), grid)


def add_by_shift(a: Integers, a_grid: Grid, b: Integers, b_grid: Grid, grid: Grid) -> Integers:
    """XNNPACK's sum: two multipliers with a common shift, rounded half up."""
    ratios = [float(_ratio(own, grid)) for own in (a_grid, b_grid)]
    shift = _SUM_BITS - (int(np.frexp(max(ratios))[1]) - 1)
    left, right = (int(np.rint(np.float32(np.ldexp(ratio, shift)))) for ratio in ratios)
    sums = _centred(a, a_grid) * left + _centred(b, b_grid) * right
    return saturated((sums + (1 << (shift - 1))) >> shift, grid)


def multiply(a: Integers, a_grid: Grid, b: Integers, b_grid: Grid, grid: Grid) -> Integers:
    """The product, brought to the grid of the result in float32 (XNNPACK, and ONNX Runtime's ``QLinearMul``)."""
    factor = np.float32(a_grid.scale) * np.float32(b_grid.scale) / np.float32(grid.scale)
    return by_float(_centred(a, a_grid) * _centred(b, b_grid), np.asarray(factor, np.float32), grid)


def image_mean(x: Integers, x_grid: Grid, grid: Grid) -> Integers:
    """(N, C, H, W) -> (N, C, 1, 1): the sum, brought to the grid of the result in float32."""
    pixels = x.shape[2] * x.shape[3]
    factor = np.float32(x_grid.scale) / (np.float32(grid.scale) * np.float32(pixels))
    return by_float(_centred(x, x_grid).sum(axis=(2, 3), keepdims=True), np.asarray(factor, np.float32), grid)


def _centred(x: Integers, grid: Grid) -> npt.NDArray[np.int64]:
    centred: npt.NDArray[np.int64] = x.astype(np.int64) - grid.zero_point
    return centred


def _ratio(grid: Grid, result: Grid) -> np.float32:
    return np.float32(grid.scale) / np.float32(result.scale)
