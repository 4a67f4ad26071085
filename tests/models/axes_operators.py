"""The rules that no coupling of ``axes_couplings`` needs, each on a graph that fits a screen."""

from __future__ import annotations

import torch
from axes_couplings import Case, split_heads
from torch.nn import functional as F


def _transposed(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return F.conv2d(F.conv_transpose2d(F.conv2d(x, a), b, groups=2), c)


def _resampled(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    smaller = F.max_pool2d(F.avg_pool2d(F.conv2d(x, a), 2), 2)
    return F.conv2d(F.pad(F.interpolate(smaller, scale_factor=2.0, mode="bilinear"), (1, 1, 0, 0), mode="reflect"), b)


def _normalised(x: torch.Tensor, a: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.conv2d(F.batch_norm(F.instance_norm(F.conv2d(x, a), weight=w), mean, variance.abs()), b)


def _gathered(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, a).gather(1, torch.tensor([[2], [0]]).expand(x.shape[0], 2, 6)), b)


def _matched(x: torch.Tensor, a: torch.Tensor, words: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(F.embedding(F.linear(x, a).argmax(-1), words), b)


def _batched(x: torch.Tensor, a: torch.Tensor, shift: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(torch.baddbmm(shift, x, a.expand(x.shape[0], 4, 6)), b)


def _from_a_start(x: torch.Tensor, a: torch.Tensor, start: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, a).diff(dim=1, prepend=start.expand(x.shape[0], 1, 6)), b)


def _counted(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, b).relu(), c) * torch.histc(F.linear(x, a), 3, -2, 2)


def _from_a_grid(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    first, second = torch.meshgrid(rows, columns, indexing="ij")
    return F.linear(F.linear(x, first - second), b)


def _abreast(x: torch.Tensor, a: torch.Tensor, scale: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide, scales = torch.broadcast_tensors(F.linear(x, a), scale)
    return F.linear(wide * scales, b)


def _cross_covariance(x: torch.Tensor, qkv: torch.Tensor, heat: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Channels attend to channels, as in XCiT."""
    q, k, v = F.linear(x, qkv).reshape(-1, 3, 3, 2, 4).permute(2, 0, 3, 4, 1)
    weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * heat).softmax(-1)
    return F.linear((weights @ v).permute(0, 3, 1, 2).reshape(-1, 3, 8), out)


def _layer_scale(x: torch.Tensor, stem: torch.Tensor, a: torch.Tensor, b: torch.Tensor, gamma: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    x = F.linear(x, stem)
    return F.linear(x + gamma * F.linear(F.gelu(F.linear(x, a)), b), head)


def _class_and_registers(
    x: torch.Tensor, stem: torch.Tensor, first: torch.Tensor, registers: torch.Tensor, places: torch.Tensor, head: torch.Tensor
) -> torch.Tensor:
    tokens = torch.cat([first.expand(x.shape[0], -1, -1), registers.expand(x.shape[0], -1, -1), F.linear(x, stem)], 1) + places
    return F.linear(tokens[:, 0] + tokens[:, 3:].mean(1), head)


def _shared_keys(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    query, key, value = split_heads(F.linear(x, q), 6), split_heads(F.linear(x, k), 3), split_heads(F.linear(x, v), 3)
    return F.linear(F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2).flatten(2), out)


OPERATORS: dict[str, Case] = {
    "constant: numbered places": (
        lambda x, a, b, c: F.linear(F.linear(F.linear(x, a) * torch.arange(6), b).relu(), c),
        {"a": (6, 4), "b": (5, 6), "c": (2, 5)},
        (2, 4),
        {"b": [1]},
        """\
a: 6, 4
b: A5, 6
c: 2, A5""",
        "",
    ),
    "conv: transposed, in groups": (
        _transposed,
        {"a": (8, 3, 1, 1), "b": (8, 3, 2, 2), "c": (2, 6, 1, 1)},
        (2, 3, 5, 5),
        {"a": [1], "a#2": [2], "b": [1]},
        """\
a: A2xB4, 3, 1, 1
b: A2xB4, C3, 2, 2
c: 2, A2xC3, 1, 1""",
        """\
-conv_transpose2d(_, _, None, [1, 1], [0, 0], [0, 0], 2)
+conv_transpose2d(_, _, None, [1, 1], [0, 0], [0, 0], 1)""",
    ),
    "conv: the general form": (
        lambda x, a, b: F.conv2d(torch.convolution(x, a, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1), b),
        {"a": (6, 3, 1, 1), "b": (2, 6, 1, 1)},
        (2, 3, 4, 4),
        {"a": [0, 5]},
        """\
a: A6, 3, 1, 1
b: 2, A6, 1, 1""",
        "",
    ),
    "conv: pools, resampling and mirrored borders": (
        _resampled,
        {"a": (6, 3, 1, 1), "b": (2, 6, 1, 1)},
        (2, 3, 8, 8),
        {"a": [2]},
        """\
a: A6, 3, 1, 1
b: 2, A6, 1, 1""",
        "",
    ),
    "conv: pixel unshuffle": (
        lambda x, a, b: F.conv2d(F.pixel_unshuffle(F.conv2d(x, a), 2), b),
        {"a": (3, 2, 1, 1), "b": (2, 12, 1, 1)},
        (2, 2, 4, 4),
        {"a": [1]},
        """\
a: A3, 2, 1, 1
b: 2, A3x2x2, 1, 1""",
        "",
    ),
    "conv: channel shuffle by name": (
        lambda x, a, b: F.conv2d(F.channel_shuffle(F.conv2d(x, a), 4), b),
        {"a": (8, 3, 1, 1), "b": (2, 8, 1, 1)},
        (2, 3, 4, 4),
        {"a": [2], "a#2": [1]},
        """\
a: A4xB2, 3, 1, 1
b: 2, B2xA4, 1, 1""",
        """\
-channel_shuffle(_, 4)
+channel_shuffle(_, 3)""",
    ),
    "conv: unfolded into a linear layer": (
        lambda x, a, b: F.linear(F.unfold(F.conv2d(x, a), 2).transpose(1, 2), b),
        {"a": (3, 2, 1, 1), "b": (2, 12)},
        (2, 2, 4, 4),
        {"a": [0]},
        """\
a: A3, 2, 1, 1
b: 2, A3x4""",
        "",
    ),
    "conv: folded": (
        lambda x, a, b: F.conv2d(F.fold(F.linear(x, a).transpose(1, 2), (3, 3), 2), b),
        {"a": (12, 5), "b": (2, 3, 1, 1)},
        (2, 4, 5),
        {"a": [1]},
        """\
a: A3x4, 5
b: 2, A3, 1, 1""",
        "",
    ),
    "index: selected by number": (
        lambda x, a, b, c: F.linear(F.linear(F.linear(x, a).index_select(2, torch.tensor([2, 0, 0])), b).index_select(1, torch.tensor([1, 0])), c),
        {"a": (6, 4), "b": (5, 3), "c": (2, 5)},
        (2, 3, 4),
        {"b": [0]},
        """\
a: 6, 4
b: A5, B3
c: 2, A5
_constants.detach__default_1: B3
_constants.detach__default_1_3: 2""",
        "",
    ),
    "index: gathered": (
        _gathered,
        {"a": (6, 4), "b": (2, 6)},
        (2, 3, 4),
        {"a": [1, 2]},
        """\
a: A6, 4
b: 2, A6
_constants.detach__default_1: 2, 1""",
        """\
-expand(_, [B, 2, 6])
+expand(_, [B, 2, 4])""",
    ),
    "index: counted by value": (
        _counted,
        {"a": (6, 4), "b": (5, 4), "c": (3, 5)},
        (2, 4),
        {"b": [3]},
        """\
a: 6, 4
b: A5, 4
c: 3, A5""",
        "",
    ),
    "join: stacked": (
        lambda x, a, b, c: F.linear(torch.stack([F.linear(x, a), F.linear(x, b).relu()], 2).flatten(1), c),
        {"a": (6, 4), "b": (6, 4), "c": (2, 12)},
        (2, 4),
        {"a": [1, 2]},
        """\
a: A6, 4
b: A6, 4
c: 2, A6x(1 + 1)""",
        "",
    ),
    "join: a range of the units": (
        lambda x, a, b: F.linear(F.linear(x, a).narrow(1, 2, 3), b),
        {"a": (7, 4), "b": (2, 3)},
        (2, 4),
        {"a": [1], "a#2": [1], "a#3": [1]},
        """\
a: (A2 + B3 + C2), 4
b: 2, B3""",
        """\
-narrow(_, 1, 2, 3)
+narrow(_, 1, 1, 2)""",
    ),
    "linear: a product and what is added": (
        lambda x, a, shift, b: F.linear(torch.addmm(shift, x, a), b),
        {"a": (4, 6), "shift": (6,), "b": (2, 6)},
        (2, 4),
        {"a": [1, 4]},
        """\
a: 4, A6
shift: A6
b: 2, A6""",
        "",
    ),
    "linear: products of a batch and what is added": (
        _batched,
        {"a": (4, 6), "shift": (3, 6), "b": (2, 6)},
        (2, 3, 4),
        {"shift": [3]},
        """\
a: 4, A6
shift: 3, A6
b: 2, A6""",
        """\
-expand(_, [B, 4, 6])
+expand(_, [B, 4, 5])""",
    ),
    "linear: a matrix of two vectors": (
        lambda x, a, c, b: F.linear(F.linear(x, torch.outer(a, c)), b),
        {"a": (6,), "c": (4,), "b": (2, 6)},
        (2, 4),
        {"a:other": [3]},
        """\
a: A6
c: 4
b: 2, A6""",
        "",
    ),
    "linear: shared keys by name": (
        _shared_keys,
        {"q": (12, 5), "k": (6, 5), "v": (6, 5), "out": (5, 12)},
        (2, 3, 5),
        {"q:heads": [1], "q:heads#2": [1], "q:head_dim": [1], "v:head_dim": [1]},
        """\
q: A3xB2xC2, 5
k: A3xC2, 5
v: A3xD2, 5
out: 5, A3xB2xD2""",
        """\
-view(_, [B, 3, 6, -1])
+view(_, [B, 3, 2, -1])
-view(_, [B, 3, 3, -1])
+view(_, [B, 3, 2, -1])
-view(_, [B, 3, 3, -1])
+view(_, [B, 3, 2, -1])
+scaled_dot_product_attention(_, _, _, enable_gqa=True, scale=0.7071067811865475)""",
    ),
    "linear: cross-covariance attention": (
        _cross_covariance,
        {"qkv": (24, 5), "heat": (2, 1, 1), "out": (5, 8)},
        (2, 3, 5),
        {"qkv:heads": [1], "qkv:head_dim": [2]},
        """\
qkv: (1 + 1 + 1)xA2xB4, 5
heat: A2, 1, 1
out: 5, A2xB4""",
        """\
-reshape(_, [-1, 3, 3, 2, 4])
+reshape(_, [-1, 3, 3, 1, 3])
-reshape(_, [-1, 3, 8])
+reshape(_, [-1, 3, 3])""",
    ),
    "norm: of each image, and of a batch": (
        _normalised,
        {"a": (6, 3, 1, 1), "mean": (6,), "variance": (6,), "w": (6,), "b": (2, 6, 1, 1)},
        (2, 3, 4, 4),
        {"a": [0, 3]},
        """\
a: A6, 3, 1, 1
mean: A6
variance: A6
w: A6
b: 2, A6, 1, 1""",
        "",
    ),
    "norm: of the weights": (
        lambda x, v, g, b: F.linear(F.linear(x, torch._weight_norm(v, g, 0)), b),
        {"v": (6, 4), "g": (6, 1), "b": (2, 6)},
        (2, 4),
        {"v:other": [3]},
        """\
v: A6, 4
g: A6, 1
b: 2, A6""",
        "",
    ),
    "reduce: over everything": (
        lambda x, a, b: F.linear(F.linear(x, a) / F.linear(x, a).abs().sum(), b),
        {"a": (6, 4), "b": (2, 6)},
        (2, 4),
        {"a": [3]},
        """\
a: A6, 4
b: 2, A6""",
        "",
    ),
    "reduce: the number of the largest": (
        _matched,
        {"a": (5, 4), "words": (5, 6), "b": (2, 6)},
        (2, 3, 4),
        {"words": [2]},
        """\
a: 5, 4
words: 5, A6
b: 2, A6""",
        "",
    ),
    "reduce: differences of neighbours": (
        lambda x, a, b, c: F.linear(F.linear(F.linear(x, a).diff(dim=-1), b).relu(), c),
        {"a": (6, 4), "b": (4, 5), "c": (2, 4)},
        (2, 4),
        {"b": [0]},
        """\
a: 6, 4
b: A4, 5
c: 2, A4""",
        "",
    ),
    "reduce: in order": (
        lambda x, a, b, c: F.linear(F.linear(F.linear(x, a).topk(2, 1).values, b).sort(-1).values, c),
        {"a": (6, 4), "b": (5, 6), "c": (2, 5)},
        (2, 3, 4),
        {"a": [5]},
        """\
a: A6, 4
b: 5, A6
c: 2, 5""",
        "",
    ),
    "reduce: running products, and differences of tokens": (
        lambda x, a, b: F.linear(F.linear(x, a).sigmoid().cumprod(1).diff(dim=1), b),
        {"a": (6, 4), "b": (2, 6)},
        (2, 3, 4),
        {"a": [1, 3]},
        """\
a: A6, 4
b: 2, A6""",
        "",
    ),
    "reduce: differences to what is put before": (
        _from_a_start,
        {"a": (6, 4), "start": (1, 1, 6), "b": (2, 6)},
        (2, 3, 4),
        {"a": [1, 3]},
        """\
a: A6, 4
start: 1, 1, A6
b: 2, A6""",
        """\
-expand(_, [B, 1, 6])
+expand(_, [B, 1, 4])""",
    ),
    "shape: made equal": (
        _abreast,
        {"a": (6, 4), "scale": (1, 6), "b": (2, 6)},
        (2, 4),
        {"a": [3]},
        """\
a: A6, 4
scale: 1, A6
b: 2, A6""",
        "",
    ),
    "shape: vectors along dimensions of their own": (
        _from_a_grid,
        {"rows": (6,), "columns": (4,), "b": (2, 6)},
        (2, 4),
        {"rows:other": [3]},
        """\
rows: A6
columns: 4
b: 2, A6""",
        "",
    ),
    "elementwise: another's type": (
        lambda x, a, b: F.linear(F.linear(x, a).type_as(b), b),
        {"a": (6, 4), "b": (2, 6)},
        (2, 4),
        {"a": [0]},
        """\
a: A6, 4
b: 2, A6""",
        "",
    ),
    "elementwise: a slope for each channel": (
        lambda x, a, slope, b: F.conv2d(F.prelu(F.conv2d(x, a), slope), b),
        {"a": (6, 3, 1, 1), "slope": (6,), "b": (2, 6, 1, 1)},
        (2, 3, 4, 4),
        {"a": [0]},
        """\
a: A6, 3, 1, 1
slope: A6
b: 2, A6, 1, 1""",
        "",
    ),
    "elementwise: a gate and what it lets through": (
        lambda x, a, b, c: F.linear(F.silu(F.linear(x, a)) * F.linear(x, b), c),
        {"a": (6, 4), "b": (6, 4), "c": (2, 6)},
        (2, 4),
        {"a": [1, 5]},
        """\
a: A6, 4
b: A6, 4
c: 2, A6""",
        "",
    ),
    "elementwise: a scale for each channel of a branch": (
        _layer_scale,
        {"stem": (8, 4), "a": (6, 8), "b": (8, 6), "gamma": (8,), "head": (2, 8)},
        (2, 4),
        {"a": [2]},
        """\
stem: A8, 4
a: B6, A8
b: A8, B6
gamma: A8
head: 2, A8""",
        "",
    ),
    "join: class and register tokens": (
        _class_and_registers,
        {"stem": (6, 4), "first": (1, 1, 6), "registers": (1, 2, 6), "places": (1, 6, 6), "head": (2, 6)},
        (2, 3, 4),
        {"stem": [3], "registers:other": [1]},
        """\
stem: A6, 4
first: 1, 1, A6
registers: 1, B2, A6
places: 1, (1 + B2 + 3), A6
head: 2, A6""",
        """\
-slice(_, 1, 3, 9223372036854775807)
+slice(_, 1, 2, 9223372036854775807)""",
    ),
}
