"""How many units each group keeps, so that a model meets limits at the least loss: what widths cost is counted, or measured on a target.

The latency of the model as a function of its widths is fitted to files of random widths, the choice is a knapsack, and what it chose is measured; where that is
not what was wanted, the measurement joins the fit and corrects its scale, and the choice is made again (as NetAdapt, Yang et al., ECCV 2018, and ZipLM,
Kurtić et al., NeurIPS 2023, section 3.2, close the loop).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import fx

from edgesmith.compiler.axes import Axes
from edgesmith.compiler.axes.axes import Axis
from edgesmith.compiler.axes.widths import Counts
from edgesmith.compiler.bench import Bench
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.latency_model import LatencyModel, Measured, Part, fit
from edgesmith.passes.prune.knapsack import Table, solve
from edgesmith.passes.prune.losses import Curve

MOST_WIDTHS = 24
"""Choices of one group; more where there are few groups."""
WIDTHS_IN_ALL = 192
FILES = 10
"""Of random widths that are measured, beside the model as it is."""
NARROWEST = 0.2
"""Share of a group's units that a file of random widths keeps at least."""
WHOLE_STEPS = (8, 16, 32)
"""About half of the widths of files are multiples of one of these, in which kernels often work: by chance few would be."""
ROUNDS = 3
CLOSE = 0.03
"""A latency is met where it was measured to be this near to what is wanted, as a share of it. What is above is taken only if no round came below."""
LOWER = 1 - CLOSE / 3
"""Of what is wanted: what a round aims at where the one before came out above."""

Widths = dict[str, int]
"""Group name -> units that it keeps."""


