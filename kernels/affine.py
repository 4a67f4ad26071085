"""Affine quantization: ``real = scale * (q - zero_point)`` with integer q.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (CVPR 2018), section 2.1;
per-channel symmetric weights as in Krishnamoorthi (arXiv 1806.08342), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgesmith.kernels.rounding import half_to_even, short

ACTIVATION_SCALE_BITS = 16
"""8 bits of grid and 16 of scale fit float32's 24: the ends of an activation's range are exact."""
WEIGHT_SCALE_BITS = 17
"""7 bits of magnitude and 17 of scale fit float32's 24: every weight on its grid is exact."""
EMPTY_RANGE_SCALE = 2.0**-8
"""Scale of a range that holds nothing but zero; any value serves, none may divide by zero."""
SMALLEST_SCALE = 2.0**-100
"""Ranges narrower than 255 of these are widened, so that scales and their reciprocals stay normal float32 numbers."""


@dataclass(frozen=True)
class Grid:
    """Integers in [``low``, ``high``] standing for ``scale * (q - zero_point)``.

    ``scale`` (float64 that float32 holds exactly) and ``zero_point`` are scalars, or one value for each index of ``axis``. Zero is always on the grid.
    """

    scale: npt.NDArray[np.float64]
    zero_point: npt.NDArray[np.int64]
    low: int = -128
    high: int = 127
    axis: int | None = None

    @property
    def dtype(self) -> type[np.int8] | type[np.uint8]:
        """int8, or uint8 where the grid starts at zero."""
        return np.int8 if self.low < 0 else np.uint8

    def along(self, ndim: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Scale and zero point shaped to broadcast against an array of ``ndim`` dimensions."""
        shape = [-1 if d == self.axis else 1 for d in range(ndim)] if self.axis is not None else []
        return self.scale.astype(np.float32).reshape(shape), self.zero_point.reshape(shape)


def activation_grid(low: float, high: float, *, signed: bool = True) -> Grid:
    """The 8-bit asymmetric per-tensor grid that covers [``low``, ``high``] and zero.

    The scale is rounded up to 16 significant bits, so that neither end is cut off by its rounding; the zero point is rounded half to even, which
    may move the covered interval by half a step.

    Raises:
        ValueError: an end is not finite, or low > high.
    """
    if not (np.isfinite(low) and np.isfinite(high)) or low > high:
        raise ValueError(f"[{low}, {high}] is not a finite interval")
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    bottom = -128 if signed else 0
    scale = max(float(short((high - low) / 255, ACTIVATION_SCALE_BITS, up=True)), SMALLEST_SCALE) if high > low else EMPTY_RANGE_SCALE
    zero = int(np.clip(half_to_even(bottom - low / scale), bottom, bottom + 255))
    return Grid(np.array(scale), np.array(zero), bottom, bottom + 255)


def ends(grid: Grid) -> tuple[float, float]:
    """The real values of a per-tensor grid's lowest and highest integer, exact in float32."""
    return float(grid.scale * (grid.low - grid.zero_point)), float(grid.scale * (grid.high - grid.zero_point))


def weight_grid(weight: npt.NDArray[np.floating], axis: int | None) -> Grid:
    """The symmetric int8 grid [-127, 127] of ``weight``, one scale per index of ``axis`` (or one in all), from the largest magnitude.

    The extreme of a channel that is not all zero lies at +-127 steps. A channel of zeros takes the median of the others' scales, or 1.

    Raises:
        ValueError: a weight is not finite.
    """
    magnitude = np.abs(np.asarray(weight, dtype=np.float64))
    if not np.isfinite(magnitude).all():
        raise ValueError("a weight is not finite")
    others = None if axis is None else tuple(d for d in range(weight.ndim) if d != axis % weight.ndim)
    extreme = magnitude.max(axis=others, initial=0.0)
    scale = short(extreme / 127, WEIGHT_SCALE_BITS)
    alive = extreme >= 127 * SMALLEST_SCALE
    spare = float(short(np.median(scale[alive]), WEIGHT_SCALE_BITS)) if alive.any() else 1.0
    scale = np.where(alive, scale, spare)
    return Grid(scale, np.zeros(scale.shape, np.int64), -127, 127, None if axis is None else axis % weight.ndim)


def quantize(x: npt.NDArray[np.floating], grid: Grid) -> npt.NDArray[np.integer]:
    """The nearest grid integers of ``x`` (ties to even), saturated at the grid's ends. Division and sum are float32, as in the runtimes."""
    scale, zero = grid.along(x.ndim)
    steps: npt.NDArray[np.floating] = np.rint(x.astype(np.float32) / scale) + zero
    integers: npt.NDArray[np.integer] = np.clip(steps, grid.low, grid.high).astype(grid.dtype)
    return integers


def dequantize(q: npt.NDArray[np.integer], grid: Grid) -> npt.NDArray[np.float32]:
    """The float32 values that the integers ``q`` stand for."""
    scale, zero = grid.along(q.ndim)
    values: npt.NDArray[np.float32] = (q.astype(np.int64) - zero).astype(np.float32) * scale
    return values


def fake_quantize(x: npt.NDArray[np.floating], grid: Grid) -> npt.NDArray[np.float32]:
    """``dequantize(quantize(x))``: the float32 values that an 8-bit tensor would hold in place of ``x``."""
    return dequantize(quantize(x, grid), grid)
