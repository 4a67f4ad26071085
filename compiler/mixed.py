"""Mixed precision: a scheme for each operator on one target, from what it takes there and what it costs in accuracy, both measured.

The files that were timed say what an operator takes by each scheme; quantizing it alone says what it adds to the error of the outputs. Errors of
roundings are nearly independent, so that their powers add, and the choice is a multiple-choice knapsack: least time at a given error and size (an
integer linear program, as in Yao et al., HAWQ-V3, ICML 2021). What an operator takes beside others of another scheme is a guess until the file is
timed: the arbiter does that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.forms import form
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.operator_types import OperatorProfile
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.spread import spread
from edgesmith.compiler.weighted import weighted

STEP = 2.0
"""Each limit on the error is the one before divided by this."""
MOST_LIMITS = 12
FLOAT_BYTES, INT8_BYTES = 4, 1

Noise = Callable[[str, Scheme], float]
"""Operator, scheme -> power of the outputs' error over that of the outputs, with this operator alone quantized."""


@dataclass(frozen=True)
class Timed:
    """A form whose file was measured: the schemes of its operators, its time a call and the operators' parts of it, and its size."""

    ops: Mapping[str, Scheme]
    ms: float
    profile: OperatorProfile
    size_bytes: int


@dataclass(frozen=True)
class Option:
    """One way to run the operators of a unit."""

    schemes: tuple[Scheme, ...]
    ms: float
    noise: float
    size_bytes: int


@dataclass(frozen=True)
class Unit:
    """Operators that run alike, because they share a weight or a source path."""

    nodes: tuple[str, ...]
    options: tuple[Option, ...]


def units(model: Model, timed: Sequence[Timed], noise: Noise) -> tuple[Unit, ...]:
    """What may be chosen for ``model``: for each unit the schemes that it has in one of the forms, each at the least time it took."""
    groups = _groups(model.graph, {name for known in timed for name in known.ops})
    owner = _owners(model.graph, groups)
    ms = [_spent(known, owner, len(groups)) for known in timed]
    found = []
    for place, nodes in enumerate(groups):
        elements = sum({id(w): w.numel() for w in (_weight(model.graph, node) for node in nodes)}.values())
        options: dict[tuple[Scheme, ...], Option] = {}
        for known, spent in zip(timed, ms, strict=True):
            schemes = tuple(known.ops.get(node.name, Scheme.FLOAT) for node in nodes)
            lost = sum(noise(node.name, scheme) for node, scheme in zip(nodes, schemes, strict=True) if scheme is not Scheme.FLOAT)
            size = elements * (FLOAT_BYTES if Scheme.FLOAT in schemes else INT8_BYTES)
            other = options.get(schemes)
            options[schemes] = Option(schemes, min(spent[place], math.inf if other is None else other.ms), lost, size)
        found.append(Unit(tuple(node.name for node in nodes), tuple(options.values())))
    return tuple(found)


