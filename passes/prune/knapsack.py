"""The choice of one width for each group: least error within limits on what widths cost, where costs may depend on several groups together.

A multiple-choice knapsack by dynamic programming. Groups are eliminated one after the other (Dechter, "Bucket elimination", Artificial Intelligence 113,
1999), and what is carried along is, for each choice of the groups that a later cost still asks for, the front of (error, costs) that no other choice
of the groups gone dominates (Nemhauser and Ullmann, Management Science 15, 1969). Exact, but where a front or a table would become too large: then a front
is thinned, and some groups at a time are held while the others are chosen anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Points = npt.NDArray[np.float64]
"""(points, 1 + resources): error, then what each resource costs."""
Places = npt.NDArray[np.int64]

MOST_POINTS = 2_000_000
"""In all fronts of one elimination together."""
MOST_IN_FRONT, LEAST_IN_FRONT = 4096, 128
MOST_CHOICES = 30_000
"""Joint choices of the groups of one elimination."""
ROUNDS_WITHOUT_GAIN = 8
TINY = 1e-12
"""Of a limit: sums of numbers that meet it exactly may miss it by rounding."""


@dataclass(frozen=True)
class Table:
    """Error and costs that depend on the choices of ``groups``: (1 + resources, choices of the first, of the second ...)."""

    groups: tuple[str, ...]
    values: Values

    def at(self, chosen: Mapping[str, int]) -> Values:
        """(1 + resources) of a choice for each of ``groups``."""
        index: Any = (slice(None), *(chosen[name] for name in self.groups))
        return np.asarray(self.values[index])


def solve(sizes: Mapping[str, int], tables: Sequence[Table], limits: Sequence[float], seed: int = 0) -> dict[str, int] | None:
    """The choice for each group, together of the least error whose costs are within ``limits``; None where no choice is.

    Args:
        sizes: group -> how many choices it has.
        tables: whose values are added up.
        limits: of each resource.
        seed: of the order in which groups are held, where they have to be.
    """
    tables = _merged(sizes, tables, len(limits))
    order = _order(sizes, tables)
    if order is not None:
        return _eliminated(sizes, tables, limits, order)
    chosen = _start(sizes, tables, limits)
    if chosen is None:
        return None
    rng, idle = np.random.default_rng(seed), 0
    error = _total(tables, chosen)[0]
    while idle < ROUNDS_WITHOUT_GAIN:
        free = _tractable(sizes, tables, [list(sizes)[i] for i in rng.permutation(len(sizes))])
        held = {name: choice for name, choice in chosen.items() if name not in free}
        part = _merged({name: sizes[name] for name in free}, [_given(table, held) for table in tables], len(limits))
        order = _order({name: sizes[name] for name in free}, part)
        assert order is not None
        found = _eliminated({name: sizes[name] for name in free}, part, limits, order)
        better = None if found is None else held | found
        if better is not None and (now := _total(tables, better)[0]) < error * (1 - 1e-9):
            chosen, error, idle = better, now, 0
        else:
            idle += 1
    return chosen


def _merged(sizes: Mapping[str, int], tables: Iterable[Table], resources: int) -> list[Table]:
    """One table for each set of groups, and one for each group."""
    found: dict[tuple[str, ...], Values] = {(name,): np.zeros((1 + resources, size)) for name, size in sizes.items()}
    rank = {name: place for place, name in enumerate(sizes)}
    for table in tables:
        groups = tuple(sorted(table.groups, key=rank.__getitem__))
        values = table.values.transpose(0, *(1 + table.groups.index(name) for name in groups))
        found[groups] = found[groups] + values if groups in found else values
    return [Table(groups, values) for groups, values in found.items()]


def _total(tables: Sequence[Table], chosen: Mapping[str, int]) -> Values:
    return np.asarray(np.sum([table.at(chosen) for table in tables], axis=0))


def _given(table: Table, held: Mapping[str, int]) -> Table:
    index: Any = (slice(None), *(held.get(name, slice(None)) for name in table.groups))
    return Table(tuple(name for name in table.groups if name not in held), table.values[index])


def _order(sizes: Mapping[str, int], tables: Sequence[Table]) -> list[str] | None:
    """The order of elimination that keeps joint choices few at every step; None where it does not keep them few enough."""
    beside: dict[str, set[str]] = {name: set() for name in sizes}
    for table in tables:
        for name in table.groups:
            beside[name] |= set(table.groups) - {name}
    order = []
    while beside:
        name = min(beside, key=lambda n: prod((sizes[other] for other in beside[n]), start=sizes[n]))
        if prod((sizes[other] for other in beside[name]), start=sizes[name]) > MOST_CHOICES:
            return None
        others = beside.pop(name)
        for other in others:
            beside[other] |= others - {other}
            beside[other].discard(name)
        order.append(name)
    return order


def _tractable(sizes: Mapping[str, int], tables: Sequence[Table], names: Sequence[str]) -> Collection[str]:
    """As many of ``names``, the first of them first, as can be eliminated while the others are held."""
    free: dict[str, int] = {}
    for name in names:
        wider = {**free, name: sizes[name]}
        inside = [Table(tuple(n for n in table.groups if n in wider), table.values) for table in tables]
        if _order(wider, inside) is not None:
            free = wider
    return free


def _start(sizes: Mapping[str, int], tables: Sequence[Table], limits: Sequence[float]) -> dict[str, int] | None:
    """The largest share of its choices that all groups can have within the limits; choices are ordered by width, the widest first."""
    for share in np.linspace(0, 1, 65):
        chosen = {name: round(share * (size - 1)) for name, size in sizes.items()}
        if (_total(tables, chosen)[1:] <= _rounded_up(limits)).all():
            return chosen
    return None


def _rounded_up(limits: Sequence[float]) -> Values:
    return np.asarray(limits) * (1 + TINY)


@dataclass(frozen=True)
class _Front:
    """Points that do not dominate each other, and where each comes from: the choice of the group eliminated, and the place in the front of each message."""

    points: Points
    origin: Places


@dataclass(frozen=True)
class _Message:
    """What is left of a group and those eliminated through it: a front for each choice of ``groups``."""

    eliminated: str
    groups: tuple[str, ...]
    parts: tuple[_Message, ...]
    fronts: Mapping[tuple[int, ...], _Front]

    def choices(self, at: Mapping[str, int], place: int) -> dict[str, int]:
        """The choices behind a point of a front."""
        choice, *places = self.fronts[tuple(at[name] for name in self.groups)].origin[place].tolist()
        chosen = {self.eliminated: choice}
        for part, inner in zip(self.parts, places, strict=True):
            chosen |= part.choices({**at, **chosen}, inner)
        return chosen


def _eliminated(sizes: Mapping[str, int], tables: Sequence[Table], limits: Sequence[float], order: Sequence[str]) -> dict[str, int] | None:
    left: list[Table | _Message] = list(tables)
    most = _rounded_up(limits)
    constant = sum((table.values for table in tables if not table.groups), start=np.zeros(1 + len(limits)))
    for name in order:
        mine = [one for one in left if name in one.groups]
        left = [one for one in left if name not in one.groups]
        message = _eliminate(name, mine, sizes, most)
        left.append(message)
    ends = [one for one in left if isinstance(one, _Message)]
    front, places = constant[None], np.zeros((1, 0), dtype=np.int64)
    for end in ends:
        front, places = _sum(front, places, end.fronts[()].points, most)
        kept = _efficient(front, most, MOST_IN_FRONT)
        front, places = front[kept], places[kept]
    if not len(front):
        return None
    best = int(np.lexsort(front.T[::-1])[0])
    chosen: dict[str, int] = {}
    for end, place in zip(ends, places[best].tolist(), strict=True):
        chosen |= end.choices({}, place)
    return chosen


def _eliminate(name: str, mine: Sequence[Table | _Message], sizes: Mapping[str, int], most: Values) -> _Message:
    groups = tuple(sorted({other for one in mine for other in one.groups} - {name}))
    parts = tuple(one for one in mine if isinstance(one, _Message))
    tables = [one for one in mine if isinstance(one, Table)]
    joint = prod((sizes[other] for other in groups), start=1)
    room = int(np.clip(MOST_POINTS // joint, LEAST_IN_FRONT, MOST_IN_FRONT))
    fronts = {}
    for at in product(*(range(sizes[other]) for other in groups)):
        where = dict(zip(groups, at, strict=True))
        points, origins = [], []
        for choice in range(sizes[name]):
            here = {**where, name: choice}
            front = _total(tables, here)[None]
            places = np.zeros((1, 0), dtype=np.int64)
            for part in parts:
                front, places = _sum(front, places, part.fronts[tuple(here[n] for n in part.groups)].points, most)
                if len(parts) > 1:
                    kept = _efficient(front, most, room)
                    front, places = front[kept], places[kept]
            points.append(front)
            origins.append(np.column_stack([np.full(len(front), choice), places]))
        together, origin = np.concatenate(points), np.concatenate(origins)
        kept = _efficient(together, most, room)
        fronts[at] = _Front(together[kept], origin[kept])
    return _Message(name, groups, parts, fronts)


def _sum(front: Points, places: Places, other: Points, most: Values) -> tuple[Points, Places]:
    """Every point of one front plus every one of the other that is within ``most``, and both places."""
    points = (front[:, None] + other[None]).reshape(-1, front.shape[1])
    came = np.column_stack([np.repeat(places, len(other), axis=0), np.tile(np.arange(len(other)), len(front))])
    within = (points[:, 1:] <= most).all(axis=1)
    return points[within], came[within]


def _efficient(points: Points, most: Values, room: int) -> Places:
    """Places of the points within ``most`` that no other dominates; where they are more than ``room``, about as many of them."""
    within = np.flatnonzero((points[:, 1:] <= most).all(axis=1))
    order = within[np.lexsort([points[within, 0], *points[within, :0:-1].T])]
    if points.shape[1] == 2:
        return _thinned(_least(order, points), points, most, room)
    return _thinned(_undominated(_thinned(order, points, most, 4 * room), points), points, most, room)


def _thinned(order: Places, points: Points, most: Values, room: int) -> Places:
    """The first of ``order``, the cheapest, and the best of each cell of a grid of costs."""
    if len(order) <= room:
        return order
    cells = max(1, int(room ** (1 / (points.shape[1] - 1))))
    costs = points[order, 1:]
    scale = np.where(np.isfinite(most) & (most > 0), most, np.maximum(costs.max(axis=0), TINY))
    place = np.clip((costs / scale * cells).astype(np.int64), 0, cells - 1)
    cell = np.ravel_multi_index(tuple(place.T), (cells,) * place.shape[1])
    best = np.lexsort([points[order, 0], cell])
    _, first = np.unique(cell[best], return_index=True)
    kept: Places = order[np.union1d(best[first], [0])]
    return kept


def _least(order: Places, points: Points) -> Places:
    """Of points by rising cost, those whose error is less than that of all before."""
    errors = points[order, 0]
    before = np.minimum.accumulate(np.concatenate([[np.inf], errors[:-1]]))
    kept: Places = order[errors < before]
    return kept


def _undominated(order: Places, points: Points) -> Places:
    kept: list[int] = []
    front = np.empty((0, points.shape[1]))
    for place in order.tolist():
        if not (front <= points[place]).all(axis=1).any():
            kept.append(place)
            front = np.vstack([front, points[place]])
    return np.array(kept, dtype=np.int64)
