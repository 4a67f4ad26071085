"""What a quantization plan means, in torch: the graph with every rounding to int8 written out.

A target's INT8 file is compared with this, and a plan is scored with it before anything is lowered. Tensors stay float32 and hold exact grid values:

- STATIC operator: every activation input is rounded to the int8 grid that the plan gives it, then the operator is computed, then the result
  is rounded to its own grid. What a float operator computes is rounded only for its static readers.
- STATIC16X8 operator: the same with the plan's int16 grids.
- DYNAMIC operator: the activation input is rounded to a grid made from its own values when it runs; the result stays float.
- Weights already lie on their grid (``WeightGrid``). The bias of a static operator is rounded to multiples of input scale x weight scale.
- Sums are float32 where a runtime adds integers, and a runtime may rescale by a fixed-point multiplier: results differ from a runtime's by one
  step where a value falls next to a tie.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.errors import DefectError
from edgesmith.compiler.model import Model
from edgesmith.compiler.quantplan import STATIC_SCHEMES, STEPS16, QuantPlan, Scheme
from edgesmith.compiler.weighted import weighted


class DynamicGrid(enum.Enum):
    """Which values share a grid, and of which kind, in a DYNAMIC operator."""

    ROW_SYMMETRIC = "row-symmetric"
    """One grid [-127, 127] per row, the last dimension (LiteRT's own dynamic-range kernels)."""
    ROW_ASYMMETRIC = "row-asymmetric"
    """One grid [-128, 127] with a zero point per row (XNNPACK's qd8: ExecuTorch, and LiteRT through its default delegate)."""
    TENSOR_ASYMMETRIC = "tensor-asymmetric"
    """One grid [0, 255] with a zero point for the whole tensor (ONNX ``DynamicQuantizeLinear``)."""


def fake_quantize(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """``x`` rounded to the int8 grid: ``scale * (clamp(round(x / scale) + zero_point, -128, 127) - zero_point)``, ties to even, division in float32."""
    step = torch.tensor(scale, dtype=x.dtype, device=x.device)
    return (torch.clamp(torch.round(x / step) + zero_point, -128, 127) - zero_point) * step


def fake_quantize16(x: torch.Tensor, scale: float) -> torch.Tensor:
    """``x`` rounded to the symmetric int16 grid of ``scale``."""
    step = torch.tensor(scale, dtype=x.dtype, device=x.device)
    return torch.clamp(torch.round(x / step), -STEPS16 - 1, STEPS16) * step


def fake_quantize_rows_symmetric(x: torch.Tensor) -> torch.Tensor:
    """Each row of ``x`` (..., n) rounded to 127 steps either side of zero, the largest magnitude of the row at the end."""
    step = _not_zero(x.abs().amax(dim=-1, keepdim=True) / 127)
    return torch.clamp(torch.round(x / step), -127, 127) * step


def fake_quantize_rows(x: torch.Tensor) -> torch.Tensor:
    """Each row of ``x`` (..., n) rounded to the 255 steps between its own least and greatest value, zero included."""
    return _from_range(x, x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True))


def fake_quantize_tensor(x: torch.Tensor) -> torch.Tensor:
    """``x`` rounded to the 255 steps between its own least and greatest value, zero included."""
    return _from_range(x, x.amin(), x.amax())


def _from_range(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = _not_zero((high - low) / 255)
    zero = torch.clamp(torch.round(-low / step), 0, 255)
    return (torch.clamp(torch.round(x / step) + zero, 0, 255) - zero) * step


def _not_zero(step: torch.Tensor) -> torch.Tensor:
    return torch.where(step > 0, step, torch.ones_like(step))


_DYNAMIC = {
    DynamicGrid.ROW_SYMMETRIC: fake_quantize_rows_symmetric,
    DynamicGrid.ROW_ASYMMETRIC: fake_quantize_rows,
    DynamicGrid.TENSOR_ASYMMETRIC: fake_quantize_tensor,
}


def simulated(model: Model, dynamic: DynamicGrid = DynamicGrid.ROW_ASYMMETRIC) -> Callable[..., Any]:
    """``model`` as its plan says it runs: takes the model's inputs, gives its outputs (float32, no gradients).

    Without a plan it is the model itself. ``dynamic`` says how DYNAMIC operators round what they read, which differs among runtimes.
    """
    graph = simulated_graph(model, dynamic)

    def run(*inputs: torch.Tensor) -> Any:
        with torch.no_grad():
            return graph(*inputs)

    return run


def simulated_graph(model: Model, dynamic: DynamicGrid = DynamicGrid.ROW_ASYMMETRIC) -> fx.GraphModule:
    """``model.graph`` with a node for every rounding; its other nodes keep their names, its tensors are shared with the model."""
    graph = model.edit()
    if model.quant is not None:
        rounded: dict[tuple[fx.Node, Scheme], fx.Node] = {}
        operators = list(graphs.operators(graph))
        for node in operators:
            if model.quant.scheme(node.name) in STATIC_SCHEMES:
                _round_bias(graph, node, model.quant)
        for node in operators:
            scheme = model.quant.scheme(node.name)
            if scheme in STATIC_SCHEMES:
                _round_inputs(node, model.quant, rounded)
                _round_result(node, model.quant, rounded)
            elif scheme is Scheme.DYNAMIC:
                _round_dynamically(node, dynamic)
        graph.recompile()
    return graph


def _round_bias(graph: fx.GraphModule, node: fx.Node, plan: QuantPlan) -> None:
    """Give a static weighted operator the bias that runtimes add in int32: a multiple of input scale x weight scale in each channel."""
    kind = weighted(node)
    activation, weight, bias = (kind.argument(node, p) for p in (kind.activation, kind.weight, kind.bias)) if kind else (None, None, None)
    if activation is None or weight is None or bias is None or bias.op != "get_attr" or str(weight.target) not in plan.weights:
        return
    scales = torch.tensor(plan.weights[str(weight.target)].scales, dtype=torch.float64)
    value = graphs.tensor(graph, str(bias.target)).detach()
    step = _scale(plan, activation, plan.scheme(node.name)) * scales.repeat(value.numel() // len(scales))
    name = f"_simulated.{node.name}.bias"
    graphs.add_tensor(graph, name, (torch.round(value.double() / step) * step).to(value.dtype))
    with graph.graph.inserting_before(node):
        rounded = graph.graph.get_attr(name)
    rounded.meta["source"] = bias.meta.get("source", "")
    node.replace_input_with(bias, rounded)


def _round_inputs(node: fx.Node, plan: QuantPlan, rounded: dict[tuple[fx.Node, Scheme], fx.Node]) -> None:
    scheme = plan.scheme(node.name)
    for argument in node.all_input_nodes:
        if argument.name in plan.activations:
            if (argument, scheme) not in rounded:
                rounded[argument, scheme] = _rounding(argument, plan, scheme)
            node.replace_input_with(argument, rounded[argument, scheme])


def _round_result(node: fx.Node, plan: QuantPlan, rounded: dict[tuple[fx.Node, Scheme], fx.Node]) -> None:
    if node.name in plan.activations:
        scheme, readers = plan.scheme(node.name), list(node.users)
        rounded[node, scheme] = _rounding(node, plan, scheme)
        for reader in readers:
            reader.replace_input_with(node, rounded[node, scheme])


def _rounding(node: fx.Node, plan: QuantPlan, scheme: Scheme) -> fx.Node:
    with node.graph.inserting_after(node):
        if scheme is Scheme.STATIC:
            new = node.graph.call_function(fake_quantize, (node, _scale(plan, node, scheme), plan.activations[node.name].zero_point))
        else:
            new = node.graph.call_function(fake_quantize16, (node, _scale(plan, node, scheme)))
    new.meta["source"] = node.meta.get("source", "")
    return new


def _scale(plan: QuantPlan, node: fx.Node, scheme: Scheme) -> float:
    """Step of the grid that ``scheme`` has for the tensor ``node``."""
    extent = plan.activations[node.name]
    return extent.scale if scheme is Scheme.STATIC else extent.scale16


def _round_dynamically(node: fx.Node, dynamic: DynamicGrid) -> None:
    kind = weighted(node)
    activation = kind.argument(node, kind.activation) if kind else None
    if activation is None:
        raise DefectError(f"the plan makes {node.target} dynamic, which multiplies by no weight", where=graphs.source(node))
    with node.graph.inserting_before(node):
        new = node.graph.call_function(_DYNAMIC[dynamic], (activation,))
    new.meta["source"] = node.meta.get("source", "")
    node.replace_input_with(activation, new)
