"""What INT8 costs on real images: small networks trained on handwritten digits, quantized and simulated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler.axes import Axes
from edgesmith.compiler.axes.rescale import rescaled, stretches
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.errors import NumericsError
from edgesmith.compiler.instruments import NumericsCheck
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.quantplan import TensorRange
from edgesmith.compiler.simulate import DynamicGrid, simulated
from edgesmith.kernels.affine import activation_grid, ends
from edgesmith.passes.graph.fold_batch_norm import FoldBatchNorm
from edgesmith.passes.quantize import outliers
from edgesmith.passes.quantize.equalise import Equalise
from edgesmith.passes.quantize.quantize import Quantize

ALLOWED_DROP = 0.01
"""One point: 5 of 497 images."""


class Separable(nn.Sequential):
    def __init__(self, width: int, out: int) -> None:
        conv = [nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        super().__init__(*conv, nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU6())


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block, self.down = Separable(16, 16), Separable(16, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.max_pool2d(x + self.block(x), 2)
        return self.head(self.down(x).mean((2, 3)))


class Rectified(nn.Sequential):
    """Depthwise layers between rectifiers, which a factor per channel goes through."""

    def __init__(self) -> None:
        def separable(width: int, out: int) -> list[nn.Module]:
            depthwise = [nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            return [*depthwise, nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

        stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
        super().__init__(*stem, *separable(16, 24), nn.MaxPool2d(2), *separable(24, 32), *head)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.1)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def digits() -> tuple[Split, Split]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order].reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32), labels[order].astype(np.int64)
    return Split((images[:1300],), labels[:1300]), Split((images[1300:],), labels[1300:])


TRAIN, TEST = digits()
CONTEXT = PassContext(data=PassData(TRAIN, TRAIN))


@pytest.fixture(scope="module", params=[ConvNet, Transformer])
def trained(request: pytest.FixtureRequest) -> Model:
    """A network of more than 93 % top-1, its batch norms folded."""
    torch.manual_seed(0)
    module = request.param()
    epochs, batch = 12, 64
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3 if request.param is Transformer else 1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], total_steps=epochs * (len(TRAIN) // batch))
    images, labels = torch.from_numpy(TRAIN.inputs[0]), torch.from_numpy(TRAIN.labels)
    for _ in range(epochs):
        for part in torch.randperm(len(TRAIN))[: len(TRAIN) // batch * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(module(images[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()
    model = Model.from_module(module.eval(), (images[:2],))
    model = FoldBatchNorm().run(model, CONTEXT).model
    assert accuracy(model) > 0.93
    return model


def accuracy(model: Model, dynamic: DynamicGrid = DynamicGrid.ROW_ASYMMETRIC) -> float:
    """Top-1 on images that neither training nor calibration saw, as the plan says it runs."""
    predicted = simulated(model, dynamic)(torch.from_numpy(TEST.inputs[0])).argmax(1).numpy()
    return float((predicted == TEST.labels).mean())


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("scheme", ["auto", "static"])
def test_accuracy_is_kept(trained: Model, scheme: str, ranges: str) -> None:
    quantized = Quantize(scheme=scheme, ranges=ranges).run(trained, CONTEXT).model
    assert accuracy(quantized) >= accuracy(trained) - ALLOWED_DROP


@pytest.mark.parametrize("dynamic", DynamicGrid)
def test_accuracy_is_kept_by_every_kind_of_dynamic_grid(trained: Model, dynamic: DynamicGrid) -> None:
    quantized = Quantize(scheme="dynamic").run(trained, PassContext()).model
    assert accuracy(quantized, dynamic) >= accuracy(trained) - ALLOWED_DROP


def test_a_broken_range_is_seen(trained: Model) -> None:
    """The twin of the test above: ranges 64 times too wide, or too narrow, cost more than what is allowed."""
    quantized = Quantize(scheme="static").run(trained, CONTEXT).model
    assert quantized.quant is not None
    for factor in (64.0, 1 / 64):
        broken = {k: TensorRange(*ends(activation_grid(r.low * factor, r.high * factor)), "broken") for k, r in quantized.quant.activations.items()}
        spoiled = replace(quantized, quant=replace(quantized.quant, activations=broken))
        assert accuracy(spoiled) < accuracy(trained) - ALLOWED_DROP


def planted(model: Model, factor: float) -> Model:
    """Two channels of every stretch scaled up where they are made and down where they are read: the same float function."""
    graph, rng = model.edit(), np.random.default_rng(0)
    for stretch in stretches(Axes.of(model)):
        scales = np.ones(stretch.channels)
        scales[rng.choice(stretch.channels, 2, replace=False)] = 1 / factor
        rescaled(graph, stretch, scales)
    return model.with_graph(graph)


@pytest.mark.parametrize("scheme", ["auto", "static", "dynamic"])
@pytest.mark.parametrize("factor", [64.0, 1024.0])
@pytest.mark.parametrize("trained", [Rectified, Transformer], indirect=True)
def test_planted_outlier_channels_are_seen_and_equalised(trained: Model, factor: float, scheme: str) -> None:
    """The float function is unchanged, but a grid for the whole tensor has little left for the other channels, and one for a row of weights for theirs."""
    spoiled = planted(trained, factor)
    x = torch.from_numpy(TEST.inputs[0])
    assert (spoiled(x) - trained(x)).abs().max() < 1e-3
    equal = Equalise(scheme=scheme).run(spoiled, CONTEXT).model
    naive, ours = (Quantize(scheme=scheme, ranges="minmax").run(model, CONTEXT).model for model in (spoiled, equal))
    assert accuracy(ours) >= accuracy(trained) - 0.005
    if factor > 100 and scheme == "static":
        assert accuracy(naive) < accuracy(trained) - 0.05


@pytest.mark.parametrize("trained", [Transformer], indirect=True)
def test_a_wrong_rescaling_stops_the_pass(trained: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outliers, "rescaled", lambda graph, stretch, scales: rescaled(graph, replace(stretch, read=()), scales))
    spoiled = planted(trained, 1024.0)
    with pytest.raises(NumericsError):
        NumericsCheck().around(Equalise(), spoiled, CONTEXT, lambda: Equalise().run(spoiled, CONTEXT))


def test_the_same_seed_gives_the_same_plan_and_another_seed_another(trained: Model) -> None:
    plans = [Quantize(scheme="static", samples=32).run(trained, replace(CONTEXT, seed=seed)).model.quant for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
