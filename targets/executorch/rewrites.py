"""Exact rewrites of operators into those that XNNPACK takes or fuses: others go to slower kernels between delegates, or are taken for something else."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.quantplan import QuantPlan
from edgesmith.compiler.weighted import LINEARS, weighted
from edgesmith.targets.executorch.constraints import PLAN_ALIASES, PLAN_NAME

aten = torch.ops.aten


def rewrite_in_place(graph: fx.GraphModule) -> None:
    """Rewrites after which every tensor of a quantization plan is still there under its name.

    ``relu6`` and ``clamp`` by numbers become ``relu`` or ``hardtanh``, which XNNPACK fuses; what does nothing in eval mode goes; a mean over
    images keeps its dimensions, as XNNPACK's does, and a view drops them.
    """
    for node in list(graphs.operators(graph)):
        bounds = _bounds(node)
        if bounds == (0.0, math.inf):
            node.target, node.args, node.kwargs = aten.relu.default, (node.args[0],), {}
        elif bounds is not None and all(map(math.isfinite, bounds)):
            node.target, node.args, node.kwargs = aten.hardtanh.default, (node.args[0], *bounds), {}
        elif node.target in _IDENTITIES and not node.kwargs:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            source.meta[PLAN_ALIASES] = (*source.meta.get(PLAN_ALIASES, ()), node.name, *node.meta.get(PLAN_ALIASES, ()))
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # other rewrites change strides, which a view depends on
        elif node.target is aten.mean.dim:
            _keep_dimensions(graph, node)
        elif node.target is aten.max_pool2d.default and not (*node.args[2:], ())[0]:
            node.args = (*node.args[:2], node.args[1], *node.args[3:])  # XNNPACK's partitioner reads the stride, also where it is left out


def begin_names_with_letters(graph: fx.GraphModule) -> None:
    """Give tensors of a module that is a sequence ("0.weight") a parent: XNNPACK's passes look for names that begin as they were written."""
    nodes = [node for node in graph.graph.find_nodes(op="get_attr") if str(node.target)[0].isdigit()]
    for node in nodes:
        name = str(node.target)
        graphs.add_tensor(graph, f"layers.{name}", graphs.tensor(graph, name))
        node.target = f"layers.{name}"
    if nodes:
        graphs.clean(graph)


def products_as_linear(graph: fx.GraphModule, plan: QuantPlan | None) -> QuantPlan | None:
    """Write products with a weight by input channel (``addmm``, ``mm``, ``matmul``) as ``linear``, which has more kernels; the plan to match."""
    grids, made = {} if plan is None else dict(plan.weights), set()
    for node in list(graphs.operators(graph)):
        kind = weighted(node)
        if kind is None or node.target not in LINEARS or kind.axis != 1 or node.kwargs:
            continue
        weight, bias = kind.argument(node, kind.weight), kind.argument(node, kind.bias)
        if weight is None or weight.op != "get_attr" or not (bias is None or (bias.op == "get_attr" and bias.meta["val"].dim() == 1)):
            continue
        name = str(weight.target)
        if name not in made:
            made.add(name)
            graphs.add_tensor(graph, f"{name}_transposed", graphs.tensor(graph, name).detach().t().contiguous())
        with graph.graph.inserting_before(node):
            transposed = graph.graph.get_attr(f"{name}_transposed")
        transposed.meta["val"] = weight.meta["val"].t()
        node.target, node.args = aten.linear.default, (kind.argument(node, kind.activation), transposed, *([] if bias is None else [bias]))
        if name in grids:
            grids[f"{name}_transposed"] = replace(grids[name], axis=0)
    return None if plan is None else replace(plan, weights=grids)


_IDENTITIES = frozenset({aten.alias.default, aten.clone.default, aten.contiguous.default, aten.dropout.default, aten.feature_dropout.default})


def _keep_dimensions(graph: fx.GraphModule, node: fx.Node) -> None:
    given = _arguments(node, "input", "dim", "keepdim")
    x, dims = given["input"], given["dim"]
    if len(_shape(x)) != 4 or not dims or sorted(d % 4 for d in dims) != [2, 3] or given.get("keepdim") or given.get("dtype"):
        return
    flat, (batch, channels) = node.meta["val"], _shape(node)
    node.args = (x, dims, True)
    node.meta["val"] = flat[:, :, None, None]
    with graph.graph.inserting_after(node):
        view = graph.graph.call_function(aten.reshape.default, (node, [graphs.any_batch(batch), channels]))
    view.meta.update({"source": graphs.source(node), "val": flat, PLAN_NAME: node.name})
    node.replace_all_uses_with(view, delete_user_cb=lambda user: user is not view)


def _bounds(node: fx.Node) -> tuple[float, float] | None:
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target is not aten.clamp.default or node.meta["val"].dtype is not torch.float32:
        return None
    given = _arguments(node, "input", "min", "max")
    low, high = given.get("min"), given.get("max")
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))


def rewrite_into_delegate(graph: fx.GraphModule) -> None:
    """Replace attention, picking along a dimension, layer norm and GELU by tanh by what XNNPACK has, in place."""
    for node in list(graphs.operators(graph)):
        rewrite = _REWRITES.get(node.target)
        if rewrite is None:
            continue
        with graph.graph.inserting_before(node):
            replacement = rewrite(_Writer(graph, node), node)
        if replacement is not None:
            replacement.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(replacement)
            graph.graph.erase_node(node)


