"""Bias correction: what rounding adds on average to a channel is taken off its bias (Nagel et al., Data-Free Quantization Through Weight
Equalization and Bias Correction, ICCV 2019, section 4.2; here measured on data)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.weighted import LINEARS, Weighted
from edgesmith.passes.observe.visit import Look, visit
from edgesmith.passes.quantize.schemes import Candidates

Floats = npt.NDArray[np.float64]


def correct_biases(before: fx.GraphModule, after: fx.GraphModule, quantized: Candidates, batches: Iterable[tuple[torch.Tensor, ...]]) -> int:
    """Correct the biases of the operators ``quantized`` of ``before`` in ``after``, its copy with rounded weights; how many were changed.

    Each operator is looked at by itself, on what ``before`` gives it: the correction is that of its weights alone, and serves every scheme.
    """
    shifts = [_Shift(node, kind, after) for node, kind in quantized.items() if _own_bias(before, node, kind)]
    visit(before, {shift.node: shift.look() for shift in shifts}, batches)
    return sum(shift.apply() for shift in shifts)


def _own_bias(graph: fx.GraphModule, node: fx.Node, kind: Weighted) -> bool:
    """Whether ``node`` adds to its channels a parameter that nobody else reads."""
    bias = kind.argument(node, kind.bias)
    if bias is None or bias.op != "get_attr" or len(bias.users) != 1:
        return False
    return len(graphs.same_tensor(graph, str(bias.target))) == 1 and graphs.tensor(graph, str(bias.target)).dim() == 1


@dataclass
class _Shift:
    node: fx.Node
    kind: Weighted
    after: fx.GraphModule
    count: int = 0
    sums: tuple[Floats, Floats] = (np.zeros(()), np.zeros(()))

    def look(self) -> Look:
        """What adds up the error of this operator's results, by channel."""
        weight = self.kind.argument(self.node, self.kind.weight)
        assert weight is not None
        rounded, channel = graphs.tensor(self.after, str(weight.target)), -1 if self.node.target in LINEARS else 1

        def look(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> None:
            given = list(args)
            given[self.kind.weight] = rounded
            added = self.node.target(*given, **kwargs) - result  # type: ignore[operator]
            per_channel = added.double().movedim(channel, 1)
            means = per_channel.reshape(*per_channel.shape[:2], -1).mean(2).numpy()
            self.count += len(means)
            self.sums = self.sums[0] + means.sum(0), self.sums[1] + np.square(means).sum(0)

        return look

    def apply(self) -> bool:
        """Take the mean off the bias, less what of it may be chance: m becomes m (1 - e^2 / m^2), e the standard error of m over samples."""
        if self.count < 2:
            return False
        mean, squares = (total / self.count for total in self.sums)
        error = np.sqrt(np.maximum(squares - mean**2, 0) / (self.count - 1))
        kept = np.where(np.abs(mean) > error, mean - error**2 / np.where(mean == 0, 1, mean), 0.0)
        bias = self.kind.argument(self.node, self.kind.bias)
        assert bias is not None
        old = graphs.tensor(self.after, str(bias.target))
        if not kept.any():
            return False
        new = (old.detach().double() - torch.from_numpy(kept)).to(old.dtype)
        graphs.add_tensor(self.after, str(bias.target), nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)
        return True
