"""What can be pruned: groups of parameter slices that go together, and dimensions that must stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import nn

from edgesmith.compiler.axes.axes import Axis, Reason, Term, Trait, leaves, resolve, size
from edgesmith.compiler.axes.op import State

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter, buffer or constant that a group runs through.

    ``side`` is ``producer`` where the dimension holds what computes the units (a linear layer's rows, its bias),
    ``consumer`` where it holds what reads them (its columns), ``scale`` where it holds something for each unit
    (a norm's weight, a depthwise filter). A tensor with several names is listed under the first.
    """

    name: str
    dim: int
    side: str
    axis: Axis = field(repr=False, compare=False)
    term: Term = field(repr=False, compare=False)

    @cached_property
    def labels(self) -> Labels:
        """(occurrences, size of the dimension): the unit that each index belongs to, -1 where none."""
        return labels(self.term, self.axis)

    def indices(self, unit: int) -> npt.NDArray[np.intp]:
        """Indices along ``dim`` that go when ``unit`` goes."""
        return np.flatnonzero((self.labels == unit).any(axis=0))


@dataclass(frozen=True)
class PruneGroup:
    """Units that can be removed: unit ``u`` goes with the indices ``member.indices(u)`` of every member.

    ``kind`` is ``residual`` (a width that several producers add to), ``heads``, ``head_dim``, ``channels`` (made by a
    convolution), ``hidden`` (made by a linear layer) or ``other``. ``exact`` is False where a statistic (a norm over it, a mean, a softmax)
    runs over the axis: there removal differs from zeroing.
    """

    name: str
    kind: str
    size: int
    exact: bool
    members: tuple[Member, ...]
    axis: Axis = field(repr=False, compare=False)


@dataclass(frozen=True)
class Pinned:
    """A dimension (of ``size`` units) of a parameter that must stay: ``where`` names the tensor, ``by`` the operator that says so."""

    where: str
    dim: int
    size: int
    reason: str
    by: str


def labels(term: Term, axis: Axis) -> Labels:
    """(occurrences of ``axis`` in ``term``, size of ``term``): the unit of ``axis`` at each index, -1 where there is none."""
    rows: list[Labels] = []
    before = 1
    for factor in resolve(term):
        inner = _axis_labels(factor, axis)
        rows = [np.repeat(row, factor.size, axis=1) for row in rows] + [np.tile(row, (1, before)) for row in inner]
        before *= factor.size
    return np.concatenate(rows) if rows else np.full((0, before), -1, dtype=np.int64)


def _axis_labels(factor: Axis, axis: Axis) -> list[Labels]:
    if factor is axis:
        return [np.arange(axis.size, dtype=np.int64)[None]]
    found: list[Labels] = []
    start = 0
    for part in factor.parts or ():
        inner = labels(part, axis)
        for row in inner:
            padded = np.full((1, factor.size), -1, dtype=np.int64)
            padded[0, start : start + size(part)] = row
            found.append(padded)
        start += size(part)
    return found


def collect(state: State) -> tuple[tuple[PruneGroup, ...], tuple[Pinned, ...]]:
    """The groups and pinned dimensions of an analysed graph, in the order in which the graph reads its tensors."""
    members: dict[Axis, list[Member]] = {}
    pins: list[Pinned] = []
    is_parameter: set[str] = set()
    for name, shape in named_shapes(state):
        key = id(state.tensor(name))
        if isinstance(state.tensor(name), nn.Parameter):
            is_parameter.add(name)
        for dim, term in enumerate(shape):
            below = dict.fromkeys(leaves(term))
            reason = next((leaf.pin for leaf in below if leaf.pin), None)
            if reason is not None:
                pins.append(_pinned(name, dim, term, reason))
            elif not below and size(term) > 1:
                pins.append(_pinned(name, dim, term, Reason(name, "bound to others unit by unit")))
            for leaf in below:
                if leaf.pin is None:
                    members.setdefault(leaf, []).append(Member(name, dim, state.roles.get((key, dim), "scale"), leaf, resolve(term)))
    prunable = {axis: found for axis, found in members.items() if any(m.name in is_parameter for m in found)}
    names = _names(prunable)
    groups = tuple(PruneGroup(names[a], _kind(a, found), a.size, not a.traits & Trait.STATISTIC, tuple(found), a) for a, found in prunable.items())
    return groups, tuple(pins)


def named_shapes(state: State) -> Iterable[tuple[str, tuple[Term, ...]]]:
    """Each tensor that the graph reads, under its first name, with its terms."""
    seen: set[int] = set()
    for node in state.graph.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        key = id(state.tensor(name))
        if key not in seen and key in state.tensors:
            seen.add(key)
            yield name, state.tensors[key]


def _pinned(name: str, dim: int, term: Term, reason: Reason) -> Pinned:
    return Pinned(name, dim, size(term), reason.why, reason.where)


def _kind(axis: Axis, members: list[Member]) -> str:
    for trait, kind in ((Trait.ADDED, "residual"), (Trait.HEADS, "heads"), (Trait.HEAD_DIM, "head_dim"), (Trait.CONVOLVED, "channels")):
        if axis.traits & trait:
            return kind
    return "hidden" if any(m.side == "producer" for m in members) else "other"


def _names(prunable: dict[Axis, list[Member]]) -> dict[Axis, str]:
    """The path of the module that produces the units; the kind is added where it is not the plain output of a layer."""
    names: dict[Axis, str] = {}
    used: Counter[str] = Counter()
    for axis, found in prunable.items():
        first = next((m for m in found if m.side == "producer"), found[0])
        path, _, leaf = first.name.rpartition(".")
        base = path if path and leaf in {"weight", "bias"} else first.name
        kind = _kind(axis, found)
        name = base if kind in {"channels", "hidden"} else f"{base}:{kind}"
        used[name] += 1
        names[axis] = name if used[name] == 1 else f"{name}#{used[name]}"
    return names
