"""Units go in the order of what their loss costs after the others have made up for it, and the others do make up for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith import Model, PassContext, Pipeline
from edgesmith.compiler.axes import Axes, remove
from edgesmith.compiler.data import Data, Split
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer
from edgesmith.passes.observe.batches import calibration_batches
from edgesmith.passes.prune.obs import Read, obs
from edgesmith.passes.prune.reconstruct import reconstructed

F = nn.functional


def context(*shape: int, count: int = 256) -> PassContext:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, *shape)).astype(np.float32)
    split = Split((x,), np.zeros(count, np.int64))
    return PassContext(data=Data(split, split, split).for_passes())


def least_error(x: torch.Tensor, weight: torch.Tensor, kept: list[int]) -> float:
    """The reference: the best that any weights for the columns ``kept`` can do, by the library's least squares."""
    wanted = x @ weight.T
    best = torch.linalg.lstsq(x[:, kept], wanted).solution
    return float((x[:, kept] @ best - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(("units", "width", "mixed"), [(10, 1, 1.0), (10, 3, 1.0), (80, 1, 0.03)])
def test_scores_are_what_least_squares_leave(units: int, width: int, mixed: float) -> None:
    """``width`` columns a unit, which are correlated with others'; many are ``mixed`` less, or damping would tell."""
    torch.manual_seed(0)
    columns = units * width
    x = torch.randn(500, columns, dtype=torch.float64) @ (mixed * torch.randn(columns, columns, dtype=torch.float64) + torch.eye(columns))
    weight = torch.randn(7, columns, dtype=torch.float64)
    labels = np.repeat(np.arange(units), width)
    scores = obs([Read(weight, x.T @ x / len(x), labels)], units)
    order = scores.argsort().tolist()
    for gone in range(1, units):
        kept = [int(c) for c in np.flatnonzero(~np.isin(labels, order[:gone]))]
        assert float(scores[order[gone - 1]]) == pytest.approx(least_error(x, weight, kept), rel=2e-3)
    first = min(range(units), key=lambda u: least_error(x, weight, [int(c) for c in np.flatnonzero(labels != u)]))
    assert order[0] == first


def test_units_of_several_readers_and_of_different_sizes_are_scored() -> None:
    torch.manual_seed(0)
    reads, references = [], []
    for labels in (np.array([0, 1, 1, 2, -1]), np.array([0, 1, 2])):
        x, weight = torch.randn(300, len(labels), dtype=torch.float64), torch.randn(4, len(labels), dtype=torch.float64)
        reads.append(Read(weight, x.T @ x / len(x), labels))
        references.append((x, weight, labels))
    scores = obs(reads, 3)
    order = scores.argsort().tolist()
    for gone in (1, 2):
        wanted = sum(least_error(x, w, [int(c) for c in np.flatnonzero(~np.isin(labels, order[:gone]))]) for x, w, labels in references)
        assert float(scores[order[gone - 1]]) == pytest.approx(wanted, rel=2e-3)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.head = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3, bias=False), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))).mean((2, 3)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.gelu(self.first(x)))


