"""Normalisation layers: which dimensions a statistic runs over, and which it is kept apart for."""

from __future__ import annotations

import torch

from edgesmith.compiler.axes.axes import Trait, factored, size
from edgesmith.compiler.axes.op import Op, Shape
from edgesmith.compiler.axes.rules.table import rule

aten = torch.ops.aten


@rule(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(op: Op) -> Shape:
    """A statistic over the last dimensions, then a scale and a shift of the same shape."""
    x = op.terms("input")
    count = len(op.arg("normalized_shape"))
    for name in ("weight", "bias") if op.node.target is aten.layer_norm.default else ("weight",):
        scale = op.maybe(name)
        if scale is not None:
            op.unify_shapes(scale, x[-count:])
    op.mark(x[-count:], Trait.STATISTIC)
    op.resize_list("normalized_shape", x[-count:])
    return x


@rule(aten.batch_norm.default, aten.instance_norm.default)
def batch_norm(op: Op) -> Shape:
    """Everything per channel (dimension 1), with the input's own statistics over what else there is."""
    x = op.terms("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = op.maybe(name)
        if vector is not None:
            op.unify(vector[0], x[1])
    if op.node.target is aten.instance_norm.default:
        op.mark(x[2:], Trait.STATISTIC)
    elif op.arg("training") or op.maybe("running_mean") is None:
        op.mark((x[0], *x[2:]), Trait.STATISTIC)
    return x


@rule(aten.group_norm.default)
def group_norm(op: Op) -> Shape:
    """Channels are groups x width, with a statistic over each group's width and space: whole groups go exactly."""
    x = op.terms("input")
    groups = op.int_arg("num_groups")
    group, width = factored(x[1], [groups, size(x[1]) // groups], op.reason)
    for name in ("weight", "bias"):
        vector = op.maybe(name)
        if vector is not None:
            op.unify(vector[0], x[1])
    op.mark((width, *x[2:]), Trait.STATISTIC)
    op.resize("num_groups", group)
    return x


@rule(aten._weight_norm.default)
def weight_norm(op: Op) -> Shape:
    """v / |v| x g, the norm over all dimensions but one."""
    v, g = op.terms("v"), op.terms("g")
    op.align(g, v)
    dim = op.int_arg("dim") % len(v)
    op.mark([term for i, term in enumerate(v) if i != dim], Trait.STATISTIC)
    return v
