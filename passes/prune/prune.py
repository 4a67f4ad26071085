"""The pass that removes whole channels, hidden units and attention heads."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import ClassVar

import torch

from edgesmith.compiler.axes import Axes, PruneGroup, prove, remove
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult
from edgesmith.compiler.suggest import did_you_mean
from edgesmith.passes.observe.batches import calibration_batches
from edgesmith.passes.prune.importance import IMPORTANCES, Scores
from edgesmith.passes.prune.reconstruct import Refit, reconstructed

_ALWAYS = frozenset({"channels", "hidden", "heads"})


@dataclass(frozen=True)
class Prune(Pass):
    """Remove the share ``ratio`` of the units of every group that may go: channels, hidden units, whole attention heads.

    ``heads`` is the share of heads where it is another one; ``head_dim`` and ``residual`` let the width of the heads and of the residual
    stream go too. ``importance`` says which units stay: ``taylor`` or ``obs`` (need data, no labels), ``l2`` or ``l1``. ``exclude`` holds source paths
    or patterns (``blocks.0``, ``*.fc1``) of layers that keep their units. Where two groups of a kind multiply (key heads by repeats,
    convolution groups by width) only the larger is cut. A group keeps at least ``least`` units, and channels and hidden units
    a multiple of ``round_to``. Every removal is proved: the pruned model equals the unpruned one with the same units dead. Then, with
    ``reconstruct``, which needs data, the layers that read what was pruned are fitted by least squares to what they gave, and batch norms take new
    statistics. ``samples`` is how many training samples the importance and the fit look at.
    """

    name: ClassVar[str] = "prune"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    ratio: float = 0.3
    heads: float | None = None
    importance: str = "taylor"
    exclude: tuple[str, ...] = ()
    residual: bool = False
    head_dim: bool = False
    round_to: int = 1
    least: int = 1
    samples: int = 256
    reconstruct: bool = False

    def __post_init__(self) -> None:
        for option, value in (("ratio", self.ratio), ("heads", self.heads)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{option} is the share of units that go: at least 0 and below 1, not {value}")
        if self.importance not in IMPORTANCES:
            raise ValueError(f"there is no importance {self.importance!r}; {did_you_mean(self.importance, IMPORTANCES)}")
        for option, count in (("round_to", self.round_to), ("least", self.least), ("samples", self.samples)):
            if count < 1:
                raise ValueError(f"{option} is at least 1, not {count}")

    def requires(self, model: Model) -> Iterable[Diagnostic]:
        """Refuses a quantized model, a pattern that matches nothing, and a model with nothing to prune."""
        if model.quant is not None:
            yield Diagnostic(Severity.ERROR, "prune.quantized", "", "the model is quantized already", "prune before quantize")
        if self.ratio == 0 and not self.heads:
            return
        axes = Axes.of(model)
        for pattern in self.exclude:
            paths = {path for group in axes.groups for path in _paths(group)}
            if not any(_matches(path, pattern) for path in paths):
                yield Diagnostic(Severity.ERROR, "prune.unknown-path", pattern, "matches no layer that could be pruned", did_you_mean(pattern, paths))
        if not self._chosen(axes):
            yield Diagnostic(Severity.ERROR, "prune.nothing", "", "no group of units may go", _why_none(axes))

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        """The model without the least important units.

        Raises:
            UnsupportedError: the importance needs data and there is none, or a removal cannot be proved.
            NumericsError: a removal is proved wrong.
        """
        counts = {}
        if self.ratio > 0 or self.heads:
            axes = Axes.of(model)
            counts = {group.name: count for group in self._chosen(axes) if (count := self._count(group))}
        if not counts:
            return PassResult(model, False)
        groups = [axes.group(name) for name in counts]
        ctx.progress(0, 3, f"{self.importance} scores of {sum(g.size for g in groups)} units in {len(groups)} groups")
        scores = IMPORTANCES[self.importance].score(axes, groups, ctx, self.samples)
        removals = least_important(scores, counts)
        ctx.progress(1, 3, f"remove {sum(counts.values())} units")
        pruned = remove(model, removals, axes=axes)
        ctx.progress(2, 3, "prove the removal")
        difference = prove(model, pruned, removals, axes=axes)
        ctx.progress(3, 3, f"proved, relative difference {difference:.1e}")
        remarks = (*axes.diagnostics, *_summary(groups, counts))
        if self.reconstruct:
            split = ctx.need_data("prune{reconstruct=true}").train
            pruned, fits = reconstructed(axes, pruned, removals, partial(calibration_batches, model, split, self.samples, ctx.seed))
            remarks += tuple(_fits(fits))
        return PassResult(pruned, True, remarks)

    def _chosen(self, axes: Axes) -> list[PruneGroup]:
        kinds = _ALWAYS | ({"residual"} if self.residual else set()) | ({"head_dim"} if self.head_dim else set())
        allowed = [g for g in axes.groups if g.kind in kinds and not any(_matches(path, pattern) for path in _paths(g) for pattern in self.exclude)]
        return independent(allowed)

    def _count(self, group: PruneGroup) -> int:
        """How many units go: the nearest whole number, then fewer where that is needed to keep enough."""
        ratio = self.heads if group.kind == "heads" and self.heads is not None else self.ratio
        keep = group.size - int(ratio * group.size + 0.5)
        if group.kind in {"channels", "hidden", "residual"}:
            keep = -(-keep // self.round_to) * self.round_to
        return group.size - min(group.size, max(keep, self.least))


def least_important(scores: Scores, counts: dict[str, int]) -> dict[str, list[int]]:
    """The ``counts[name]`` units of each group with the lowest scores; of equal ones the last."""
    removals = {}
    for name, count in counts.items():
        order = torch.argsort(scores[name].flip(0), stable=True)
        removals[name] = sorted((len(order) - 1 - order[:count]).tolist())
    return removals


def independent(groups: Sequence[PruneGroup]) -> list[PruneGroup]:
    """``groups`` without those that are a factor of a dimension which a larger one of their kind is a factor of, too."""
    taken: dict[tuple[str, int], list[PruneGroup]] = {}
    for group in sorted(groups, key=lambda g: -g.size):
        if not any(_multiplied(group, other) for member in group.members for other in taken.get((member.name, member.dim), ())):
            for member in group.members:
                taken.setdefault((member.name, member.dim), []).append(group)
    chosen = {group.name for held in taken.values() for group in held}
    return [group for group in groups if group.name in chosen]


def _multiplied(group: PruneGroup, other: PruneGroup) -> bool:
    """Whether both are factors of one dimension (groups x width, key heads x repeats) and of one kind: cutting both would cut it twice."""
    if group.kind != other.kind:
        return False
    theirs = {(m.name, m.dim): m.labels for m in other.members}
    return any(bool(((m.labels >= 0).any(axis=0) & (theirs[m.name, m.dim] >= 0).any(axis=0)).any()) for m in group.members if (m.name, m.dim) in theirs)


def _paths(group: PruneGroup) -> set[str]:
    """The group's name and the layers that make its units; of those that only scale units where none makes them."""
    made = [m.name for m in group.members if m.side == "producer"] or [m.name for m in group.members]
    return {group.name, *(name.rpartition(".")[0] or name for name in made)}


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or path.startswith(f"{pattern}.")


