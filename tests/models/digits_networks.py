"""Small networks, trained on handwritten digits in seconds."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler.axes import Axes
from edgesmith.compiler.axes.rescale import rescaled, stretches
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.passes.graph.fold_batch_norm import FoldBatchNorm


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


def trained_on_digits(kind: type[nn.Module]) -> Model:
    """A network of more than 93 % top-1, its batch norms folded."""
    torch.manual_seed(0)
    module = kind()
    epochs, batch = 12, 64
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3 if kind is Transformer else 1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], total_steps=epochs * (len(TRAIN) // batch))
    images, labels = torch.from_numpy(TRAIN.inputs[0]), torch.from_numpy(TRAIN.labels)
    for _ in range(epochs):
        for part in torch.randperm(len(TRAIN))[: len(TRAIN) // batch * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(module(images[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()
    model = Model.from_module(module.eval(), (images[:2],))
    return FoldBatchNorm().run(model, CONTEXT).model


def planted(model: Model, factor: float) -> Model:
    """Two channels of every stretch scaled up where they are made and down where they are read: the same float function."""
    graph, rng = model.edit(), np.random.default_rng(0)
    for stretch in stretches(Axes.of(model)):
        scales = np.ones(stretch.channels)
        scales[rng.choice(stretch.channels, 2, replace=False)] = 1 / factor
        rescaled(graph, stretch, scales)
    return model.with_graph(graph)
