"""Removal against models cut by hand, the proof against wrong cuts, and the refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes import Axes, prove, remove
from edgesmith.compiler.axes.proof import compare
from edgesmith.compiler.errors import NumericsError, UserError
from edgesmith.compiler.model import Model
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, tiny_model

KEEP_WIDTH = [0, 1, 3, 4, 6, 7, 9, 11]
KEEP_HEADS = [0, 2]
KEEP_HIDDEN = [1, 2, 5, 7, 8]


class Block(nn.Module):
    """A pre-norm transformer block with a fused qkv and a head size that is given apart from its width."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, scale
        self.embed = nn.Linear(5, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * heads * head_dim), nn.Linear(heads * head_dim, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))
        out: torch.Tensor = self.head((x + self.fc2(F.gelu(self.fc1(self.norm2(x))))).mean(1))
        return out


def block() -> Block:
    torch.manual_seed(0)
    module = Block(width=12, heads=4, head_dim=3, hidden=10, scale=3**-0.5).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module


def cut_by_hand(big: Block) -> Block:
    """The same function of fewer units, written without any analysis."""
    small = Block(len(KEEP_WIDTH), len(KEEP_HEADS), 3, len(KEEP_HIDDEN), big.scale).double()
    inner = [h * 3 + d for h in KEEP_HEADS for d in range(3)]
    rows = [part * 12 + i for part in range(3) for i in inner]
    everything = slice(None)
    cuts = {
        "embed": (KEEP_WIDTH, everything),
        "qkv": (rows, KEEP_WIDTH),
        "proj": (KEEP_WIDTH, inner),
        "fc1": (KEEP_HIDDEN, KEEP_WIDTH),
        "fc2": (KEEP_WIDTH, KEEP_HIDDEN),
        "head": (everything, KEEP_WIDTH),
    }
    with torch.no_grad():
        for name, (out, into) in cuts.items():
            ours, theirs = small.get_submodule(name), big.get_submodule(name)
            ours.weight.copy_(theirs.weight[out][:, into])  # type: ignore[operator, index]
            ours.bias.copy_(theirs.bias[out])  # type: ignore[operator, index]
        for name in ("norm1", "norm2"):
            for leaf in ("weight", "bias"):
                getattr(small.get_submodule(name), leaf).copy_(getattr(big.get_submodule(name), leaf)[KEEP_WIDTH])
    return small


def test_removal_is_what_a_careful_hand_would_do() -> None:
    """Residual width under layer norms, whole heads of a fused qkv and hidden units, all at once, against a module cut by hand."""
    big = block()
    model = Model.from_module(big, (torch.randn(2, 4, 5, dtype=torch.float64),))
    axes = Axes.of(model)
    kinds = {group.kind: group for group in axes.groups}
    assert {kind: (group.size, group.exact) for kind, group in kinds.items()} == {
        "residual": (12, False),
        "heads": (4, True),
        "head_dim": (3, True),
        "hidden": (10, True),
    }
    removals = {
        kinds["residual"].name: [u for u in range(12) if u not in KEEP_WIDTH],
        kinds["heads"].name: [u for u in range(4) if u not in KEEP_HEADS],
        kinds["hidden"].name: [u for u in range(10) if u not in KEEP_HIDDEN],
    }
    pruned = remove(model, removals, axes=axes)
    small = cut_by_hand(big)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), small(x), rtol=1e-12, atol=1e-12)
    assert pruned.params == sum(p.numel() for p in small.parameters())
    assert prove(model, pruned, removals, axes=axes, tolerance=1e-12) < 1e-12


