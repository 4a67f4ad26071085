"""What runtimes lack is written as what they have: the same values under the same names, in files that compute them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesmith import Model, targets
from edgesmith.compiler import graph as graphs
from edgesmith.compiler.instruments import flat_outputs
from edgesmith.compiler.lowering import Lowering
from edgesmith.compiler.plain import REWRITES, plain

CASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "norm of rows": lambda x: F.normalize(x, dim=-1),
    "norm of a plane": lambda x: x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1),
    "norm without the dimension": lambda x: x.norm(dim=1),
    "greatest of a row": lambda x: x.max(dim=1).values + x.max(dim=1, keepdim=True).values.mean(1),
    "convolution that pads by a word": lambda x: F.conv2d(x[:, None], torch.ones(2, 1, 3, 5), padding="same", dilation=(2, 1)),
    "convolution that does not pad": lambda x: F.conv1d(x, torch.ones(2, 4, 3), stride=2, padding="valid"),
    "mean of an image by a window beyond it": lambda x: F.avg_pool2d(x[:, None], 16, 16, ceil_mode=True),
    "mean of planes without channels by a window beyond them": lambda x: F.avg_pool2d(x, 16, 16, ceil_mode=True),
    "mean of a sequence": lambda x: F.adaptive_avg_pool1d(x, 1),
}


class After(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.function = nn.Linear(8, 8), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.first(x))


def shapes(model: Model) -> dict[str, torch.Size]:
    return {n.name: n.meta["val"].shape for n in graphs.operators(model.graph) if isinstance(n.meta["val"], torch.Tensor)}


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(0)
    return Model.from_module(After(CASES[request.param]).eval(), (torch.randn(2, 4, 8),))


def test_values_and_names_stay(model: Model) -> None:
    inputs = model.example_inputs(4)
    written = plain(model)
    assert any(node.target in REWRITES for node in graphs.operators(model.graph))
    assert not any(node.target in REWRITES for node in graphs.operators(written.graph))
    assert shapes(model).items() <= shapes(written).items()
    for ours, theirs in zip(flat_outputs(written, inputs), flat_outputs(model, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("target", targets)
def test_every_runtime_computes_them(model: Model, target: str, tmp_path: Path) -> None:
    artifact = Lowering(tmp_path, model.example_inputs(4)).artifact(model, targets[target])  # refuses a difference above 1e-4
    assert artifact.source_fingerprint == model.fingerprint


def test_other_norms_and_pools_are_left_alone() -> None:
    module = After(lambda x: F.adaptive_avg_pool1d(x, 2) + x.norm(p=3, dim=-1, keepdim=True))
    model = Model.from_module(module, (torch.randn(2, 4, 8),))
    assert [n.target for n in graphs.operators(plain(model).graph)] == [n.target for n in graphs.operators(model.graph)]
