"""Rounding as the runtimes do it, and numbers short enough for exact products."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def half_to_even(x: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Nearest integer, ties to the even one: ONNX ``QuantizeLinear``, XNNPACK and ``torch.round``."""
    rounded: npt.NDArray[np.float64] = np.rint(np.asarray(x, dtype=np.float64))
    return rounded


def half_away(x: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Nearest integer, ties away from zero: C's ``round``, used by TensorFlow Lite's reference kernels."""
    values = np.asarray(x, dtype=np.float64)
    whole = np.trunc(values)
    rounded: npt.NDArray[np.float64] = whole + np.sign(values) * (np.abs(values - whole) >= 0.5)
    return rounded


def short(x: npt.ArrayLike, bits: int, *, up: bool = False) -> npt.NDArray[np.float64]:
    """``x`` with a significand of at most ``bits`` bits: the nearest such number, or with ``up`` the nearest not below it.

    A product of a ``bits``-bit number with an integer of ``24 - bits`` bits is exact in float32. Scales cut to this length make
    every grid value, and every scale that a tool derives again from the grid's ends, equal to the last bit.
    """
    mantissa, exponent = np.frexp(np.asarray(x, dtype=np.float64))
    whole = np.ceil(mantissa * 2.0**bits) if up else np.rint(mantissa * 2.0**bits)
    result: npt.NDArray[np.float64] = np.ldexp(whole, exponent - bits)
    return result
