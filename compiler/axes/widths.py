"""How sizes follow the widths of groups: elements, parameters and multiply-accumulates as sums of products of axes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes.analysis import Axes
from edgesmith.compiler.axes.axes import Axis, Term, resolve
from edgesmith.compiler.axes.groups import named_shapes
from edgesmith.compiler.axes.rules.linear import spelled_out
from edgesmith.compiler.weighted import CONVOLUTIONS, LINEARS, weighted

aten = torch.ops.aten

Values = npt.NDArray[np.float64]
Widths = Mapping[Axis, Values]
"""Axis -> its widths, in arrays that broadcast with each other."""

PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
ATTENTION, EINSUM = aten.scaled_dot_product_attention.default, aten.einsum.default


@dataclass(frozen=True)
class Step:
    """A kernel works on multiples of ``width`` units. Any other number is rounded up, and takes ``extra`` times as much more: copies, or a slower kernel.

    ``narrow``: fewer than ``width`` units are left to a kernel of half the width, which takes so many times more for each.
    """

    width: int = 1
    extra: float = 0.0
    narrow: float | None = None

    def of(self, value: Values) -> Values:
        """``value`` as the kernel's time sees it."""
        up = np.ceil(value / self.width) * self.width
        found = np.where(up == value, value, up * (1 + self.extra))
        if self.narrow is None:
            return np.asarray(found)
        half = self.width / 2
        return np.asarray(np.where(value < self.width, np.ceil(value / half) * half * (1 + self.narrow), found))


Steps = tuple[Step, Step]
"""Of the outputs and of the inputs of a kernel."""


@dataclass(frozen=True)
class Monomial:
    """``constant`` times the widths of ``axes``."""

    constant: int
    axes: tuple[Axis, ...] = ()

    def of(self, widths: Widths, step: Step | None = None) -> Values:
        """The value; to a kernel with such a ``step``."""
        value = np.asarray(prod((widths[axis] for axis in self.axes), start=np.float64(self.constant)))
        return value if step is None else step.of(value)


@dataclass(frozen=True)
class Volume:
    """A product of what is counted once for each position, output and input of an operator."""

    positions: Monomial
    outputs: Monomial = Monomial(1)
    inputs: Monomial = Monomial(1)

    @classmethod
    def one(cls) -> Volume:
        """What is counted once."""
        return cls(Monomial(1))

    @property
    def axes(self) -> frozenset[Axis]:
        """The axes that it depends on."""
        return frozenset(self.positions.axes + self.outputs.axes + self.inputs.axes)

    def of(self, widths: Widths, steps: Steps | None = None) -> Values:
        """The value; to a kernel with such ``steps``."""
        outputs, inputs = steps or (None, None)
        return np.asarray(self.positions.of(widths) * self.outputs.of(widths, outputs) * self.inputs.of(widths, inputs))


