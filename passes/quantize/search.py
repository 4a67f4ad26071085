"""The range of each grid: of several, the one whose rounding changes least what the readers of its tensors compute.

What is best for the tensor itself is not always best for those who read it: a convolution may hardly weigh the channel that a range is widened for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from edgesmith.compiler import grid_operators as ops
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.simulate import fake_quantize
from edgesmith.kernels.affine import EMPTY_RANGE_SCALE, Grid, activation_grid
from edgesmith.kernels.ranges import SEARCHES, Histogram, minmax, percentile
from edgesmith.passes.observe.visit import Look, merged, visit
from edgesmith.passes.quantize.grids import GridGroup

AUTO = "auto"
DEFAULT = "mse"
"""For grids that nothing computes with."""
CANDIDATES: Mapping[str, Callable[[Histogram], tuple[float, float]]] = {
    **SEARCHES,
    "percentile-99.9": partial(percentile, percent=99.9),
    "percentile-99.999": partial(percentile, percent=99.999),
}
"""What AUTO chooses among; ``percentile`` is 99.99 %."""


@dataclass
class Choice:
    """The candidates for one grid, and the squared error that each makes in the readers' results, relative to these. ``peak``: the largest magnitude seen."""

    group: GridGroup
    grids: dict[str, Grid]
    peak: float
    errors: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.errors = np.zeros(len(self.grids))

    @classmethod
    def of(cls, group: GridGroup, histogram: Histogram, ranges: str) -> Choice:
        """The candidates of ``ranges`` (AUTO, or the name of one); those that come to the same grid are one."""
        names = CANDIDATES if ranges == AUTO else [ranges]
        distinct: dict[tuple[float, int], tuple[str, Grid]] = {}
        for name in sorted(names, key=lambda n: n != DEFAULT):
            grid = activation_grid(*CANDIDATES[name](histogram))
            distinct.setdefault((float(grid.scale), int(grid.zero_point)), (name, grid))
        low, high = minmax(histogram)
        return cls(group, dict(distinct.values()), max(-low, high) or EMPTY_RANGE_SCALE)

    def best(self) -> tuple[str, Grid]:
        """The name and the grid of the least error; the first where nothing computes with them."""
        return list(self.grids.items())[int(np.argmin(self.errors))]

    def looks(self, schemes: Mapping[fx.Node, Scheme]) -> Iterator[tuple[fx.Node, Look]]:
        """What to do at each static operator that computes with a tensor of the group."""
        if len(self.grids) > 1:
            for member in self.group.members:
                for reader in member.users:
                    if schemes.get(reader) is Scheme.STATIC and not ops.keeps_grid(reader):
                        yield reader, self._judge(reader, member)

    def _judge(self, reader: fx.Node, member: fx.Node) -> Look:
        def look(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> None:
            energy = max(float(result.double().square().sum()), 1e-30)
            for place, grid in enumerate(self.grids.values()):
                given = list(args)
                for at, argument in enumerate(reader.args):
                    if argument is member:
                        given[at] = fake_quantize(args[at], float(grid.scale), int(grid.zero_point))
                computed = reader.target(*given, **kwargs)  # type: ignore[operator]
                self.errors[place] += float((computed - result).double().square().sum()) / energy

        return look


def judge(graph: fx.GraphModule, choices: Sequence[Choice], schemes: Mapping[fx.Node, Scheme], batches: Iterable[tuple[torch.Tensor, ...]]) -> None:
    """Run ``batches`` and add up the errors of every candidate of ``choices``."""
    looks = merged(pair for choice in choices for pair in choice.looks(schemes))
    if looks:
        visit(graph, looks, batches)
