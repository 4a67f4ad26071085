"""Importance by what a unit's removal costs after the weights that stay have made up for it as well as they can.

The optimal brain surgeon for structures: with the inputs' covariance C and the weights W of what reads the units, removing the columns I costs
tr(W_I (C^-1_II)^-1 W_I') at least, and what is left is the same problem again (Hassibi and Stork, NIPS 1992, section 2; in blocks: Kurtić et al.,
ZipLM, NeurIPS 2023, section 3.1). A unit that others can stand in for is cheap however large its weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from edgesmith.compiler.axes import Axes, PruneGroup
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.passbase import PassContext
from edgesmith.passes.observe.batches import calibration_batches
from edgesmith.passes.observe.inputs import Moments, gathered
from edgesmith.passes.prune.readers import MOST_BYTES, Indices, Reader, covariance, readers

Scores = dict[str, torch.Tensor]
"""Group name -> score of each unit, float64 [size]."""

DAMPING = 1e-5
"""Of the mean variance of the inputs, added to each."""
AT_ONCE, CHOICE = 32, 4
"""Units are taken out of the whole matrices in parts of at most so many, and within a part one by one from so many times as many of the cheapest."""


@dataclass(frozen=True)
class Read:
    """What one reader makes of its inputs: ``weight`` (outputs, d), their ``covariance`` (d, d), and the unit of each input, -1 where none."""

    weight: torch.Tensor
    covariance: torch.Tensor
    units: Indices

    @property
    def energy(self) -> float:
        """Of the outputs, about their means where a bias can make up for these."""
        return max(float(((self.weight @ self.covariance) * self.weight).sum()), torch.finfo(torch.float64).tiny)


def obs(reads: Sequence[Read], size: int) -> torch.Tensor:
    """For each unit the error of its group's readers, relative to their outputs and added up, when it and all cheaper ones are gone: float64 [size]."""
    return eliminated([Problem.of(read, size) for read in reads], size)


def activation(reads: Sequence[Read], size: int) -> torch.Tensor:
    """For each unit how much of its readers' outputs it makes, alone and relative to them: float64 [size].

    With a bias behind it only what varies counts (An et al., Fluctuation-based Adaptive Structured Pruning, AAAI 2024, section 3.2).
    """
    scores = torch.zeros(size, dtype=torch.float64)
    for read in reads:
        for unit in range(size):
            own = np.flatnonzero(read.units == unit)
            part = read.weight[:, own]
            scores[unit] += float(((part @ read.covariance[own][:, own]) * part).sum()) / read.energy
    return scores


def by_readers(name: str, score: Callable[[Sequence[Read], int], torch.Tensor]) -> Callable[[Axes, Sequence[PruneGroup], PassContext, int], Scores]:
    """The importance ``name``: ``score`` of what reads each group's units, gathered from samples."""

    def scored(axes: Axes, groups: Sequence[PruneGroup], ctx: PassContext, samples: int) -> Scores:
        split = ctx.need_data(f"prune{{importance={name}}}").train
        found = readers(axes, groups)
        of_group = {group.name: [weight for weight, reader in found.items() if group.name in reader.units] for group in groups}
        for where, weights in of_group.items():
            if not weights:
                raise UnsupportedError(
                    f"importance={name} cannot score {where}",
                    where=where,
                    why="no linear layer or convolution with a weight of its own reads it",
                    hint="exclude it, or use importance=taylor",
                )
        batches = partial(calibration_batches, axes.model, split, samples, ctx.seed)
        scores: Scores = {}
        known: dict[str, Moments] = {}
        for wave in gathered(axes.model.graph, [reader.inputs for reader in found.values()], batches, MOST_BYTES, parts=1):
            known |= {one.weight: one.parts[0] for one in wave}
            for group in groups:
                weights = of_group[group.name]
                if group.name not in scores and set(weights) <= set(known):
                    scores[group.name] = score([r for w in weights for r in _reads(axes, found[w], known[w], group)], group.size)
            waiting = {weight for group in groups if group.name not in scores for weight in of_group[group.name]}
            known = {weight: moments for weight, moments in known.items() if weight in waiting}
        return scores

    return scored


def _reads(axes: Axes, reader: Reader, moments: Moments, group: PruneGroup) -> Iterator[Read]:
    units = reader.along(reader.units[group.name])
    for number, weight in enumerate(reader.inputs.matrices(axes.model.graph)):
        yield Read(weight, covariance(moments, number, centred=reader.inputs.bias is not None), units)


