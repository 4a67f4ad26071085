"""Random small networks out of residual, concatenated, split, grouped, gated, reshaped and attending parts: none is cut wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler.axes import Axes, prove, remove
from edgesmith.compiler.model import Model

TOKENS = 6


class Part(nn.Module):
    """Tokens [batch, 6, width] to tokens of another width: what it does is drawn from ``rng``."""

    def __init__(self, width: int, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(sorted(KINDS)) if width > 1 else "widen"
        self.out_width, self.run = KINDS[self.kind](self, width, rng)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.run(x)
        return out


Run = Callable[[torch.Tensor], torch.Tensor]


def widen(part: Any, width: int, rng: random.Random) -> tuple[int, Run]:
    out = rng.choice([4, 6, 8, 12])
    part.layer = nn.Linear(width, out)
    act: Any = rng.choice([torch.tanh, F.gelu, torch.sigmoid, F.relu])
    return out, lambda x: act(part.layer(x))


def residual(part: Any, width: int, rng: random.Random) -> tuple[int, Run]:
    hidden = rng.choice([3, 5, 8])
    part.a, part.b = nn.Linear(width, hidden), nn.Linear(hidden, width)
    part.norm = rng.choice([nn.LayerNorm(width), nn.Identity(), nn.RMSNorm(width)])
    return width, lambda x: x + part.b(torch.relu(part.a(part.norm(x))))


def concatenated(part: Any, width: int, rng: random.Random) -> tuple[int, Run]:
    extra = rng.choice([2, 4, 5])
    part.a = nn.Linear(width, extra)
    return width + extra, lambda x: torch.cat([x, part.a(x)], -1)


def halved(part: Any, width: int, rng: random.Random) -> tuple[int, Run]:
    first = rng.randrange(1, width)
    part.a = nn.Linear(first, width - first)
    return width - first, lambda x: x[..., first:] * part.a(x[..., :first])


def exchanged(part: Any, width: int, rng: random.Random) -> tuple[int, Run]:
    first = rng.randrange(1, width)
    return width, lambda x: torch.cat([x[..., first:], x[..., :first]], -1)


def shuffled(part: Any, width: int, rng: random.Random) -> tuple[int, Run]:
    groups = rng.choice([g for g in range(1, width + 1) if width % g == 0])
    return width, lambda x: x.reshape(-1, TOKENS, groups, width // groups).transpose(2, 3).reshape(-1, TOKENS, width)


def grouped(part: Any, width: int, rng: random.Random) -> tuple[int, Run]:
    groups = rng.choice([g for g in range(1, width + 1) if width % g == 0])
    out = groups * rng.choice([1, 2, 3])
    part.conv = nn.Conv1d(width, out, rng.choice([1, 3]), padding="same", groups=groups)
    part.norm = rng.choice([nn.BatchNorm1d(out), nn.GroupNorm(groups, out), nn.Identity()])
    return out, lambda x: part.norm(part.conv(x.transpose(1, 2))).transpose(1, 2)


def attention(part: Any, width: int, rng: random.Random) -> tuple[int, Run]:
    heads, size = rng.choice([(2, 3), (4, 2), (3, 4)])
    part.qkv, part.out = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)
    order = rng.choice(["3hd", "h3d", "chunk"])

    def run(x: torch.Tensor) -> torch.Tensor:
        qkv = part.qkv(x)
        if order == "3hd":
            q, k, v = qkv.view(-1, TOKENS, 3, heads, size).permute(2, 0, 3, 1, 4)
        elif order == "h3d":
            q, k, v = qkv.view(-1, TOKENS, heads, 3, size).permute(3, 0, 2, 1, 4).unbind(0)
        else:
            q, k, v = (t.view(-1, TOKENS, heads, size).transpose(1, 2) for t in qkv.chunk(3, -1))
        y: torch.Tensor = part.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + y

    return width, run


def gated(part: Any, width: int, rng: random.Random) -> tuple[int, Run]:
    part.a, part.b, part.c = nn.Linear(width, 5), nn.Linear(width, 5), nn.Linear(5, width)
    return width, lambda x: part.c(F.silu(part.a(x)) * part.b(x))


def excited(part: Any, width: int, rng: random.Random) -> tuple[int, Run]:
    part.a, part.b = nn.Linear(width, 3), nn.Linear(3, width)
    return width, lambda x: x * torch.sigmoid(part.b(torch.relu(part.a(x.mean(1, keepdim=True)))))


def between_channels(part: Any, width: int, rng: random.Random) -> tuple[int, Run]:
    part.temperature = nn.Parameter(torch.ones(1))
    part.q, part.k = nn.Linear(width, 6), nn.Linear(width, 6)

    def run(x: torch.Tensor) -> torch.Tensor:
        q, k = F.normalize(part.q(x), dim=-1), F.normalize(part.k(x), dim=-1)
        weights: torch.Tensor = (q.transpose(1, 2) @ k * part.temperature).softmax(-1)
        return weights.matmul(q.transpose(1, 2)).transpose(1, 2)

    return 6, run


def repeated(part: Any, width: int, rng: random.Random) -> tuple[int, Run]:
    return 2 * width, (lambda x: x.repeat_interleave(2, -1)) if rng.random() < 0.5 else (lambda x: x.repeat(1, 1, 2))


KINDS: dict[str, Callable[[Any, int, random.Random], tuple[int, Run]]] = {
    f.__name__: f for f in (widen, residual, concatenated, halved, exchanged, shuffled, grouped, attention, gated, excited, between_channels, repeated)
}


class RandomNet(nn.Module):
    """Three to six parts, joined now and then by skips of equal width; the mean token is classified."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        width = rng.choice([4, 6, 8])
        self.embed, self.parts, self.skips = nn.Linear(5, width), nn.ModuleList(), []
        seen = {width: 0}
        for _ in range(rng.randint(3, 6)):
            part = Part(width, rng)
            if part.out_width > 40:
                continue
            self.parts.append(part)
            width = part.out_width
            self.skips.append(seen.get(width) if rng.random() < 0.5 else None)
            seen[width] = len(self.parts)
        self.flat = rng.random() < 0.5
        self.head = nn.Linear(width * (TOKENS if self.flat else 1), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        past = [self.embed(x)]
        for part, skip in zip(self.parts, self.skips, strict=True):
            y = part(past[-1])
            past.append(y if skip is None else y + past[skip])
        out: torch.Tensor = self.head(past[-1].flatten(1) if self.flat else past[-1].mean(1))
        return out


def check(seed: int) -> int:
    torch.manual_seed(seed)
    module = RandomNet(seed).double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * (1.5 / p[0].numel() ** 0.5 if p.dim() > 1 else 1))
    kinds = [part.kind for part in module.parts]
    model = Model.from_module(module, (torch.randn(2, TOKENS, 5, dtype=torch.float64),))
    axes = Axes.of(model)
    rng = random.Random(seed)
    removals = {g.name: rng.sample(range(g.size), rng.randint(0, g.size - 1)) for g in axes.groups}
    pruned = remove(model, removals, axes=axes)
    assert prove(model, pruned, removals, axes=axes, tolerance=1e-12) <= 1e-12, (seed, kinds)
    return len(axes.groups)


def test_random_networks_are_cut_right() -> None:
    assert sum(check(seed) for seed in range(6)) > 12


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 2100, 100))
def test_many_random_networks_are_cut_right(first: int) -> None:
    assert sum(check(seed) for seed in range(first, first + 100)) > 200
