"""Each family of rules on a graph that fits a screen: its axes as text, and its operators before and after a removal.

Units of a group are written with a letter (``A8``: group A, 8 units), dimensions that must stay as plain numbers; B is the batch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes import Axes, prove, remove
from edgesmith.compiler.axes.axes import Axis, Term, resolve
from edgesmith.compiler.axes.groups import named_shapes
from edgesmith.compiler.errors import NumericsError
from edgesmith.compiler.model import Model


class Net(nn.Module):
    """Tensors by name, and a function of them and the input."""

    def __init__(self, function: Callable[..., torch.Tensor], **tensors: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in tensors.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, **dict(self.named_parameters()))


def axes_as_text(axes: Axes) -> str:
    letters = {group.axis: chr(ord("A") + i) for i, group in enumerate(axes.groups)}

    def show(term: Term) -> str:
        return "x".join(factor(axis) for axis in resolve(term)) or "1"

    def factor(axis: Axis) -> str:
        if axis.parts is not None:
            return "(" + " + ".join(show(part) for part in axis.parts) + ")"
        return f"{letters.get(axis, '')}{axis.size}"

    return "\n".join(f"{name}: {', '.join(show(term) for term in shape)}" for name, shape in named_shapes(axes.state))


def operators_as_text(model: Model) -> str:
    """The operators that have literal sizes, with their arguments."""

    def show(value: object) -> str:
        if isinstance(value, fx.Node):
            return "_" if isinstance(value.meta["val"], torch.Tensor) else str(value.meta["val"]).replace(str(graphs.BATCH), "B")
        return f"[{', '.join(show(v) for v in value)}]" if isinstance(value, (list, tuple)) else str(value)

    lines = []
    for node in graphs.operators(model.graph):
        arguments = [show(a) for a in node.args] + [f"{k}={show(v)}" for k, v in node.kwargs.items()]
        if isinstance(node.target, torch._ops.OpOverload) and any(c.isdigit() for c in "".join(arguments)):
            lines.append(f"{getattr(node.target, '_opname', node.target)}({', '.join(arguments)})")
    return "\n".join(lines)


def changed_lines(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if line[:2] not in {"--", "++", "@@"})


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _written_at_places(x: torch.Tensor) -> torch.Tensor:
    rows = x.new_zeros(x.shape[0], 4, x.shape[2])
    rows[:, torch.tensor([3, 0, 1])] = x
    rows[0, torch.tensor([2])] = x[1, :1]
    return rows


def _sampled(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Every head looks at places of its own, as in deformable attention."""
    heads = F.grid_sample(x.reshape(-1, 3, 3, 3), grid.reshape(-1, 2, 2, 2), align_corners=False)
    return heads.reshape(x.shape[0], -1, 2, 2)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def fused_attention(x: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    q, k, v = F.linear(x, qkv).reshape(x.shape[0], 3, 3, 4, 2).permute(2, 0, 3, 1, 4)
    return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], 3, 8), out)


def split_attention(x: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    q, k, v = (split_heads(part, 4) for part in F.linear(x, qkv).chunk(3, -1))
    return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), out)