@dataclass
class Problem:
    """What one reader makes of its inputs: its weights (d, outputs) and the inverse of the inputs' covariance (d, d), and the columns of each unit (units, m).

    A unit with fewer columns than others is filled up with columns of zeros.
    """

    weight: torch.Tensor
    inverse: torch.Tensor
    columns: torch.Tensor
    energy: float

    @classmethod
    def of(cls, read: Read, size: int) -> Problem:
        """For a reader of ``size`` units."""
        weight, covariance, units = read.weight.t(), read.covariance, read.units
        variance = covariance.diagonal()
        known = float(variance.mean())
        damped = covariance + torch.eye(len(covariance), dtype=torch.float64) * (DAMPING * known or 1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        owned = [np.flatnonzero(units == unit) for unit in range(size)]
        most = max(map(len, owned))
        columns, end = np.empty((size, most), dtype=np.int64), len(units)
        for unit, own in enumerate(owned):
            missing = most - len(own)
            columns[unit] = [*own, *range(end, end + missing)]
            end += missing
        extra = end - len(units)
        if extra:
            weight = torch.cat([weight, weight.new_zeros(extra, weight.shape[1])])
            inverse = torch.block_diag(inverse, torch.eye(extra, dtype=torch.float64))
        return cls(weight.clone(memory_format=torch.contiguous_format), inverse, torch.from_numpy(columns), read.energy)

    def narrowed(self, units: torch.Tensor) -> Problem:
        """The problem without units that are not among ``units``, which are numbered from 0; those must have been removed."""
        columns = self.columns[units].flatten()
        return Problem(self.weight[columns], self.inverse[columns][:, columns], _numbered(units, columns), self.energy)

    def part(self, units: torch.Tensor) -> Part:
        """The problem for ``units`` alone, numbered from 0; what it costs to remove some of them is the same."""
        columns = self.columns[units].flatten()
        weight = self.weight[columns]
        return Part(weight @ weight.t(), self.inverse[columns][:, columns], _numbered(units, columns), self.energy)

    def costs(self, units: torch.Tensor) -> torch.Tensor:
        """What removing each of ``units`` alone adds to the error, relative to the energy of the outputs."""
        columns = self.columns[units]
        weights = self.weight[columns]
        return _errors(_blocks(self.inverse, columns), weights @ weights.transpose(1, 2)) / self.energy

    def remove(self, units: torch.Tensor) -> None:
        """Take ``units`` out; the weights of the others make up for them."""
        gone = self.columns[units].flatten()
        rows = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])
        self.weight.addmm_(rows.t(), self.weight[gone], alpha=-1)
        self.inverse.addmm_(self.inverse[:, gone], rows, alpha=-1)


@dataclass
class Part:
    """Some units of a problem, with the products of their weights (d, d) instead of these: no step looks at all outputs."""

    products: torch.Tensor
    inverse: torch.Tensor
    columns: torch.Tensor
    energy: float

    def costs(self, units: torch.Tensor) -> torch.Tensor:
        """As those of the problem."""
        columns = self.columns[units]
        return _errors(_blocks(self.inverse, columns), _blocks(self.products, columns)) / self.energy

    def remove(self, units: torch.Tensor) -> None:
        """As from the problem."""
        gone = self.columns[units].flatten()
        rows = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])
        moved = self.products[:, gone] @ rows
        self.products += rows.t() @ self.products[gone][:, gone] @ rows - moved - moved.t()
        self.inverse.addmm_(self.inverse[:, gone], rows, alpha=-1)


def _numbered(units: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(columns)).reshape(len(units), -1)


def _blocks(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(units, m, m) of (d, d)."""
    return matrix[columns[:, :, None], columns[:, None, :]]


def _errors(inverses: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    errors: torch.Tensor = (torch.linalg.inv(inverses) * products).sum((1, 2))
    return errors


def eliminated(problems: Sequence[Problem], size: int) -> torch.Tensor:
    """The error when units are taken out one by one, the cheapest first, at the place of each: float64 [size], no two alike."""
    scores = torch.zeros(size, dtype=torch.float64)
    names, alive, total = torch.arange(size), torch.arange(size), 0.0
    while len(alive):
        costs = sum(problem.costs(alive) for problem in problems)
        assert isinstance(costs, torch.Tensor)
        count = min(AT_ONCE, -(-len(alive) // 8))
        some = alive[torch.argsort(costs, stable=True)[: count * CHOICE]]
        parts = [problem.part(some) for problem in problems]
        left, gone = torch.arange(len(some)), []
        for _ in range(count):
            costs = sum(part.costs(left) for part in parts)
            assert isinstance(costs, torch.Tensor)
            place = int(costs.argmin())
            unit = left[place : place + 1]
            total = float(np.nextafter(total + max(0.0, float(costs[place])), np.inf))
            scores[names[some[unit]]] = total
            for part in parts:
                part.remove(unit)
            gone.append(int(unit))
            left = left[left != unit]
        out = some[gone]
        for problem in problems:
            problem.remove(out)
        alive = alive[~torch.isin(alive, out)]
        if 0 < 2 * len(alive) < len(names):
            problems = [problem.narrowed(alive) for problem in problems]
            names, alive = names[alive], torch.arange(len(alive))
    return scores
