"""Capture: agreement with the source, dynamic batch, in-place operators, source paths, refusals."""

from __future__ import annotations

from collections.abc import Callable

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
        y = nn.functional.dropout(self.first(x), 0.1, self.training, inplace=True)
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


def _rows_and_columns(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 0] = 0
    y[:, -1] += y[:, 1]
    y[:, 1:3, 2:] = x[:, 1:3, :-2].exp()
    return y + 1


def _interleaved(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    y[..., 0::2] = x[..., 1::2].sin()
    y[..., 1::2] = x[..., 0::2].cos()
    y[:, 1::3] = -1
    y[:, :, 1:4:2] *= 3
    return y


def _interleaved_unevenly(x: torch.Tensor) -> torch.Tensor:
    y = x[:, :, :5] * 1
    y[..., ::2] = x[..., 1:4]
    y[..., 1:4:3] += 1
    return y


def _read_before_and_after(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    row, columns = y[:, 1], y.transpose(1, 2)
    before = columns * 1
    row.mul_(3)
    row[:, 2:4] = -1
    return torch.cat([before, columns, y.transpose(1, 2), row[:, :, None].expand(-1, -1, 4)], -1)


def _through_a_copy(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y.copy_(x)
    y += 1
    return torch.cat([y, x])


def _through_reshapes(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    flat = y.view(x.shape[0], -1)
    flat[:, 5:] = flat[:, :-5] * 2
    y.permute(2, 0, 1)[1] = 7
    y.unsqueeze(1)[:, :, 2:, 0].sigmoid_()
    return y


def _shapes_changed_in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    row, columns = y[:, 1], y.transpose(1, 2)
    y.unsqueeze_(1)
    y[:, 0, 1] += 1
    row.unsqueeze_(1).transpose_(1, 2)
    y.squeeze_(1)[:, :, 0] = 7
    return torch.cat([y.transpose(1, 2), columns, row], -1)


def _through_pieces(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    first, second = y.chunk(2, -1)
    second.add_(first)
    y.unbind(1)[2].zero_()
    y.split([1, 3], dim=1)[1].clamp_(min=0)
    return torch.cat([y, second], -1)


def _a_copy_that_may_share(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    shared, own = y.reshape(x.shape[0], -1), y.transpose(1, 2).reshape(x.shape[0], -1)
    y[:, 0] = 1
    return torch.cat([shared, own], -1)


def _one_of_several_results(x: torch.Tensor) -> torch.Tensor:
    values, _ = x.topk(3, dim=1)
    first = values[:, 0]
    values /= values.sum(1, keepdim=True)
    return torch.cat([values, first[:, None]], 1)


def _every_other_of_one(x: torch.Tensor) -> torch.Tensor:
    y = x[:, :1] * 2
    y[:, ::2] = 3
    return y


def _masked(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 1:][x[:, 1:] > 0] = 0.5
    y[:, :, 2].masked_fill_(x[:, :, 0] > 0, -1)
    return y.double() if y.dtype is torch.float32 else y


def _into_the_input(x: torch.Tensor) -> torch.Tensor:
    x = x.view(x.shape)
    x[:, :2] = x[:, 2:].half()
    return x * x[:1]


_WRITES = (
    _rows_and_columns,
    _interleaved,
    _interleaved_unevenly,
    _read_before_and_after,
    _through_a_copy,
    _through_reshapes,
    _shapes_changed_in_place,
    _through_pieces,
    _a_copy_that_may_share,
    _one_of_several_results,
    _every_other_of_one,
    _masked,
    _into_the_input,
)


class Writes(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize("function", _WRITES)
def test_what_is_written_through_a_view_is_seen_by_all_that_share_it(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    model = Model.from_module(Writes(function), (torch.randn(2, 4, 6),))
    assert model.dynamic_batch
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(model(x), function(x.clone()), rtol=0, atol=0)


class WritesOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight[1:] *= 2
        return x * self.weight


class WritesAlongADiagonal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.diagonal(dim1=1, dim2=2).zero_()
        return y


class WritesOtherBits(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.view(torch.int32).bitwise_and_(0x7FFFFFFF)
        return y


@pytest.mark.parametrize(
    ("module", "shape", "why"),
    [(WritesOtherBits(), (2, 4), "view.dtype"), (WritesOutside(), (2, 4), "parameter"), (WritesAlongADiagonal(), (2, 4, 4), "diagonal")],
)
def test_a_write_that_cannot_be_followed_is_refused_not_lost(module: nn.Module, shape: tuple[int, ...], why: str) -> None:
    with pytest.raises(CaptureError) as caught:
        Model.from_module(module, (torch.randn(shape),))
    assert why in f"{caught.value.what} {caught.value.why}"


def test_second_names_give_way_to_the_first() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch.concatenate([torch.multiply(x, 2), torch.negative(x)], -1)
        y.subtract_(1)
        return torch.where(torch.greater_equal(y, 0), y, torch.absolute(y)).true_divide(3)

    model = Model.from_module(Writes(function), (torch.randn(2, 4),))
    names = {str(node.target).split(".")[1] for node in graphs.operators(model.graph)}
    assert names == {"cat", "mul", "neg", "sub", "where", "ge", "abs", "div"}
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), function(x), rtol=0, atol=0)


@torch.library.custom_op("edgesmith_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: torch.relu(torch.ops.edgesmith_tests.doubled(x)), "edgesmith_tests.doubled"),
        (torch.vmap(lambda row: row * torch.ones(3).sum()), "functorch"),
        (lambda x: x[x > 0].sum(), "nonzero.default gives depends on values"),
        (lambda x: x * x.max().int().item(), "depends on values"),
    ],
)
def test_what_no_runtime_could_run_is_refused(function: Callable[[torch.Tensor], torch.Tensor], why: str) -> None:
    with pytest.raises(CaptureError) as caught:
        Model.from_module(Writes(function), (torch.ones(2, 4),))
    assert why in caught.value.what


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
