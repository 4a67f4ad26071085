"""Operators that some runtime lacks, written as ones that it has: for files, which are not trained."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.model import Model

aten = torch.ops.aten


def plain(model: Model) -> Model:
    """``model`` with what ``REWRITES`` knows written out. Every tensor keeps its name and its value, to the rounding of float32."""
    if not any(node.target in REWRITES for node in graphs.operators(model.graph)):
        return model
    graph = model.edit()
    for node in list(graphs.operators(graph)):
        if node.target in REWRITES:
            REWRITES[node.target](node)
    graph.recompile()
    return replace(model, graph=graph)


def _mean(node: fx.Node) -> None:
    """A mean over the last dimension."""
    if node.args[1] in ([1], (1,), 1):
        node.target, node.args = aten.mean.dim, (node.args[0], [-1], True)


def _mean_of_image(node: fx.Node) -> None:
    """An average whose one window covers the whole image, and may reach beyond it (``ceil_mode``), which ONNX Runtime's integer kernel counts."""
    given: dict[str, Any] = dict(zip(("x", "kernel", "stride", "padding", "ceil", "with_padding", "divisor"), node.args, strict=False))
    size = given["x"].meta["val"].shape[-2:]
    covered = all(k >= s for k, s in zip(_each(given["kernel"], 2), size, strict=True)) and tuple(node.meta["val"].shape[-2:]) == (1, 1)
    if covered and not any(_each(given.get("padding", 0), 2)) and given.get("divisor") is None and not node.kwargs:
        node.target, node.args = aten.mean.dim, (given["x"], [-2, -1], True)


def _root_of_squares(node: fx.Node) -> None:
    """The Euclidean norm. Its gradient at zero would be infinite, which is why training keeps the operator."""
    given: dict[str, Any] = dict(zip(("x", "ord", "dim", "keepdim"), node.args, strict=False))
    x, dims = given["x"], given.get("dim")
    if given.get("ord", 2) != 2 or dims is None or node.kwargs:
        return
    with node.graph.inserting_before(node):
        total = _added(node, aten.sum.dim_IntList, _added(node, aten.mul.Tensor, x, x), dims, given.get("keepdim", False))
    node.target, node.args = aten.sqrt.default, (total,)


def _explicit_padding(node: fx.Node) -> None:
    """A convolution that pads by ``valid``, or by ``same`` where that is as much on either side, with its padding in numbers."""
    given: dict[str, Any] = dict(zip(("x", "weight", "bias", "stride", "padding", "dilation", "groups"), node.args, strict=False)) | dict(node.kwargs)
    kernel = given["weight"].meta["val"].shape[2:]
    dilation = _each(given.get("dilation", 1), len(kernel))
    total = [d * (size - 1) if given.get("padding") == "same" else 0 for d, size in zip(dilation, kernel, strict=True)]
    if any(size % 2 for size in total):
        return
    node.target = {1: aten.conv1d.default, 2: aten.conv2d.default}[len(kernel)]
    stride = _each(given.get("stride", 1), len(kernel))
    node.args = (given["x"], given["weight"], given.get("bias"), stride, [size // 2 for size in total], dilation, given.get("groups", 1))
    node.kwargs = {}


def _each(value: Any, count: int) -> list[int]:
    """One number for each dimension: those given, or the one that is given for all."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return numbers * (count // len(numbers))


def _greatest(node: fx.Node) -> None:
    """The values of a maximum whose indices nobody reads, with the dimension kept and then dropped, as XNNPACK has it."""
    given: dict[str, Any] = dict(zip(("x", "dim", "keepdim"), node.args, strict=False))
    if node.kwargs or any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return
    with node.graph.inserting_before(node):
        kept = _added(node, aten.amax.default, given["x"], [given["dim"]], True)
    for user in list(node.users):
        user.target, user.args = (aten.alias.default, (kept,)) if given.get("keepdim") else (aten.squeeze.dims, (kept, [given["dim"]]))
    node.graph.erase_node(node)


def _filled(node: fx.Node) -> None:
    """Zeros or ones, by the operator that fills with any number."""
    value = 1 if node.target is aten.ones.default else 0
    node.target, node.args, node.kwargs = aten.full.default, (node.args[0], value), {**node.kwargs, "dtype": node.meta["val"].dtype}


def _added(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    values = fx.map_arg(args, lambda n: n.meta["val"])
    made = node.graph.call_function(target, args)
    (mode, *_) = (v.fake_mode for v in pytree.tree_leaves(values) if isinstance(v, FakeTensor))
    with mode:
        made.meta.update({"source": graphs.source(node), "val": target(*values)})
    return made


REWRITES: dict[Any, Callable[[fx.Node], None]] = {
    aten.adaptive_avg_pool1d.default: _mean,
    aten.avg_pool2d.default: _mean_of_image,
    aten.conv1d.padding: _explicit_padding,
    aten.conv2d.padding: _explicit_padding,
    aten.linalg_vector_norm.default: _root_of_squares,
    aten.max.dim: _greatest,
    aten.ones.default: _filled,
    aten.zeros.default: _filled,
}
"""Operator -> how its node is changed."""
