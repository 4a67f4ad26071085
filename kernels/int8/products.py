"""Sums of products of integers, exact: what goes into a requantization.

Activations are integers of any 8-bit grid, weights int8 around zero, biases int32 in steps of activation step x weight step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Integers: TypeAlias = npt.NDArray[np.integer]
Sums: TypeAlias = npt.NDArray[np.int64]


def linear(x: Integers, zero: int, weight: Integers, bias: Integers | None = None) -> Sums:
    """(..., K) activations with zero point ``zero`` by (N, K) weights -> (..., N)."""
    sums: Sums = (x.astype(np.int64) - zero) @ weight.astype(np.int64).T
    return sums if bias is None else sums + bias.astype(np.int64)


def matmul(a: Integers, a_zero: int, b: Integers, b_zero: int) -> Sums:
    """(..., M, K) by (..., K, N), both activations -> (..., M, N)."""
    sums: Sums = (a.astype(np.int64) - a_zero) @ (b.astype(np.int64) - b_zero)
    return sums


def convolution(  # noqa: PLR0913 - the arguments of every convolution
    x: Integers,
    zero: int,
    weight: Integers,
    bias: Integers | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Sums:
    """(N, C, H, W) activations by (O, C / groups, h, w) weights -> (N, O, H', W'); depthwise with ``groups`` = C. Padding is the value zero."""
    centred = np.pad(x.astype(np.int64) - zero, ((0, 0), (0, 0), *((p, p) for p in padding)))
    out, inner, height, width = weight.shape
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, (height, width), strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(centred, reach, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    grouped = windows.reshape(len(x), groups, inner, *windows.shape[2:])
    kernels = weight.astype(np.int64).reshape(groups, out // groups, inner, height, width)
    sums: Sums = np.einsum("ngcyxhw,gochw->ngoyx", grouped, kernels, optimize=True).reshape(len(x), out, *windows.shape[2:4])
    return sums if bias is None else sums + bias.astype(np.int64).reshape(-1, 1, 1)
