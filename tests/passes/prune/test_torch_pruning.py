"""torch-pruning as an oracle where its dependency graph is right, and its importances by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ALWAYS, module_of, samples
from torch import nn
from torch.nn import functional as F

from edgesmith import Model, PassContext, Pipeline
from edgesmith.compiler.axes import Axes, PruneGroup
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, randomise_norms, tiny_data, tiny_model
from edgesmith.passes.prune.importance import IMPORTANCES
from edgesmith.passes.prune.torch_pruning import NAMES

tp = pytest.importorskip("torch_pruning")


class Residual(nn.Module):
    """Two stages, the second with a shortcut that has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.a_norm, self.b, self.b_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c, self.c_norm, self.d, self.d_norm = nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.skip, self.head = nn.Conv2d(8, 12, 1, 2), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.b_norm(self.b(torch.relu(self.a_norm(self.a(x))))))
        x = torch.relu(self.skip(x) + self.d_norm(self.d(torch.relu(self.c_norm(self.c(x))))))
        return self.head(x.mean((2, 3)))


class Flattened(nn.Module):
    """Channels times positions into a linear layer, an MLP behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.second, self.fc1, self.fc2 = nn.Conv2d(1, 6, 3, 2, 1), nn.Conv2d(6, 5, 3, 1, 1), nn.Linear(80, 20), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(torch.relu(self.second(torch.relu(self.conv(x)))).flatten(1))))


class Dense(nn.Module):
    """Concatenations, each over all before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 5, 1), nn.Linear(15, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.a(x))
        b = torch.cat([a, torch.relu(self.b(a))], 1)
        return self.head(torch.cat([b, torch.relu(self.c(b))], 1).mean((2, 3)))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.point, self.head = nn.Conv2d(8, 12, 1), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.point(torch.relu(self.norm(self.depth(self.stem(x)))))).mean((2, 3)))


def ours(group: PruneGroup, unit: int) -> set[tuple[str, int, int]]:
    """(parameter, dimension, index) of everything that goes with ``unit``."""
    return {(m.name, m.dim, int(i)) for m in group.members for i in m.indices(unit)}


def theirs(graph: object, names: dict[nn.Module | nn.Parameter, str], unit: int, root: nn.Module, function: object) -> set[tuple[str, int, int]]:
    """The same by the library's dependency graph, which narrows a parameter that is in no layer by its last dimension."""
    found = set()
    for dependency, indices in graph.get_pruning_group(root, function, idxs=[unit]):  # type: ignore[attr-defined]
        layer = dependency.target.module
        if isinstance(layer, nn.Parameter):
            found |= {(names[layer], layer.dim() - 1, int(i)) for i in indices}
        if layer not in names or isinstance(layer, nn.Parameter):
            continue
        dim = 1 if "in_channels" in dependency.handler.__name__ and not isinstance(layer, nn.BatchNorm2d) else 0
        if dim == 1 and getattr(layer, "groups", 1) > 1:
            continue
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
            if value.dim() > dim:
                found |= {(f"{names[layer]}.{name}", dim, int(i)) for i in indices}
    return found


