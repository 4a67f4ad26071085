"""The pass: how much goes, which units, what stays, and what it refuses. Its contract is tested with those of all passes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes import Axes
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.diagnostics import Severity
from edgesmith.compiler.errors import NumericsError, SpecError, UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.quantplan import QuantPlan
from edgesmith.compiler.spec import format_pass, parse_pass
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, tiny_data, tiny_model
from edgesmith.passes.prune.candidates import KINDS
from edgesmith.passes.prune.cutter import Cutter
from edgesmith.passes.prune.importance import IMPORTANCES
from edgesmith.passes.prune.prune import Prune


@pytest.fixture(scope="module")
def transformer() -> Model:
    return tiny_model(TinyTransformer)


@pytest.fixture(scope="module")
def ctx() -> PassContext:
    return PassContext(data=tiny_data().for_passes())


def sizes(model: Model) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for group in Axes.of(model).groups:
        found.setdefault(group.kind, []).append(group.size)
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ratio": 0.4}, {"residual": [32], "heads": [2, 2], "head_dim": [8, 8], "hidden": [38, 38]}),
        ({"ratio": 0.25, "heads": 0.0}, {"residual": [32], "heads": [4, 4], "head_dim": [8, 8], "hidden": [48, 48]}),
        ({"ratio": 0.25, "kinds": KINDS[:-1]}, {"residual": [24], "heads": [3, 3], "head_dim": [6, 6], "hidden": [48, 48]}),
        ({"ratio": 0.4, "round_to": 8}, {"residual": [32], "heads": [2, 2], "head_dim": [8, 8], "hidden": [40, 40]}),
        ({"ratio": 0.9, "least": 20}, {"residual": [32], "heads": [4, 4], "head_dim": [8, 8], "hidden": [20, 20]}),
        ({"ratio": 0.4, "exclude": ("blocks.0",)}, {"residual": [32], "heads": [4, 2], "head_dim": [8, 8], "hidden": [64, 38]}),
        ({"ratio": 0.4, "include": ("blocks.1",)}, {"residual": [32], "heads": [4, 2], "head_dim": [8, 8], "hidden": [64, 38]}),
        ({"ratio": 0.4, "include": ("*.fc1",), "exclude": ("blocks.0",)}, {"residual": [32], "heads": [4, 4], "head_dim": [8, 8], "hidden": [64, 38]}),
        ({"ratio": 0.4, "exclude": ("*.qkv", "blocks.1.fc1")}, {"residual": [32], "heads": [4, 4], "head_dim": [8, 8], "hidden": [38, 64]}),
    ],
)
def test_the_share_that_goes(transformer: Model, options: dict[str, object], expected: dict[str, list[int]]) -> None:
    result = Prune(importance="l2", **options).run(transformer, PassContext())  # type: ignore[arg-type]
    assert sizes(result.model) == expected
    assert result.changed
    assert {d.code for d in result.diagnostics} == {"prune.removed"}


def test_a_share_that_leaves_nothing_is_refused_with_the_nearest_that_does(transformer: Model) -> None:
    """Four heads: 0.874 of them are three, 0.875 four."""
    with pytest.raises(UnsupportedError, match=r"a share of 0\.9 leaves nothing of blocks\.0\.qkv:heads") as caught:
        Prune(ratio=0.9, importance="l2").run(transformer, PassContext())
    assert "0.874" in caught.value.hint
    for options in ({"ratio": 0.874}, {"ratio": 0.9, "least": 1}, {"ratio": 0.9, "ranking": "isomorphic"}):
        result = Prune(importance="l2", **options).run(transformer, PassContext())  # type: ignore[arg-type]
        assert "6 of 8 heads removed, in 2 groups" in [d.message for d in result.diagnostics]


OTHERWISE = ("BNScaleImportance", "FPGMImportance", "RandomImportance")
"""Those that ask something else than how much a unit does: its norm's scale, how far it is from the other units, chance."""


