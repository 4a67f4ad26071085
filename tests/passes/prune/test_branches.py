"""Residual branches: found by structure, ranked by what they do, taken out exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.model import Model
from edgesmith.passes.prune.branches import residual_branches, with_influence, without
from edgesmith.testing import TinyConvNet, TinyTransformer, randomise_norms, tiny_model


class Parallel(nn.Module):
    """Attention-like and feed-forward branches of one stream, as ``x + f(x) + g(x)``, twice; then a long skip over both."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.ModuleList(nn.Linear(6, 6) for _ in range(2)), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.offset = nn.Parameter(torch.randn(1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x = x + self.offset
        for f, g in zip(self.f, self.g, strict=True):
            normed = nn.functional.layer_norm(x, (6,))
            x = x + f(normed) + g(normed)
        return torch.tanh(x) + start


class Downsampling(nn.Module):
    """A residual stage of two blocks: the first has a shortcut with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shortcut, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x) + self.shortcut(x))
        return torch.relu(self.b(x) + x)


def zeroed(model: Model, *names: str) -> Model:
    """``model`` with the weights and biases of some layers set to zero."""
    graph = model.edit(tensors=True)
    for name in names:
        for leaf in ("weight", "bias"):
            graphs.set_tensor(graph, f"{name}.{leaf}", torch.zeros_like(graphs.tensor(graph, f"{name}.{leaf}")))
    return model.with_graph(graph)


@pytest.mark.parametrize(
    ("model", "sources"),
    [
        (lambda: tiny_model(TinyTransformer), ["blocks.0.proj", "blocks.0.fc2", "blocks.1.proj", "blocks.1.fc2"]),
        (lambda: tiny_model(TinyConvNet), ["project_norm"]),
        (lambda: Model.from_module(Parallel(), (torch.randn(2, 6),)), ["f.0", "g.0", "f.1", "g.1"]),
        (lambda: Model.from_module(Downsampling(), (torch.randn(2, 3, 5, 5),)), ["b"]),
        (lambda: Model.from_module(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (torch.randn(2, 3),)), []),
    ],
    ids=["transformer", "squeeze-excite", "parallel", "downsampling", "none"],
)
def test_branches_are_found(model: object, sources: list[str]) -> None:
    assert [b.source for b in residual_branches(model())] == sources  # type: ignore[operator]


@pytest.mark.parametrize("gone", [("blocks.0.fc2",), ("blocks.0.fc2", "blocks.1.proj"), ("blocks.1.fc2", "blocks.0.proj", "blocks.1.proj")])
def test_taking_branches_out_is_what_zero_branches_do(gone: tuple[str, ...]) -> None:
    model = tiny_model(TinyTransformer)
    chosen = sorted((b for b in residual_branches(model) if b.source in gone), key=lambda b: gone.index(b.source))
    cut, expected = without(model, chosen), zeroed(model, *gone)
    (x,) = model.example_inputs(5)
    assert torch.equal(cut(x), expected(x))
    assert cut.params < model.params and cut.macs < model.macs
    assert len(residual_branches(cut)) == 4 - len(gone)
    assert cut.outputs == model.outputs


def test_parallel_branches_go_one_by_one() -> None:
    torch.manual_seed(0)
    model = Model.from_module(Parallel(), (torch.randn(2, 6),))
    branches = residual_branches(model)
    (x,) = model.example_inputs(5)
    for gone in ((0,), (1,), (0, 1), (1, 2), (0, 1, 2, 3)):
        cut = without(model, [branches[i] for i in gone])
        torch.testing.assert_close(cut(x), zeroed(model, *(branches[i].source for i in gone))(x))


def test_influence_is_zero_for_a_branch_that_adds_nothing_and_larger_for_one_that_adds_more() -> None:
    model = zeroed(tiny_model(TinyTransformer), "blocks.1.proj")
    graph = model.edit(tensors=True)
    graphs.set_tensor(graph, "blocks.0.fc2.weight", 5 * graphs.tensor(graph, "blocks.0.fc2.weight"))
    model = model.with_graph(graph)
    measured = with_influence(model, residual_branches(model), model.example_inputs(16))
    by_source = {b.source: b.influence for b in measured}
    assert abs(by_source["blocks.1.proj"]) < 1e-6
    assert max(by_source, key=lambda s: by_source[s]) == "blocks.0.fc2"
    assert all(0 <= round(v, 6) <= 2 for v in by_source.values())


def test_a_long_graph_is_no_burden() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(60))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + torch.relu(layer(x))
            return x

    model = Model.from_module(randomise_norms(Deep()), (torch.randn(2, 4),))
    branches = residual_branches(model)
    assert len(branches) == 60
    assert without(model, branches[1:]).params == 20
