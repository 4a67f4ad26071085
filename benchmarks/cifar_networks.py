"""The networks that cifar.py trains, and their weights. Nothing of edgesmith is imported: peers in environments of their own load them, too."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).parent / "weights"


class Basic(nn.Module):
    """Two convolutions with a residual path (He et al., CVPR 2016)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.second, self.norm2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.skip = nn.Sequential() if stride == 1 and inner == outer else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm2(self.second(F.relu(self.norm1(self.first(x))))) + self.skip(x))


class Inverted(nn.Module):
    """Expand, filter depthwise, project (Sandler et al., CVPR 2018)."""

    def __init__(self, inner: int, outer: int, stride: int, factor: int = 4) -> None:
        super().__init__()
        wide = inner * factor
        expand = [nn.Conv2d(inner, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        depthwise = [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        self.body = nn.Sequential(*expand, *depthwise, nn.Conv2d(wide, outer, 1, bias=False), nn.BatchNorm2d(outer))
        self.residual = stride == 1 and inner == outer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Block(nn.Module):
    """A pre-norm transformer block (Dosovitskiy et al., ICLR 2021)."""

    def __init__(self, width: int, heads: int, factor: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, factor * width), nn.Linear(factor * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """64 patches of 4x4, a convolutional stem."""

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4, factor: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, width, 3, 2, 1))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads, factor) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def staged(block: type[nn.Module], widths: tuple[int, ...], depth: int, head: int) -> nn.Module:
    """A stem, three stages of ``depth`` blocks, each but the first at half the resolution of the one before, and a head."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    inner = widths[0]
    for stage, outer in enumerate(widths):
        for number in range(depth):
            layers.append(block(inner, outer, 2 if stage and not number else 1))
            inner = outer
    if head:
        layers += [nn.Conv2d(inner, head, 1, bias=False), nn.BatchNorm2d(head), nn.ReLU6()]
        inner = head
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, 10))


NETWORKS = {
    "resnet": lambda: staged(Basic, (16, 32, 64), 3, 0),
    "mobile": lambda: staged(Inverted, (16, 32, 64), 3, 256),
    "vit": Transformer,
    "wide-resnet": lambda: staged(Basic, (32, 64, 128), 2, 0),
    "wide-vit": lambda: Transformer(160, 4, 4, 4),
}
"""How each is made."""


def _trained(name: str) -> nn.Module:
    module = NETWORKS[name]()
    module.load_state_dict(load_file(WEIGHTS / f"cifar-{name}.safetensors"))
    return module.eval()


def resnet() -> nn.Module:
    """The trained ResNet, for a build file."""
    return _trained("resnet")


def wide_resnet() -> nn.Module:
    """The trained ResNet of twice the width, for a build file."""
    return _trained("wide-resnet")


def wide_vit() -> nn.Module:
    """The trained transformer of wider layers, for a build file."""
    return _trained("wide-vit")


def mobile() -> nn.Module:
    """The trained network of depthwise convolutions, for a build file."""
    return _trained("mobile")


def vit() -> nn.Module:
    """The trained transformer, for a build file."""
    return _trained("vit")
