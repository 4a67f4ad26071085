"""Tensors made from literals."""

from __future__ import annotations

import torch

from edgesmith.compiler.axes.axes import fresh
from edgesmith.compiler.axes.op import Op, Shape
from edgesmith.compiler.axes.rules.table import rule

aten = torch.ops.aten


@rule(
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.empty.memory_format,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
)
def filled(op: Op) -> Shape:
    """The same value everywhere: any part of it will do."""
    shape = tuple(fresh(n) for n in op.out_sizes)
    op.resize_list("size", shape)
    return shape


@rule(aten.arange, aten.linspace.default, aten.eye, aten.tril_indices.default, aten.triu_indices.default, aten.scalar_tensor.default)
def numbered(op: Op) -> Shape:
    """Values that tell the place: pinned."""
    return tuple(op.pinned(n, "numbered places") for n in op.out_sizes)