@pytest.mark.parametrize("importance", [name for name in IMPORTANCES if not name.endswith(OTHERWISE)])
def test_units_that_nothing_depends_on_go_first(importance: str, ctx: PassContext) -> None:
    """Hidden units and channels of tiny weights, and nothing else, are chosen by every importance."""
    torch.manual_seed(0)
    model = tiny_model(TinyTransformer)
    faint = {"blocks.0.fc1": [3, 17, 40, 41], "blocks.1.fc1": [0, 1, 2, 63]}
    graph = model.edit(tensors=True)
    with torch.no_grad():
        for name, units in faint.items():
            block = name.rpartition(".")[0]
            graphs.tensor(graph, f"{block}.fc1.weight")[units] *= 1e-3
            graphs.tensor(graph, f"{block}.fc1.bias")[units] *= 1e-3
            graphs.tensor(graph, f"{block}.fc2.weight")[:, units] *= 1e-3
    model = model.with_graph(graph)
    axes = Axes.of(model)
    groups = [axes.group(name) for name in faint]
    scores = IMPORTANCES[importance](axes, groups, ctx, 64)
    assert Cutter(axes, scores).removals(dict.fromkeys(faint, 60)) == faint


def test_taylor_predicts_what_switching_a_unit_off_costs(ctx: PassContext) -> None:
    """The score is half the Fisher information along the switch: for small changes the divergence itself, measured here on the same samples."""
    model = tiny_model(TinyTransformer)
    axes = Axes.of(model)
    group = axes.group("blocks.0.fc1")
    scores = IMPORTANCES["taylor"](axes, [group], ctx, 96)[group.name]
    assert ctx.data is not None
    x = torch.from_numpy(ctx.data.train.inputs[0])
    with torch.no_grad():
        before = model.graph(x).log_softmax(1)
        costs = []
        graph = model.edit(tensors=True)
        weight = graphs.tensor(graph, "blocks.0.fc2.weight")
        for unit in range(group.size):
            column = weight[:, unit].clone()
            weight[:, unit] = 0
            after = graph(x).log_softmax(1)
            weight[:, unit] = column
            costs.append(float((before.exp() * (before - after)).sum(1).mean()))
    assert spearmanr(scores.numpy(), costs).statistic > 0.7


def test_taylor_does_better_than_chance_and_no_worse_than_magnitude(ctx: PassContext) -> None:
    """On a model whose large weights matter least, magnitude is misled and the divergence is not."""
    model = tiny_model(TinyTransformer)
    graph = model.edit(tensors=True)
    with torch.no_grad():
        for block in ("blocks.0", "blocks.1"):
            loud = slice(0, 32)
            graphs.tensor(graph, f"{block}.fc1.weight")[loud] *= 4
            graphs.tensor(graph, f"{block}.fc1.bias")[loud] = -40
    model = model.with_graph(graph)
    assert ctx.data is not None
    x = torch.from_numpy(ctx.data.validation.inputs[0])
    drift = {}
    for importance in ("taylor", "l2"):
        pruned = Prune(ratio=0.5, heads=0.0, importance=importance).run(model, ctx).model
        drift[importance] = float((pruned(x) - model(x)).abs().mean())
    assert drift["taylor"] < 1e-6 < drift["l2"]


def test_ratio_zero_is_the_model_bit_for_bit(transformer: Model) -> None:
    result = Prune(ratio=0.0).run(transformer, PassContext())
    assert result.model is transformer
    assert not result.changed


def test_an_importance_that_needs_data_refuses_without(transformer: Model) -> None:
    with pytest.raises(UnsupportedError, match=r"importance=taylor.* needs data"):
        Prune().run(transformer, PassContext())


