"""From widths to a narrower model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from edgesmith.compiler.axes import Axes, remove
from edgesmith.compiler.model import Model
from edgesmith.passes.prune.branches import Branch, without
from edgesmith.passes.prune.obs import Scores


@dataclass(frozen=True)
class Cutter:
    """Makes a model narrower: the units with the lowest ``scores`` go, and ``branches`` of width 0."""

    axes: Axes
    scores: Scores
    branches: Mapping[str, Branch] = field(default_factory=dict)

    def removals(self, widths: Mapping[str, int]) -> dict[str, list[int]]:
        """The units that go where groups are left with ``widths``; of equal scores the last."""
        found = {}
        for name, width in widths.items():
            if name in self.branches or not (count := self.axes.group(name).size - width):
                continue
            order = torch.argsort(self.scores[name].flip(0), stable=True)
            found[name] = sorted((len(order) - 1 - order[:count]).tolist())
        return found

    def dropped(self, widths: Mapping[str, int]) -> list[Branch]:
        """The branches that go."""
        return [branch for name, branch in self.branches.items() if not widths.get(name, 1)]

    def model(self, widths: Mapping[str, int]) -> Model:
        """The model with what is left."""
        narrow, dropped = remove(self.axes.model, self.removals(widths), axes=self.axes), self.dropped(widths)
        return without(narrow, dropped) if dropped else narrow
