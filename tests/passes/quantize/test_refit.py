"""Rounding that makes up for itself: less error on inputs that go together, the same grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.weighted import weighted
from edgesmith.passes.quantize import quantize
from edgesmith.passes.quantize.quantize import Quantize
from edgesmith.passes.quantize.refit import rounded


def correlated(shape: tuple[int, ...], rank: int) -> torch.Tensor:
    """Normal values whose channels are mixtures of ``rank``."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape[0], rank, *shape[2:], generator=generator)
    mix = torch.randn(shape[1], rank, generator=generator)
    return torch.einsum("cr,nr...->nc...", mix, hidden) + 0.1 * torch.randn(shape, generator=generator)


def test_the_error_is_smaller_where_inputs_go_together_and_ends_stay() -> None:
    x = correlated((2000, 48), 6)
    products, steps = x.T @ x, torch.empty(20, 48).uniform_(-126, 126, generator=torch.Generator().manual_seed(1))
    steps[:, 3] = 127
    new = rounded(steps, products)
    assert torch.equal(new, new.round()) and new.abs().max() == 127 and (new[:, 3] == 127).all()
    errors = [float(((q - steps) @ x.T).square().sum()) for q in (steps.round(), new)]
    assert errors[1] < 0.3 * errors[0]
    assert torch.equal(rounded(steps, torch.zeros(48, 48)), steps.round())
    alone = rounded(steps, torch.eye(48))
    assert torch.equal(alone, steps.round()), "inputs that do not go together have nothing to make up with"


LAYERS = {
    "linear": (lambda: nn.Linear(32, 16), (400, 32)),
    "convolution": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (160, 8, 10, 10)),
    "same": (lambda: nn.Conv2d(8, 12, (3, 2), padding="same", dilation=2), (160, 8, 10, 10)),
    "groups": (lambda: nn.Conv2d(8, 12, 3, groups=4, bias=False), (160, 8, 10, 10)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (160, 8, 10, 10)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_loses_less_on_samples_that_were_not_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    x = correlated(shape, 2)
    if x.dim() == 4:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1)
    model = Model.from_module(make().eval(), (x[:2],))
    half = len(x) // 2
    split = Split((x[:half].numpy(),), np.zeros(half, np.int64))
    ctx = PassContext(data=PassData(split, split))
    refitted = Quantize(scheme="static").run(model, ctx).model
    monkeypatch.setattr(quantize, "refit", lambda *args: 0)
    nearest = Quantize(scheme="static").run(model, ctx).model
    assert refitted.quant.weights == nearest.quant.weights
    with torch.no_grad():
        errors = [float((m(x[half:]) - model(x[half:])).square().mean()) for m in (nearest, refitted)]
    assert errors[1] < 0.7 * errors[0]


def test_every_channel_still_reaches_the_end_of_its_grid() -> None:
    """What lets each runtime's own tool find the same integers."""
    x = correlated((128, 32), 3)
    model = Model.from_module(nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8)).eval(), (x[:2],))
    split = Split((x.numpy(),), np.zeros(len(x), np.int64))
    found = Quantize(scheme="static").run(model, PassContext(data=PassData(split, split))).model
    for node in graphs.operators(found.graph):
        if weighted(node):
            name = str(node.args[1].target)
            integers = graphs.tensor(found.graph, name).detach().numpy() / np.array(found.quant.weights[name].scales, np.float32)[:, None]
            assert (integers == np.round(integers)).all() and (np.abs(integers).max(1) == 127).all()
