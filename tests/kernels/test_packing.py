"""Sizes of packed weights: those that XNNPACK 2026 asked the C library for, seen in real files."""

from __future__ import annotations

import pytest

from edgesmith.kernels import packing


@pytest.mark.parametrize(
    ("outputs", "depth", "bits", "scheme", "size"),
    [
        (384, 384, 32, "float", 591_360),
        (1536, 384, 32, "float", 2_365_440),
        (24, 144, 32, "float", 18_560),
        (960, 160, 8, "static", 161_280),
        (512, 512, 8, "dynamic", 268_288),
        (96, 384, 8, "dynamic", 38_016),
    ],
)
def test_matrices(outputs: int, depth: int, bits: int, scheme: str, size: int) -> None:
    assert packing.matrix_bytes(outputs, depth, bits, scheme) == size


def test_convolutions_are_matrices_of_their_pixels() -> None:
    assert packing.convolution_bytes(1, 512, 9 * 512, 8, "static") == 2_363_392
    assert packing.convolution_bytes(4, 128, 9 * 128, 32, "float") == 4 * packing.matrix_bytes(128, 9 * 128, 32, "float")
    assert packing.convolution_bytes(960, 1, 9, 32, "float") == 38_400, "a depthwise one is one matrix"
    assert packing.convolution_bytes(192, 1, 49, 32, "float") == 307_200, "but where it is too large"


def test_tables_of_pointers() -> None:
    assert packing.indirection_bytes((3, 3), (1, 1), (112, 112), depthwise=True) == 306_432
    assert packing.indirection_bytes((3, 3), (2, 2), (56, 56), depthwise=True) == 151_872
    assert packing.indirection_bytes((3, 3), (2, 2), (112, 112), depthwise=False) == pytest.approx(903_240, rel=1e-3), "XNNPACK rounds up to its tile"
    assert packing.indirection_bytes((7, 7), (1, 1), (32, 32), depthwise=True) == pytest.approx(403_760, rel=1e-2)
    assert packing.indirection_bytes((1, 1), (1, 1), (112, 112), depthwise=False) == 0


def test_large_blocks_have_pages_of_their_own() -> None:
    assert packing.allocated(1000) == 1000
    assert packing.allocated(591_360) == 145 * 4096 + 4096
