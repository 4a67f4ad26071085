"""The pass: training with the plan's roundings in place, for what calibration alone cannot keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult
from edgesmith.compiler.quantplan import QuantPlan, Scheme
from edgesmith.compiler.simulate import fake_quantize, fake_quantize16, fake_quantize_rows, simulated_graph
from edgesmith.compiler.weighted import weighted
from edgesmith.passes.quantize.schemes import Candidates
from edgesmith.passes.quantize.weights import put_on_grid, widened
from edgesmith.passes.train.loop import Schedule, train
from edgesmith.passes.train.objective import Objective
from edgesmith.passes.train.options import check_training_options
from edgesmith.passes.train.remarks import labels_unused, outcome


@dataclass(frozen=True)
class Qat(Pass):
    """Quantization-aware training, distilled from the model before the first pass. For right after ``quantize``, as the last resort.

    Weights and activations are rounded as the plan has them, by its ``static`` alternative where it has one, since that rounds most; gradients
    pass each rounding as if it were not there (straight-through estimator: Jacob et al., CVPR 2018, section 3). Ranges of activations stay.
    Nothing is trained where the plan in simulation loses at most ``max_drop`` of the metric on validation data. ``epochs``, ``lr``,
    ``batch_size``, ``loss`` and ``label_weight`` are those of ``recover``.
    """

    name: ClassVar[str] = "qat"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    trains: ClassVar[bool] = True

    epochs: int = 5
    lr: float = 1e-4
    batch_size: int = 64
    loss: str = "standardized-kl"
    label_weight: float = 0.5
    max_drop: float = 0.002

    def __post_init__(self) -> None:
        check_training_options(self.epochs, self.lr, self.batch_size, self.loss, self.label_weight)
        if not 0 <= self.max_drop < float("inf"):
            raise ValueError(f"max_drop={self.max_drop} must be at least 0 and finite")

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        """The model with trained weights on new grids; ``model`` itself where there is nothing to win, or training did not help."""
        plan = model.quant
        if plan is None:
            remark = Diagnostic(Severity.WARNING, "qat.not-quantized", "", "the model has no quantization plan", "put qat after quantize")
            return PassResult(model, False, (remark,))
        data, teacher = ctx.need_data(self.name), ctx.need_teacher(self.name)
        rounding = replace(model, graph=trainable(model, plan.alternatives.get("static", plan.ops)), quant=None)
        if ctx.evaluate is not None:
            drop = ctx.evaluate(teacher) - ctx.evaluate(rounding)
            if drop <= self.max_drop:
                remark = Diagnostic(Severity.INFO, "qat.not-needed", "", f"the plan loses {drop:.4f} of the metric, at most {self.max_drop} is allowed")
                return PassResult(model, False, (remark,))
        objective = Objective(teacher, data, self.loss, self.label_weight)
        trained = train(rounding, objective, Schedule(self.epochs, self.lr, self.batch_size), ctx)
        remarks = (*labels_unused(self.name, self.label_weight, objective), *outcome(self.name, trained, self.epochs, scored=ctx.evaluate is not None))
        if trained.best_epoch == 0:
            return PassResult(model, False, remarks)
        return PassResult(on_new_grids(model, plan, trained.model.graph), True, remarks)


def trainable(model: Model, ops: Mapping[str, Scheme]) -> fx.GraphModule:
    """The graph of ``model`` with the roundings of ``ops`` and of its weights, which gradients pass."""
    assert model.quant is not None
    graph = simulated_graph(replace(model, quant=replace(model.quant, ops=ops)))
    own = {node.name: node for node in model.graph.graph.nodes}
    for node in list(graphs.operators(graph)):
        if node.target in STRAIGHT:
            node.target = STRAIGHT[node.target]
            continue
        kind = weighted(node)
        if kind is None or node.name not in ops:
            continue
        weight, bias, before = kind.argument(node, kind.weight), kind.argument(node, kind.bias), kind.argument(own[node.name], kind.bias)
        assert weight is not None
        with graph.graph.inserting_before(node):
            rounded = graph.graph.call_function(on_weight_grid, (weight, kind.axis))
            exact = None if before is None else graph.graph.get_attr(str(before.target))
        node.replace_input_with(weight, rounded)
        if bias is not None and exact is not None:
            node.replace_input_with(bias, exact)
    graphs.clean(graph)
    return graph


def fake_quantize_clipped(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """``fake_quantize``; gradients pass where ``x`` is not beyond the grid."""
    kept = torch.clamp(x, (-128 - zero_point) * scale, (127 - zero_point) * scale)
    return kept + (fake_quantize(x, scale, zero_point) - kept).detach()


def fake_quantize_rows_through(x: torch.Tensor) -> torch.Tensor:
    """``fake_quantize_rows``; gradients pass."""
    return x + (fake_quantize_rows(x) - x).detach()


def fake_quantize16_through(x: torch.Tensor, scale: float) -> torch.Tensor:
    """``fake_quantize16``; gradients pass."""
    return x + (fake_quantize16(x, scale) - x).detach()


def on_weight_grid(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """``weight`` rounded to 127 steps either side of zero for each index of ``axis``; gradients pass."""
    others = [d for d in range(weight.dim()) if d != axis]
    scale = weight.detach().abs().amax(others, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return weight + (torch.round(weight / scale) * scale - weight).detach()


STRAIGHT: Mapping[object, Callable[..., torch.Tensor]] = {
    fake_quantize: fake_quantize_clipped,
    fake_quantize16: fake_quantize16_through,
    fake_quantize_rows: fake_quantize_rows_through,
}
"""Rounding -> the same with gradients."""


def on_new_grids(model: Model, plan: QuantPlan, trained: fx.GraphModule) -> Model:
    """``model`` with the tensors of ``trained``, its weights on grids of their own."""
    graph = model.edit()
    for name in {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}:
        graphs.add_tensor(graph, name, graphs.tensor(trained, name))
    named = {name for ops in (plan.ops, *plan.alternatives.values()) for name in ops}
    found: Candidates = {node: kind for node in graphs.operators(model.graph) if node.name in named and (kind := weighted(node)) is not None}
    weights = put_on_grid(graph, found)
    weights |= widened(graph, found, weights, plan.activations)
    return model.with_graph(graph, quant=replace(plan, weights=weights))
