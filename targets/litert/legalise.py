"""The abstract quantization plan -> what a ``.tflite`` file can hold, and what of it could not be honoured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.grid_operators import FIXED_PEAK
from edgesmith.compiler.model import Model
from edgesmith.compiler.quantplan import STATIC_SCHEMES, STEPS16, QuantPlan, Scheme, TensorRange
from edgesmith.compiler.weighted import weighted
from edgesmith.targets.litert.check import check
from edgesmith.targets.litert.flatfile import Array, FlatFile, Op, Tensor
from edgesmith.targets.litert.layout import carried
from edgesmith.targets.litert.match import CHANNEL_AXIS, Correspondence, Match, weight_name, weight_of
from edgesmith.targets.litert.quantizer import WIDE_BITS, Numbers, quantized

STEPS = 127
"""Largest magnitude of a symmetric int8 weight."""
_INT32_MAX = 2**31 - 1
_COMPUTED = frozenset({"ADD", "SUB", "MUL", "MEAN", "RELU", "LOGISTIC", "TANH", "CONCATENATION", "AVERAGE_POOL_2D"})
"""Operators without weights that run on int8 by a static scheme.

GELU and HARD_SWISH are not among them: the runtime's accelerated path lacks both on int8 and is left and entered again at each (measured on
a net of hard swishes: 8.1 ms with them on int8, 2.4 ms with them in float32 between conversions, for the same numbers).
"""
_ONE_GRID = frozenset({"CONCATENATION", "AVERAGE_POOL_2D"})
"""Those whose inputs and result must share one grid."""
_FIXED = {"LOGISTIC": (0.0, 255 / 256), "TANH": (-1.0, 127 / 128)}
_FIXED16 = dict.fromkeys(_FIXED, (-FIXED_PEAK, FIXED_PEAK))
"""Those whose result has one grid, whatever its values (TensorFlow Lite 8-bit quantization specification)."""


def legalised(model: Model, content: bytes) -> tuple[bytes, tuple[Diagnostic, ...]]:
    """``content`` (the float32 file of ``model``) with ``model.quant`` in it, and a remark for each operator that stays in float32.

    What is quantized has exactly the plan's integers and scales as weights and, where static, exactly the plan's activation ranges. The remark
    is a WARNING for an operator with a weight. For one without it is INFO: its readers still get its values on the plan's grid, at the
    price of a conversion.

    Raises:
        DefectError: the file does not hold what the plan says.
    """
    assert model.quant is not None
    before = FlatFile(content)
    chosen = _Choices(model, model.quant, before)
    if not chosen.made:
        return content, tuple(chosen.refused)
    schemes = {c.op.outputs[0].name: (c.op, c.scheme) for c in chosen.made}
    layout = carried(before, {c.op.outputs[0].index for c in chosen.made if c.scheme in STATIC_SCHEMES}, chosen.numbers)
    for op in layout:
        wide = chosen.numbers[op.outputs[0].name].bits == WIDE_BITS
        schemes[op.outputs[0].name] = op, Scheme.STATIC16X8 if wide else Scheme.STATIC
    result = quantized(content, schemes, chosen.numbers)
    check(chosen.made, before, FlatFile(result), chosen.numbers)
    return result, tuple(chosen.refused)


@dataclass(frozen=True)
class Choice:
    """An operator of the file that is quantized. ``integers``: those of its weight, a row per output channel, None without a weight."""

    node: fx.Node
    op: Op
    scheme: Scheme
    integers: Array | None


class _Choices:
    """Decides node by node, and collects the numbers (by tensor name) that the chosen operators need."""

    def __init__(self, model: Model, plan: QuantPlan, file: FlatFile) -> None:
        self.made: list[Choice] = []
        self.refused: list[Diagnostic] = []
        self.numbers: dict[str, Numbers] = {}
        self._model = model
        self._plan = plan
        self._fused: set[fx.Node] = set()
        wanted = [n for n in graphs.operators(model.graph) if plan.scheme(n.name) is not Scheme.FLOAT and not _keeps_grid(n, plan)]
        self._found = Correspondence(model, file, wanted)
        for node in wanted:
            if node not in self._fused and (why := self._decide(node)):
                self.refused.append(self._remark(node, why))

    def _remark(self, node: fx.Node, why: str) -> Diagnostic:
        severity = Severity.WARNING if weighted(node) else Severity.INFO
        text = f"{node.target} stays in float32 where the plan has {self._plan.scheme(node.name).value}: {why}"
        return Diagnostic(severity, "litert.not-honoured", graphs.source(node), text)

    def _decide(self, node: fx.Node) -> str:
        """Choose the operator of the file that computes ``node``; the reason why not, or nothing."""
        match = self._found.match(node)
        if isinstance(match, str):
            return match
        if weighted(node):
            return self._decide_weighted(match)
        if self._plan.scheme(node.name) not in STATIC_SCHEMES:
            return "it has no weight"
        if match.op.kind not in _COMPUTED:
            return f"the runtime's {match.op.kind} is not faster on int8"
        numbers = self._ranges(match)
        if isinstance(numbers, str):
            return numbers
        return self._take(match, numbers, None)

    def _decide_weighted(self, match: Match) -> str:
        name, kind = weight_name(match.node), weighted(match.node)
        assert kind is not None
        if name not in self._plan.weights:
            return f"the plan has no grid for {name}"
        grid, weight = self._plan.weights[name], graphs.tensor(self._model.graph, name).detach().numpy().astype(np.float64)
        if grid.axis != kind.axis or len(grid.scales) != weight.shape[kind.axis]:
            return f"LiteRT has one weight scale per output channel (axis {kind.axis}), the plan {len(grid.scales)} on axis {grid.axis}"
        rows = np.moveaxis(weight, kind.axis, 0).reshape(len(grid.scales), -1)
        scales = _harmless(rows, np.asarray(grid.scales))
        static = self._plan.scheme(match.node.name) in STATIC_SCHEMES
        numbers = self._ranges(match) if static else {}
        if isinstance(numbers, str):
            return numbers
        if static and _bias_overflows(match.op, scales, numbers[match.op.inputs[0].name]):
            return "its bias does not fit into 32 bits at the scales of its input and weight"
        integers = np.clip(np.rint(rows / scales[:, None]), -STEPS, STEPS)
        return self._take(match, numbers | _weight_numbers(match.op, scales), integers)

    def _take(self, match: Match, numbers: Mapping[str, Numbers], integers: Array | None) -> str:
        self.numbers |= numbers
        self._fused |= set(match.results)
        self.made.append(Choice(match.node, match.op, self._plan.scheme(match.node.name), integers))
        return ""

    def _ranges(self, match: Match) -> dict[str, Numbers] | str:
        """The ranges of what a static operator reads and writes, by tensor name; or why it cannot have them."""
        planned = self._plan.activations
        result = next((n for n in match.results if n.name in planned), None)
        missing = [n.name for _, n in match.reads if n.name not in planned] or ([match.node.name] if result is None else [])
        if result is None or missing:
            return f"the plan has no range for {missing[0]}"
        pairs = [*((tensor, planned[n.name]) for tensor, n in match.reads), (match.op.outputs[0], planned[result.name])]
        wide = self._plan.scheme(match.node.name) is Scheme.STATIC16X8
        numbers = {tensor.name: (_wide_numbers if wide else _range_numbers)(tensor, wanted) for tensor, wanted in pairs}
        if match.op.kind in _ONE_GRID and len({n.ends for n in numbers.values()}) > 1:
            return f"the runtime's {match.op.kind} needs one grid for what it reads and writes"
        fixed = (_FIXED16 if wide else _FIXED).get(match.op.kind)
        if fixed and not np.allclose(numbers[match.op.outputs[0].name].ends, fixed, rtol=1e-6):
            return f"the runtime's {match.op.kind} always writes on the grid from {fixed[0]} to {fixed[1]}"
        for name, mine in numbers.items():
            if name in self.numbers and not self.numbers[name].same_grid(mine):
                return "another operator needs a different range for a tensor that they share"
        return numbers


def _keeps_grid(node: fx.Node, plan: QuantPlan) -> bool:
    """Whether ``node`` has no weight and writes on the grid that it reads: a view or a max pool, the same in float32 and in int8."""
    if weighted(node) or node.name not in plan.activations:
        return False
    first = node.args[0]
    if not isinstance(first, fx.Node) or first.name not in plan.activations or len([n for n in node.all_input_nodes if n.op != "get_attr"]) != 1:
        return False
    mine, read = plan.activations[node.name], plan.activations[first.name]
    return (mine.low, mine.high) == (read.low, read.high)


def _harmless(rows: Array, scales: Array) -> Array:
    """``scales``, with the largest one for channels that are all zero: a tiny one would leave no room for their bias."""
    return np.where(np.any(rows != 0, axis=1), scales, scales.max())


def _range_numbers(tensor: Tensor, wanted: TensorRange) -> Numbers:
    shape = (1,) * len(tensor.shape)
    return Numbers(np.full(shape, min(wanted.low, 0.0)), np.full(shape, max(wanted.high, 0.0)))


def _wide_numbers(tensor: Tensor, wanted: TensorRange) -> Numbers:
    end = np.full((1,) * len(tensor.shape), wanted.scale16 * STEPS16)
    return Numbers(-end, end, WIDE_BITS)


def _weight_numbers(op: Op, scales: Array) -> dict[str, Numbers]:
    weight = weight_of(op)
    assert weight is not None
    shape = [1] * len(weight.shape)
    shape[CHANNEL_AXIS[op.kind]] = -1
    bound = (scales * STEPS).reshape(shape)
    return {weight.name: Numbers(-bound, bound)}


def _bias_overflows(op: Op, scales: Array, read: Numbers) -> bool:
    """Whether the bias has too many steps; the quantizer cuts it off at 32 bits beside int16 activations, too."""
    bias = op.inputs[2].data if len(op.inputs) > 2 else None
    return bias is not None and bool(np.any(np.abs(bias) > _INT32_MAX * scales * read.grid[0]))
