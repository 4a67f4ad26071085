"""What runtimes lack is written as what they have: the same values under the same names, in files that compute them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesmith import Model, PassContext, Pipeline, targets
from edgesmith.compiler import graph as graphs
from edgesmith.compiler.data import Data, Split
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
    "patches": lambda x: F.unfold(x.view(-1, 2, 4, 4), (2, 4), stride=(2, 4)),
    "image of patches": lambda x: F.fold(x.reshape(-1, 8, 4), (2, 8), (1, 4), stride=(1, 4)),
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
    assert all("expand" in name for name, _ in shapes(model).items() - shapes(written).items())
    for ours, theirs in zip(flat_outputs(written, inputs), flat_outputs(model, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("target", targets)
def test_every_runtime_computes_them(model: Model, target: str, tmp_path: Path) -> None:
    artifact = Lowering(tmp_path, model.example_inputs(4)).artifact(model, targets[target])  # refuses a difference above 1e-4
    assert artifact.source_fingerprint == model.fingerprint


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.adaptive_avg_pool1d(x, 2) + x.norm(p=3, dim=-1, keepdim=True),
        lambda x: x.mean(1, keepdim=True).expand(x.shape[0], 4, 8).reshape(x.shape[0], 32),
        lambda x: F.unfold(x.view(-1, 2, 4, 4), 3, stride=1),
        lambda x: F.unfold(x.view(-1, 2, 4, 4), 3, stride=3),
        lambda x: F.unfold(x.view(-1, 2, 4, 4), 2, stride=2, padding=1),
        lambda x: F.fold(x.reshape(-1, 8, 4), (3, 3), 2, stride=1),
    ],
)
def test_other_norms_pools_patches_and_repeats_are_left_alone(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module = After(function)
    model = Model.from_module(module, (torch.randn(2, 4, 8),))
    assert [n.target for n in graphs.operators(plain(model).graph)] == [n.target for n in graphs.operators(model.graph)]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key, value = self.first(x).chunk(2, dim=1)
        return self.last(value.relu() * key.sum(-1, keepdim=True).expand_as(value))


@pytest.mark.parametrize("target", targets)
@pytest.mark.parametrize("passes", ["fold-constants", "quantize{scheme=static}"])
def test_what_broadcasts_reads_what_was_repeated_for_it(passes: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 8, 4, 16)
    split = Split((images.numpy(),), np.zeros(64, np.int64))
    model = Model.from_module(Gated().eval(), (images[:2],))
    model = Pipeline.parse(passes).run(model, PassContext(data=Data(split, split, split).for_passes()))
    (repeated,) = (n.name for n in graphs.operators(model.graph) if "expand" in n.name)
    assert repeated not in shapes(plain(model))
    artifact = Lowering(tmp_path, (images[:4],)).artifact(model, targets[target])
    assert not [d for d in artifact.diagnostics if "mul" in d.message]
