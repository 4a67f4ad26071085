"""How many bytes a kernel library takes to keep weights in the order in which its matrix kernels read them.

The sizes are XNNPACK's, for its kernels of sixteen columns (``src/packing.cc``): every output channel is a row of its weights, its bias, and what
else its dtype needs. Other widths differ by the padding of the last columns alone.
"""

from __future__ import annotations

COLUMNS, FEW_COLUMNS = 16, 8
DEPTHWISE_TAPS = 25
"""The most pixels that a depthwise kernel has; larger convolutions run as one matrix per channel, in kernels of a few columns."""
POINTER_BYTES = 8
BIAS_BYTES = SCALE_BYTES = SUM_BYTES = 4
PAGE_BYTES, OWN_PAGES_FROM = 4096, 128 << 10
PER_CHANNEL_BYTES = {"float": BIAS_BYTES, "static": BIAS_BYTES + SCALE_BYTES, "dynamic": BIAS_BYTES + SCALE_BYTES + SUM_BYTES}
"""Beside the weights themselves: a float layer's bias, a statically quantized one's scale too, a dynamically quantized one's sum of weights too."""


def matrix_bytes(outputs: int, depth: int, item_bits: int, scheme: str) -> int:
    """Packed weights [outputs, depth]; ``scheme``: "float", "static" or "dynamic"."""
    width = COLUMNS if outputs > 1 else FEW_COLUMNS
    columns = -(-outputs // width) * width
    return columns * (depth * item_bits // 8 + PER_CHANNEL_BYTES[scheme])


def convolution_bytes(groups: int, outputs: int, depth: int, item_bits: int, scheme: str) -> int:
    """Packed weights of a convolution: ``outputs`` channels per group, ``depth`` the input channels per group times the kernel's pixels.

    A depthwise one (one input and one output channel per group) is packed as one matrix whose rows are the groups.
    """
    if groups > 1 and outputs == 1 and depth <= DEPTHWISE_TAPS:
        return matrix_bytes(groups, depth, item_bits, scheme)
    return groups * matrix_bytes(outputs, depth, item_bits, scheme)


def indirection_bytes(kernel: tuple[int, int], stride: tuple[int, int], output: tuple[int, int], *, depthwise: bool) -> int:
    """The table of pointers that says which pixel each tap of a convolution reads; none for one of 1x1 that visits every pixel.

    Depthwise kernels share the pointers of neighbouring pixels in a row.
    """
    height, width = kernel
    if kernel == (1, 1) and stride == (1, 1):
        return 0
    if not depthwise or height * width > DEPTHWISE_TAPS:
        return POINTER_BYTES * height * width * output[0] * output[1]
    step = height * width + (output[1] - 1) * min(stride[1], width) * height
    return POINTER_BYTES * output[0] * step


def allocated(size_bytes: int) -> int:
    """What the C library takes from the kernel for one block: large ones get pages of their own, with a page more for its header."""
    if size_bytes < OWN_PAGES_FROM:
        return size_bytes
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES + PAGE_BYTES