class Heads(nn.Module):
    """Attention of four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 5, 3, 4, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 12))


def doubled(module: nn.Module) -> nn.Module:
    """Every unit between two layers twice, and what reads it split at random between the two (Chen et al., Net2Net, ICLR 2016, section 2)."""
    torch.manual_seed(1)
    if isinstance(module, Heads):
        wide: nn.Module = HeadsTwice()
        share = torch.rand(4).repeat_interleave(3)
        rows = torch.arange(36).view(3, 4, 3)[:, torch.arange(8) % 4].flatten()
        first, second = (module.qkv, wide.qkv), (module.out, wide.out)
    elif isinstance(module, Mlp):
        wide = Mlp()
        wide.first, wide.second = nn.Linear(6, 32), nn.Linear(32, 5)
        share, rows = torch.rand(16), torch.arange(32) % 16
        first, second = (module.first, wide.first), (module.second, wide.second)
    else:
        assert isinstance(module, Convolutions)
        wide = Convolutions()
        wide.first, wide.norm, wide.second = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.Conv2d(24, 8, 3, bias=False)
        wide.head.load_state_dict(module.head.state_dict())
        share, rows = torch.rand(12), torch.arange(24) % 12
        first, second = (module.first, wide.first), (module.second, wide.second)
        for name, value in module.norm.state_dict().items():
            if value.dim():
                wide.norm.state_dict()[name].copy_(value[rows])
    with torch.no_grad():
        first[1].weight.copy_(first[0].weight[rows])
        first[1].bias.copy_(first[0].bias[rows])
        along = share.reshape(1, -1, *[1] * (second[0].weight.dim() - 2))
        second[1].weight.copy_(torch.cat([second[0].weight * along, second[0].weight * (1 - along)], 1))
        if second[0].bias is not None:
            second[1].bias.copy_(second[0].bias)
    return wide.eval()


class HeadsTwice(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 72), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 5, 3, 8, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 24))


PLANTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "mlp": (Mlp, (6,), ""),
    "convolutions": (Convolutions, (3, 10, 10), "exclude=second,"),
    "heads": (Heads, (5, 12), ""),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_redundancy_goes_without_loss(kind: str) -> None:
    """Half of the units repeat others. Magnitude alone takes whole pairs, and the same test fails."""
    make, shape, options = PLANTED[kind]
    torch.manual_seed(0)
    narrow = make().eval()
    with torch.no_grad():
        for name, buffer in narrow.named_buffers():
            if "running" in name:
                buffer.copy_(0.5 + torch.rand(buffer.shape))
    wide = doubled(narrow)
    inputs = torch.randn(64, *shape)
    torch.testing.assert_close(wide(inputs), narrow(inputs), rtol=1e-4, atol=1e-5)
    model = Model.from_module(wide, (inputs[:2],))

    def off(passes: str) -> float:
        pruned = Pipeline.parse(passes).run(model, context(*shape))
        assert pruned.params < 0.6 * model.params or kind == "heads"
        with torch.no_grad():
            return float((pruned(inputs) - model(inputs)).abs().max() / model(inputs).abs().max())

    assert off(f"prune{{ratio=0.5,{options}importance=obs,reconstruct=true}}") < 1e-4
    assert off(f"prune{{ratio=0.5,{options}importance=l2}}") > 1e-2


class Whole(nn.Module):
    """A transformer of one block, every width ``times`` as large."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.heads = 2 * times
        stream, hidden, heads = 8 * times, 12 * times, 4 * self.heads
        self.stem, self.head = nn.Linear(6, stream), nn.Linear(stream, 5)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(stream) for _ in range(3))
        self.qkv, self.out = nn.Linear(stream, 3 * heads), nn.Linear(heads, stream)
        self.fc1, self.fc2 = nn.Linear(stream, hidden), nn.Linear(hidden, stream)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        q, k, v = self.qkv(self.norm1(x)).view(-1, 5, 3, self.heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(self.norm3(x + self.fc2(F.gelu(self.fc1(self.norm2(x))))))


def test_half_of_every_width_goes_where_all_of_a_transformer_is_there_twice() -> None:
    """Stream, heads and hidden units; a norm over units of which each is there twice is the norm over one of each."""
    torch.manual_seed(0)
    narrow, wide = Whole(1).eval(), Whole(2).eval()
    stream, hidden, heads = torch.arange(16) % 8, torch.arange(24) % 12, torch.arange(8).view(2, 4).repeat(2, 1).flatten()
    in_three = torch.arange(24).view(3, 2, 4).repeat(1, 2, 1).flatten()
    rows = {"qkv": in_three, "fc1": hidden, "head": torch.arange(5)}
    columns = {"qkv": stream, "fc1": stream, "head": stream, "out": heads, "fc2": hidden}
    state = wide.state_dict()
    for name, value in narrow.state_dict().items():
        layer = name.partition(".")[0]
        if "norm" in layer:
            value += 0.3 * torch.randn(value.shape)
        twice = value[rows.get(layer, stream)]
        if layer in columns and value.dim() == 2:
            share = torch.rand(value.shape[1] // 4).repeat_interleave(4)
            twice = twice[:, columns[layer]] * torch.cat([share, 1 - share])
        state[name].copy_(twice)
    inputs = torch.randn(64, 5, 6)
    torch.testing.assert_close(wide(inputs), narrow(inputs), rtol=1e-4, atol=1e-5)
    model = Model.from_module(wide, (inputs[:2],))

    def off(importance: str) -> float:
        pruned = Pipeline.parse(f"prune{{ratio=0.5,kinds=[hidden,heads,residual],importance={importance}}}").run(model, context(5, 6))
        assert pruned.params == sum(p.numel() for p in narrow.parameters())
        with torch.no_grad():
            return float((pruned(inputs) - model(inputs)).abs().max() / model(inputs).abs().max())

    assert off("obs,reconstruct=true") < 1e-4
    assert off("l2") > 1e-2


@pytest.mark.parametrize(("make", "shape"), [(TinyTransformer, (1, 8, 8)), (TinyConvNet, (1, 8, 8)), (Heads, (5, 12))], ids=["vit", "cnn", "heads"])
@pytest.mark.parametrize("seed", range(3))
def test_the_fit_never_makes_an_operator_worse_on_samples_held_out(make: Callable[[], nn.Module], shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.from_module(make().eval(), (torch.randn(2, *shape),))
    axes, data = Axes.of(model), context(*shape).need_data("").train
    removals = {g.name: range(round(0.6 * g.size), g.size) for g in axes.groups if g.kind in {"hidden", "channels", "heads"}}
    pruned = remove(model, removals, axes=axes)
    fitted, found = reconstructed(axes, pruned, removals, lambda: calibration_batches(model, data, 256, 0))
    assert found
    assert all(refit.after <= refit.before for refit in found)
    assert sum(refit.after < 0.9 * refit.before for refit in found) > 0
    inputs = torch.from_numpy(data.inputs[0])
    with torch.no_grad():
        off = [float((m(inputs) - model(inputs)).square().mean()) for m in (fitted, pruned)]
    assert off[0] < off[1]


def test_the_fit_is_the_one_that_least_squares_give() -> None:
    torch.manual_seed(0)
    module = Mlp().eval()
    model = Model.from_module(module, (torch.randn(2, 6),))
    ctx = context(6, count=4096)
    pruned = Pipeline.parse("prune{ratio=0.5,importance=l1,samples=4096,reconstruct=true}").run(model, ctx)
    axes = Axes.of(model)
    (group,) = (g for g in axes.groups if g.kind == "hidden")
    first = dict(pruned.graph.named_parameters())["first.weight"]
    kept = [int((module.first.weight == row).all(1).nonzero()) for row in first]
    x = torch.from_numpy(ctx.need_data("").train.inputs[0])
    with torch.no_grad():
        hidden = F.gelu(module.first(x))[:, kept].double()
        wanted = module.second(F.gelu(module.first(x))).double()
        best = torch.linalg.lstsq(torch.cat([hidden, torch.ones(len(x), 1)], 1), wanted).solution
        least = float((torch.cat([hidden, torch.ones(len(x), 1)], 1) @ best - wanted).square().mean())
        got = float((pruned(x).double() - wanted).square().mean())
        cut = float((remove(model, {group.name: sorted(set(range(16)) - set(kept))})(x).double() - wanted).square().mean())
    assert got < 1.01 * least
    assert least < 0.5 * cut


def test_batch_norms_follow_what_they_read() -> None:
    """A norm behind the fitted layer: what it reads on average is what it takes off, as it was before."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.relu(self.norm(self.second(F.relu(self.first(x))))).mean((2, 3)))

    torch.manual_seed(0)
    module = Normed()
    ctx = context(3, 10, 10, count=64)
    x = torch.from_numpy(ctx.need_data("").train.inputs[0])
    with torch.no_grad():
        for _ in range(100):
            module.train()(x)
    model = Model.from_module(module.eval(), (x[:2],))
    pruned = Pipeline.parse("prune{ratio=0.6,importance=l1,exclude=second,reconstruct=true}").run(model, ctx)
    tensors = dict(pruned.graph.named_parameters()) | dict(pruned.graph.named_buffers())
    with torch.no_grad():
        read = F.conv2d(F.relu(F.conv2d(x, tensors["first.weight"], tensors["first.bias"])), tensors["second.weight"], tensors["second.bias"])
        assert float((module.norm.running_var / read.var((0, 2, 3)) - 1).abs().max()) > 0.05
        torch.testing.assert_close(tensors["norm.running_mean"], read.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(tensors["norm.running_var"], read.var((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_what_nothing_that_can_be_fitted_reads_is_named() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.first(x)).sum(-1)

    model = Model.from_module(Summed().eval(), (torch.randn(2, 6),))
    with pytest.raises(UnsupportedError, match="importance=obs cannot score first"):
        Pipeline.parse("prune{importance=obs}").run(model, context(6))
