"""A small vision transformer, as anybody writes one: 339 k parameters for grey images of 8x8 pixels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

IMAGE, PATCH, DIM, HEADS, BLOCKS, HIDDEN, CLASSES, DROPOUT = 8, 2, 96, 6, 3, 384, 10, 0.1


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, DIM] -> the same."""
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        merged: torch.Tensor = self.proj(x.transpose(1, 2).reshape(batch, tokens, DIM))
        return merged


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, DIM] -> the same."""
        x = x + self.drop(self.attn(self.norm1(x)))
        mixed: torch.Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return mixed


class DigitsViT(nn.Module):
    """Patch embedding, class token, learned positions, blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, DIM, kernel_size=PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (IMAGE // PATCH) ** 2, DIM))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, 1, 8, 8] -> logits [batch, 10]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x[:, 0]))
        return logits


def model() -> nn.Module:
    """The untrained network; ``digits.safetensors`` holds its trained weights."""
    return DigitsViT()
