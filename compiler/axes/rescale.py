"""Who may rescale whom: channels that can be divided by any positive number where they are made and multiplied by it where they are read.

A *stretch* is a set of tensors of the graph along which such a scale travels: from the parameters that make its channels (rows of a weight, its
bias, the gain and shift of a norm, a scale per channel) through operators that a positive factor per channel goes through unchanged (a ReLU, a max
pool, a view, a residual sum) to those that read them (columns of a weight, a depthwise filter). Everything else ends it. After the change the model
computes the same function, and the tensors in between have other ranges: the ground of equalisation before quantization (Nagel et al., Data-Free
Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.1; Xiao et al., SmoothQuant, ICML 2023, section 4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes.analysis import Axes
from edgesmith.compiler.axes.axes import Term, leaves, resolve, size
from edgesmith.compiler.axes.groups import labels
from edgesmith.compiler.axes.op import Shape, arguments, get_argument
from edgesmith.compiler.weighted import CONVOLUTIONS, Weighted, weighted

aten = torch.ops.aten
Units = npt.NDArray[np.int64]

_THROUGH: frozenset[object] = frozenset(
    {
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.alias.default,
        aten.amax.default,
        aten.avg_pool1d.default,
        aten.avg_pool2d.default,
        aten.clone.default,
        aten.constant_pad_nd.default,
        aten.contiguous.default,
        aten.dropout.default,
        aten.expand.default,
        aten.feature_dropout.default,
        aten.flatten.using_ints,
        aten.leaky_relu.default,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.mean.dim,
        aten.neg.default,
        aten.pad.default,
        aten.permute.default,
        aten.relu.default,
        aten.repeat_interleave.self_int,
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.sum.dim_IntList,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
"""Operators of one tensor that a positive factor per channel goes through."""
_POOLS: Mapping[object, int] = MappingProxyType(
    {
        aten.adaptive_avg_pool1d.default: 1,
        aten.adaptive_avg_pool2d.default: 2,
        aten.avg_pool1d.default: 1,
        aten.avg_pool2d.default: 2,
        aten.max_pool1d.default: 1,
        aten.max_pool2d.default: 2,
    }
)
"""Those that mix their last dimensions, and how many: a factor along these does not go through."""
_PADS = frozenset({aten.constant_pad_nd.default, aten.pad.default})
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_PRODUCTS = frozenset({aten.mul.Tensor, aten.div.Tensor})
_MIXTURES = frozenset({aten.bmm.default, aten.matmul.default, aten.mm.default})
_NORMS = frozenset({aten.batch_norm.default, aten.group_norm.default, aten.instance_norm.default, aten.layer_norm.default, aten.rms_norm.default})


@dataclass(frozen=True)
class Slice:
    """One dimension of one parameter: ``units[i]`` is the channel that index ``i`` belongs to."""

    name: str
    dim: int
    units: Units = field(compare=False, repr=False)


@dataclass(frozen=True)
class Stretch:
    """``channels`` numbers to divide ``made`` by and to multiply ``read`` by. ``tensors``: the nodes in between, whose values are divided.

    ``readers``: the operators that read the channels, each with the tensor that it reads them from.
    """

    channels: int
    made: tuple[Slice, ...]
    read: tuple[Slice, ...]
    tensors: tuple[fx.Node, ...]
    readers: tuple[tuple[fx.Node, fx.Node], ...]


def stretches(axes: Axes) -> tuple[Stretch, ...]:
    """Every stretch of ``axes.model`` that something makes and something reads, in graph order."""
    walk = _Walk(axes)
    keys = dict.fromkeys(key for node in graphs.operators(axes.model.graph) if (key := walk.made_by(node)))
    return tuple(stretch for key in keys for stretch in _Flow(walk, key).stretches())


def rescaled(graph: fx.GraphModule, stretch: Stretch, scales: npt.NDArray[np.float64]) -> None:
    """Divide what makes the channels of ``stretch`` by ``scales``, and multiply what reads them, in ``graph``.

    Args:
        graph: a copy of the model's graph; its tensors are replaced, not written.
        stretch: of that model.
        scales: (channels,), positive.
    """
    for factors, slices in ((1 / scales, stretch.made), (scales, stretch.read)):
        for part in slices:
            old = graphs.tensor(graph, part.name)
            along = [-1 if dim == part.dim else 1 for dim in range(old.dim())]
            factor = torch.from_numpy(factors[part.units]).reshape(along)
            new = (old.detach().double() * factor).to(old.dtype)
            graphs.add_tensor(graph, part.name, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)


class _Walk:
    """The graph with the terms of its tensors."""

    def __init__(self, axes: Axes) -> None:
        self.graph, self._values = axes.model.graph, axes.state.values
        self.constant = axes.state.constant
        uses: Counter[int] = Counter()
        for node in self.graph.graph.find_nodes(op="get_attr"):
            uses[id(graphs.tensor(self.graph, str(node.target)))] += len(node.users)
        self._uses = uses

    def shape(self, node: fx.Node) -> Shape | None:
        """The terms of a tensor."""
        found = self._values.get(node)
        return tuple(resolve(term) for term in found) if isinstance(found, tuple) else None

    def carries(self, node: fx.Node, key: Term) -> bool:
        """Whether the tensor has every axis of ``key``."""
        shape = self.shape(node)
        return shape is not None and set(key) <= {leaf for term in shape for leaf in leaves(term)}

    def slice(self, node: object, dim: int, key: Term) -> Slice | None:
        """Dimension ``dim`` of a parameter by the channels of ``key``; None if it is no parameter of one reader, or does not follow ``key``."""
        if not isinstance(node, fx.Node) or node.op != "get_attr" or self._uses[id(graphs.tensor(self.graph, str(node.target)))] != 1:
            return None
        shape = self.shape(node)
        units = None if shape is None or dim >= len(shape) else _units(shape[dim], key)
        return None if units is None else Slice(str(node.target), dim, units)

    def made_by(self, node: fx.Node) -> Term:
        """The channels that a weight, a norm or a gain makes: the term of the parameter's dimension, or nothing."""
        kind, place = weighted(node), 0
        parameter = kind.argument(node, kind.weight) if kind is not None else _gain(node)
        if kind is not None:
            place = kind.axis
        if node.target is aten.mul.Tensor:
            parameter = next((a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"), None)
            place = -1
        shape = self.shape(parameter) if parameter is not None else None
        return () if not shape else tuple(dict.fromkeys(shape[place]))


class _Flow:
    """How a factor per index of ``key`` travels: tensors joined to stretches, what makes and reads each, and those that cannot be scaled."""

    def __init__(self, walk: _Walk, key: Term) -> None:
        self._walk, self._key = walk, key
        self._parent: dict[fx.Node, fx.Node] = {}
        self._fixed: set[fx.Node] = set()
        self._made: list[tuple[fx.Node, Slice]] = []
        self._read: list[tuple[fx.Node, Slice, fx.Node]] = []
        for node in walk.graph.graph.nodes:
            self._visit(node)

    def stretches(self) -> list[Stretch]:
        """Those that nothing holds fixed, and that something makes and reads."""
        fixed = {self._root(node) for node in self._fixed}
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in self._parent:
            members.setdefault(self._root(node), []).append(node)
        found = []
        for root, tensors in members.items():
            made = tuple(part for node, part in self._made if self._root(node) is root)
            reads = [(part, reader, node) for node, part, reader in self._read if self._root(node) is root]
            if root not in fixed and made and reads:
                readers = tuple((reader, node) for _, reader, node in reads)
                found.append(Stretch(size(self._key), made, tuple(part for part, _, _ in reads), tuple(sorted(tensors)), readers))
        return found

    def _visit(self, node: fx.Node) -> None:
        inputs = [a for a in node.all_input_nodes if a not in self._walk.constant and self._walk.carries(a, self._key)]
        gives = node.op != "output" and node not in self._walk.constant and self._walk.carries(node, self._key)
        if not inputs and not gives:
            return
        if node.op != "call_function":
            self._fix(*inputs, *([node] if gives else []))
            return
        kind = weighted(node)
        if kind is not None:
            self._weighted(node, kind, inputs, gives)
        elif node.target in _NORMS:
            self._fix(*inputs)
            self._makes(node, [(_gain(node), 0), (_shift(node), 0)])
        elif gives and not self._goes_through(node, inputs):
            self._fix(*inputs, node)
        elif not gives:
            self._fix(*inputs)

    def _weighted(self, node: fx.Node, kind: Weighted, inputs: list[fx.Node], gives: bool) -> None:
        activation, weight, bias = (kind.argument(node, place) for place in (kind.activation, kind.weight, kind.bias))
        assert weight is not None
        depthwise = node.target in CONVOLUTIONS and not kind.transposed and weight.meta["val"].shape[1] == 1 != weight.meta["val"].shape[0]
        grouped = node.target in CONVOLUTIONS and not depthwise and _groups(node) > 1
        for source in inputs:
            columns = kind.axis if depthwise else 1 - kind.axis
            part = None if grouped or source is not activation or source is node else self._walk.slice(weight, columns, self._key)
            if part is None:
                self._fix(source)
            else:
                self._join(source, source)
                self._read.append((source, part, node))
        if gives:
            self._makes(node, [] if grouped and kind.transposed else [(weight, kind.axis), (bias, 0)])

    def _makes(self, node: fx.Node, parameters: list[tuple[fx.Node | None, int]]) -> None:
        """``node``'s result is scaled by its ``parameters``, all of them, or not at all."""
        self._join(node, node)
        parts = [self._walk.slice(parameter, dim, self._key) for parameter, dim in parameters if parameter is not None]
        if not parts or None in parts:
            self._fix(node)
        self._made += [(node, part) for part in parts if part is not None]

    def _goes_through(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        first = node.args[0] if node.args else None
        if node.target in _THROUGH:
            return inputs == [first] and not self._mixes(node) and self._join(node, *inputs)
        if node.target in _SUMS:
            return set(node.args) == set(inputs) and self._join(node, *inputs)
        if node.target in _PRODUCTS:
            return self._product(node, inputs)
        if node.target in _MIXTURES:
            return self._mixture(node, inputs)
        if node.target is aten.scaled_dot_product_attention.default:
            value = node.args[2]
            self._fix(*(a for a in inputs if a is not value))
            return value in inputs and value not in node.args[:2] and self._join(node, *(a for a in inputs if a is value))
        return False

    def _mixes(self, node: fx.Node) -> bool:
        """Whether ``node`` combines channels, or them and something that is not scaled."""
        if node.target in _PADS:
            return _pads_other_than_zero(node)
        shape = self._walk.shape(node)
        mixed = _POOLS.get(node.target, 0)
        return bool(mixed) and shape is not None and any(leaf in self._key for term in shape[-mixed:] for leaf in leaves(term))

    def _product(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        """A gate, a gain or a number times the channels: the factor of one operand goes through, the other has none."""
        if not inputs or (node.target is aten.div.Tensor and inputs[0] is not node.args[0]):
            return False
        gain = self._diagonal(node)
        if gain is not None and len(inputs) == 1:
            self._join(inputs[0], inputs[0])
            self._read.append((inputs[0], gain, node))
            self._join(node, node)
            self._made.append((node, gain))
            return True
        whole = [a for a in inputs if a.meta["val"].shape == node.meta["val"].shape and sum(b is a for b in node.args) == 1]
        if not whole:
            return False
        scaled = next((a for a in whole if not self._held(a)), whole[0])
        self._fix(*(a for a in inputs if a is not scaled))
        return self._join(node, scaled)

    def _mixture(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        """Attention by a product of its weights and values: what one operand is not summed over keeps its factor, the other has none."""
        left, right = node.args[:2]
        shape = self._walk.shape(inputs[0]) if len(inputs) == 1 and left is not right else None
        if shape is None or len(shape) < 2 or set(self._key) & set(leaves(shape[-1 if inputs[0] is left else -2])):
            return False
        return self._join(node, inputs[0])

    def _diagonal(self, node: fx.Node) -> Slice | None:
        """The parameter that ``node`` multiplies every channel by; it makes new channels of those that it reads, as a depthwise filter does."""
        if node.target is not aten.mul.Tensor:
            return None
        constants = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        found = [part for a in constants for dim, n in enumerate(a.meta["val"].shape) if n > 1 and (part := self._walk.slice(a, dim, self._key))]
        return found[0] if len(found) == 1 and constants[0].meta["val"].numel() == len(found[0].units) else None

    def _join(self, *nodes: fx.Node) -> bool:
        for node in nodes:
            self._parent.setdefault(node, node)
            self._parent[self._root(node)] = self._root(nodes[0])
        return True

    def _fix(self, *nodes: fx.Node) -> None:
        for node in nodes:
            self._parent.setdefault(node, node)
            self._fixed.add(node)

    def _held(self, node: fx.Node) -> bool:
        """Whether something before or at ``node`` holds its channels as they are."""
        return node not in self._parent or any(self._root(fixed) is self._root(node) for fixed in self._fixed)

    def _root(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            node = self._parent[node]
        return node


def _units(term: Term, key: Term) -> Units | None:
    """The index of ``key`` at each index of ``term``; None where it has none, or several.

    Every axis of the key must be in the term once, in any order and beside others: repeated heads of keys and values belong to the same channels.
    """
    found = [labels(term, axis) for axis in key]
    if any(len(rows) != 1 or (rows < 0).any() for rows in found):
        return None
    return np.asarray(np.ravel_multi_index([rows[0] for rows in found], [axis.size for axis in key]), dtype=np.int64)


def _gain(node: fx.Node) -> fx.Node | None:
    return _norm_argument(node, "weight")


def _shift(node: fx.Node) -> fx.Node | None:
    return _norm_argument(node, "bias")


def _norm_argument(node: fx.Node, name: str) -> fx.Node | None:
    if node.op != "call_function" or node.target not in _NORMS:
        return None
    value = get_argument(node, name) if name in arguments(node.target) else None
    return value if isinstance(value, fx.Node) else None


def _groups(node: fx.Node) -> int:
    return int(get_argument(node, "groups"))


def _pads_other_than_zero(node: fx.Node) -> bool:
    rest = list(node.args[2:])
    mode = rest.pop(0) if node.target is aten.pad.default and rest else "constant"
    return mode == "constant" and any(rest)
