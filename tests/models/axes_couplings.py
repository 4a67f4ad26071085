"""Small networks, one for each way in which layers couple, with the axes and the changes of operators that are expected."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

Case = tuple[Callable[..., torch.Tensor], dict[str, tuple[int, ...]], tuple[int, ...], dict[str, list[int]], str, str]
"""A function, its tensors, the shape of its input, units that go (group name -> units), the axes as text, and the lines of operators that change."""


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


COUPLINGS: dict[str, Case] = {
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
