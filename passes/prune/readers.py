"""The operators whose weights read the units of a group, and can be fitted anew when some of them go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes import Axes, PruneGroup
from edgesmith.passes.observe.inputs import Inputs, Moments

MOST_BYTES = min(2**32, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)
"""Of the products of inputs that are gathered at a time: fewer mean more runs of the model, never another result."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reader:
    """An operator, and its part in the groups that it reads: group name -> the unit that each index along its input belongs to, -1 where none."""

    inputs: Inputs
    units: Mapping[str, Indices]

    @property
    def kernel(self) -> int:
        """Weights for each channel of the input: 1 but for convolutions."""
        return int(np.prod(self._shape[2:]))

    @property
    def _shape(self) -> torch.Size:
        parameter = self.inputs.kind.argument(self.inputs.node, self.inputs.kind.weight)
        assert parameter is not None
        shape: torch.Size = parameter.meta["val"].shape
        return shape

    def along(self, units: Indices) -> Indices:
        """``units`` for each column of ``matrices``: those of a channel follow each other."""
        return np.repeat(units, self.kernel)


def readers(axes: Axes, groups: Iterable[PruneGroup]) -> dict[str, Reader]:
    """Weight -> its reader, for every operator that reads one of ``groups``."""
    of_weight: dict[tuple[str, int], dict[str, Indices]] = {}
    for group in groups:
        for member in group.members:
            rows = member.labels
            if member.side == "consumer" and ((rows >= 0).sum(axis=0) <= 1).all():
                of_weight.setdefault((member.name, member.dim), {})[group.name] = rows.max(axis=0)
    found = {}
    for node in graphs.operators(axes.model.graph):
        inputs = Inputs.of(axes.model.graph, node)
        units = None if inputs is None else of_weight.get((inputs.weight, 1 - inputs.kind.axis))
        if inputs is not None and units:
            found[inputs.weight] = Reader(inputs, units)
    return found


def covariance(moments: Moments, group: int, *, centred: bool) -> torch.Tensor:
    """Mean product of the inputs of one group of an operator, about their means if ``centred``: (d, d), float64."""
    product = moments.products[group].double() / moments.count
    if centred:
        mean = moments.sums[group].double() / moments.count
        product = product - torch.outer(mean, mean)
    return product