def agreed(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """How many units were compared of groups that begin with a layer's rows, one row a unit: the first and the last of each."""
    axes = Axes.of(Model.from_module(module, inputs))
    graph = tp.DependencyGraph().build_dependency(module, example_inputs=inputs[0])
    names = {layer: name for name, layer in module.named_modules()} | {value: name for name, value in module.named_parameters()}
    compared = 0
    for group in axes.groups:
        producer = next((m for m in group.members if m.side == "producer" and m.dim == 0), None)
        if producer is None or len(producer.indices(0)) != 1:
            continue
        root = module.get_submodule(producer.name.rpartition(".")[0])
        if getattr(root, "groups", 1) > 1:
            continue
        function = tp.prune_linear_out_channels if isinstance(root, nn.Linear) else tp.prune_conv_out_channels
        for unit in {0, group.size - 1}:
            (index, *_) = producer.indices(unit)
            assert ours(group, unit) == theirs(graph, names, int(index), root, function), group.name
            compared += 1
    return compared


@pytest.mark.parametrize("make", [Residual, Flattened, Dense, Separable, TinyConvNet])
def test_groups_have_the_same_members(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert agreed(randomise_norms(make()).eval(), (torch.randn(2, 1, 8, 8),)) >= 2


ORACLE = {
    "ResNetForImageClassification": 16,
    "MobileNetV1ForImageClassification": 28,
    "MobileNetV2ForImageClassification": 50,
    "RegNetForImageClassification": 18,
    "EfficientNetForImageClassification": 56,
    "MobileViTForImageClassification": 68,
    "MobileViTV2ForImageClassification": 52,
    "ViTForImageClassification": 6,
    "DeiTForImageClassification": 6,
    "BeitForImageClassification": 6,
    "ConvNextForImageClassification": 16,
    "PoolFormerForImageClassification": 16,
    "HieraForImageClassification": 18,
}
"""Architectures of which the library's graph is right, and how many units are compared; units of several rows (heads) it does not know as one."""


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in ORACLE])
def test_groups_of_architectures_have_the_same_members(name: str) -> None:
    assert agreed(module_of(name), samples(name, 2)) == ORACLE[name]


@pytest.mark.parametrize("kind", [TinyTransformer, TinyConvNet])
@pytest.mark.parametrize("name", NAMES)
def test_importances_plug_in_by_name(name: str, kind: type[nn.Module]) -> None:
    model, ctx = tiny_model(kind), PassContext(data=tiny_data(64).for_passes())
    scaled = name.endswith("BNScaleImportance")
    passes = Pipeline.parse(f"prune{{ratio=0.4,importance={name},samples=48{',exclude=squeeze' if scaled and kind is TinyConvNet else ''}}}")
    if scaled and kind is TinyTransformer:
        with pytest.raises(UnsupportedError, match="cannot score"):
            passes.run(model, ctx)
        return
    assert passes.run(model, ctx).params < 0.8 * model.params


@pytest.mark.parametrize(("name", "close"), [("GroupMagnitudeImportance", 1e-6), ("GroupTaylorImportance", 1e-4), ("GroupHessianImportance", 1e-4)])
def test_scores_are_what_the_library_says_of_its_own_group(name: str, close: float) -> None:
    """Gradients are sums in float32, of which Taylor's scores add up terms that nearly cancel."""
    torch.manual_seed(0)
    module = randomise_norms(Residual()).eval()
    x = tiny_data(8).train.inputs[0]
    axes = Axes.of(Model.from_module(module, (torch.from_numpy(x),)))
    group = axes.group("a")
    scores = IMPORTANCES[f"torch_pruning:{name}"](axes, [group], PassContext(data=tiny_data(8).for_passes()), 8)["a"]
    samples = torch.from_numpy(x)
    losses = F.cross_entropy(module(samples), module(samples).argmax(1), reduction="none")
    parameters = list(module.parameters())
    singly = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    for parameter, gradients in zip(parameters, zip(*singly, strict=True), strict=True):
        stacked = torch.stack(gradients)
        parameter.grad = stacked.square().mean(0) if "Hessian" in name else stacked.mean(0)
    graph = tp.DependencyGraph().build_dependency(module, example_inputs=samples)
    own = getattr(tp.importance, name)()(graph.get_pruning_group(module.a, tp.prune_conv_out_channels, idxs=list(range(8))))
    np.testing.assert_allclose(scores.numpy(), own.detach().double().numpy(), rtol=close)


def test_squares_of_gradients_need_single_samples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.export.save(torch.export.export(TinyConvNet().eval(), (torch.randn(4, 1, 8, 8),)), tmp_path / "four.pt2")
    passes = Pipeline.parse("prune{importance=torch_pruning:HessianImportance}")
    with pytest.raises(UnsupportedError, match="cannot be taken"):
        passes.run(Model.load(tmp_path / "four.pt2"), PassContext(data=tiny_data(64).for_passes()))


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="needs data"):
        Pipeline.parse("prune{importance=torch_pruning:TaylorImportance}").run(tiny_model(), PassContext())
