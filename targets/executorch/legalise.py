"""Write a QuantPlan into the graph as the quantize and dequantize nodes that XNNPACK's partitioner fuses.

A static operator becomes ``dequantize -> operator (-> activation) -> quantize`` in int8, with int8 weights that are dequantized per
channel; a dynamic one reads its input through run-time parameters, which XNNPACK takes per row (linear) or per sample
(convolution). Nothing is observed and no pattern is replaced: the integers are those of the plan.
What XNNPACK cannot run as planned stays float and is reported.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.errors import DefectError
from edgesmith.compiler.model import Model
from edgesmith.compiler.quantplan import QuantPlan, Scheme
from edgesmith.targets.executorch import constraints
from edgesmith.targets.executorch.rewrites import begin_names_with_letters, products_as_linear, rewrite_in_place, rewrite_into_delegate

aten = torch.ops.aten
_INT8 = (-128, 127, torch.int8)
_WEIGHT_INT8 = (-127, 127, torch.int8)
_EPSILON = 2.0**-23
_OFF_GRID = 1e-3
"""How far, in steps, a weight may lie from its grid: float32's rounding of 127 steps is 1e-5."""


def legalise(model: Model) -> tuple[Model, tuple[Diagnostic, ...]]:
    """The model to lower, and one WARNING for each operator whose scheme could not be honoured.

    The model runs in torch and computes what the file does up to rounding: in float where it is float, fake-quantized where it is static.

    Raises:
        DefectError: a weight does not lie on the grid that its plan gives it.
    """
    graph = model.edit()
    rewrite_in_place(graph)
    plan = products_as_linear(graph, model.quant)
    diagnostics = _Quantiser(graph, plan).run() if plan is not None else ()
    rewrite_into_delegate(graph)
    begin_names_with_letters(graph)
    return model.with_graph(graph), diagnostics