class _Writer:
    """Adds operators in the place of ``node``, which they inherit their source path from."""

    def __init__(self, graph: fx.GraphModule, node: fx.Node) -> None:
        self.graph = graph
        self._node = node

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        made = self.graph.graph.call_function(target, args)
        made.meta["source"] = graphs.source(self._node)
        return made

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        graphs.add_tensor(self.graph, name, value)
        return self.graph.graph.get_attr(name)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _attention(write: _Writer, node: fx.Node) -> fx.Node | None:
    """softmax(q k^T / sqrt(d)) v as two batched products, for attention without a mask.

    The exporter's own decomposition guards against rows that a mask empties; without one it only splits the delegate.
    """
    given = _arguments(node, "query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    query, key, value = given["query"], given["key"], given["value"]
    plain = given.get("attn_mask") is None and not given.get("dropout_p") and not given.get("is_causal") and not given.get("enable_gqa")
    if not plain or not (_shape(query)[:-2] == _shape(key)[:-2] == _shape(value)[:-2]) or len(_shape(query)) < 3:
        return None
    scale = given.get("scale") or 1 / math.sqrt(_shape(query)[-1])
    scaled = write(aten.mul.Tensor, query, scale)
    folded = [write(aten.reshape.default, x, [-1, *_shape(s)[-2:]]) for x, s in ((scaled, query), (key, key), (value, value))]
    scores = write(aten.bmm.default, folded[0], write(aten.transpose.int, folded[1], 1, 2))
    mixed = write(aten.bmm.default, write(aten.softmax.int, scores, -1), folded[2])
    return write(aten.reshape.default, mixed, [-1, *_shape(node)[1:]])


def _layer_norm(write: _Writer, node: fx.Node) -> fx.Node | None:
    """Layer norm over the last dimension with its means as products with a constant column of 1/n."""
    given = _arguments(node, "input", "normalized_shape", "weight", "bias", "eps")
    x, (size, *more), weight, bias = given["input"], given["normalized_shape"], given.get("weight"), given.get("bias")
    if more or node.meta["val"].dtype is not torch.float32:
        return None
    row = write.constant(f"_edgesmith.mean_{size}", torch.full((1, size), 1 / size))
    centred = write(aten.sub.Tensor, x, write(aten.linear.default, x, row))
    variance = write(aten.linear.default, write(aten.mul.Tensor, centred, centred), row)
    normal = write(aten.mul.Tensor, centred, write(aten.rsqrt.default, write(aten.add.Tensor, variance, given.get("eps", 1e-5))))
    scaled = normal if weight is None else write(aten.mul.Tensor, normal, weight)
    return scaled if bias is None else write(aten.add.Tensor, scaled, bias)


def _gelu(write: _Writer, node: fx.Node) -> fx.Node | None:
    """GELU by tanh (Hendrycks and Gimpel, 2016, section 2), as x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), which is the same.

    XNNPACK's partitioner takes every GELU for the one by erf, up to 5e-4 away.
    """
    given = _arguments(node, "input")
    if given.get("approximate", "none") != "tanh":
        return None
    x, scale = given["input"], 2 * math.sqrt(2 / math.pi)
    slope = write(aten.add.Tensor, write(aten.mul.Tensor, write(aten.mul.Tensor, x, x), 0.044715 * scale), scale)
    return write(aten.mul.Tensor, x, write(aten.sigmoid.default, write(aten.mul.Tensor, x, slope)))


def _select(write: _Writer, node: fx.Node) -> fx.Node | None:
    """One index along a dimension, as a slice and a reshape."""
    x, dim, index = node.args
    assert isinstance(dim, int) and isinstance(index, int)
    return _picked(write, x, dim, index, _shape(node))


def _unbound(write: _Writer, node: fx.Node) -> fx.Node | None:
    """One of the tensors that ``unbind`` makes, likewise."""
    parent, index = node.args
    if not isinstance(parent, fx.Node) or parent.target is not aten.unbind.int:
        return None
    dim = parent.args[1] if len(parent.args) > 1 else 0
    assert isinstance(dim, int) and isinstance(index, int)
    return _picked(write, parent.args[0], dim, index, _shape(node))


def _picked(write: _Writer, x: Any, dim: int, index: int, shape: tuple[int, ...]) -> fx.Node | None:
    size = _shape(x)[dim]
    dynamic = [d for d, s in enumerate(shape) if s % graphs.BATCH == 0]
    if size % graphs.BATCH == 0 or len(dynamic) > 1:
        return None
    index %= size
    return write(aten.reshape.default, write(aten.slice.Tensor, x, dim, index, index + 1), [-1 if d in dynamic else s for d, s in enumerate(shape)])


_REWRITES: dict[Any, Callable[[_Writer, fx.Node], fx.Node | None]] = {
    aten.scaled_dot_product_attention.default: _attention,
    aten.layer_norm.default: _layer_norm,
    aten.gelu.default: _gelu,
    aten.select.int: _select,
    operator.getitem: _unbound,
}