@dataclass(frozen=True)
class Counts:
    """Volumes of a model at batch 1, where the axes in ``free`` may change their widths and all others keep them.

    ``gates`` are axes of width 1 or 0 that are no dimension of any tensor: operators that are there or not.
    """

    axes: Axes
    free: Set[Axis]
    gates: Mapping[fx.Node, tuple[Axis, ...]] = field(default_factory=dict)

    def parameters(self) -> list[Volume]:
        """Elements of all parameters."""
        state, found = self.axes.state, []
        readers: dict[int, list[fx.Node]] = {}
        for node in self.axes.model.graph.graph.find_nodes(op="get_attr"):
            readers.setdefault(id(state.tensor(str(node.target))), []).extend(node.users)
        for name, shape in named_shapes(state):
            if isinstance(value := state.tensor(name), nn.Parameter):
                found += self._gated(self._elements(shape), readers[id(value)])
        return found

    def elements(self, node: fx.Node) -> list[Volume]:
        """What ``node`` reads that the model computes, and what it gives."""
        read = [other for other in node.all_input_nodes if other.op == "call_function"]
        return self._gated([volume for one in (*read, node) for volume in self._of_value(one)], [node])

    def once(self, node: fx.Node) -> list[Volume]:
        """1 for a ``node`` that is there."""
        return self._gated([Volume.one()], [node])

    def work(self, node: fx.Node) -> list[Volume]:
        """Multiply-accumulates of ``node``; nothing where it is no product."""
        return self._gated(self._work(node), [node])

    def _gates_of(self, nodes: Iterable[fx.Node]) -> tuple[Axis, ...]:
        """The gates that all of ``nodes`` are behind."""
        several = [self.gates.get(node, ()) for node in nodes]
        return tuple(gate for gate in several[0] if all(gate in other for other in several)) if several else ()

    def _gated(self, volumes: Sequence[Volume], nodes: Iterable[fx.Node]) -> list[Volume]:
        gates = self._gates_of(nodes)
        return [replace(v, positions=Monomial(v.positions.constant, v.positions.axes + gates)) for v in volumes] if gates else list(volumes)

    def _work(self, node: fx.Node) -> list[Volume]:
        kind = weighted(node)
        values = self.axes.state.values
        if kind is not None:
            weight, read = kind.argument(node, kind.weight), kind.argument(node, kind.activation)
            assert weight is not None and read is not None
            shape, given, made = values[weight], values[read], values[node]
            assert isinstance(shape, tuple) and isinstance(given, tuple) and isinstance(made, tuple)
            if node.target in LINEARS:
                return self._product(made[:-1], shape[kind.axis], shape[1 - kind.axis])
            if node.target in CONVOLUTIONS:
                positions = given if kind.transposed else made
                spread = tuple(term for dim, term in enumerate(positions) if dim != len(positions) - len(shape) + 1)
                return self._product((*spread, *shape[2:]), shape[kind.axis], shape[1 - kind.axis])
        if node.target in PRODUCTS:
            left, right = (values[a] for a in node.args[:2])  # type: ignore[index]
            made = values[node]
            assert isinstance(left, tuple) and isinstance(right, tuple) and isinstance(made, tuple)
            return self._product(made[:-1], made[-1] if len(right) > 1 else (), left[-1])
        if node.target is EINSUM:
            return self._einsum(node)
        if node.target is ATTENTION:
            query, key, value = (values[a] for a in node.args[:3])  # type: ignore[index]
            assert isinstance(query, tuple) and isinstance(key, tuple) and isinstance(value, tuple)
            return [*self._product(query[:-1], key[-2], query[-1]), *self._product(query[:-1], value[-1], key[-2])]
        return []

    def _einsum(self, node: fx.Node) -> list[Volume]:
        """One product for every combination of letters; of two operands, as all that runtimes know."""
        equation: Any = node.args[0]
        operands: Any = node.args[1]
        if len(operands) != 2:
            return []
        shapes = [shape for operand in operands if isinstance(shape := self.axes.state.values[operand], tuple)]
        given, made = spelled_out(equation, [len(shape) for shape in shapes])
        terms: dict[str, Term] = {}
        for letters, shape in zip(given.split(","), shapes, strict=True):
            terms |= dict(zip(letters, shape, strict=True))
        summed = [terms[letter] for letter in terms if letter not in made]
        positions = [*(terms[letter] for letter in made[:-1]), *summed[1:]]
        return self._product(positions, terms[made[-1]] if made else (), summed[0] if summed else ())

    def macs(self) -> list[Volume]:
        """Multiply-accumulates of all operators."""
        return [volume for node in graphs.operators(self.axes.model.graph) for volume in self.work(node)]

    def _of_value(self, node: fx.Node) -> Iterator[Volume]:
        shape = self.axes.state.values.get(node)
        for one in shape if isinstance(shape, list) else [shape]:
            if isinstance(one, tuple):
                yield from self._elements(one)

    def _elements(self, shape: Sequence[Term]) -> list[Volume]:
        return [Volume(monomial) for monomial in self._products(shape)]

    def _product(self, positions: Sequence[Term], outputs: Term, inputs: Term) -> list[Volume]:
        several = product(self._products(positions), self._extent(outputs), self._extent(inputs))
        return [Volume(p, o, i) for p, o, i in several]

    def _products(self, shape: Iterable[Term]) -> list[Monomial]:
        return [_multiplied(parts) for parts in product(*(self._extent(term) for term in shape))]

    def _extent(self, term: Term) -> list[Monomial]:
        """The size of a dimension, as a sum."""
        return [_multiplied(parts) for parts in product(*(self._size(axis) for axis in resolve(term)))]

    def _size(self, axis: Axis) -> list[Monomial]:
        if axis in self.free:
            return [Monomial(1, (axis,))]
        if axis.parts is not None:
            found = [monomial for part in axis.parts for monomial in self._extent(part)]
            fixed = sum(monomial.constant for monomial in found if not monomial.axes)
            return [*(monomial for monomial in found if monomial.axes), *([Monomial(fixed)] if fixed else [])]
        return [Monomial(1 if axis in self._batch else axis.size)]

    @cached_property
    def _batch(self) -> Set[Axis]:
        model = self.axes.model
        if not model.dynamic_batch:
            return frozenset()
        values = (self.axes.state.values[node] for node in model.graph.graph.find_nodes(op="placeholder"))
        return frozenset(axis for shape in values if isinstance(shape, tuple) and shape for axis in resolve(shape[0]))


def _multiplied(parts: Sequence[Monomial]) -> Monomial:
    return Monomial(prod(part.constant for part in parts), tuple(axis for part in parts for axis in part.axes))
