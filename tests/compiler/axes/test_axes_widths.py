"""What widths cost, counted from the axes, against what the narrowed models cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith import Model
from edgesmith.compiler.axes import Axes, remove
from edgesmith.compiler.axes.widths import Counts, Monomial, Step, Volume
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer


class Dense(nn.Module):
    """Concatenated convolutions, of which one is grouped, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(14, 12, 3, padding=1, groups=2)
        self.up, self.head = nn.ConvTranspose2d(26, 5, 2, stride=2), nn.Linear(5 * 256, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.first(x))
        b = torch.cat([a, torch.relu(self.second(a))], 1)
        return self.head(torch.relu(self.up(torch.cat([b, torch.relu(self.third(b))], 1))).flatten(1))


@pytest.mark.parametrize("make", [TinyTransformer, TinyConvNet, Dense])
@pytest.mark.parametrize("seed", range(3))
def test_counts_follow_widths(make: type[nn.Module], seed: int) -> None:
    model = Model.from_module(make().eval(), (torch.randn(2, 1, 8, 8),))
    axes, rng = Axes.of(model), np.random.default_rng(seed)
    counts = Counts(axes, {g.axis for g in axes.groups})
    widths = {g.name: g.size if seed == 0 else int(rng.integers(1, g.size + 1)) for g in axes.groups}
    narrow = remove(model, {g.name: range(widths[g.name], g.size) for g in axes.groups}, axes=axes)
    at = {g.axis: np.array(widths[g.name], dtype=np.float64) for g in axes.groups}
    assert sum(float(v.of(at)) for v in counts.macs()) == narrow.macs
    assert sum(float(v.of(at)) for v in counts.parameters()) == narrow.params


def test_kernels_work_in_whole_steps_and_take_more_for_what_is_none() -> None:
    model = Model.from_module(nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 3)).eval(), (torch.randn(2, 4),))
    (group,) = Axes.of(model).groups
    volume = Volume(Monomial(2), Monomial(1, (group.axis,)), Monomial(3))
    widths = {group.axis: np.array([16.0, 17.0, 20.0])}
    assert volume.of(widths).tolist() == [96, 102, 120]
    assert volume.of(widths, (Step(8), Step(4))).tolist() == [2 * 16 * 4, 2 * 24 * 4, 2 * 24 * 4]
    assert volume.of(widths, (Step(16, 0.5), Step(3, 0.5))).tolist() == [2 * 16 * 3, 2 * 48 * 3, 2 * 48 * 3]


def test_a_narrower_kernel_takes_fewer_units_than_one_step() -> None:
    step = Step(32, narrow=0.25)
    assert step.of(np.array([0.0, 1.0, 16.0, 17.0, 31.0, 32.0, 33.0])).tolist() == [0, 20, 20, 40, 40, 32, 64]
