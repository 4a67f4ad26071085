"""A model's latency as a function of the widths of its groups, fitted to measured files.

Every source module takes so much for each operator, each multiply-accumulate and each element that it reads or writes: coefficients that are not
negative, from the times of its operators in files of many widths. Kernels work in steps, so that time rises in steps; how wide these are is what fits best
(nn-Meter, Zhang et al., MobiSys 2021, section 4, finds steps likewise, by kernel). Operators are
timed in one file after the other; how long a file takes beside the first one is measured in turns, and where that explains more, its operators are
brought to that level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes.axes import Axis
from edgesmith.compiler.axes.widths import Counts, Step, Steps, Values, Volume, Widths
from edgesmith.compiler.profile.operator_types import OperatorProfile
from edgesmith.compiler.weighted import CONVOLUTIONS, LINEARS

SMOOTH: Steps = (Step(), Step())
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
EXTRAS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
WORTH = 0.9
"""Wider steps, and what is particular about them, are believed where they leave less than this share of the squared error."""
EXACT = 1e-5
"""An error of this share of all squared times explains them."""
NARROW = (None, 0.0, 0.15, 0.3, 0.5)
PARTICULAR = tuple(Step(width, extra, narrow) for width, narrow, extra in product(WIDTHS[1:], NARROW, EXTRAS))
ROUNDS = 2
"""Of looking for what is particular about outputs and about inputs in turn."""
ONE = Volume.one()


@dataclass(frozen=True)
class Measured:
    """One file: the width of every free axis, the time of its operators, and of a whole call as a ``share`` of the first file's, measured in turns."""

    widths: Mapping[Axis, int]
    profile: OperatorProfile
    share: float


@dataclass(frozen=True)
class Layer:
    """Source modules that a runtime executes together: how many operators, what they compute, by kind of kernel, and what they read and write."""

    sources: frozenset[str]
    operators: tuple[Volume, ...]
    work: tuple[tuple[str, Volume], ...]
    elements: tuple[Volume, ...]

    def features(self, widths: Widths, steps: Mapping[str, Steps]) -> Values:
        """(3, ...): operators, multiply-accumulates in whole steps, elements."""
        there = sum((v.of(widths) for v in self.operators), start=np.zeros(()))
        work = sum((v.of(widths, steps.get(kind, SMOOTH)) for kind, v in self.work), start=np.zeros(()))
        elements = sum((v.of(widths) for v in self.elements), start=np.zeros(()))
        return np.stack(np.broadcast_arrays(there, work, elements))


@dataclass(frozen=True)
class Part:
    """A share of the latency: milliseconds for each unit of a volume in whole steps."""

    ms: float
    volume: Volume
    steps: Steps = SMOOTH


@dataclass(frozen=True)
class LatencyModel:
    """``coefficients``: milliseconds of each of ``layers`` for its three features. ``steps``: by kind of kernel. ``rest_ms``: what has no source."""

    layers: tuple[Layer, ...]
    coefficients: tuple[tuple[float, ...], ...]
    steps: Mapping[str, Steps]
    rest_ms: float

    def ms(self, widths: Mapping[Axis, int]) -> float:
        """Of one call."""
        at = {axis: np.array(width, dtype=np.float64) for axis, width in widths.items()}
        spent = (float(np.dot(c, layer.features(at, self.steps))) for layer, c in zip(self.layers, self.coefficients, strict=True))
        return self.rest_ms + sum(spent)

    def parts(self) -> Iterator[Part]:
        """What depends on widths, and constants, as volumes with a price."""
        yield Part(self.rest_ms, ONE)
        for layer, (constant, per_work, per_element) in zip(self.layers, self.coefficients, strict=True):
            yield from (Part(constant, volume) for volume in layer.operators)
            yield from (Part(per_work, volume, self.steps.get(kind, SMOOTH)) for kind, volume in layer.work)
            yield from (Part(per_element, volume) for volume in layer.elements)


def fit(counts: Counts, measured: Sequence[Measured]) -> LatencyModel:
    """The latency of the model of ``counts`` where its free axes and gates change: from files of it that were ``measured``, one of them as it is, the first."""
    layers = _layers(counts, [one.profile for one in measured])
    times, rest = _times(layers, measured)
    widths = {axis: np.array([one.widths[axis] for one in measured], dtype=np.float64) for axis in measured[0].widths}
    took = times.sum(1) + rest
    levels = (took / (took[0] * np.array([one.share for one in measured])), np.ones(len(measured)))
    steps, coefficients, _, level = min((_explained(layers, times, widths, level) for level in levels), key=lambda one: one[2])
    return LatencyModel(layers, tuple(tuple(c) for c in coefficients.tolist()), MappingProxyType(steps), float(np.median(rest / level)))


def _explained(layers: Sequence[Layer], times: Values, widths: Widths, level: Values) -> tuple[dict[str, Steps], Values, float, Values]:
    """Steps and coefficients for ``times`` brought to a ``level``, the share of the squares that they leave, and the level."""
    levelled = times / level[:, None]
    steps = _steps(layers, levelled, widths)
    coefficients, error = _fitted(layers, levelled, widths, steps)
    return steps, coefficients, error / max(float(np.square(levelled).sum()), np.finfo(float).tiny), level


