"""The captured graph's plain operations, above all the switch between training and evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.model import Model

aten = torch.ops.aten


class Odd(nn.Module):
    """Norms and dropouts with values that no default has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8, eps=3e-2, momentum=0.37)
        self.instance = nn.InstanceNorm2d(8, eps=7e-3, momentum=0.21, affine=True, track_running_stats=True)
        self.drop = nn.Dropout(0.23)
        self.drop2 = nn.Dropout2d(0.11)
        self.head = nn.Linear(8, 4)
        for norm in (self.norm, self.instance):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop2(self.instance(torch.relu(self.norm(self.conv(x)))))
        return self.head(self.drop(x.mean((2, 3))))


def literals(graph: fx.GraphModule) -> list[tuple[str, tuple[object, ...]]]:
    return [(str(n.target), tuple(a for a in n.args if not isinstance(a, (fx.Node, bool)))) for n in graphs.operators(graph)]


@pytest.fixture
def odd() -> tuple[Odd, Model, torch.Tensor]:
    torch.manual_seed(0)
    module = Odd().eval()
    x = torch.randn(5, 3, 9, 9)
    return module, Model.from_module(module, (x,)), x


def test_training_and_back_is_exact(odd: tuple[Odd, Model, torch.Tensor]) -> None:
    module, model, x = odd
    graph = model.edit()
    before = literals(graph)
    graphs.set_training(graph, True)
    assert literals(graph) == before
    graphs.set_training(graph, False)
    assert literals(graph) == before
    assert torch.equal(graph(x), module(x))


def test_training_mode_is_the_source_modules_training_mode(odd: tuple[Odd, Model, torch.Tensor]) -> None:
    module, model, x = odd
    graph = model.edit(tensors=True)
    graphs.set_training(graph, True)
    module.train()
    torch.manual_seed(1)
    ours = graph(x)
    torch.manual_seed(1)
    theirs = module(x)
    assert torch.equal(ours, theirs)
    for name in ("norm.running_mean", "norm.running_var", "instance.running_mean", "instance.running_var"):
        assert torch.equal(graphs.tensor(graph, name), module.get_buffer(name)), name
    graphs.set_training(graph, False)
    assert torch.equal(graph(x), module.eval()(x))


def test_training_without_noise_switches_the_norms_alone(odd: tuple[Odd, Model, torch.Tensor]) -> None:
    module, model, x = odd
    graph = model.edit(tensors=True)
    graphs.set_training(graph, True, noise=False)
    module.train()
    module.drop.eval()
    module.drop2.eval()
    assert torch.equal(graph(x), module(x))
    assert torch.equal(graphs.tensor(graph, "norm.running_var"), module.norm.running_var)


def test_training_leaves_the_model_alone(odd: tuple[Odd, Model, torch.Tensor]) -> None:
    _, model, x = odd
    before = model.fingerprint
    graph = model.edit(tensors=True)
    graphs.set_training(graph, True)
    graph(x).sum().backward()
    with torch.no_grad():
        for p in graph.parameters():
            assert p.grad is not None
            p.add_(p.grad)
    assert Model(model.graph, model.inputs, model.outputs).fingerprint == before


def test_a_norm_without_running_statistics_always_takes_those_of_the_batch() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4)).eval()
    x = torch.randn(4, 3, 6, 6)
    model = Model.from_module(module, (x,))
    graph = model.edit()
    for training in (True, False):
        graphs.set_training(graph, training)
        assert torch.equal(graph(x), module(x))


def _calls(target: torch._ops.OpOverload, *arguments: object, **named: object) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(target, (x, *arguments), named))  # type: ignore[arg-type]
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    ("graph", "reference"),
    [
        (_calls(aten.dropout.default, 0.3, False), lambda x, t: F.dropout(x, 0.3, t)),
        (_calls(aten.feature_dropout.default, 0.3, False), lambda x, t: F.dropout2d(x, 0.3, t)),
        (_calls(aten.alpha_dropout.default, 0.3, False), lambda x, t: F.alpha_dropout(x, 0.3, t)),
        (_calls(aten.feature_alpha_dropout.default, 0.3, False), lambda x, t: F.feature_alpha_dropout(x, 0.3, t)),
        (_calls(aten.rrelu.default, 0.05, 0.9, False), lambda x, t: F.rrelu(x, 0.05, 0.9, t)),
        (_calls(aten.rrelu.default, 0.05, 0.9), lambda x, t: F.rrelu(x, 0.05, 0.9, t)),
        (_calls(aten.rrelu.default, 0.05, 0.9, training=False), lambda x, t: F.rrelu(x, 0.05, 0.9, t)),
    ],
    ids=["dropout", "feature", "alpha", "feature-alpha", "rrelu", "rrelu-by-default", "rrelu-by-name"],
)
def test_every_random_operator_is_switched(graph: fx.GraphModule, reference: object) -> None:
    x = torch.randn(4, 6, 5, 5)
    for training in (False, True, False):
        graphs.set_training(graph, training)
        torch.manual_seed(3)
        ours = graph(x)
        torch.manual_seed(3)
        assert torch.equal(ours, reference(x, training))  # type: ignore[operator]


def test_a_recurrent_layers_own_dropout_is_switched() -> None:
    torch.manual_seed(0)
    module = nn.GRU(3, 5, num_layers=2, dropout=0.4, batch_first=True).eval()
    x = torch.randn(2, 7, 3)
    hx = torch.zeros(2, 2, 5)
    weights = list(module._flat_weights)
    graph = fx.Graph()
    given = graph.placeholder("x")
    root = nn.Module()
    names = [f"w{i}" for i in range(len(weights))]
    for name, weight in zip(names, weights, strict=True):
        root.register_parameter(name, weight)
    root.register_buffer("hx", hx)
    call = graph.call_function(aten.gru.input, (given, graph.get_attr("hx"), [graph.get_attr(n) for n in names], True, 2, 0.4, False, False, True))
    graph.output(call)
    captured = fx.GraphModule(root, graph)
    for training in (False, True, False):
        module.train(training)
        graphs.set_training(captured, training)
        torch.manual_seed(3)
        ours = captured(x)[0]
        torch.manual_seed(3)
        assert torch.equal(ours, module(x)[0])


def test_copies_keep_ties_and_share_or_copy_tensors() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = Model.from_module(Tied(), (torch.randn(2, 4),))
    shared, fresh = model.edit(), model.edit(tensors=True)
    weights = [str(n.target) for n in model.graph.graph.find_nodes(op="get_attr") if n.meta["val"].dim() == 2]
    for name in weights:
        assert graphs.tensor(shared, name) is graphs.tensor(model.graph, name)
        assert graphs.tensor(fresh, name) is not graphs.tensor(model.graph, name)
        assert graphs.tensor(fresh, name) is graphs.tensor(fresh, weights[0])
    assert len(list(fresh.parameters())) == 3