def test_a_head_size_keeps_its_scale() -> None:
    """Masking a coordinate of q and k leaves 1 / sqrt(3) as it was; so must its removal."""
    big = block()
    model = Model.from_module(big, (torch.randn(2, 4, 5, dtype=torch.float64),))
    (name,) = [g.name for g in Axes.of(model).groups if g.kind == "head_dim"]
    pruned = remove(model, {name: [1]})
    rows = torch.tensor([i for i in range(36) if i % 3 == 1])
    with torch.no_grad():
        big.qkv.weight[rows] = 0
        big.qkv.bias[rows] = 0
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), big(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [TinyTransformer, TinyConvNet])
def test_exact_groups_equal_the_graph_with_their_weights_zeroed(kind: type[nn.Module]) -> None:
    """A reference of parameters alone: what is made of nothing and read by nobody is as good as gone."""
    model = tiny_model(kind)
    axes = Axes.of(model)
    x = model.example_inputs(4)
    for group in axes.groups:
        if not group.exact or not any(m.side == "consumer" for m in group.members) or group.kind == "residual":
            continue
        units = range(0, group.size, 3)
        pruned = remove(model, {group.name: units}, axes=axes)
        zeroed = model.edit(tensors=True)
        for member in group.members:
            if member.side in {"consumer", "producer"}:
                index = torch.tensor([i for u in units for i in member.indices(u)])
                graphs.tensor(zeroed, member.name).data.index_fill_(member.dim, index, 0)
        torch.testing.assert_close(pruned(*x), model.with_graph(zeroed)(*x), rtol=1e-5, atol=1e-5)


def test_a_wrong_cut_is_seen_and_the_group_named() -> None:
    model = tiny_model()
    axes = Axes.of(model)
    names = [g.name for g in axes.groups if g.kind in {"hidden", "heads"}]
    removals = {name: [0] for name in names}
    right = remove(model, removals, axes=axes)
    prove(model, right, removals, axes=axes)
    seen = 0
    for name in names:
        for member in axes.group(name).members[::3]:
            graph = right.edit(tensors=True)
            value = graphs.tensor(graph, member.name)
            value.data = value.data.roll(1, member.dim)
            wrong = right.with_graph(graph)
            with pytest.raises(NumericsError, match="not the unpruned one"):
                prove(model, wrong, removals, axes=axes)
            seen += 1
    assert seen >= 4


