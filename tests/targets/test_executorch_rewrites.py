from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.model import Model
from edgesmith.targets.executorch.legalise import legalise

WIDTH = 8


class Only(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.gain, self.shift = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))
        self.table, self.square = nn.Parameter(torch.randn(WIDTH, 5)), nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


CASES: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...], list[str]]] = {
    "relu6": (lambda s, x: F.relu6(x), (4, WIDTH), ["hardtanh"]),
    "clamp": (lambda s, x: x.clamp(-0.5, 0.25), (4, WIDTH), ["hardtanh"]),
    "clamp_min_zero": (lambda s, x: x.clamp(min=0), (4, WIDTH), ["relu"]),
    "clamp_min": (lambda s, x: x.clamp(min=0.1), (4, WIDTH), ["clamp"]),
    "clamp_integers": (lambda s, x: x.long().clamp(0, 1), (4, WIDTH), ["to", "clamp"]),
    "dropout": (lambda s, x: F.dropout(x + 1, 0.5, s.training), (4, WIDTH), ["add"]),
    "mean": (lambda s, x: x.mean((2, 3)), (3, 4, 4), ["mean", "reshape"]),
    "mean_kept": (lambda s, x: x.mean((-1, -2), keepdim=True), (3, 4, 4), ["mean"]),
    "mean_of_tokens": (lambda s, x: x.mean(1), (4, WIDTH), ["mean"]),
    "select": (lambda s, x: x[:, -1], (4, WIDTH), ["slice", "reshape"]),
    "unbind": (lambda s, x: x.unbind(1)[2], (4, WIDTH), ["slice", "reshape"]),
    "gelu": (lambda s, x: F.gelu(x), (4, WIDTH), ["gelu"]),
    "gelu_tanh": (lambda s, x: F.gelu(x, approximate="tanh"), (4, WIDTH), ["mul", "mul", "add", "mul", "sigmoid", "mul"]),
    "layer_norm": (
        lambda s, x: F.layer_norm(x, (WIDTH,), s.gain, s.shift, 1e-3),
        (4, WIDTH),
        ["linear", "sub", "mul", "linear", "add", "rsqrt", "mul", "mul", "add"],
    ),
    "layer_norm_gain": (lambda s, x: F.layer_norm(x, (WIDTH,), s.gain), (4, WIDTH), ["linear", "sub", "mul", "linear", "add", "rsqrt", "mul", "mul"]),
    "layer_norm_plain": (lambda s, x: F.layer_norm(x, (WIDTH,)), (4, WIDTH), ["linear", "sub", "mul", "linear", "add", "rsqrt", "mul"]),
    "layer_norm_two": (lambda s, x: F.layer_norm(x, (4, WIDTH)), (4, WIDTH), ["layer_norm"]),
    "pool": (lambda s, x: F.max_pool2d(x, 2), (3, 4, 4), ["max_pool2d"]),
    "product": (lambda s, x: x @ s.table, (4, WIDTH), ["linear"]),
    "addmm": (lambda s, x: torch.addmm(s.shift[:5].clone(), x, s.table), (WIDTH,), ["addmm"]),
    "addmm_parameters": (lambda s, x: torch.addmm(s.shift, x, s.square), (WIDTH,), ["linear"]),
    "addmm_scaled": (lambda s, x: torch.addmm(s.shift, x, s.square, alpha=2), (WIDTH,), ["addmm"]),
    "masked": (lambda s, x: F.scaled_dot_product_attention(x, x, x, torch.ones(4, 4).tril() > 0), (2, 4, WIDTH), ["scaled_dot_product_attention"]),
}


@pytest.mark.parametrize("case", CASES)
def test_rewritten_and_the_same(case: str) -> None:
    function, shape, wanted = CASES[case]
    torch.manual_seed(0)
    model = Model.from_module(Only(function).eval(), (torch.randn(2, *shape),))
    legal, diagnostics = legalise(model)
    made = [n.target.__name__.split(".")[0] for n in graphs.operators(legal.graph) if isinstance(n.target, torch._ops.OpOverload)]
    assert [name for name in made if name != "sym_size"][-len(wanted) :] == wanted
    assert "getitem" not in made
    x = torch.randn(3, *shape)
    torch.testing.assert_close(legal(x), model(x), rtol=1e-6, atol=1e-6)
    assert diagnostics == ()
    assert legal.inputs == model.inputs
    assert legal.outputs == model.outputs


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
@pytest.mark.parametrize("shape", [(4, WIDTH), (2, 4, WIDTH), (3, 2, 4, WIDTH)])
def test_attention_becomes_two_products(shape: tuple[int, ...], options: dict[str, float]) -> None:
    """Keys longer than queries, values wider than keys, three to five dimensions."""
    torch.manual_seed(0)
    keys = nn.Parameter(torch.randn(*shape[:-2], 6, WIDTH))
    values = nn.Parameter(torch.randn(*shape[:-2], 6, 5))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values = keys, values

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            k, v = (t.expand(x.shape[0], *t.shape) for t in (self.keys, self.values))
            return F.scaled_dot_product_attention(x, k, v, **options)

    model = Model.from_module(Attention(), (torch.randn(2, *shape),))
    legal, _ = legalise(model)
    names = [n.target.__name__ for n in graphs.operators(legal.graph)]
    assert names.count("bmm.default") == 2
    assert "scaled_dot_product_attention.default" not in names
    x = torch.randn(3, *shape)
    torch.testing.assert_close(legal(x), model(x), rtol=1e-5, atol=1e-6)


def test_every_node_keeps_a_source_path() -> None:
    block = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True).eval()
    legal, _ = legalise(Model.from_module(nn.Sequential(nn.Identity(), block), (torch.randn(2, 4, WIDTH),)))
    assert {graphs.source(n).split(".")[0] for n in graphs.operators(legal.graph)} <= {
        "1",
        *(n.name for n in legal.graph.graph.nodes if n.target is torch.ops.aten.sym_size.int),
    }