def grouped_queries(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    query, key, value = split_heads(F.linear(x, q), 4), split_heads(F.linear(x, k), 2), split_heads(F.linear(x, v), 2)
    key, value = (t[:, :, None].expand(-1, 2, 2, 3, 2).reshape(-1, 4, 3, 2) for t in (key, value))
    weights = (query @ key.transpose(2, 3) / 2**0.5).softmax(-1)
    return F.linear((weights @ value).transpose(1, 2).reshape(-1, 3, 8), out)


def rotary(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    def turned(t: torch.Tensor) -> torch.Tensor:
        both = torch.cat([angles, angles], -1)
        return t * both.cos() + torch.cat([-t[..., 4:], t[..., :4]], -1) * both.sin()

    return F.linear((turned(F.linear(x, q)) @ turned(F.linear(x, k)).transpose(1, 2)).softmax(-1), out)


def shuffled(x: torch.Tensor, first: torch.Tensor, depthwise: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    x = F.conv2d(x, first)
    x = x.view(x.shape[0], 2, 4, 5, 5).transpose(1, 2).reshape(x.shape[0], 8, 5, 5)
    return F.conv2d(F.conv2d(x, depthwise, padding=1, groups=8), last)


def dense(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    a = F.conv2d(x, first)
    b = F.conv2d(a, second)
    return F.conv2d(torch.cat([a, b], 1), last)


def excited(x: torch.Tensor, first: torch.Tensor, squeeze: torch.Tensor, excite: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    x = F.conv2d(x, first)
    gate = F.conv2d(F.conv2d(x.mean((2, 3), keepdim=True), squeeze).relu(), excite).sigmoid()
    return F.linear((x * gate).flatten(1), last)


def windows(x: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    x = F.linear(x, first).view(-1, 2, 2, 2, 2, 6).transpose(2, 3).reshape(-1, 4, 6)
    return F.linear(torch.roll(x, 1, 1).view(-1, 2, 2, 2, 2, 6).transpose(2, 3).reshape(-1, 16, 6), last)


def biased(x: torch.Tensor, first: torch.Tensor, table: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    heads = F.linear(x, first).view(-1, 3, 4, 2).transpose(1, 2)
    bias = table[torch.tensor([0, 1, 2, 1, 0, 1, 2, 1, 0])].view(3, 3, 4).permute(2, 0, 1)
    scores = (heads @ heads.transpose(-2, -1) + bias).softmax(-1)
    return F.linear((scores @ heads).transpose(1, 2).flatten(2), last)


CASES: dict[str, tuple[Callable[..., torch.Tensor], dict[str, tuple[int, ...]], tuple[int, ...], dict[str, list[int]], str, str]] = {
    "linear: hidden units, and a norm that counts them": (
        lambda x, a, bias, w, b: F.linear(F.layer_norm(F.linear(x, a, bias).relu(), [6], w), b),
        {"a": (6, 4), "bias": (6,), "w": (6,), "b": (3, 6)},
        (2, 4),
        {"a": [1, 4]},
        """\
a: A6, 4
bias: A6
w: A6
b: 3, A6""",
        """\
-layer_norm(_, [6], _, None, 1e-05, False)
+layer_norm(_, [4], _, None, 1e-05, False)""",
    ),
    "conv: depthwise after a channel shuffle": (
        shuffled,
        {"first": (8, 3, 1, 1), "depthwise": (8, 1, 3, 3), "last": (5, 8, 1, 1)},
        (2, 3, 5, 5),
        {"first#2": [2]},
        """\
first: A2xB4, 3, 1, 1
depthwise: B4xA2, 1, 3, 3
last: 5, B4xA2, 1, 1""",
        """\
-view(_, [B, 2, 4, 5, 5])
+view(_, [B, 2, 3, 5, 5])
-reshape(_, [B, 8, 5, 5])
-conv2d(_, _, None, [1, 1], [1, 1], [1, 1], 8)
+reshape(_, [B, 6, 5, 5])
+conv2d(_, _, None, [1, 1], [1, 1], [1, 1], 6)""",
    ),
    "conv: groups": (
        lambda x, a, b, c: F.conv2d(F.conv2d(F.conv2d(x, a), b, groups=2), c),
        {"a": (8, 3, 1, 1), "b": (6, 4, 1, 1), "c": (2, 6, 1, 1)},
        (2, 3, 5, 5),
        {"a#2": [0], "b": [2]},
        """\
a: A2xB4, 3, 1, 1
b: A2xC3, B4, 1, 1
c: 2, A2xC3, 1, 1""",
        """\
""",
    ),
    "norm: whole groups, and inside a group": (
        lambda x, a, w, b: F.conv2d(F.group_norm(F.conv2d(x, a), 4, w), b),
        {"a": (8, 3, 1, 1), "w": (8,), "b": (2, 8, 1, 1)},
        (2, 3, 5, 5),
        {"a": [3], "a#2": [0]},
        """\
a: A4xB2, 3, 1, 1
w: A4xB2
b: 2, A4xB2, 1, 1""",
        """\
-group_norm(_, 4, _, None, 1e-05, False)
+group_norm(_, 3, _, None, 1e-05, False)""",
    ),
    "linear: fused qkv as three times heads times width": (
        fused_attention,
        {"qkv": (24, 5), "out": (5, 8)},
        (2, 3, 5),
        {"qkv:heads": [1, 3], "qkv:head_dim": [0]},
        """\
qkv: (1 + 1 + 1)xA4xB2, 5
out: 5, A4xB2""",
        """\
-reshape(_, [B, 3, 3, 4, 2])
+reshape(_, [B, 3, 3, 2, 1])
+scaled_dot_product_attention(_, _, _, scale=0.7071067811865475)
-reshape(_, [B, 3, 8])
+reshape(_, [B, 3, 2])""",
    ),
    "join: fused qkv as a split in three": (
        split_attention,
        {"qkv": (24, 5), "out": (5, 8)},
        (2, 3, 5),
        {"qkv:heads": [0]},
        """\
qkv: (A4xB2 + A4xB2 + A4xC2), 5
out: 5, A4xC2""",
        """\
-chunk(_, 3, -1)
-view(_, [B, 3, 4, -1])
+split_with_sizes(_, [6, 6, 6], 2)
+view(_, [B, 3, 3, -1])
-view(_, [B, 3, 4, -1])
+view(_, [B, 3, 3, -1])
-view(_, [B, 3, 4, -1])
+view(_, [B, 3, 3, -1])""",
    ),
    "join: dense concatenation": (
        dense,
        {"first": (4, 3, 1, 1), "second": (6, 4, 1, 1), "last": (2, 10, 1, 1)},
        (2, 3, 5, 5),
        {"first": [0], "second": [1, 5]},
        """\
first: A4, 3, 1, 1
second: B6, A4, 1, 1
last: 2, (A4 + B6), 1, 1""",
        """\
""",
    ),
    "reduce: squeeze and excite, flatten into a linear layer": (
        excited,
        {"first": (4, 3, 2, 2), "squeeze": (2, 4, 1, 1), "excite": (4, 2, 1, 1), "last": (3, 36)},
        (2, 3, 4, 4),
        {"first": [2], "squeeze": [1]},
        """\
first: A4, 3, 2, 2
squeeze: B2, A4, 1, 1
excite: A4, B2, 1, 1
last: 3, A4x3x3""",
        """\
""",
    ),
    "shape: windows and rolls": (
        windows,
        {"first": (6, 3), "last": (2, 6)},
        (2, 16, 3),
        {"first": [5]},
        """\
first: A6, 3
last: 2, A6""",
        """\
-view(_, [-1, 2, 2, 2, 2, 6])
+view(_, [-1, 2, 2, 2, 2, 5])
-reshape(_, [-1, 4, 6])
+reshape(_, [-1, 4, 5])
-view(_, [-1, 2, 2, 2, 2, 6])
+view(_, [-1, 2, 2, 2, 2, 5])
-reshape(_, [-1, 16, 6])
+reshape(_, [-1, 16, 5])""",
    ),
    "index: a table of relative positions for each head": (
        biased,
        {"first": (8, 5), "table": (3, 4), "last": (5, 8)},
        (2, 3, 5),
        {"first:heads": [0, 2]},
        """\
first: A4xB2, 5
table: 3, A4
last: 5, A4xB2
_constants.detach__default_1: 3x3""",
        """\
-view(_, [-1, 3, 4, 2])
+view(_, [-1, 3, 2, 2])
-view(_, [3, 3, 4])
+view(_, [3, 3, 2])""",
    ),
    "shape: grouped queries by repeated keys": (
        grouped_queries,
        {"q": (8, 5), "k": (4, 5), "v": (4, 5), "out": (5, 8)},
        (2, 3, 5),
        {"q:heads": [1], "q:heads#2": [0], "v:head_dim": [1]},
        """\
q: A2xB2xC2, 5
k: A2xC2, 5
v: A2xD2, 5
out: 5, A2xB2xD2""",
        """\
-view(_, [B, 3, 4, -1])
+view(_, [B, 3, 1, -1])
-view(_, [B, 3, 2, -1])
+view(_, [B, 3, 1, -1])
-view(_, [B, 3, 2, -1])
+view(_, [B, 3, 1, -1])
-expand(_, [-1, 2, 2, 3, 2])
-reshape(_, [-1, 4, 3, 2])
+expand(_, [-1, 1, 1, 3, 2])
+reshape(_, [-1, 1, 3, 2])
-expand(_, [-1, 2, 2, 3, 2])
-reshape(_, [-1, 4, 3, 2])
+expand(_, [-1, 1, 1, 3, 1])
+reshape(_, [-1, 1, 3, 1])
-reshape(_, [-1, 3, 8])
+reshape(_, [-1, 3, 1])""",
    ),
    "join: rotary halves": (
        rotary,
        {"q": (8, 5), "k": (8, 5), "angles": (3, 4), "out": (2, 3)},
        (2, 3, 5),
        {"q:head_dim": [1, 2]},
        """\
q: (A4 + A4), 5
k: (A4 + A4), 5
angles: 3, A4
out: 2, 3""",
        """\
-slice(_, 2, 4, 9223372036854775807)
-slice(_, 2, 0, 4)
+slice(_, 2, 2, 9223372036854775807)
+slice(_, 2, 0, 2)
-slice(_, 2, 4, 9223372036854775807)
-slice(_, 2, 0, 4)
+slice(_, 2, 2, 9223372036854775807)
+slice(_, 2, 0, 2)""",
    ),
    "elementwise: a gated unit": (
        lambda x, a, b: F.linear(F.glu(F.linear(x, a), -1), b),
        {"a": (8, 5), "b": (2, 4)},
        (2, 5),
        {"a": [0]},
        """\
a: (A4 + A4), 5
b: 2, A4""",
        """\
""",
    ),
    "index: an embedding, tied": (
        lambda x, table, a: F.linear(F.linear(F.embedding((x > 0).long(), table), a), a.t()) @ table.t(),
        {"table": (7, 6), "a": (4, 6)},
        (2, 3),
        {"table": [0, 1], "a": [3]},
        """\
table: 7, A6
a: B4, A6""",
        """\
""",
    ),
    "constant: zeros that join in, and padding of channels": (
        lambda x, a, b, c: F.linear(F.pad(F.linear(x, a), (2, 3)) + torch.cat([F.linear(x, b), x.new_zeros(x.shape[0], 3)], 1), c),
        {"a": (4, 5), "b": (6, 5), "c": (2, 9)},
        (2, 5),
        {"b:residual": [0], "a:residual": [2], "c:residual": [1]},
        """\
a: A4, 5
b: (B2 + A4), 5
c: 2, (B2 + A4 + C3)""",
        """\
-pad(_, [2, 3])
-new_zeros(_, [B, 3], pin_memory=False)
+pad(_, [1, 2])
+new_zeros(_, [B, 2], pin_memory=False)""",
    ),
    "reduce: a norm of rows that were padded and filled": (
        lambda x, a, b, rows: F.linear(
            _root_mean_square(rows @ torch.cat([F.pad(F.linear(x, a), (0, 0, 1, 0), value=0.5), x.new_ones(x.shape[0], 2, 6)], 1)), b
        ),
        {"a": (6, 5), "b": (2, 6), "rows": (3, 6)},
        (2, 3, 5),
        {"a": [0, 5]},
        """\
a: A6, 5
b: 2, A6
rows: 3, ((1 + 3) + B2)""",
        """\
-new_ones(_, [B, 2, 6], pin_memory=False)
+new_ones(_, [B, 2, 4], pin_memory=False)""",
    ),
    "reduce: a norm by a vector's length": (
        lambda x, a, b: F.linear(F.normalize(F.linear(x, a), dim=-1), b),
        {"a": (6, 5), "b": (2, 6)},
        (2, 5),
        {"a": [0, 5]},
        """\
a: A6, 5
b: 2, A6""",
        """\
""",
    ),
    "conv: each head sampled at a grid of its own": (
        lambda x, a, grid, b: F.conv2d(_sampled(F.conv2d(x, a), F.linear(x.mean((2, 3)), grid).tanh()), b),
        {"a": (6, 4, 1, 1), "grid": (16, 4), "b": (2, 6, 1, 1)},
        (2, 4, 3, 3),
        {"a": [1], "a#2": [0]},
        """\
a: A2xB3, 4, 1, 1
grid: A2x2x2x2, 4
b: 2, A2xB3, 1, 1""",
        """\
-reshape(_, [-1, 3, 3, 3])
+reshape(_, [-1, 2, 3, 3])""",
    ),
    "shape: nothing of a dimension": (
        lambda x, a, b: F.linear(torch.cat([y := F.linear(x, a), y[:, :0].reshape(x.shape[0], 0, 3, 2).flatten(2)], 1), b),
        {"a": (6, 5), "b": (2, 6)},
        (2, 3, 5),
        {},
        """\
a: 6, 5
b: 2, 6""",
        """\
""",
    ),
    "reduce: the largest, whose number nobody reads": (
        lambda x, a, b: F.linear(x, a).max(-1, keepdim=True)[0] * F.linear(x, b),
        {"a": (2, 5), "b": (3, 5)},
        (2, 40, 5),
        {"a": [0]},
        """\
a: A2, 5
b: 3, 5""",
        """\
""",
    ),
    "index: written at places": (
        lambda x, a, b: F.linear(_root_mean_square(_written_at_places(F.linear(x, a))), b),
        {"a": (6, 5), "b": (2, 6)},
        (2, 3, 5),
        {"a": [0, 5]},
        """\
a: A6, 5
b: 2, A6
_constants.detach__default_1: (1 + 2)
_constants.detach__default_1_3: 1""",
        """\
-new_zeros(_, [B, 4, 6], pin_memory=False)
+new_zeros(_, [B, 4, 4], pin_memory=False)
-view(_, [6])
+view(_, [4])""",
    ),
    "index: scattered": (
        lambda x, a, b: F.linear(
            _root_mean_square(x.new_zeros(x.shape[0], 4, 6).scatter(1, torch.tensor([3, 0, 1])[:, None].expand(x.shape[0], 3, 6), F.linear(x, a))),
            b,
        ),
        {"a": (6, 5), "b": (2, 6)},
        (2, 3, 5),
        {"a": [0, 5]},
        """\
a: A6, 5
b: 2, A6
_constants.unsqueeze_default_2: 3, 1""",
        """\
-new_zeros(_, [B, 4, 6], pin_memory=False)
-expand(_, [B, 3, 6])
+new_zeros(_, [B, 4, 4], pin_memory=False)
+expand(_, [B, 3, 4])""",
    ),
    "linear: a matrix for each group": (
        lambda x, a, b: (F.linear(x, a[0])[:, :, None] @ b[torch.tensor([0, 2, 1])]).squeeze(2),
        {"a": (1, 6, 5), "b": (3, 6, 2)},
        (2, 3, 5),
        {},
        """\
a: 1, A6, 5
b: 3, A6, 2
_constants.detach__default_1: 3""",
        """\
""",
    ),
    "linear: einsum": (
        lambda x, a, b: torch.einsum("bth,oh->bto", torch.einsum("...i,hi->...h", x, a).tanh(), b),
        {"a": (6, 5), "b": (2, 6)},
        (2, 3, 5),
        {"a": [0, 5]},
        """\
a: A6, 5
b: 2, A6""",
        """\
""",
    ),
    "conv: pixel shuffle": (
        lambda x, a, b: F.conv2d(F.pixel_shuffle(F.conv2d(x, a), 2), b),
        {"a": (12, 2, 1, 1), "b": (2, 3, 1, 1)},
        (2, 2, 3, 3),
        {"a": [1]},
        """\
a: A3x2x2, 2, 1, 1
b: 2, A3, 1, 1""",
        """\
""",
    ),
    "shape: repeats": (
        lambda x, a, b: F.linear(F.linear(x, a).repeat_interleave(2, 1, output_size=8) * F.linear(x, a).repeat(1, 2), b),
        {"a": (4, 5), "b": (2, 8)},
        (2, 5),
        {},
        """\
a: A2xA2, 5
b: 2, A2xA2xA2""",
        """\
""",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_axes_and_operators_before_and_after(case: str) -> None:
    function, tensors, shape, removals, axes_text, change = CASES[case]
    model = Model.from_module(Net(function, **tensors).double(), (torch.randn(shape, dtype=torch.float64),))
    axes = Axes.of(model)
    assert axes_as_text(axes) == axes_text
    pruned = remove(model, removals, axes=axes)
    assert changed_lines(operators_as_text(model), operators_as_text(pruned)) == change
    assert prove(model, pruned, removals, axes=axes, tolerance=1e-12) <= 1e-12
    everything = {group.name: range(0, group.size - 1, 2) for group in axes.groups}
    assert prove(model, remove(model, everything, axes=axes), everything, axes=axes, tolerance=1e-12) <= 1e-12


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers(kind: Any, bidirectional: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(5, 6)
            self.cell = kind(6, 4, num_layers=2, batch_first=True, bidirectional=bidirectional)
            self.head = nn.Linear(8 if bidirectional else 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.cell(self.embed(x))[0][:, -1])
            return out

    torch.manual_seed(0)
    model = Model.from_module(Recurrent().double(), (torch.randn(2, 3, 5, dtype=torch.float64),))
    axes = Axes.of(model)
    text = axes_as_text(axes)
    gates = {nn.LSTM: "4xB4", nn.GRU: "3xB4", nn.RNN: "B4"}[kind]
    assert f"cell.weight_ih_l0: {gates}, A6" in text
    assert f"cell.weight_hh_l1: {gates}, B4" in text
    assert ("head.weight: 2, (B4 + B4)" if bidirectional else "head.weight: 2, B4") in text
    removals = {group.name: [1, 2] for group in axes.groups}
    pruned = remove(model, removals, axes=axes)
    assert prove(model, pruned, removals, axes=axes, tolerance=1e-12) <= 1e-12
    wrong = pruned.edit(tensors=True)
    rolled = graphs.tensor(wrong, "cell.weight_hh_l0").data.roll(1, 1)
    graphs.tensor(wrong, "cell.weight_hh_l0").data = rolled
    with pytest.raises(NumericsError):
        prove(model, pruned.with_graph(wrong), removals, axes=axes)


def test_an_operator_without_a_rule_pins_what_it_touches_and_says_so() -> None:
    model = Model.from_module(
        Net(lambda x, a, b, c: F.linear(F.linear(torch.fft.fft(F.linear(x, a)).real, b), c), a=(6, 5), b=(4, 6), c=(2, 4)), (torch.randn(2, 5),)
    )
    axes = Axes.of(model)
    assert [(group.name, group.size) for group in axes.groups] == [("b", 4)]
    assert [d.code for d in axes.diagnostics] == ["axes.no-rule"]
    (pin,) = [p for p in axes.pinned if p.where == "a" and p.dim == 0]
    assert pin.size == 6
    assert "fft" in pin.reason
