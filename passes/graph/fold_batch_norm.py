"""Fold batch normalisation into the convolution or matrix product before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult
from edgesmith.compiler.weighted import LINEARS, Weighted, weighted

aten = torch.ops.aten

_GROUPS_OF_TRANSPOSED = 6


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """In eval mode ``(conv(x) - mean) / sqrt(var + eps) * gain + shift`` is one convolution with other weights and bias.

    Folds where the batch norm alone reads the result of a convolution (also transposed, grouped, depthwise) or of a matrix product of two
    dimensions, and all tensors are constants. The arithmetic is float64, rounded once. A weight shared with another operator gets a copy.
    Batch norms that stay are named. Source: Jacob et al. (CVPR 2018), section 3.2.
    """

    name: ClassVar[str] = "fold-batch-norm"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        """The model without the batch norms that fold."""
        graph = model.edit()
        remarks: list[Diagnostic] = []
        folded = 0
        for norm in [n for n in graphs.operators(graph) if n.target is aten.batch_norm.default]:
            reason = _why_not(graph, norm)
            if reason:
                remarks.append(Diagnostic(Severity.INFO, "graph.batch-norm-stays", graphs.source(norm), f"batch norm stays: {reason}"))
            else:
                _fold(graph, norm)
                folded += 1
        return PassResult(model.with_graph(graph) if folded else model, folded > 0, tuple(remarks))


def _why_not(graph: fx.GraphModule, norm: fx.Node) -> str:
    """Why ``norm`` cannot be folded, or nothing."""
    before = norm.args[0]
    assert isinstance(before, fx.Node)
    kind = weighted(before)
    if kind is None or (kind.bias is None):
        return f"it follows {before.target if before.op == 'call_function' else 'an input'}"
    if len(before.users) != 1:
        return "what it normalises is read elsewhere too"
    weight, bias = kind.argument(before, kind.weight), kind.argument(before, kind.bias)
    tensors = [a for a in norm.args[1:5] if isinstance(a, fx.Node)] + [a for a in (weight, bias) if a is not None]
    if norm.args[3] is None or norm.args[4] is None:
        return "it keeps no running statistics"
    if any(a.op != "get_attr" for a in tensors):
        return "a weight or statistic is computed"
    rank = 2 if before.target in LINEARS else graphs.tensor(graph, str(weight.target)).dim()  # type: ignore[union-attr]
    if before.meta["val"].dim() != rank:
        return "its channels are not the output channels of what it follows"
    if bias is not None and tuple(bias.meta["val"].shape) != (before.meta["val"].shape[1],):
        return "the bias before it is not one value per channel"
    return ""


def _fold(graph: fx.GraphModule, norm: fx.Node) -> None:
    before = norm.args[0]
    assert isinstance(before, fx.Node)
    kind = weighted(before)
    assert kind is not None and kind.bias is not None
    gain, shift = _gain_and_shift(graph, norm)
    weight = kind.argument(before, kind.weight)
    bias = kind.argument(before, kind.bias)
    assert weight is not None
    old = graphs.tensor(graph, str(weight.target))
    if bias is not None:
        shift = shift + gain * graphs.tensor(graph, str(bias.target)).detach().double()
    groups = before.args[_GROUPS_OF_TRANSPOSED] if kind.transposed and len(before.args) > _GROUPS_OF_TRANSPOSED else 1
    assert isinstance(groups, int)
    trains = any(graphs.tensor(graph, str(a.target)).requires_grad for a in (weight, *norm.args[1:3]) if isinstance(a, fx.Node))
    _put(graph, before, kind.weight, scaled(old.detach().double(), gain, kind, groups).to(old.dtype), trains)
    _put(graph, before, kind.bias, shift.to(old.dtype), trains)
    norm.replace_all_uses_with(before)
    graph.graph.erase_node(norm)


def _gain_and_shift(graph: fx.GraphModule, norm: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    """The affine map per channel that ``norm`` is in eval mode, in float64."""
    weight, bias, mean, variance = (graphs.tensor(graph, str(a.target)).detach().double() if isinstance(a, fx.Node) else None for a in norm.args[1:5])
    assert mean is not None and variance is not None and isinstance(norm.args[7], float)
    gain = torch.rsqrt(variance + norm.args[7])
    gain = gain if weight is None else gain * weight
    shift = -mean * gain
    return gain, shift if bias is None else shift + bias


def scaled(weight: torch.Tensor, gain: torch.Tensor, kind: Weighted, groups: int = 1) -> torch.Tensor:
    """``weight`` with each output channel multiplied by its element of ``gain`` (one per output channel of all groups)."""
    if not kind.transposed:
        return weight * gain.reshape([-1 if d == kind.axis else 1 for d in range(weight.dim())])
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    factors = gain.reshape(groups, 1, weight.shape[1], *[1] * (weight.dim() - 2))
    return (split * factors).reshape(weight.shape)


def _put(graph: fx.GraphModule, node: fx.Node, position: int, value: torch.Tensor, trains: bool) -> None:
    """Give ``node`` a tensor of its own at ``position``: under the name it had, unless that tensor has other readers or there was none."""
    old = node.args[position] if position < len(node.args) else None
    weight = next(a for a in node.all_input_nodes if a.op == "get_attr")
    name = str(old.target) if isinstance(old, fx.Node) else ".".join(p for p in (str(weight.target).rpartition(".")[0], "bias") if p)
    if not isinstance(old, fx.Node) or _readers(graph, name) > 1:
        name = _free_name(graph, name)
        graphs.add_tensor(graph, name, value)
        with graph.graph.inserting_before(node):
            fresh = graph.graph.get_attr(name)
        fresh.meta["source"] = name
        node.args = (*node.args[:position], fresh, *node.args[position + 1 :])
    graphs.add_tensor(graph, name, nn.Parameter(value, requires_grad=trains))


def _readers(graph: fx.GraphModule, name: str) -> int:
    """How many operators read the tensor called ``name``, under any name."""
    names = graphs.same_tensor(graph, name)
    return sum(len(node.users) for node in graph.graph.find_nodes(op="get_attr") if str(node.target) in names)


def _free_name(graph: fx.GraphModule, name: str) -> str:
    """``name``, or with the first number that makes it new."""
    taken = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    return next(n for n in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if n not in taken)