def solve(units: Sequence[Unit], noise: float, size_bytes: float) -> tuple[Option, ...] | None:
    """An option for each of ``units``, together the fastest that add at most ``noise`` and take at most ``size_bytes``; None where there is none."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = [(place, option) for place, unit in enumerate(units) for option in unit.options]
    once = np.zeros((len(units), len(options)))
    for column, (place, _) in enumerate(options):
        once[place, column] = 1
    constraints, allowed = [LinearConstraint(once, 1, 1)], np.ones(len(options))
    for values, most in (([o.noise for _, o in options], noise), ([float(o.size_bytes) for _, o in options], size_bytes)):
        if not math.isfinite(most):
            continue
        if most < 0:
            return None
        allowed[np.array(values) > most] = 0
        if most > 0:
            constraints.append(LinearConstraint(np.minimum(np.array(values) / most, 1.0)[None], -np.inf, 1.0))
    cost = np.array([o.ms for _, o in options])
    found = milp(cost / (cost.max() or 1.0), constraints=constraints, integrality=np.ones(len(options)), bounds=Bounds(0, allowed))
    if found.x is None:
        return None
    return tuple(option for (_, option), taken in zip(options, found.x, strict=True) if taken > 0.5)


@dataclass(frozen=True)
class Wish:
    """What a mixture must be worth lowering: predicted to take less than ``ms`` and no more than ``size_bytes``, and kept by ``keeps`` in simulation."""

    keeps: Callable[[Model], bool]
    ms: float = math.inf
    size_bytes: float = math.inf


def mixtures(model: Model, twin: Model, timed: Sequence[Timed], noise: Noise, wish: Wish) -> Iterator[Model]:
    """Forms of ``model`` that mix the schemes of those that were ``timed``, the first of them the float file; the fastest by prediction first."""
    found = units(model, timed, noise)
    float_bytes = sum(max(o.size_bytes for o in unit.options) for unit in found)
    room = wish.size_bytes - (timed[0].size_bytes - float_bytes)
    limit, seen = math.inf, {_key(found, known.ops) for known in timed}
    for _ in range(MOST_LIMITS):
        options = solve(found, limit, room)
        if options is None or sum(o.ms for o in options) >= wish.ms:
            return
        wanted = {node: scheme for unit, option in zip(found, options, strict=True) for node, scheme in zip(unit.nodes, option.schemes, strict=True)}
        ops = _spread(model, wanted, timed)
        if _key(found, ops) not in seen:
            seen.add(_key(found, ops))
            mixed = form(model, twin, ops)
            if wish.keeps(mixed):
                yield mixed
        limit = sum(o.noise for o in options) / STEP
        if limit == 0:
            return


def _spread(model: Model, wanted: Mapping[str, Scheme], timed: Sequence[Timed]) -> dict[str, Scheme]:
    """``wanted`` for the operators with weights, and what follows them; only what was static in a form that was timed may."""
    static = {name for known in timed for name, scheme in known.ops.items() if scheme is Scheme.STATIC}
    chosen = spread(
        model.graph,
        lambda node, fed: None if weighted(node) is None else wanted.get(node.name, Scheme.FLOAT),
        lambda node: node.name in static,
    )
    return {node.name: scheme for node, scheme in chosen.items()}


def _key(units: Sequence[Unit], ops: Mapping[str, Scheme]) -> tuple[Scheme, ...]:
    return tuple(ops.get(name, Scheme.FLOAT) for unit in units for name in unit.nodes)


def _weight(graph: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    kind = weighted(node)
    weight = kind.argument(node, kind.weight) if kind else None
    assert weight is not None
    return graphs.tensor(graph, str(weight.target))


def _groups(graph: fx.GraphModule, names: set[str]) -> list[tuple[fx.Node, ...]]:
    """The operators ``names`` that have weights, in graph order, those of one source path or one weight together."""
    found: list[tuple[set[object], list[fx.Node]]] = []
    for node in graphs.operators(graph):
        if node.name not in names or weighted(node) is None:
            continue
        keys: set[object] = {graphs.source(node), id(_weight(graph, node))}
        touched = [group for group in found if group[0] & keys]
        found = [group for group in found if group not in touched]
        found.append((keys.union(*(k for k, _ in touched)), [*(n for _, members in touched for n in members), node]))
    return [tuple(members) for _, members in found]


def _owners(graph: fx.GraphModule, groups: Sequence[Sequence[fx.Node]]) -> dict[str, int]:
    """Source path -> the group whose time it counts in: its own, or that of the latest operator it reads from."""
    own = {node: place for place, group in enumerate(groups) for node in group}
    owner: dict[fx.Node, int] = {}
    for node in graphs.operators(graph):
        owner[node] = own.get(node, max((owner[a] for a in node.all_input_nodes if a in owner), default=0))
    paths = {graphs.source(node): place for node, place in owner.items()}
    return paths | {graphs.source(node): place for node, place in own.items()}


def _spent(timed: Timed, owner: Mapping[str, int], count: int) -> list[float]:
    """Milliseconds of each of ``count`` groups; what no source path is known of is spread over all."""
    spent = np.zeros(count)
    for operator in timed.profile.operators:
        places = {owner[path] for path in operator.sources if path in owner}
        for place in places:
            spent[place] += operator.ms / len(places)
    total = spent.sum()
    return [float(ms) for ms in spent * timed.ms / total] if total else [timed.ms / count] * count