def _why_none(axes: Axes) -> str:
    kinds = sorted({g.kind for g in axes.groups} - _ALWAYS)
    if kinds:
        return f"there are groups of the kinds {', '.join(kinds)}"
    return f"{axes.pinned[0].where} stays: {axes.pinned[0].reason}" if axes.pinned else "the model has no parameters"


def _summary(groups: Sequence[PruneGroup], counts: dict[str, int]) -> Iterable[Diagnostic]:
    total: Counter[str] = Counter()
    gone: Counter[str] = Counter()
    of_kind: Counter[str] = Counter()
    for group in groups:
        total[group.kind] += group.size
        gone[group.kind] += counts[group.name]
        of_kind[group.kind] += 1
    for kind in sorted(total):
        yield Diagnostic(Severity.INFO, "prune.removed", "", f"{gone[kind]} of {total[kind]} {kind} removed, in {of_kind[kind]} groups")


def _fits(fits: Sequence[Refit]) -> Iterable[Diagnostic]:
    if fits:
        before, after = (statistics.median(values) for values in ([f.before for f in fits], [f.after for f in fits]))
        message = f"{len(fits)} layers refitted; median error of their outputs on samples held out {before:.3g} before, {after:.3g} after"
        yield Diagnostic(Severity.INFO, "prune.reconstructed", "", message)
