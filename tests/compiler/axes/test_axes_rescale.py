"""Channels rescaled where they are made and read: the function stays, and what must not be scaled is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler.axes import Axes
from edgesmith.compiler.axes.rescale import Stretch, rescaled, stretches
from edgesmith.compiler.model import Model
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer

F = nn.functional


class Inverted(nn.Module):
    """Pointwise, depthwise, pointwise, with a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = nn.Conv2d(4, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 4, 1)
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        return self.head(x.mean((2, 3)))


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.max_pool2d(F.leaky_relu(self.conv(x)), 4).flatten(1))


class Gated(nn.Module):
    """Squeeze-excite: the gate of the channels is computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.out(x * gate)


class Scaled(nn.Module):
    """A scale for each channel between two layers, as in the branches of recent transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gain, self.second = nn.Linear(6, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * self.gain)


class GatedMlp(nn.Module):
    """As in recent language models: the gate is another projection of the same input, before or behind what it gates."""

    def __init__(self, gate_first: bool) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.gate_first = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5), gate_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.silu(self.gate(x)), self.up(x)
        return self.down(gate * up if self.gate_first else up * gate)


class Attention(nn.Module):
    """Attention written out, with fewer heads of keys and values than of queries."""

    def __init__(self, groups: int, repeat: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        super().__init__()
        self.groups, self.repeat = groups, repeat
        self.q, self.k, self.v, self.out = nn.Linear(6, 12), nn.Linear(6, 12 // groups), nn.Linear(6, 12 // groups), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(x.shape[0], x.shape[1], -1, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (self.repeat(t, self.groups) for t in (k, v))
        mixed = torch.matmul((q @ k.transpose(-1, -2)).softmax(-1), v)
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


def expanded(x: torch.Tensor, times: int) -> torch.Tensor:
    return x[:, :, None].expand(*x.shape[:2], times, *x.shape[2:]).reshape(x.shape[0], -1, *x.shape[2:])


class Barred(nn.Module):
    """Every way between the two layers is barred by ``between``."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(6, 8), nn.Linear(8, 5), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(F.relu(self.layer(x)))


def captured(module: nn.Module, *shape: int) -> Model:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Model.from_module(module.eval(), (torch.randn(2, *shape),))


def difference(model: Model, chosen: tuple[Stretch, ...]) -> float:
    """How far the outputs move when all of ``chosen`` are rescaled at random, relative to the largest, in float64."""
    rng = np.random.default_rng(0)
    graph = model.edit(tensors=True).double()
    for stretch in chosen:
        rescaled(graph, stretch, np.exp2(rng.uniform(-6, 6, stretch.channels)))
    inputs = tuple(x.double() if x.is_floating_point() else x for x in model.example_inputs(3))
    with torch.no_grad():
        before, after = model.edit(tensors=True).double()(*inputs), graph(*inputs)
    return float((before - after).abs().max() / before.abs().max())


def where(chosen: tuple[Stretch, ...]) -> list[str]:
    return sorted("+".join(sorted({p.name.rpartition(".")[0] or p.name for p in s.made})) + " -> " + "+".join(p.name for p in s.read) for s in chosen)


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (Inverted(), (3, 8, 8), ["depthwise -> project.weight", "expand -> depthwise.weight", "project+stem -> expand.weight+head.weight"]),
        (Flattened(), (3, 8, 8), ["conv -> head.weight"]),
        (Scaled(), (6,), ["first -> gain", "gain -> second.weight"]),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 5)), (6,), ["0 -> 3.weight"]),
        (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)), (6,), ["0 -> 1.weight"]),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 5, 1)), (3, 4, 4), ["1 -> 3.weight"]),
        (GatedMlp(gate_first=True), (6,), ["up -> down.weight"]),
        (GatedMlp(gate_first=False), (6,), ["up -> down.weight"]),
        (Attention(1, lambda x, times: x), (4, 6), ["v -> out.weight"]),
        (Attention(2, expanded), (4, 6), ["v -> out.weight"]),
        (Attention(2, lambda x, times: x.repeat_interleave(times, 1)), (4, 6), ["v -> out.weight"]),
        (nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2)), (3, 4, 4), ["0 -> 2.weight"]),
    ],
    ids=["inverted", "flattened", "scaled", "mlp", "layer-norm", "group-norm", "gated", "gated-behind", "attention", "grouped", "interleaved", "transposed"],
)
def test_stretches_are_found_and_the_function_stays(module: nn.Module, shape: tuple[int, ...], expected: list[str]) -> None:
    model = captured(module, *shape)
    found = stretches(Axes.of(model))
    assert where(found) == expected
    assert difference(model, found) < 1e-11


def test_a_scale_passes_by_the_gate_that_is_computed_from_it() -> None:
    model = captured(Gated(), 3, 6, 6)
    found = stretches(Axes.of(model))
    assert where(found) == ["conv -> squeeze.weight+out.weight", "squeeze -> excite.weight"]
    assert difference(model, found) < 1e-11


@pytest.mark.parametrize(
    "between",
    [
        torch.sigmoid,
        F.gelu,
        F.relu6,
        lambda x: x + 1.0,
        lambda x: x.softmax(-1),
        lambda x: 1.0 / x,
        lambda x: F.pad(x[None, None], (0, 0, 1, 1), value=2.0)[0, 0, 1:-1],
        lambda x: x * x,
        lambda x: (torch.ones(2, 3, 8) @ x[:, :, None] @ x[:, None])[:, 0],
        lambda x: F.layer_norm(x, (8,)),
        lambda x: F.max_pool1d(x[:, None], 3, 1, 1)[:, 0],
    ],
    ids=["sigmoid", "gelu", "relu6", "shifted", "softmax", "inverse", "padded", "squared", "multiplied", "normed", "mixed"],
)
def test_what_a_factor_does_not_go_through_bars_it(between: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert stretches(Axes.of(captured(Barred(between), 6))) == ()


def test_a_weight_with_two_uses_is_left_alone() -> None:
    assert stretches(Axes.of(captured(Tied(), 8))) == ()


@pytest.mark.parametrize(("module", "shape"), [(TinyTransformer(), (1, 8, 8)), (TinyConvNet(), (1, 8, 8))], ids=["transformer", "convolutional"])
def test_networks_keep_their_function(module: nn.Module, shape: tuple[int, ...]) -> None:
    model = captured(module, *shape)
    found = stretches(Axes.of(model))
    assert found
    assert difference(model, found) < 1e-9


def test_a_wrong_scale_would_be_seen() -> None:
    model = captured(Inverted(), 3, 8, 8)
    found = stretches(Axes.of(model))
    half = Stretch(found[0].channels, found[0].made, (), found[0].tensors, found[0].readers)
    assert difference(model, (half,)) > 1e-2