def test_the_culprit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another unit than the one promised goes in one of two groups: that group is named, also where both are removed at once."""
    model = tiny_model()
    axes = Axes.of(model)
    first, second = [g.name for g in axes.groups if g.kind == "hidden"]
    asked = {first: [0], second: [1]}

    def crooked(model: Model, removals: dict[str, list[int]], *, axes: Axes) -> Model:
        return remove(model, {n: [5] if n == second else u for n, u in removals.items()}, axes=axes)

    monkeypatch.setattr("edgesmith.compiler.axes.proof.remove", crooked)
    with pytest.raises(NumericsError) as caught:
        prove(model, crooked(model, asked, axes=axes), asked, axes=axes)
    assert caught.value.where == second


def test_tied_weights_stay_tied_and_train() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.embed(ids).relu())
            return out

    model = Model.from_module(Tied(), (torch.randint(0, 11, (2, 3)),))
    (group,) = Axes.of(model).groups
    pruned = remove(model, {group.name: [2, 3]})
    names = {str(n.target) for n in pruned.graph.graph.find_nodes(op="get_attr")}
    assert len({id(graphs.tensor(pruned.graph, name)) for name in names}) == 1
    assert pruned.params == 11 * 4
    trained = pruned.edit(tensors=True)
    trained(torch.randint(0, 11, (2, 3))).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.parameters())


def test_nothing_to_remove_is_the_model_itself() -> None:
    model = tiny_model()
    assert remove(model, {}) is model
    assert remove(model, {Axes.of(model).groups[0].name: []}) is model


def test_the_input_model_is_left_alone() -> None:
    model = tiny_model()
    before = model.fingerprint
    remove(model, {g.name: [0] for g in Axes.of(model).groups})
    del model.__dict__["fingerprint"]
    assert model.fingerprint == before


def test_refusals_say_what_is_wrong() -> None:
    model = tiny_model()
    group = Axes.of(model).groups[1]
    with pytest.raises(UserError, match="would be empty"):
        remove(model, {group.name: range(group.size)})
    with pytest.raises(UserError, match="did you mean"):
        remove(model, {group.name + "x": [0]})
    with pytest.raises(UserError, match="has no unit"):
        remove(model, {group.name: [group.size]})


class Viewed(nn.Module):
    """Attention whose heads are brought together by ``view``, which works where the product lies in memory as fused attention leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(2, (3, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(x.shape))


def test_what_lies_in_memory_otherwise_under_masks_is_proved() -> None:
    model = Model.from_module(Viewed().eval(), (torch.randn(2, 5, 12),))
    axes = Axes.of(model)
    (heads,) = (g for g in axes.groups if g.kind == "heads")
    removals = {heads.name: [1]}
    assert prove(model, remove(model, removals, axes=axes), removals, axes=axes, tolerance=1e-12) <= 1e-12


class ChoosesBetweenEquals(nn.Module):
    """The same sum is computed in two ways, whose roundings decide which is the larger."""

    def __init__(self, chooses: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.embed, self.weight = nn.Linear(8, 64), nn.Parameter(torch.randn(64))
        self.chooses = chooses

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x).tanh()
        both = torch.stack([(hidden * self.weight).sum(-1), hidden @ self.weight], -1)
        return self.chooses(both) + torch.rand(2)


CHOOSES = [
    lambda both: torch.tensor([[1.0, 2.0], [3.0, 4.0]])[both.argmax(-1)],
    lambda both: torch.tensor([[1.0, 2.0], [3.0, 4.0]])[both.max(-1).indices],
    lambda both: both.argsort(-1, descending=True).float(),
    lambda both: torch.topk(both, 1)[1] * torch.ones(2),
    lambda both: both.sort(dim=-1)[1].float(),
]


@pytest.mark.parametrize("chooses", CHOOSES)
def test_a_choice_between_equals_and_noise_are_the_same_on_both_sides(chooses: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    model = Model.from_module(ChoosesBetweenEquals(chooses), (torch.randn(2, 200, 8),))
    axes = Axes.of(model)
    (hidden,) = axes.groups
    removals = {hidden.name: range(0, 64, 3)}
    pruned = remove(model, removals, axes=axes)
    assert prove(model, pruned, removals, axes=axes, tolerance=1e-12) <= 1e-12


class Cancels(nn.Module):
    """Adds up large numbers, of which little is left: float32 tells the order in which it was done."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 256), nn.Linear(256, 16)
        with torch.no_grad():
            self.first.weight[128:], self.first.bias[128:] = self.first.weight[:128], self.first.bias[:128]
            self.second.weight[:, :128] += 1e3 * torch.randn(16, 128)
            self.second.weight[:, 128:] -= self.second.weight[:, :128]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x).tanh())
        return out


def test_where_float32_rounds_too_much_float64_decides() -> None:
    torch.manual_seed(0)
    model = Model.from_module(Cancels(), (torch.randn(2, 8),))
    axes = Axes.of(model)
    (hidden,) = axes.groups
    removals = {hidden.name: [1, 2, 3, 129, 130, 131]}
    pruned = remove(model, removals, axes=axes)
    assert compare(model, pruned, removals, axes, model.example_inputs()) > 1e-5
    assert prove(model, pruned, removals, axes=axes) <= 1e-9
    wrong = pruned.edit(tensors=True)
    graphs.tensor(wrong, "second.weight").data[0, 0] += 1.0
    with pytest.raises(NumericsError):
        prove(model, pruned.with_graph(wrong), removals, axes=axes)


def test_a_pruned_model_can_be_analysed_and_pruned_again() -> None:
    model = tiny_model(TinyConvNet)
    for _ in range(3):
        axes = Axes.of(model)
        removals = {g.name: [g.size - 1] for g in axes.groups if g.size > 2}
        pruned = remove(model, removals, axes=axes)
        prove(model, pruned, removals, axes=axes)
        model = pruned


def test_analysis_is_linear_and_fast() -> None:
    """Counted, not timed: the operators on axes grow in step with the graph."""
    import edgesmith.compiler.axes.axes as axes_module

    counts = []
    for depth in (2, 8):
        torch.manual_seed(0)
        model = Model.from_module(TinyTransformer(depth=depth), (torch.randn(2, 1, 8, 8),))
        calls = 0
        original = axes_module.resolve

        def counting(term: axes_module.Term, original: object = original) -> axes_module.Term:
            nonlocal calls
            calls += 1
            return original(term)  # type: ignore[operator, no-any-return]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(axes_module, "resolve", counting)
            Axes.of(model)
        counts.append(calls / len(model.graph.graph.nodes))
    assert counts[1] < 1.5 * counts[0]
