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
from edgesmith.compiler.quantplan import QuantPlan

aten = torch.ops.aten


def plain(model: Model) -> Model:
    """``model`` with what ``REWRITES`` knows written out. Every tensor keeps its name and its value, to the rounding of float32.

    What repeats a tensor for an operator that broadcasts anyway is gone: LiteRT's converter moves it past changes of layout, to shapes that do not fit.
    """
    if not any(node.target in REWRITES or node.target in _REPEATING for node in graphs.operators(model.graph)):
        return model
    graph = model.edit()
    plan = _read_unexpanded(graph, model.quant)
    for node in list(graphs.operators(graph)):
        if node.target in REWRITES:
            REWRITES[node.target](node)
    graph.recompile()
    return replace(model, graph=graph, quant=plan)


def _read_unexpanded(graph: fx.GraphModule, plan: QuantPlan | None) -> QuantPlan | None:
    """Let operators that broadcast read what is repeated for them; a planned range goes along, for the values are the same."""
    ranges = {} if plan is None else dict(plan.activations)
    for node in [n for n in graphs.operators(graph) if n.target in _REPEATING]:
        x, own = node.args[0], ranges.get(node.name)
        assert isinstance(x, fx.Node)
        if own is not None and ranges.get(x.name, own) != own:
            continue
        for user in [u for u in node.users if u.target in _BROADCASTING]:
            others = [n.meta["val"] for n in user.all_input_nodes if n is not node]
            if any(isinstance(value, torch.Tensor) and value.shape == user.meta["val"].shape for value in others):
                user.replace_input_with(node, x)
                if own is not None:
                    ranges[x.name] = own
        if not node.users:
            graph.graph.erase_node(node)
    return None if plan is None else replace(plan, activations=ranges)


_REPEATING = frozenset({aten.broadcast_to.default, aten.expand.default, aten.expand_as.default})
_BROADCASTING = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})


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


def _patches(node: fx.Node) -> None:
    """Patches that touch and do not overlap (``unfold``), as a view of the image: (n, c, rows, y, columns, x) to (n, c y x, rows columns)."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    tiles = _tiles(node, x.meta["val"].shape, node.args[1:])
    if tiles is not None:
        batch, channels, (rows, columns), (height, width) = tiles
        _permuted(node, (batch, channels, rows, height, columns, width), (0, 1, 3, 5, 2, 4), (batch, channels * height * width, rows * columns))


def _image_of_patches(node: fx.Node) -> None:
    """The way back (``fold``)."""
    tiles = _tiles(node, node.meta["val"].shape, node.args[2:])
    if tiles is not None:
        batch, channels, (rows, columns), (height, width) = tiles
        _permuted(node, (batch, channels, height, width, rows, columns), (0, 1, 4, 2, 5, 3), (batch, channels, rows * height, columns * width))


def _tiles(node: fx.Node, shape: torch.Size, given: tuple[Any, ...]) -> tuple[int, int, tuple[int, int], tuple[int, int]] | None:
    """Batch, channels, how many tiles the image of ``shape`` has and their size; None where ``given`` does not cut it into tiles exactly."""
    kernel, dilation, padding, stride = given
    exact = list(kernel) == list(stride) and set(dilation) == {1} and not any(padding) and not node.kwargs and len(shape) == 4
    if not exact or shape[2] % kernel[0] or shape[3] % kernel[1]:
        return None
    return graphs.any_batch(shape[0]), int(shape[1]), (shape[2] // kernel[0], shape[3] // kernel[1]), (kernel[0], kernel[1])


def _permuted(node: fx.Node, parts: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Make ``node`` a view of its first argument: as ``parts``, in another order, as ``shape``."""
    with node.graph.inserting_before(node):
        moved = _added(node, aten.permute.default, _added(node, aten.reshape.default, node.args[0], list(parts)), list(order))
    node.target, node.args = aten.reshape.default, (moved, list(shape))


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
    aten.col2im.default: _image_of_patches,
    aten.conv1d.padding: _explicit_padding,
    aten.conv2d.padding: _explicit_padding,
    aten.im2col.default: _patches,
    aten.linalg_vector_norm.default: _root_of_squares,
    aten.max.dim: _greatest,
    aten.ones.default: _filled,
    aten.zeros.default: _filled,
}
"""Operator -> how its node is changed."""
