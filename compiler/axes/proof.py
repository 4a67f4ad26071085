"""The proof of a removal: the pruned graph computes what the unpruned one computes without those units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes.analysis import Axes
from edgesmith.compiler.axes.choices import SameChoices
from edgesmith.compiler.axes.masked import MaskedInterpreter
from edgesmith.compiler.axes.surgery import remove
from edgesmith.compiler.errors import NumericsError
from edgesmith.compiler.model import Model

TOLERANCE = 1e-5
"""Largest difference, relative to the largest output, in float32."""
DOUBLE_TOLERANCE = 1e-9
"""The same in float64."""


def prove(
    before: Model,
    after: Model,
    removals: Mapping[str, Iterable[int]],
    *,
    axes: Axes | None = None,
    inputs: tuple[torch.Tensor, ...] | None = None,
    tolerance: float | None = None,
) -> float:
    """Show that ``after`` equals ``before`` with the units of ``removals`` (group name -> unit numbers) dead.

    A dead unit is zero wherever it occurs; a statistic is taken over the units that are alive; between equals both choose
    the same. ``inputs`` are random ones unless given. Where a float32 comparison exceeds 1e-5 (a deep network may add up
    that much rounding), both are run in float64, and 1e-9 decides. A ``tolerance`` given is the only one, and is asked in
    float64.

    Returns:
        The largest difference relative to the largest output.

    Raises:
        NumericsError: they differ; the group that is wrong is named.
        UnsupportedError: an operator that the removal goes through cannot be run with dead units.
    """
    axes = axes or Axes.of(before)
    removals = {name: sorted(set(units)) for name, units in removals.items()}
    inputs = before.example_inputs() if inputs is None else inputs
    if tolerance is None and all(p.dtype == torch.float32 for p in before.graph.parameters()):
        difference = compare(before, after, removals, axes, inputs)
        if difference <= TOLERANCE:
            return difference
    difference = compare(before, after, removals, axes, inputs, double=True)
    if difference <= (DOUBLE_TOLERANCE if tolerance is None else tolerance):
        return difference
    raise NumericsError(
        "the pruned graph is not the unpruned one without the removed units",
        where=_culprit(before, removals, axes, inputs, tolerance or DOUBLE_TOLERANCE),
        why=f"outputs differ by {difference:.2g} of the largest",
    )


def compare(before: Model, after: Model, removals: Mapping[str, Iterable[int]], axes: Axes, inputs: tuple[torch.Tensor, ...], *, double: bool = False) -> float:
    """The largest difference of any output relative to the largest value of that output; infinite where a dead unit reaches an output."""
    reference, pruned = before.graph, after.graph
    dead = dead_elements(before, removals, axes)
    if double:
        reference, renamed = as_double(reference)
        pruned, _ = as_double(pruned)
        dead = {renamed[key]: mask for key, mask in dead.items()}
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    interpreter = MaskedInterpreter(reference, dead)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = _tuple(interpreter.run(*inputs))
        torch.manual_seed(0)
        same = SameChoices(pruned, interpreter.choices, DOUBLE_TOLERANCE if double else TOLERANCE)
        got = _tuple(same.run(*inputs))
    (output,) = before.graph.graph.find_nodes(op="output")
    (mine,) = reference.graph.find_nodes(op="output")
    assert len(expected) == len(got) == len(output.all_input_nodes)
    if any(mask is not None and not bool(mask.all()) for mask in (interpreter.alive.get(node) for node in mine.all_input_nodes)):
        return float("inf")
    return max((_difference(a, b) for a, b in zip(got, expected, strict=True)), default=0.0)


def dead_elements(model: Model, removals: Mapping[str, Iterable[int]], axes: Axes) -> dict[int, torch.Tensor]:
    """Tensor id -> mask of what is alive, for every tensor that a removed unit has a part of."""
    alive: dict[int, torch.Tensor] = {}
    for name, units in removals.items():
        gone = np.array(sorted(units), dtype=np.int64)
        for member in axes.group(name).members if len(gone) else ():
            value = graphs.tensor(model.graph, member.name)
            mask = alive.setdefault(id(value), torch.ones(value.shape, dtype=torch.bool))
            indices = np.flatnonzero(np.isin(member.labels, gone).any(axis=0))
            mask.index_fill_(member.dim, torch.from_numpy(indices), False)
    return alive


def as_double(graph: fx.GraphModule) -> tuple[fx.GraphModule, dict[int, int]]:
    """A copy of ``graph`` that computes in float64, and old tensor id -> new tensor id."""
    result = graphs.copied(graph)
    renamed: dict[int, int] = {}
    made: dict[int, torch.Tensor] = {}
    for name in dict.fromkeys(str(node.target) for node in graph.graph.find_nodes(op="get_attr")):
        old = graphs.tensor(graph, name)
        if id(old) not in made:
            value = old.detach().double() if old.is_floating_point() else old.detach()
            made[id(old)] = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
        graphs.add_tensor(result, name, made[id(old)])
        renamed[id(old)] = id(graphs.tensor(result, name))
    for node in result.graph.nodes:
        node.args = _widened(node.args)
        node.kwargs = _widened(node.kwargs)
    result.recompile()
    return result, renamed


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, (list, tuple)):
        return type(value)(_widened(v) for v in value)
    return {k: _widened(v) for k, v in value.items()} if isinstance(value, dict) else value


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(got, expected) else float("inf")
    same = (got == expected) | (got.isnan() & expected.isnan())
    gap = torch.where(same, torch.zeros((), dtype=got.dtype), (got - expected).abs())
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    worst = float(gap.nan_to_num(nan=float("inf")).max()) if gap.numel() else 0.0
    return worst / max(largest, torch.finfo(got.dtype).tiny)


def _culprit(before: Model, removals: Mapping[str, Iterable[int]], axes: Axes, inputs: tuple[torch.Tensor, ...], tolerance: float) -> str:
    """The first group whose removal alone is wrong; all of them where only the combination is."""
    for name, units in removals.items():
        alone = {name: units}
        after = remove(before, alone, axes=axes)
        if compare(before, after, alone, axes, inputs, double=True) > tolerance:
            return name
    return ", ".join(removals)


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
