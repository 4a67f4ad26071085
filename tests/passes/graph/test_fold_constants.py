from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.testing import check_pass, tiny_model
from edgesmith.passes.graph.fold_constants import FoldConstants


def text(model: Model) -> str:
    return "\n".join(
        f"{n.name} = {str(n.target).removeprefix('aten.')}({', '.join(map(str, n.args))}) @ {graphs.source(n)}" for n in graphs.operators(model.graph)
    )


def fold(module: nn.Module, *inputs: torch.Tensor) -> tuple[Model, Model]:
    """The model before and after; both give the same to the last bit."""
    model = Model.from_module(module, inputs)
    folded = FoldConstants().run(model, PassContext()).model
    x = model.example_inputs(3)
    assert torch.equal(folded(*x), model(*x))
    return model, folded


class Identities(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.dropout(x, 0.3, self.training) + 0
        y = y.reshape(y.shape[0], 4).contiguous().to(torch.float32)
        y = y[:, 0:4].expand(-1, 4) * 1
        return F.pad(y, (0, 0)).clone().relu()


def test_before_and_after_identities() -> None:
    model, folded = fold(Identities(), torch.randn(2, 4))
    assert len(text(model).splitlines()) >= 7
    assert text(folded) == "relu_default = relu.default(x) @ relu_default"


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.table = nn.Parameter(torch.randn(9, 3))
        self.register_buffer("index", torch.arange(6) % 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        position = self.table[self.index[: x.shape[1]]]
        mask = torch.ones(5, 5).tril()
        return mask @ (x @ self.weight.t().contiguous().t() + position)


def test_before_and_after_constants() -> None:
    model, folded = fold(Constants(), torch.randn(2, 5, 4))
    assert len(text(model).splitlines()) >= 8
    names = [str(n.target).removeprefix("aten.") for n in graphs.operators(folded.graph)]
    assert names == ["matmul.default", "add.Tensor", "matmul.default"]
    kinds = {type(graphs.tensor(folded.graph, str(n.target))) for n in folded.graph.graph.find_nodes(op="get_attr")}
    assert kinds == {nn.Parameter, torch.Tensor}
    assert folded.params == 4 * 3 + 5 * 3
    assert all("source" in n.meta for n in folded.graph.graph.nodes)


def test_weight_normalisation_becomes_a_plain_trainable_weight() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    _, folded = fold(nn.Sequential(layer), torch.randn(2, 3))
    (product,) = graphs.operators(folded.graph)
    weight = product.args[1]
    assert isinstance(weight, torch.fx.Node)
    assert weight.op == "get_attr"
    folded.edit(tensors=True)(torch.randn(2, 3)).sum().backward()
    assert graphs.tensor(folded.graph, str(weight.target)).requires_grad


class Layout(nn.Module):
    """A contiguous copy that a later view relies on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().relu().view(x.shape[0], -1)


def test_a_copy_that_changes_the_layout_stays() -> None:
    _, folded = fold(Layout(), torch.randn(2, 3, 4))
    assert "contiguous" in text(folded) or "clone" in text(folded)


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(4)


def test_random_numbers_stay_random() -> None:
    model = Model.from_module(Noise(), (torch.randn(2, 4),))
    assert not FoldConstants().run(model, PassContext()).changed


class Broadcast(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.row = nn.Parameter(torch.randn(1, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.row.t() * self.row)


@pytest.mark.parametrize(("size", "operators"), [(64, 1), (1024, 3)])
def test_a_constant_that_would_swell_the_file_is_computed_when_it_runs(size: int, operators: int) -> None:
    _, folded = fold(Broadcast(size), torch.randn(2, size, size))
    assert len(list(graphs.operators(folded.graph))) == operators


class ConstantBranch(nn.Module):
    """A size read off a constant, and an output that is the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.clone(), (x @ self.table).reshape(-1, self.table.shape[1])


def test_an_input_is_not_made_an_output() -> None:
    model = Model.from_module(ConstantBranch(), (torch.randn(2, 3),))
    folded = FoldConstants().run(model, PassContext()).model
    x = torch.randn(3, 3)
    assert all(torch.equal(a, b) for a, b in zip(model(x), folded(x), strict=True))
    (output,) = folded.graph.graph.find_nodes(op="output")
    assert all(n.op == "call_function" for n in output.all_input_nodes)


def test_the_contract_of_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    changed = check_pass(FoldConstants(), folder=tmp_path, model=Model.from_module(Constants(), (torch.randn(2, 5, 4),)), ctx=PassContext())
    assert changed.changed


def test_nothing_to_do_is_said(tmp_path: Path) -> None:
    assert not check_pass(FoldConstants(), folder=tmp_path, model=tiny_model()).changed
