from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.testing import TinyConvNet, check_pass, randomise_norms, tiny_model
from edgesmith.passes.graph.fold_batch_norm import FoldBatchNorm


def text(model: Model) -> str:
    """The graph as one line per operator, weights by name."""
    return "\n".join(
        f"{n.name} = {str(n.target).removeprefix('aten.')}({', '.join(map(str, n.args))}) @ {graphs.source(n)}" for n in graphs.operators(model.graph)
    )


def captured(*layers: nn.Module, shape: tuple[int, ...]) -> Model:
    torch.manual_seed(0)
    return Model.from_module(randomise_norms(nn.Sequential(*layers)), (torch.randn(shape),))


def fold(model: Model) -> Model:
    result = FoldBatchNorm().run(model, PassContext())
    assert result.changed
    x = model.example_inputs(3)
    before = model(*x)
    assert (result.model(*x) - before).abs().max() <= 1e-5 * before.abs().max()
    assert (before - before.mean()).abs().max() > 1e-2
    return result.model


def test_before_and_after() -> None:
    model = captured(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, eps=0.1), nn.ReLU(), shape=(2, 2, 6, 6))
    assert text(model) == (
        "conv2d_default = conv2d.default(input_1, _0_weight) @ 0\n"
        "batch_norm_default = batch_norm.default(conv2d_default, _1_weight, _1_bias, _1_running_mean, _1_running_var, False, 0.1, 0.1, False) @ 1\n"
        "relu_default = relu.default(batch_norm_default) @ 2"
    )
    folded = fold(model)
    assert text(folded) == "conv2d_default = conv2d.default(input_1, _0_weight, _0_bias) @ 0\nrelu_default = relu.default(conv2d_default) @ 2"
    assert sorted(dict(folded.graph.named_parameters())) == ["0.bias", "0.weight"]


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
        ((nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False)), (2, 4, 6, 6)),
        ((nn.Conv2d(4, 8, 3, groups=4, padding="same"), nn.BatchNorm2d(8)), (2, 4, 6, 6)),
        ((nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3)), (2, 2, 5, 5, 5)),
        ((nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6)), (2, 4, 9)),
        ((nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 6, 6)),
        ((nn.Linear(5, 7), nn.BatchNorm1d(7)), (3, 5)),
        ((nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7)), (3, 5)),
    ],
)
def test_every_kind_of_weight(layers: tuple[nn.Module, ...], shape: tuple[int, ...]) -> None:
    folded = fold(captured(*layers, shape=shape))
    assert not folded.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)


def test_a_small_variance_is_folded_in_double_precision() -> None:
    conv, norm = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=1e-12)
    nn.init.constant_(conv.weight, 1.0)
    norm.running_var.fill_(1e-9)  # type: ignore[union-attr]
    norm.running_mean.fill_(0.3)  # type: ignore[union-attr]
    folded = FoldBatchNorm().run(Model.from_module(nn.Sequential(conv, norm), (torch.randn(2, 1, 2, 2),)), PassContext()).model
    exact = -0.3 / (1e-9 + 1e-12) ** 0.5
    assert graphs.tensor(folded.graph, "0.bias").item() == pytest.approx(exact, rel=1e-6)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class SharedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) - self.conv(x + 1)


class TokenNorm(nn.Module):
    """Batch norm over the tokens of a three-dimensional matrix product: not its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (TwoReaders(), (2, 2, 3, 3), "read elsewhere"),
        (TokenNorm(), (2, 4, 3), "channels are not"),
        (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)), (2, 2, 3, 3), "follows an input"),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.BatchNorm2d(2)), (2, 2, 3, 3), "follows aten.relu"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)), nn.BatchNorm2d(2)), (2, 2, 3, 3), "is computed"),
    ],
)
def test_what_stays_says_why(module: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    model = Model.from_module(randomise_norms(module), (torch.randn(shape),))
    result = FoldBatchNorm().run(model, PassContext())
    assert not result.changed
    assert result.model is model
    (remark,) = result.diagnostics
    assert reason in remark.message
    assert remark.where


def test_a_shared_weight_is_copied() -> None:
    folded = fold(Model.from_module(randomise_norms(SharedWeight()), (torch.randn(2, 2, 3, 3),)))
    assert sorted(dict(folded.graph.named_parameters())) == ["conv.bias", "conv.bias_1", "conv.weight", "conv.weight_1"]


def test_the_contract_of_passes(tmp_path: Path) -> None:
    result = check_pass(FoldBatchNorm(), folder=tmp_path, model=tiny_model(TinyConvNet))
    assert result.changed
    assert result.model.params < tiny_model(TinyConvNet).params
