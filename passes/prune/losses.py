"""What the removal of units costs at the outputs: measured for each group alone, at a few widths."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from edgesmith.compiler.axes import Axes, PruneGroup, remove
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.passes.observe.inputs import Batches, gathered
from edgesmith.passes.prune.branches import Branch, without
from edgesmith.passes.prune.readers import MOST_BYTES, Reader, readers
from edgesmith.passes.prune.reconstruct import reconstructed, refitted
from edgesmith.passes.train.forward import Tensors, flat, learnable, rows

PROBED = (0.3, 0.6, 1.0)
"""Shares of the units of a group that may go, at which its loss is measured."""

MOST_BATCHES = 4
"""So many give the means of a channel over thousands of positions."""
RISE = 0.02
"""Of the largest error, which a curve rises by at least from end to end: where less of a group measured no worse, more of it is still as good."""

Counts = npt.NDArray[np.int64]
Losses = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """How a loss is measured: ``removal`` says which units go (group name, how many stay), ``refit`` whether what reads them is fitted anew then."""

    axes: Axes
    batches: Batches
    removal: Callable[[str, int], Mapping[str, list[int]]]
    refit: bool
    progress: Callable[[int, int, str], None] = field(default=lambda done, total, text: None)


@dataclass(frozen=True)
class Curve:
    """The loss that was measured with so many units gone; 0 with none. ``most`` may go."""

    counts: tuple[int, ...]
    values: tuple[float, ...]
    most: int

    def at(self, counts: Counts) -> Losses:
        """For every number of units gone: always rising, and smooth in its square root, the size of the error."""
        from scipy.interpolate import PchipInterpolator

        if not self.counts:
            return np.zeros(len(counts))
        roots = np.sqrt(np.maximum.accumulate([0.0, *np.maximum(self.values, 0.0)]))
        roots = roots + RISE * roots[-1] * np.array([0, *self.counts]) / self.most
        return np.asarray(PchipInterpolator([0, *self.counts], roots)(counts), dtype=np.float64) ** 2


def losses(probe: Probe, most: Mapping[str, int]) -> dict[str, Curve]:
    """How the outputs diverge from what they were when units of one group go, as many as ``most`` says.

    Raises:
        UnsupportedError: the model has no output that a divergence fits.
    """
    found: dict[str, Curve] = {}
    reference = _reference(probe)
    for group, held in _with_moments(probe, [probe.axes.group(name) for name in most]):
        probe.progress(len(found), len(most), f"measure the loss of {group.name}")
        found[group.name] = _curve(probe, group, held, most[group.name], reference)
    return found


def branch_losses(probe: Probe, branches: Mapping[str, Branch]) -> dict[str, Curve]:
    """The same for residual branches, each of which is there or not; the layers behind one that is not are fitted anew if readers are.

    Raises:
        UnsupportedError: as of ``losses``.
    """
    found: dict[str, Curve] = {}
    reference = _reference(probe)
    for name, branch in branches.items():
        probe.progress(len(found), len(branches), f"measure the loss of {name}")
        model = without(probe.axes.model, [branch])
        if probe.refit:
            model, _ = reconstructed(probe.axes, model, {}, probe.batches)
        found[name] = Curve((1,), (_divergence(probe, model, reference),), 1)
    return found


def joint_loss(probe: Probe) -> Callable[[Model, Mapping[str, Sequence[int]]], float]:
    """The same for a narrowed model and all that is gone from it: fitted anew on every second batch if readers are, judged on the others.

    Raises:
        UnsupportedError: as of ``losses``, when it is called.
    """
    batches = list(probe.batches())
    held = replace(probe, batches=lambda: batches[1::2] or batches)
    reference = cache(lambda: _reference(held))

    def loss(narrowed: Model, removals: Mapping[str, Sequence[int]]) -> float:
        model = reconstructed(probe.axes, narrowed, removals, lambda: batches[::2])[0] if probe.refit else narrowed
        return _divergence(held, model, reference())

    return loss


def _reference(probe: Probe) -> list[Tensors]:
    if not learnable(probe.axes.model):
        raise UnsupportedError("no loss can be measured", why="the model has no floating-point output to look at", hint="prune{ratio=...} needs none")
    with torch.no_grad():
        return [flat(probe.axes.model(*batch)) for batch in probe.batches()]


def _with_moments(probe: Probe, groups: Sequence[PruneGroup]) -> Iterator[tuple[PruneGroup, Mapping[str, Reader]]]:
    """Each group with its readers, which hold the moments of their inputs if they are to be fitted; as many at a time as fit into memory."""
    waiting = list(groups)
    while waiting:
        some = [waiting.pop(0)]
        while waiting and sum(r.inputs.size_bytes for r in readers(probe.axes, [*some, waiting[0]]).values()) <= MOST_BYTES:
            some.append(waiting.pop(0))
        held = readers(probe.axes, some) if probe.refit else {}
        mine = [(group, {name: reader for name, reader in held.items() if group.name in reader.units}) for group in some]
        if not held:
            yield from mine
        for _ in gathered(probe.axes.model.graph, [reader.inputs for reader in held.values()], probe.batches, sys.maxsize):
            yield from mine


def _curve(probe: Probe, group: PruneGroup, held: Mapping[str, Reader], most: int, reference: Sequence[Tensors]) -> Curve:
    counts = sorted({min(most, max(1, round(share * most))) for share in PROBED}) if most else []
    measured = [_loss(probe, probe.removal(group.name, group.size - count), held, reference) for count in counts]
    return Curve(tuple(counts), tuple(measured), most)


def _loss(probe: Probe, removals: Mapping[str, Sequence[int]], held: Mapping[str, Reader], reference: Sequence[Tensors]) -> float:
    model = remove(probe.axes.model, removals, axes=probe.axes)
    if probe.refit:
        model = refitted(probe.axes, model, removals, held, lambda: islice(probe.batches(), MOST_BATCHES))
    return _divergence(probe, model, reference)


def _divergence(probe: Probe, model: Model, reference: Sequence[Tensors]) -> float:
    with torch.no_grad():
        found = [divergence(expected, flat(model(*batch)), learnable(model)) for batch, expected in zip(probe.batches(), reference, strict=True)]
    return float(np.mean(found))


def divergence(expected: Tensors, got: Tensors, positions: Sequence[int]) -> float:
    """Of the distributions that outputs stand for: Kullback and Leibler's, a row at a time; of single numbers half the square of the relative difference."""
    total = 0.0
    for position in positions:
        old, new = rows(expected[position]).double(), rows(got[position]).double()
        if old.shape[1] > 1:
            was = old.log_softmax(1)
            total += float((was.exp() * (was - new.log_softmax(1))).sum(1).mean())
        else:
            total += float(0.5 * (new - old).square().mean() / old.square().mean().clamp(min=torch.finfo(torch.float64).tiny))
    return total
