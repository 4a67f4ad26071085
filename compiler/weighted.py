"""The operators that multiply an activation by a weight, and where their arguments are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Weighted:
    """Positions of an operator's arguments, and the dimension of its weight that counts output channels.

    With ``transposed`` and groups > 1 that dimension counts the channels of one group: channels of the same rank in each group share an index.
    """

    activation: int
    weight: int
    bias: int | None
    axis: int
    transposed: bool = False

    def argument(self, node: fx.Node, position: int | None) -> fx.Node | None:
        """The node at ``position`` of ``node``'s arguments, or None where there is none."""
        value = node.args[position] if position is not None and position < len(node.args) else None
        return value if isinstance(value, fx.Node) else None


_LINEAR = Weighted(0, 1, 2, 0)
_CONV = Weighted(0, 1, 2, 0)
_CONV_TRANSPOSE = Weighted(0, 1, 2, 1, transposed=True)
_MATMUL = Weighted(0, 1, None, 1)

LINEARS: Mapping[object, Weighted] = MappingProxyType(
    {
        aten.linear.default: _LINEAR,
        aten.addmm.default: Weighted(1, 2, 0, 1),
        aten.mm.default: _MATMUL,
        aten.matmul.default: _MATMUL,
    }
)
"""Matrix products; ``mm`` and ``matmul`` count only where their second argument is a two-dimensional weight."""

CONVOLUTIONS: Mapping[object, Weighted] = MappingProxyType(
    {
        aten.conv1d.default: _CONV,
        aten.conv1d.padding: _CONV,
        aten.conv2d.default: _CONV,
        aten.conv2d.padding: _CONV,
        aten.conv3d.default: _CONV,
        aten.conv3d.padding: _CONV,
        aten.conv_transpose1d.default: _CONV_TRANSPOSE,
        aten.conv_transpose2d.input: _CONV_TRANSPOSE,
        aten.conv_transpose3d.input: _CONV_TRANSPOSE,
    }
)


def weighted(node: fx.Node) -> Weighted | None:
    """How ``node`` multiplies by a weight, or None if it does not: the second operand of a matrix product may be an activation."""
    kind = LINEARS.get(node.target) or CONVOLUTIONS.get(node.target)
    if kind is None:
        return None
    weight = kind.argument(node, kind.weight)
    if weight is None or weight.op == "placeholder":
        return None
    if kind is _MATMUL and (weight.op != "get_attr" or weight.meta["val"].dim() != 2):
        return None
    return kind