def _layers(counts: Counts, profiles: Sequence[OperatorProfile]) -> tuple[Layer, ...]:
    """What one runtime operator computed in any of the files is one layer.

    Those that multiply come first. What is fused with one of them takes no time of its own: a path that stands beside one (a sum, an activation) joins no
    two of them, and is a layer of what it is found to take alone.
    """
    executed = [set(operator.sources) for profile in profiles for operator in profile.operators]
    nodes = _claimed(counts.axes.model.graph, set().union(*executed))
    multiply = {path for path, members in nodes.items() if any(counts.work(node) for node in members)}
    of_multiplying = _connected(paths & multiply for paths in executed)
    alone = _connected(paths & nodes.keys() for paths in executed if not paths & multiply)
    return tuple(
        Layer(
            sources,
            tuple(volume for node in members for volume in counts.once(node)),
            tuple((kind(node), volume) for node in members for volume in counts.work(node)),
            tuple(volume for node in members for volume in counts.elements(node)),
        )
        for sources in (*of_multiplying, *alone)
        for members in [[node for path in sorted(sources) for node in nodes[path]]]
    )


def _claimed(graph: fx.GraphModule, seen: Set[str]) -> dict[str, list[fx.Node]]:
    """Path among ``seen`` -> its nodes; those of a path that a runtime does not tell are with what reads them: a convolution with its batch norm."""
    found: dict[str, list[fx.Node]] = {}
    for node in graphs.operators(graph):
        teller: fx.Node | None = node
        while teller is not None and graphs.source(teller) not in seen:
            teller = next(iter(teller.users), None)
        if teller is not None:
            found.setdefault(graphs.source(teller), []).append(node)
    return found


def _connected(sets: Iterable[set[str]]) -> list[frozenset[str]]:
    owner: dict[str, set[str]] = {}
    for one in filter(None, sets):
        merged = set(one).union(*(owner[path] for path in one if path in owner))
        owner.update(dict.fromkeys(merged, merged))
    return list(dict.fromkeys(map(frozenset, owner.values())))


def kind(node: fx.Node) -> str:
    """The kind of kernel that computes ``node``: those of a kind share their steps."""
    if node.target in CONVOLUTIONS:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        return "depthwise" if weight.meta["val"].shape[1] == 1 else "convolution"
    return "linear" if node.target in LINEARS and _constant(node.args[1]) else "product"


def _constant(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr" and isinstance(value.meta.get("val"), torch.Tensor)


def _times(layers: Sequence[Layer], measured: Sequence[Measured]) -> tuple[Values, Values]:
    """Milliseconds of each layer (files, layers), and of what has no source (files,)."""
    place = {path: number for number, layer in enumerate(layers) for path in layer.sources}
    times, rest = np.zeros((len(measured), len(layers))), np.zeros(len(measured))
    for row, one in enumerate(measured):
        for operator in one.profile.operators:
            number = min((place[path] for path in operator.sources if path in place), default=None)
            if number is None:
                rest[row] += operator.ms
            else:
                times[row, number] += operator.ms
        rest[row] += max(0.0, one.profile.whole_ms - one.profile.total_ms)
    return times, rest


def _steps(layers: Sequence[Layer], times: Values, widths: Widths) -> dict[str, Steps]:
    """The steps of each kind of kernel that explain ``times`` best; wider ones, and particular ones, only where they are clearly better."""
    steps: dict[str, Steps] = {}
    for name in sorted({name for layer in layers for name, _ in layer.work}):
        mine = [number for number, layer in enumerate(layers) if any(k == name for k, _ in layer.work)]
        some, seen = [layers[number] for number in mine], times[:, mine]

        error = partial(_error, some, seen, widths, steps, name)
        exact = EXACT * float(np.square(seen).sum())
        found = _better(error, exact, ((Step(a), Step(b)) for a, b in sorted(product(WIDTHS, WIDTHS), key=sum)), (SMOOTH, error(SMOOTH)))
        for _ in range(ROUNDS):
            found = _better(error, exact, [(one, found[0][1]) for one in PARTICULAR], found)
            found = _better(error, exact, [(found[0][0], one) for one in PARTICULAR], found)
        steps[name] = found[0]
    return steps


def _error(layers: Sequence[Layer], times: Values, widths: Widths, others: Mapping[str, Steps], name: str, steps: Steps) -> float:
    return _fitted(layers, times, widths, {**others, name: steps})[1]


def _better(error: Callable[[Steps], float], exact: float, candidates: Iterable[Steps], found: tuple[Steps, float]) -> tuple[Steps, float]:
    """``found``, or the last of the candidates each of which is clearly better than the one before it."""
    for one in candidates:
        if found[1] <= exact:
            break
        left = error(one)
        if left < WORTH * found[1]:
            found = one, left
    return found


def _fitted(layers: Sequence[Layer], times: Values, widths: Widths, steps: Mapping[str, Steps]) -> tuple[Values, float]:
    """Coefficients (layers, 3), and the squared error that they leave."""
    from scipy.optimize import nnls

    found, error = np.zeros((len(layers), 3)), 0.0
    for number, layer in enumerate(layers):
        features: npt.NDArray[np.float64] = np.stack([np.broadcast_to(f, (len(times),)) for f in layer.features(widths, steps)], axis=1)
        scale = np.maximum(features.max(axis=0), np.finfo(float).tiny)
        solution, residual = nnls(features / scale, times[:, number])
        found[number], error = solution / scale, error + residual**2
    return found, error