def test_a_removal_that_cannot_be_proved_stops_the_pass(transformer: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgesmith.compiler.axes import remove

    def crooked(model: Model, removals: dict[str, list[int]], *, axes: Axes) -> Model:
        return remove(model, {name: [(u + 1) % axes.group(name).size for u in units] for name, units in removals.items()}, axes=axes)

    monkeypatch.setattr("edgesmith.passes.prune.prune.remove", crooked)
    with pytest.raises(NumericsError):
        Prune(importance="l2").run(transformer, PassContext())


def test_refusals_before_anything_runs(transformer: Model) -> None:
    def refused(step: Prune, model: Model) -> list[str]:
        return [d.code for d in step.requires(model) if d.severity is Severity.ERROR]

    assert refused(Prune(), transformer) == []
    assert refused(Prune(exclude=("blocks.7",)), transformer) == ["prune.unknown-path"]
    assert refused(Prune(exclude=("*",)), transformer) == ["prune.nothing"]
    assert refused(Prune(), dataclasses.replace(transformer, quant=QuantPlan())) == ["prune.quantized"]
    linear = Model.from_module(nn.Linear(4, 3), (torch.randn(2, 4),))
    (diagnostic,) = Prune().requires(linear)
    assert "an output of the model" in diagnostic.hint


@pytest.mark.parametrize("text", ["prune{ratio=1.0}", "prune{heads=-0.1}", "prune{importance=l7}", "prune{round_to=0}"])
def test_options_out_of_range(text: str) -> None:
    with pytest.raises(SpecError, match="refuses its options"):
        parse_pass(text)


def test_the_text_form_of_patterns() -> None:
    step = Prune(ratio=0.5, exclude=("blocks.0", "*.fc1"), heads=0.25)
    assert parse_pass(format_pass(step)) == step


def test_of_two_factors_of_a_width_only_the_larger_is_cut() -> None:
    """A grouped convolution's channels are groups x width; 40 % of a width means 40 %, not 64 %."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 40, 1), nn.ReLU(), nn.Conv2d(40, 40, 3, groups=10), nn.ReLU(), nn.Conv2d(40, 2, 1))
    model = Model.from_module(net, (torch.randn(2, 3, 8, 8),))
    assert sizes(model) == {"channels": [10, 4, 4]}
    assert sizes(Prune(ratio=0.4, importance="l2").run(model, PassContext()).model) == {"channels": [6, 4, 4]}


def test_a_convolutional_net_and_a_fixed_batch() -> None:
    class Fixed(TinyConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.reshape(1, 1, 8, 8))

    torch.manual_seed(0)
    model = Model.from_module(Fixed(), (torch.randn(1, 1, 8, 8),))
    assert not model.dynamic_batch
    rng = np.random.default_rng(0)
    split = Split((rng.normal(size=(7, 1, 8, 8)).astype(np.float32),), rng.integers(0, 4, 7))
    pruned = Prune(ratio=0.5, samples=7).run(model, PassContext(data=PassData(split, split))).model
    assert sizes(pruned) == {"residual": [16], "channels": [16, 4]}


class Stages(nn.Module):
    """Two MLPs of one structure and different widths, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)
        self.first, self.second = (nn.Sequential(nn.Linear(128, hidden), nn.GELU(), nn.Linear(hidden, 128)) for hidden in (20, 40))
        self.head = nn.Linear(128, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(torch.relu(self.conv(x))).flatten(1)
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def test_groups_of_one_structure_are_ranked_together(ctx: PassContext) -> None:
    """The units of the first MLP are made to count for less than those of the second: it gives most of what is asked of both, the convolution its share."""
    torch.manual_seed(0)
    module = Stages().eval()
    with torch.no_grad():
        module.first[0].weight *= 0.1
        module.first[2].weight *= 0.1
    model = Model.from_module(module, (torch.randn(2, 1, 8, 8),))
    pruned = Prune(ratio=0.3, ranking="isomorphic", importance="l2", include=("conv", "first.0", "second.0"), least=3).run(model, ctx).model
    kept = {g.name: g.size for g in Axes.of(pruned).groups}
    assert (kept["first.0"], kept["second.0"], kept["conv"]) == (3, 39, 4)
    each = Prune(ratio=0.3, importance="l2", include=("conv", "first.0", "second.0"), least=3).run(model, ctx).model
    kept = {g.name: g.size for g in Axes.of(each).groups}
    assert (kept["first.0"], kept["second.0"], kept["conv"]) == (14, 28, 4)