class _Quantiser:
    """Applies one plan to one graph, in place."""

    def __init__(self, graph: fx.GraphModule, plan: QuantPlan) -> None:
        import torch.ao.quantization.fx._decomposed

        self._ops = torch.ops.quantized_decomposed
        self._module = graph
        self._plan = plan
        self._weights: dict[str, tuple[str, str, str]] = {}

    def run(self) -> tuple[Diagnostic, ...]:
        """Rewrite the graph; what could not be honoured comes back."""
        refused = []
        honoured: dict[Scheme, list[fx.Node]] = {Scheme.STATIC: [], Scheme.DYNAMIC: []}
        for node in graphs.operators(self._module):
            scheme = self._plan.scheme(str(node.meta.get(constraints.PLAN_NAME, node.name)))
            if scheme is Scheme.FLOAT:
                continue
            why = constraints.why_not(self._module, node, scheme, self._plan)
            if why:
                message = f"{node.target} was planned {scheme.value} and runs in float: {why}"
                refused.append(Diagnostic(Severity.WARNING, "executorch.not-honoured", graphs.source(node), message))
            else:
                honoured[scheme].append(node)
        self._make_static(honoured[Scheme.STATIC])
        self._pad_on_grid()
        self._make_dynamic(honoured[Scheme.DYNAMIC])
        for node in (*honoured[Scheme.STATIC], *honoured[Scheme.DYNAMIC]):
            self._quantize_weight(node)
        return tuple(refused)

    def _make_static(self, nodes: list[fx.Node]) -> None:
        """Put every tensor that ``nodes`` read or write on its int8 grid; whoever reads what they write reads int8, too."""
        written = {node: constraints.result(node, self._plan) for node in nodes}
        fused = {tensor for node, tensor in written.items() if tensor is not node}
        readers: dict[fx.Node, dict[fx.Node, None]] = {}
        for node in nodes:
            if node in fused:
                continue
            readers.setdefault(written[node], {}).update(dict.fromkeys(written[node].users))
            for tensor, consumer in constraints.activations(node):
                readers.setdefault(tensor, {})[consumer] = None
        for tensor, consumers in readers.items():
            self._through_int8(tensor, list(consumers))

    def _through_int8(self, tensor: fx.Node, consumers: list[fx.Node]) -> None:
        found = constraints.planned_range(tensor, self._plan)
        assert found is not None
        parameters = (found.scale, found.zero_point, *_INT8)
        after = tensor if tensor.op != "placeholder" else self._module.graph.find_nodes(op="placeholder")[-1]
        with self._module.graph.inserting_after(after):
            quantized = self._call(self._ops.quantize_per_tensor.default, (tensor, *parameters), tensor)
        for consumer in consumers:
            with self._module.graph.inserting_before(consumer):
                dequantized = self._call(self._ops.dequantize_per_tensor.default, (quantized, *parameters), tensor)
            consumer.replace_input_with(tensor, dequantized)

    def _pad_on_grid(self) -> None:
        """Let paddings that read int8 write int8 on the same grid, zero included: XNNPACK has no padding from one to float."""
        for node in list(graphs.operators(self._module)):
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or source.target is not self._ops.dequantize_per_tensor.default or not constraints.pads_between_grids(node):
                continue
            readers, parameters = list(node.users), source.args[1:]
            with self._module.graph.inserting_after(node):
                quantized = self._call(self._ops.quantize_per_tensor.default, (node, *parameters), node)
            with self._module.graph.inserting_after(quantized):
                dequantized = self._call(self._ops.dequantize_per_tensor.default, (quantized, *parameters), node)
            for reader in readers:
                reader.replace_input_with(node, dequantized)

    def _make_dynamic(self, nodes: list[fx.Node]) -> None:
        """Let each of ``nodes`` read its input through parameters chosen at run time."""
        for node in nodes:
            x = self._flattened(node)
            with self._module.graph.inserting_before(node):
                chosen = self._call(self._ops.choose_qparams.tensor, (x, -128, 127, _EPSILON, torch.int8), node)
                parameters = (self._call(operator.getitem, (chosen, 0), node), self._call(operator.getitem, (chosen, 1), node), *_INT8)
                quantized = self._call(self._ops.quantize_per_tensor.tensor, (x, *parameters), node)
                dequantized = self._call(self._ops.dequantize_per_tensor.tensor, (quantized, *parameters), node)
            node.replace_input_with(x, dequantized)

    def _flattened(self, node: fx.Node) -> fx.Node:
        """What ``node`` reads, as a matrix if it is a product of images, whose memory order XNNPACK's partitioner changes behind the quantization otherwise."""
        x, whole = node.args[0], node.meta["val"]
        assert isinstance(x, fx.Node)
        if node.target is not aten.linear.default or whole.dim() != 4:
            return x
        rows = x.meta["val"].flatten(0, 2)
        with self._module.graph.inserting_before(node):
            matrix = self._call(aten.reshape.default, (x, [-1, rows.shape[1]]), x)
        node.replace_input_with(x, matrix)
        with self._module.graph.inserting_after(node):
            image = self._call(aten.reshape.default, (node, [graphs.any_batch(whole.shape[0]), *whole.shape[1:]]), node)
        node.replace_all_uses_with(image, delete_user_cb=lambda user: user is not image)
        for made, value in ((matrix, rows), (node, whole.flatten(0, 2)), (image, whole)):
            made.meta["val"] = value
        return matrix

    def _quantize_weight(self, node: fx.Node) -> None:
        kernel = constraints.weight(node)
        if kernel is None:
            return
        name = str(kernel.target)
        if name not in self._weights:
            self._weights[name] = self._integers(name)
        with self._module.graph.inserting_before(node):
            integers, scales, zeros = (self._module.graph.get_attr(n) for n in self._weights[name])
            axis = self._plan.weights[name].axis
            dequantized = self._call(self._ops.dequantize_per_channel.default, (integers, scales, zeros, axis, *_WEIGHT_INT8), kernel)
        node.update_arg(1, dequantized)

    def _integers(self, name: str) -> tuple[str, str, str]:
        """Register the int8 weight, its scales and its zero points; their names."""
        weight, grid = graphs.tensor(self._module, name).detach().double(), self._plan.weights[name]
        scales = torch.tensor(grid.scales, dtype=torch.float64)
        steps = weight / scales.reshape([-1 if d == grid.axis else 1 for d in range(weight.dim())])
        integers = steps.round()
        if float((steps - integers).abs().max()) > _OFF_GRID or float(integers.abs().max()) > 127:
            raise DefectError("a weight does not lie on its planned grid", where=name)
        made = {"int8": integers.to(torch.int8), "scales": scales.float(), "zeros": torch.zeros(len(grid.scales), dtype=torch.int64)}
        names = [f"{name}_{suffix}" for suffix in made]
        for target, value in zip(names, made.values(), strict=True):
            graphs.add_tensor(self._module, target, value)
        return names[0], names[1], names[2]

    def _call(self, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        node = self._module.graph.call_function(target, args)
        node.meta["source"] = graphs.source(like) if like.op == "call_function" else like.meta.get("source", "")
        return node