@dataclass(frozen=True)
class Goal:
    """What is to be met, all that is not None: shares of the present latency, multiply-accumulates and parameters; or milliseconds of the latency."""

    latency: float | None = None
    latency_ms: float | None = None
    macs: float | None = None
    params: float | None = None

    @property
    def timed(self) -> bool:
        """Whether it takes measurements to meet it."""
        return self.latency is not None or self.latency_ms is not None

    def __post_init__(self) -> None:
        for option, share in (("latency", self.latency), ("macs", self.macs), ("params", self.params)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{option} is the share of the present that is left: above 0 and at most 1, not {share}")
        if self.latency_ms is not None and not self.latency_ms > 0:
            raise ValueError(f"latency_ms is above 0, not {self.latency_ms}")
        if self.latency is not None and self.latency_ms is not None:
            raise ValueError("latency and latency_ms say the same in two ways: give one")


@dataclass(frozen=True)
class Allocation:
    """The widths that were chosen, and what there is to say about it."""

    widths: Widths
    remarks: tuple[Diagnostic, ...] = ()


@dataclass(frozen=True)
class Variable:
    """A group, or a gate (of size 1, which may go): its axis, its width as it is, what it loses when it gets narrower, and its kind."""

    axis: Axis
    size: int
    curve: Curve
    kind: str = ""


@dataclass(frozen=True)
class Problem:
    """Groups that may be made narrower, in steps of ``round_to`` units, and operators behind ``gates``.

    ``narrowed`` is the model of given widths, ``loss`` what all of them together lose: less or more than the sum of what each loses alone.
    """

    axes: Axes
    variables: Mapping[str, Variable]
    narrowed: Callable[[Widths], Model]
    loss: Callable[[Widths], float]
    gates: Mapping[fx.Node, tuple[Axis, ...]] = field(default_factory=dict)
    round_to: int = 1
    seed: int = 0
    progress: Callable[[int, int, str], None] = field(default=lambda done, total, text: None)

    @cached_property
    def counts(self) -> Counts:
        """What the widths cost, counted."""
        return Counts(self.axes, frozenset(variable.axis for variable in self.variables.values()), self.gates)

    @property
    def present(self) -> Widths:
        """The widths as they are."""
        return {name: variable.size for name, variable in self.variables.items()}

    def by_axis(self, widths: Mapping[str, int]) -> dict[Axis, int]:
        """``widths`` by axis."""
        return {self.variables[name].axis: width for name, width in widths.items()}

    def choices(self, steps: Mapping[str, int]) -> dict[str, npt.NDArray[np.int64]]:
        """The widths of each group, falling from its size: whole ``steps``, and between them, where four steps are not in it, evenly spread ones."""
        most = max(MOST_WIDTHS, WIDTHS_IN_ALL // len(self.variables))
        found = {}
        for name, variable in self.variables.items():
            size, lowest, step = variable.size, variable.size - variable.curve.most, steps.get(name, 1)
            whole = [w for w in range(0, size, int(np.lcm(step, self.round_to))) if w >= max(lowest, 1)]
            others = [w for w in range(0, size, self.round_to) if w >= lowest and w not in whole] if 4 * step > size else []
            lowest = -(-lowest // self.round_to) * self.round_to
            room = max(0, most - 1 - len(whole))
            wanted = {size, min(lowest, size), *_spread(whole, most - 1), *_spread(others, room)}
            found[name] = np.array(sorted(wanted, reverse=True), dtype=np.int64)
        return found


def allocate(problem: Problem, goal: Goal, bench: Bench | None) -> Allocation:
    """The widths that meet ``goal`` at the least loss. ``bench`` is needed where it is about time.

    Raises:
        UnsupportedError: no widths meet it; the nearest that can be met is told.
    """
    counts = problem.counts
    limits = [
        _Limit(option, [Part(1.0, volume) for volume in volumes], share)
        for option, volumes, share in (("macs", counts.macs(), goal.macs), ("params", counts.parameters(), goal.params))
        if share is not None
    ]
    if not goal.timed:
        return Allocation(_chosen(problem, limits)[0])
    assert bench is not None
    return _Loop(problem, goal, bench, limits).run()


@dataclass(frozen=True)
class _Limit:
    """At most ``share`` of what the model costs as it is. ``parts`` tell what widths cost; their share of the present is too small by the factor ``scale``.

    The pass's ``option`` asks for it in parts of ``unit``: 1 where it is a share, and milliseconds of the model as it is.
    """

    option: str
    parts: Sequence[Part]
    share: float
    scale: float = 1.0
    unit: float = 1.0

    def cost(self, widths: Mapping[Axis, int]) -> float:
        """Of the model with ``widths``."""
        at = {axis: np.array(width, dtype=np.float64) for axis, width in widths.items()}
        return sum((part.ms * float(part.volume.of(at, part.steps)) for part in self.parts), start=0.0)


def _chosen(problem: Problem, limits: Sequence[_Limit]) -> tuple[Widths, frozenset[str]]:
    """The widths of least loss within ``limits``, and the kinds of groups that are better left alone.

    Losses add up well for units of one kind, and worse where blocks or the width of a stream go with them: what is chosen without one of the kinds is
    compared by the loss that is measured of all of it together, and the worst kind is left out as long as that is better.
    """
    whole: frozenset[str] = frozenset()
    best, nearest = _solved(problem, limits, whole)
    if best is None:
        raise nearest
    kinds = {variable.kind for variable in problem.variables.values()}
    if len(kinds) < 2:
        return best, whole
    measured = {_key(best): problem.loss(best)}
    while True:
        found = {whole | {kind}: _solved(problem, limits, whole | {kind})[0] for kind in kinds - whole if _uses(problem, best, kind)}
        candidates = {left: widths for left, widths in found.items() if widths is not None}
        for number, widths in enumerate(candidates.values()):
            problem.progress(number, len(candidates), "measure what goes together")
            if _key(widths) not in measured:
                measured[_key(widths)] = problem.loss(widths)
        left = min(candidates, key=lambda one: measured[_key(candidates[one])], default=whole)
        if left == whole or measured[_key(candidates[left])] >= measured[_key(best)]:
            return best, whole
        best, whole = candidates[left], left


def _key(widths: Widths) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(widths.items()))


def _uses(problem: Problem, widths: Widths, kind: str) -> bool:
    return any(variable.kind == kind and widths[name] < variable.size for name, variable in problem.variables.items())


def _taken(problem: Problem, widths: Widths) -> set[str]:
    """The kinds of groups that ``widths`` take something of, and the blocks that are gone."""
    narrowed = {name: variable for name, variable in problem.variables.items() if widths[name] < variable.size}
    return {variable.kind for variable in narrowed.values()} | {name for name, variable in narrowed.items() if variable.size == 1}


def _solved(problem: Problem, limits: Sequence[_Limit], whole: Set[str]) -> tuple[Widths | None, UnsupportedError]:
    """The widths of least loss in sum, where groups of the kinds ``whole`` stay as they are; None where none meet ``limits``, and the error that says so."""
    present = problem.by_axis(problem.present)
    steps = _steps(problem, limits)
    choices = {name: w[:1] if problem.variables[name].kind in whole else w for name, w in problem.choices(steps).items()}
    narrow = problem.by_axis({name: int(widths[-1]) for name, widths in choices.items()})
    shares = [limit.scale * limit.cost(narrow) / limit.cost(present) for limit in limits]
    nearest, share = max(zip(limits, shares, strict=True), key=lambda one: one[1] / one[0].share)
    error = UnsupportedError(
        f"no widths meet {nearest.option}={nearest.unit * nearest.share:.3g}",
        why=f"the narrowest that may be chosen still take {share:.3g} of what the model takes now",
        hint=f"ask for {nearest.option}={nearest.unit * share * (1 + CLOSE):.3g} or more, or let more go: kinds, include, exclude, least",
    )
    found = _tables(problem, choices, limits)
    most = [limit.share / limit.scale * limit.cost(present) for limit in limits]
    chosen = solve({name: len(widths) for name, widths in choices.items()}, found, most, problem.seed)
    return (None if chosen is None else {name: int(choices[name][place]) for name, place in chosen.items()}), error


def _steps(problem: Problem, limits: Sequence[_Limit]) -> dict[str, int]:
    """For each group the widest step of the kernels that make or read it."""
    steps: dict[Axis, int] = {}
    for limit in limits:
        for part in limit.parts:
            for monomial, step in ((part.volume.outputs, part.steps[0]), (part.volume.inputs, part.steps[1])):
                for axis in monomial.axes:
                    inner = monomial.constant if len(monomial.axes) == 1 else 1
                    steps[axis] = max(steps.get(axis, 1), step.width // np.gcd(step.width, inner))
    return {name: int(steps.get(variable.axis, 1)) for name, variable in problem.variables.items()}


def _spread(widths: Sequence[int], most: int) -> list[int]:
    """At most so many of ``widths``, evenly."""
    if len(widths) <= most:
        return list(widths)
    return [widths[place] for place in np.unique(np.linspace(0, len(widths) - 1, most).round().astype(int))] if most else []


def _tables(problem: Problem, choices: Mapping[str, npt.NDArray[np.int64]], limits: Sequence[_Limit]) -> list[Table]:
    """The loss of every choice, and what it costs of each limit."""
    rows = 1 + len(limits)
    found = []
    for name, widths in choices.items():
        values = np.zeros((rows, len(widths)))
        values[0] = problem.variables[name].curve.at(problem.variables[name].size - widths)
        found.append(Table((name,), values))
    names = {problem.variables[name].axis: name for name in choices}
    sums: dict[tuple[Axis, ...], npt.NDArray[np.float64]] = {}
    for row, limit in enumerate(limits, 1):
        for part in limit.parts:
            axes = tuple(axis for axis in names if axis in part.volume.axes)
            grid = np.meshgrid(*(choices[names[axis]].astype(np.float64) for axis in axes), indexing="ij")
            values = part.ms * part.volume.of(dict(zip(axes, grid, strict=True)), part.steps)
            sums.setdefault(axes, np.zeros((rows, *(len(choices[names[axis]]) for axis in axes))))[row] += values
    return found + [Table(tuple(names[axis] for axis in axes), values) for axes, values in sums.items()]


@dataclass(frozen=True)
class _Tried:
    """Widths that were measured: their share of the present latency, and the share that was wanted then."""

    widths: Widths
    share: float
    wanted: float

    @property
    def off(self) -> float:
        """How far from what was wanted, as a share of it; positive where it is too slow."""
        return self.share / self.wanted - 1

    @property
    def met(self) -> bool:
        """Whether there is nothing left to mend."""
        return -CLOSE <= self.off <= 0


@dataclass
class _Loop:
    """Choose, measure, correct."""

    problem: Problem
    goal: Goal
    bench: Bench
    limits: Sequence[_Limit]
    whole: frozenset[str] = frozenset()
    """The kinds of groups that the last choice was better without."""
    measured: list[Measured] = field(default_factory=list)
    tried: list[_Tried] = field(default_factory=list)
    present_ms: float = 1.0
    """Of the model as it is, where milliseconds are asked for."""

    def run(self) -> Allocation:
        """At most three rounds."""
        wanted = self.goal.latency
        if self.goal.latency_ms is not None:
            self.present_ms = self.bench.cost(self.problem.axes.model).latency_ms
            wanted = self.goal.latency_ms / self.present_ms
        assert wanted is not None
        if wanted >= 1:
            return Allocation(self.problem.present)
        for widths in self._files():
            self._measure(widths)
        while len(self.tried) < ROUNDS and not any(one.met for one in self.tried):
            above = bool(self.tried) and self.tried[-1].off > 0
            widths = self._choice(LOWER * wanted if above else wanted)
            if any(one.widths == widths for one in self.tried):
                break
            wanted = self._try(widths, wanted)
        best = min(self.tried, key=lambda one: (abs(one.off) > CLOSE, one.off > 0, abs(one.off)))
        return Allocation(best.widths, (self._said(best),))

    def _choice(self, wanted: float) -> Widths:
        """The widths of least loss that are predicted to take no more than the share ``wanted``."""
        model = fit(self.problem.counts, self.measured)
        last = self.tried[-1] if self.tried else None
        scale = 1.0 if last is None else last.share / self._share(model, last.widths)
        option = "latency" if self.goal.latency_ms is None else "latency_ms"
        limits = [_Limit(option, list(model.parts()), wanted, scale, self.present_ms), *self.limits]
        if last is not None:
            found = _solved(self.problem, limits, self.whole)[0]
            if found is not None and _taken(self.problem, found) <= _taken(self.problem, last.widths):
                return found
        found, self.whole = _chosen(self.problem, limits)
        return found

    def _try(self, widths: Widths, wanted: float) -> float:
        """Measure what was chosen; the share that is wanted, by what the model as it is took this time."""
        problem, number = self.problem, len(self.tried) + 1
        problem.progress(number - 1, ROUNDS, f"measure what was chosen, round {number}")
        found = self.bench.paired(problem.axes.model, problem.narrowed(widths))
        if self.goal.latency_ms is not None:
            self.present_ms = found.base_ms.value
            wanted = self.goal.latency_ms / self.present_ms
        self.tried.append(_Tried(widths, found.share.value, wanted))
        if not self.tried[-1].met and number < ROUNDS:
            self._measure(widths, found.share.value)
        return wanted

    def _share(self, model: LatencyModel, widths: Widths) -> float:
        return model.ms(self.problem.by_axis(widths)) / model.ms(self.problem.by_axis(self.problem.present))

    def _files(self) -> Iterator[Widths]:
        """The model as it is, and random widths that fill the space evenly."""
        from scipy.stats import qmc

        present = self.problem.present
        yield present
        rng = np.random.default_rng(self.problem.seed)
        lowest = {name: max(size - self.problem.variables[name].curve.most, 1, round(NARROWEST * size)) for name, size in present.items()}
        for sample in qmc.LatinHypercube(len(present), rng=rng).random(FILES):
            widths = {}
            for (name, size), share in zip(present.items(), sample, strict=True):
                width = round(lowest[name] + share * (size - lowest[name]))
                step = int(rng.choice([1, 1, 1, *[one for one in WHOLE_STEPS if one <= size // 2]]))
                widths[name] = min(size, max(-(-lowest[name] // step), round(width / step)) * step)
            yield widths

    def _measure(self, widths: Widths, share: float | None = None) -> None:
        self.problem.progress(len(self.measured), 1 + FILES, "time files of random widths")
        base, model = self.problem.axes.model, self.problem.narrowed(widths)
        if share is None:
            share = self.bench.paired(base, model).share.value if self.measured else 1.0
        self.measured.append(Measured(self.problem.by_axis(widths), self.bench.operators(model), share))

    def _said(self, best: _Tried) -> Diagnostic:
        rounds = f"{len(self.tried)} round{'s' if len(self.tried) > 1 else ''}"
        message = f"{best.share:.3f} of the latency before, {best.wanted:.3f} wanted, in {rounds} of choosing and measuring"
        if best.off <= CLOSE:
            beyond = "" if best.off >= -CLOSE else "; what comes nearest to it: widths that keep more are too slow"
            return Diagnostic(Severity.INFO, "prune.latency", "", message + beyond)
        return Diagnostic(Severity.WARNING, "prune.latency-missed", "", message, "the machine may be too restless, or ask for a little less")
