"""Convolutions, and operators that look at windows of the last dimensions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgesmith.compiler.axes.axes import Term, Trait, concatenation, factored, fresh, pinned, size
from edgesmith.compiler.axes.op import Op, Result, Shape
from edgesmith.compiler.axes.rules.table import overloads_of, rule

aten = torch.ops.aten


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def convolution(op: Op) -> Shape:
    """(N, groups x in, *spatial) with (groups x out, in, *kernel) -> (N, groups x out, *spatial)."""
    return _convolution(op, _split_forward)


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed(op: Op) -> Shape:
    """(N, groups x in, *spatial) with (groups x in, out, *kernel) -> (N, groups x out, *spatial)."""
    return _convolution(op, _split_transposed)


@rule(aten.convolution.default)
def either(op: Op) -> Shape:
    """The general form of both."""
    return _convolution(op, _split_transposed if op.arg("transposed") else _split_forward)


def _convolution(op: Op, split: Callable[[Op, Term, Shape, int], Term]) -> Shape:
    x, weight, bias = op.terms("input"), op.terms("weight"), op.maybe("bias")
    spatial = len(weight) - 2
    channels = x[-spatial - 1]
    groups = op.int_arg("groups")
    out = split(op, channels, weight, groups)
    op.mark([out], Trait.CONVOLVED)
    op.pin(weight[2:], "a convolution's window")
    if bias is not None:
        op.unify(bias[0], out)
        op.role(op.arg("bias"), producer=0)
    return (*x[: -spatial - 1], out, *_windows(op, x[-spatial:], weight[2:]))


def _split_forward(op: Op, channels: Term, weight: Shape, groups: int) -> Term:
    if groups == 1:
        op.unify(channels, weight[1])
        op.role(op.arg("weight"), producer=0, consumer=1)
        return weight[0]
    inside = size(weight[1])
    group, width = factored(channels, [groups, inside], op.reason)
    op.unify(width, weight[1])
    (outputs,) = factored(weight[0], [groups, size(weight[0]) // groups], op.reason)[1:]
    op.unify(weight[0], group + outputs)
    op.resize("groups", group)
    if inside > 1:
        op.role(op.arg("weight"), producer=0, consumer=1)
    return weight[0]


def _split_transposed(op: Op, channels: Term, weight: Shape, groups: int) -> Term:
    op.unify(channels, weight[0])
    if groups == 1:
        op.role(op.arg("weight"), producer=1, consumer=0)
        return weight[1]
    group = factored(channels, [groups, size(channels) // groups], op.reason)[0]
    op.resize("groups", group)
    op.role(op.arg("weight"), producer=1, consumer=0)
    return group + weight[1]


def _windows(op: Op, inputs: Shape, kernel: Shape) -> Shape:
    """Pointwise dimensions pass; the others are pinned."""
    result: list[Term] = []
    for term, window, n in zip(inputs, kernel, op.out_sizes[-len(inputs) :], strict=True):
        if size(window) == 1 and size(term) == n:
            result.append(term)
        else:
            op.pin([term], "slid over by a window")
            result.append(op.pinned(n, "slid over by a window"))
    return tuple(result)


_WINDOWED = {
    1: (
        aten.max_pool1d,
        aten.avg_pool1d,
        aten.adaptive_avg_pool1d.default,
        aten.upsample_linear1d,
        aten.upsample_nearest1d,
        aten.reflection_pad1d,
        aten.replication_pad1d,
    ),
    2: (
        aten.max_pool2d,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten._adaptive_avg_pool2d.default,
        aten.adaptive_max_pool2d.default,
        aten.max_pool2d_with_indices.default,
        aten.upsample_bilinear2d,
        aten.upsample_bicubic2d,
        aten.upsample_nearest2d,
        aten._upsample_bilinear2d_aa,
        aten._upsample_bicubic2d_aa,
        aten._upsample_nearest_exact2d,
        aten.reflection_pad2d,
        aten.replication_pad2d,
    ),
    3: (aten.max_pool3d, aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default, aten.upsample_trilinear3d, aten.upsample_nearest3d),
}
_SPATIAL = {overload: n for n, entries in _WINDOWED.items() for entry in entries for overload in overloads_of(entry)}


@rule(*_SPATIAL)
def windowed(op: Op) -> Result:
    """Pooling, resampling and mirrored padding: the last dimensions are pinned, the others pass."""
    count = next(n for overload, n in _SPATIAL.items() if overload is op.node.target)
    x = op.of(op.node.args[0])  # type: ignore[arg-type]
    values = op.node.meta["val"]
    results = [values] if isinstance(values, torch.Tensor) else list(values)
    op.pin(x[-count:], "slid over by a window")
    shapes: list[Shape | None] = [(*x[:-count], *(op.pinned(int(n), "slid over by a window") for n in value.shape[-count:])) for value in results]
    only = shapes[0]
    return only if isinstance(values, torch.Tensor) and only is not None else shapes


@rule(aten.grid_sampler.default, aten.grid_sampler_2d.default)
def sampled(op: Op) -> Shape:
    """(N, C, H, W) at the places of a grid (N, H', W', 2) -> (N, C, H', W')."""
    x, grid = op.terms("input"), op.terms("grid")
    op.unify(x[0], grid[0])
    op.pin((*x[2:], grid[-1]), "a sampling grid")
    return (*x[:2], *grid[1:-1])


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(op: Op) -> Shape:
    """(..., c x r x r, h, w) -> (..., c, h x r, w x r)."""
    r = op.int_arg("upscale_factor")
    x = op.terms("self")
    channels, rows, columns = factored(x[-3], [size(x[-3]) // (r * r), r, r], op.reason)
    op.pin((rows, columns), "spread over space")
    return (*x[:-3], channels, x[-2] + rows, x[-1] + columns)


@rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(op: Op) -> Shape:
    """(..., c, h x r, w x r) -> (..., c x r x r, h, w)."""
    r = op.int_arg("downscale_factor")
    x = op.terms("self")
    height, rows = factored(x[-2], [size(x[-2]) // r, r], op.reason)
    width, columns = factored(x[-1], [size(x[-1]) // r, r], op.reason)
    op.pin((rows, columns), "gathered from space")
    return (*x[:-3], x[-3] + rows + columns, height, width)


@rule(aten.channel_shuffle.default)
def channel_shuffle(op: Op) -> Shape:
    """(N, groups x c, ...) -> (N, c x groups, ...)."""
    x = op.terms("self")
    groups = op.int_arg("groups")
    group, width = factored(x[1], [groups, size(x[1]) // groups], op.reason)
    op.resize("groups", group)
    return (x[0], width + group, *x[2:])


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(op: Op) -> Result:
    """Constants before and after a dimension: a concatenation with them. Other modes, and cropping, pin it."""
    x = op.terms("self")
    constant = op.node.target is aten.constant_pad_nd.default or op.arg("mode") == "constant"
    amounts = op.ints("pad")
    result = list(x)
    entries: list[Term | None] = [None] * len(amounts)
    for i in range(len(amounts) // 2):
        before, after = amounts[2 * i : 2 * i + 2]
        dim = len(x) - 1 - i
        if before == after == 0:
            continue
        if constant and before >= 0 and after >= 0 and size(x[dim]) > 1:
            result[dim] = _padded(op, x[dim], before, after, entries, 2 * i)
        else:
            op.pin([x[dim]], "padded or cropped")
            result[dim] = op.pinned(op.out_sizes[dim], "padded or cropped")
    op.resize_list("pad", entries)
    return tuple(result)


def _padded(op: Op, term: Term, before: int, after: int, entries: list[Term | None], at: int) -> Term:
    new = (lambda n: op.pinned(n, "padding of a pinned dimension")) if pinned(term) else fresh
    parts = [new(before) if before else None, term, new(after) if after else None]
    entries[at], entries[at + 1] = parts[0], parts[2]
    return concatenation([part for part in parts if part is not None])


@rule(aten.im2col.default)
def unfold(op: Op) -> Shape:
    """(N, c, h, w) -> (N, c x window, places)."""
    x = op.terms("self")
    op.pin(x[-2:], "slid over by a window")
    window, places = op.out_sizes[-2] // size(x[-3]), op.out_sizes[-1]
    return (*x[:-3], x[-3] + op.pinned(window, "a window's places"), op.pinned(places, "slid over by a window"))


@rule(aten.col2im.default)
def fold(op: Op) -> Shape:
    """(N, c x window, places) -> (N, c, h, w)."""
    x = op.terms("self")
    channels = op.out_sizes[-3]
    inner, window = factored(x[-2], [channels, size(x[-2]) // channels], op.reason)
    op.pin((window, x[-1]), "slid over by a window")
    return (*x[:-2], inner, *(op.pinned(n, "slid over by a window") for n in op.out_sizes[-2:]))
