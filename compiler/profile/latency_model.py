"""A model's latency as a function of the widths of its groups, fitted to measured files.

Every source module takes so much for each operator, each multiply-accumulate and each element that it reads or writes: coefficients that are not
negative, from the times of its operators in files of many widths. Kernels work in tiles, so that time rises in steps; how wide these are is what fits best
(nn-Meter, Zhang et al., MobiSys 2021, section 4, finds steps likewise, by kernel). A file that was measured while the machine was slow is slow in all its
operators alike, and is brought to the level of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes.axes import Axis
from edgesmith.compiler.axes.widths import Counts, Values, Volume, Widths
from edgesmith.compiler.profile.operator_types import OperatorProfile
from edgesmith.compiler.weighted import CONVOLUTIONS, LINEARS

Tiles = tuple[int, int]
"""Steps of the outputs and of the inputs of a kernel."""
UNTILED: Tiles = (1, 1)
STEPS = (1, 2, 4, 8, 16, 32, 64)
WORTH = 0.9
"""Wider steps are believed where they leave less than this share of the squared error."""
LEVELLINGS = 3
ONE = Volume.one()


@dataclass(frozen=True)
class Measured:
    """One file: the width of every free axis, and the time of its operators."""

    widths: Mapping[Axis, int]
    profile: OperatorProfile


@dataclass(frozen=True)
class Layer:
    """Source modules that a runtime executes together: how many operators, what they compute, by kind of kernel, and what they read and write."""

    sources: frozenset[str]
    operators: tuple[Volume, ...]
    work: tuple[tuple[str, Volume], ...]
    elements: tuple[Volume, ...]

    def features(self, widths: Widths, tiles: Mapping[str, Tiles]) -> Values:
        """(3, ...): operators, multiply-accumulates in whole tiles, elements."""
        there = sum((v.of(widths) for v in self.operators), start=np.zeros(()))
        work = sum((v.of(widths, tiles.get(kind, UNTILED)) for kind, v in self.work), start=np.zeros(()))
        elements = sum((v.of(widths) for v in self.elements), start=np.zeros(()))
        return np.stack(np.broadcast_arrays(there, work, elements))


@dataclass(frozen=True)
class Part:
    """A share of the latency: milliseconds for each unit of a volume in whole tiles."""

    ms: float
    volume: Volume
    tiles: Tiles = UNTILED


@dataclass(frozen=True)
class LatencyModel:
    """``coefficients``: milliseconds of each of ``layers`` for its three features. ``tiles``: by kind of kernel. ``rest_ms``: what has no source."""

    layers: tuple[Layer, ...]
    coefficients: tuple[tuple[float, ...], ...]
    tiles: Mapping[str, Tiles]
    rest_ms: float

    def ms(self, widths: Mapping[Axis, int]) -> float:
        """Of one call."""
        at = {axis: np.array(width, dtype=np.float64) for axis, width in widths.items()}
        spent = (float(np.dot(c, layer.features(at, self.tiles))) for layer, c in zip(self.layers, self.coefficients, strict=True))
        return self.rest_ms + sum(spent)

    def parts(self) -> Iterator[Part]:
        """What depends on widths, and constants, as volumes with a price."""
        yield Part(self.rest_ms, ONE)
        for layer, (constant, per_work, per_element) in zip(self.layers, self.coefficients, strict=True):
            yield from (Part(constant, volume) for volume in layer.operators)
            yield from (Part(per_work, volume, self.tiles.get(kind, UNTILED)) for kind, volume in layer.work)
            yield from (Part(per_element, volume) for volume in layer.elements)


def fit(counts: Counts, measured: Sequence[Measured]) -> LatencyModel:
    """The latency of the model of ``counts`` where its free axes and gates change: from files of it that were ``measured``, one of them as it is, the first."""
    layers = _layers(counts, [one.profile for one in measured])
    times, rest = _times(layers, measured)
    widths = {axis: np.array([one.widths[axis] for one in measured], dtype=np.float64) for axis in measured[0].widths}
    level = np.ones(len(measured))
    tiles: dict[str, Tiles] = {}
    coefficients = np.zeros((len(layers), 3))
    for _ in range(LEVELLINGS):
        levelled = times / level[:, None]
        tiles = _tiles(layers, levelled, widths)
        coefficients, _ = _fitted(layers, levelled, widths, tiles)
        predicted = np.stack([_predicted(layer, c, widths, tiles, len(measured)) for layer, c in zip(layers, coefficients, strict=True)], axis=1)
        level = times.sum(1) / np.maximum(predicted.sum(1), np.finfo(float).tiny)
        level = level / level[0]
    return LatencyModel(layers, tuple(tuple(c) for c in coefficients.tolist()), MappingProxyType(tiles), float(np.median(rest / level)))


def _predicted(layer: Layer, coefficients: Values, widths: Widths, tiles: Mapping[str, Tiles], count: int) -> Values:
    return np.asarray(np.broadcast_to(np.tensordot(coefficients, layer.features(widths, tiles), 1), (count,)))


def _layers(counts: Counts, profiles: Sequence[OperatorProfile]) -> tuple[Layer, ...]:
    """What one runtime operator computed in any of the files is one layer."""
    graph = counts.axes.model.graph
    known = {graphs.source(node) for node in graphs.operators(graph)}
    together = _connected({path for path in operator.sources if path in known} for profile in profiles for operator in profile.operators)
    nodes: dict[frozenset[str], list[fx.Node]] = {sources: [] for sources in together}
    of_path = {path: sources for sources in together for path in sources}
    for node in graphs.operators(graph):
        if (sources := of_path.get(graphs.source(node))) is not None:
            nodes[sources].append(node)
    return tuple(
        Layer(
            sources,
            tuple(volume for node in members for volume in counts.once(node)),
            tuple((kind(node), volume) for node in members for volume in counts.work(node)),
            tuple(volume for node in members for volume in counts.elements(node)),
        )
        for sources, members in nodes.items()
    )


def _connected(sets: Iterable[set[str]]) -> list[frozenset[str]]:
    owner: dict[str, set[str]] = {}
    for one in sets:
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
            number = next((place[path] for path in operator.sources if path in place), None)
            if number is None:
                rest[row] += operator.ms
            else:
                times[row, number] += operator.ms
        rest[row] += max(0.0, one.profile.whole_ms - one.profile.total_ms)
    return times, rest


def _tiles(layers: Sequence[Layer], times: Values, widths: Widths) -> dict[str, Tiles]:
    """The steps of each kind of kernel that explain ``times`` best; wider ones only where they are clearly better."""
    tiles: dict[str, Tiles] = {}
    for name in sorted({name for layer in layers for name, _ in layer.work}):
        mine = [number for number, layer in enumerate(layers) if any(k == name for k, _ in layer.work)]
        some, seen = [layers[number] for number in mine], times[:, mine]
        best, least = UNTILED, _fitted(some, seen, widths, tiles)[1]
        for steps in sorted(product(STEPS, STEPS), key=sum):
            error = _fitted(some, seen, widths, {**tiles, name: steps})[1]
            if error < WORTH * least:
                best, least = steps, error
        tiles[name] = best
    return tiles


def _fitted(layers: Sequence[Layer], times: Values, widths: Widths, tiles: Mapping[str, Tiles]) -> tuple[Values, float]:
    """Coefficients (layers, 3), and the squared error that they leave."""
    from scipy.optimize import nnls

    found, error = np.zeros((len(layers), 3)), 0.0
    for number, layer in enumerate(layers):
        features: npt.NDArray[np.float64] = np.stack([np.broadcast_to(f, (len(times),)) for f in layer.features(widths, tiles)], axis=1)
        scale = np.maximum(features.max(axis=0), np.finfo(float).tiny)
        solution, residual = nnls(features / scale, times[:, number])
        found[number], error = solution / scale, error + residual**2
    return found, error
