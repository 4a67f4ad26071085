"""Capture: agreement with the source, dynamic batch, in-place operators, source paths, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.capture import program_at
from edgesmith.compiler.errors import CaptureError
from edgesmith.compiler.model import Model
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, randomise_norms


@pytest.mark.parametrize("kind", [TinyTransformer, TinyConvNet])
def test_captured_graph_agrees_with_its_source_at_another_batch(kind: type[nn.Module]) -> None:
    module = randomise_norms(kind())
    module.train()
    model = Model.from_module(module, (torch.randn(2, 1, 8, 8),))
    assert module.training, "the module's own mode is left alone"
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(model(x), module.eval()(x), rtol=0, atol=0)
    assert model.inputs[0].shape == (None, 1, 8, 8)
    assert model.outputs[0].shape == (None, 4)


def test_nodes_know_the_module_they_came_from() -> None:
    model = Model.from_module(TinyTransformer(), (torch.randn(2, 1, 8, 8),))
    sources = {graphs.source(n) for n in graphs.operators(model.graph) if n.target is torch.ops.aten.linear.default}
    assert {"blocks.0.qkv", "blocks.1.fc2", "head"} <= sources


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y += 1
        torch.relu_(y)
        mask = torch.zeros(4, 4)
        mask[1:, 2:] = 1
        mask[0] += 2
        return self.second(y).mul_(2) @ mask


def test_in_place_operators_become_functional() -> None:
    module = InPlace().eval()
    model = Model.from_module(module, (torch.randn(2, 4),))
    names = {str(n.target) for n in graphs.operators(model.graph)}
    assert not any(name.split(".")[-2].endswith("_") for name in names if name.startswith("aten.") or ".aten." in name), names
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), module(x), rtol=0, atol=0)


class WritesThroughView(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[:, 0] = 0
        return y + 1


def test_a_write_through_a_view_of_an_activation_is_refused_not_lost() -> None:
    module = WritesThroughView()
    x = torch.randn(3, 4)
    try:
        model = Model.from_module(module, (torch.randn(2, 4),))
    except CaptureError as error:
        assert "view" in str(error)
    else:
        torch.testing.assert_close(model(x), module(x))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.table(ids) * mask[..., None]
        return {"pooled": hidden.mean(1), "hidden": hidden}


def test_several_inputs_and_outputs_keep_names_order_and_dtypes() -> None:
    module = TwoInputs()
    model = Model.from_module(module, (torch.randint(0, 10, (2, 6)), torch.ones(2, 6)))
    assert [(s.name, s.shape, s.dtype) for s in model.inputs] == [("ids", (None, 6), "int64"), ("mask", (None, 6), "float32")]
    assert [s.name for s in model.outputs] == ["pooled", "hidden"]
    ids, mask = torch.randint(0, 10, (3, 6)), torch.rand(3, 6)
    pooled, hidden = model(ids, mask)
    torch.testing.assert_close(pooled, module(ids, mask)["pooled"], rtol=0, atol=0)
    torch.testing.assert_close(hidden, module(ids, mask)["hidden"], rtol=0, atol=0)


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1) if x.shape[0] == 2 else x.reshape(1, -1)


def test_a_model_that_computes_with_its_batch_is_captured_at_a_fixed_one() -> None:
    model = Model.from_module(FixedBatch(), (torch.randn(2, 4),))
    assert model.inputs[0].shape == (1, 4)
    assert not model.dynamic_batch


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_branch_on_values_is_refused_with_torchs_reason() -> None:
    with pytest.raises(CaptureError, match="cannot be captured") as caught:
        Model.from_module(Branches(), (torch.randn(2, 4),))
    assert caught.value.why
    assert caught.value.exit_code == 2


def test_the_program_at_a_fixed_batch_knows_every_operator_of_the_model() -> None:
    model = Model.from_module(TinyTransformer(), (torch.randn(2, 1, 8, 8),))
    program, names = program_at(model, 1)
    known = {n.name for n in graphs.operators(model.graph) if not isinstance(n.meta["val"], int)}
    assert set(names.values()) == known | {"x"}
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0)


def test_training_leaves_the_model_it_was_copied_from_alone() -> None:
    model = Model.from_module(TinyTransformer(), (torch.randn(2, 1, 8, 8),))
    before = model.fingerprint
    copy = model.edit(tensors=True)
    copy(torch.randn(2, 1, 8, 8)).sum().backward()
    torch.optim.SGD(copy.parameters(), lr=1.0).step()
    assert Model(model.graph, model.inputs, model.outputs).fingerprint == before
    assert model.with_graph(copy).fingerprint != before
