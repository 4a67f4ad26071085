"""The pass that removes whole channels, hidden units and attention heads."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import ClassVar

from torch import fx

from edgesmith.compiler.axes import Axes, PruneGroup, prove, remove
from edgesmith.compiler.axes.axes import Axis
from edgesmith.compiler.bench import Bench
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult
from edgesmith.compiler.spec import format_pass
from edgesmith.compiler.suggest import did_you_mean
from edgesmith.passes.observe.batches import calibration_batches
from edgesmith.passes.observe.inputs import Batches
from edgesmith.passes.prune.allocation import Allocation, Goal, Problem, Variable, Widths, allocate
from edgesmith.passes.prune.branches import Branch, inside, prove_without, with_influence, without
from edgesmith.passes.prune.candidates import BLOCKS, KINDS, Chooser, alike, lowest
from edgesmith.passes.prune.cutter import Cutter
from edgesmith.passes.prune.importance import IMPORTANCES
from edgesmith.passes.prune.losses import Probe, branch_losses, joint_loss, losses
from edgesmith.passes.prune.reconstruct import Refit, reconstructed

RATIO = 0.3
PROBE_SHARE, PROBE_LEAST = 1 / 8, 128
"""Of the samples this share, and at least so many, show what the removal of one group's units loses; twice as many what is lost by all together."""
IN_MULTIPLES = frozenset({"channels", "hidden", "residual"})


@dataclass(frozen=True)
class Prune(Pass):
    """Remove channels, hidden units and whole attention heads: a share of every group, or as many of each as meet a limit at the least loss.

    ``ratio`` (0.3 if nothing is asked) is the share of the units of every group that go, ``heads`` that of heads where it is another one; with
    ``ranking=isomorphic`` it is the share of all units of groups of one structure, so that one group may lose more than another. Or shares that are to be
    left of the model's ``macs``, ``params`` or ``latency``, or ``latency_ms`` at the budget's percentile: how many units of each group go is chosen by the
    loss that was measured of each, and latency is measured on ``target`` (the first of the build), after the later passes that do not train.

    ``kinds`` may go: channels, hidden, heads, head_dim, residual (the width of a stream), blocks (whole residual branches). ``include`` and ``exclude``
    hold source paths or patterns (``blocks.0``, ``*.fc1``) of layers that give units and that keep them. Where two groups of a kind multiply (key
    heads by repeats, convolution groups by width) only the larger is cut. A group keeps at least ``least`` units (without it one, and a share of
    every group that leaves none is refused), and channels and hidden units a multiple of ``round_to``.

    ``importance`` says which units stay: ``taylor``, ``obs`` or ``activation`` (need data, no labels), ``l2`` or ``l1``, or one of the torch-pruning
    library's (``torch_pruning:GroupTaylorImportance``). Every removal is proved: the pruned model equals the unpruned one with the same units dead. Then,
    with ``reconstruct``, which needs data, the layers that read something else now are fitted by least squares to what they gave, and batch norms take
    new statistics. ``samples`` is how many training samples the importance and the fit look at; an eighth of them, at least 128, show what widths lose.
    """

    name: ClassVar[str] = "prune"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    ratio: float | None = None
    heads: float | None = None
    ranking: str = "group"
    latency: float | None = None
    latency_ms: float | None = None
    macs: float | None = None
    params: float | None = None
    target: str = ""
    kinds: tuple[str, ...] = ("channels", "hidden", "heads")
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    round_to: int = 1
    least: int | None = None
    importance: str = "taylor"
    samples: int = 256
    reconstruct: bool = False

    def __post_init__(self) -> None:
        for option, value in (("ratio", self.ratio), ("heads", self.heads)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{option} is the share of units that go: at least 0 and below 1, not {value}")
        if self.goal and (self.ratio is not None or self.heads is not None or self.ranking != "group"):
            raise ValueError("ratio, heads and ranking cut by shares, latency, macs and params choose for each group: give one kind")
        if self.target and not (self.goal and self.goal.timed):
            raise ValueError("target is where latency is measured: give latency or latency_ms")
        for what, given, known in (
            ("importance", (self.importance,), IMPORTANCES),
            ("ranking", (self.ranking,), ("group", "isomorphic")),
            ("kind of group", self.kinds, KINDS),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"there is no {what} {name!r}; {did_you_mean(name, known)}")
        for option, count in (("round_to", self.round_to), ("least", self.least), ("samples", self.samples)):
            if count is not None and count < 1:
                raise ValueError(f"{option} is at least 1, not {count}")

    @property
    def goal(self) -> Goal | None:
        """What is to be met, where it is not a share of every group."""
        goal = Goal(self.latency, self.latency_ms, self.macs, self.params)
        return None if goal == Goal() else goal

    def requires(self, model: Model) -> Iterable[Diagnostic]:
        """Refuses a quantized model, a pattern that matches nothing, and a model with nothing to prune."""
        if model.quant is not None:
            yield Diagnostic(Severity.ERROR, "prune.quantized", "", "the model is quantized already", "prune before quantize")
        if not self._nothing:
            yield from self._chooser.misfits(Axes.of(model))

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        """The model without the least important units.

        Raises:
            UnsupportedError: the importance needs data and there is none, or a removal cannot be proved; or no widths meet the goal.
            NumericsError: a removal is proved wrong.
        """
        if self._nothing:
            return PassResult(model, False)
        axes = Axes.of(model)
        groups, branches = self._chooser.groups(axes), self._chooser.branches(model)
        by_shares = not self.goal and self.ranking == "group"
        if by_shares and not branches and not any(self._share_of(group, self._ratio(group)) for group in groups):
            return PassResult(model, False)
        bench = ctx.need_bench(format_pass(self), self.target) if self.goal and self.goal.timed else None
        if self.goal or self.reconstruct or branches:
            ctx.need_data(format_pass(self))
        ctx.progress(0, 3, f"{self.importance} scores of {sum(g.size for g in groups)} units in {len(groups)} groups")
        scores = IMPORTANCES[self.importance](axes, groups, ctx, self.samples) if groups else {}
        cutter = Cutter(axes, scores, branches)
        allocation = self._allocated(cutter, groups, bench, ctx) if self.goal else Allocation(self._shared(cutter, groups, ctx))
        removals, dropped = cutter.removals(allocation.widths), cutter.dropped(allocation.widths)
        if not removals and not dropped:
            return PassResult(model, False, allocation.remarks)
        ctx.progress(1, 3, f"remove {sum(map(len, removals.values()))} units and {len(dropped)} blocks")
        narrow = remove(model, removals, axes=axes)
        pruned = without(narrow, dropped) if dropped else narrow
        ctx.progress(2, 3, "prove the removal")
        difference = prove(model, narrow, removals, axes=axes)
        if dropped:
            difference = max(difference, prove_without(narrow, pruned, dropped))
        ctx.progress(3, 3, f"proved, relative difference {difference:.1e}")
        remarks = (*axes.diagnostics, *_summary(groups, removals), *_blocks(branches, dropped), *allocation.remarks)
        if self.reconstruct:
            pruned, fits = reconstructed(axes, pruned, removals, self._batches(model, ctx, self.samples))
            remarks += tuple(_fits(fits))
        return PassResult(pruned, True, remarks)

    @property
    def _nothing(self) -> bool:
        """Whether nothing is asked for."""
        return self.goal is None and self.ratio == 0 and not self.heads

    @property
    def _chooser(self) -> Chooser:
        return Chooser(self.kinds, self.include, self.exclude)

    def _allocated(self, cutter: Cutter, groups: Sequence[PruneGroup], bench: Bench | None, ctx: PassContext) -> Allocation:
        """The widths that meet the goal at the least loss."""
        assert self.goal is not None
        axes = cutter.axes
        probed = max(PROBE_LEAST, int(PROBE_SHARE * self.samples))
        batches = list(self._batches(axes.model, ctx, min(self.samples, probed))())
        probe = Probe(axes, lambda: batches, lambda name, width: cutter.removals({name: width}), self.reconstruct, ctx.progress)
        curves = losses(probe, {group.name: group.size - self._least for group in groups if group.size > self._least})
        variables = {name: Variable(axes.group(name).axis, axes.group(name).size, curve, axes.group(name).kind) for name, curve in curves.items()}
        gates: dict[fx.Node, tuple[Axis, ...]] = {}
        for name, curve in branch_losses(probe, cutter.branches).items():
            gate = Axis(1)
            variables[name] = Variable(gate, 1, curve, BLOCKS)
            gates |= {node: (*gates.get(node, ()), gate) for node in inside(axes.model, cutter.branches[name])}
        together = joint_loss(replace(probe, batches=self._batches(axes.model, ctx, min(self.samples, 2 * probed))))

        def loss(widths: Widths) -> float:
            return together(cutter.model(widths), cutter.removals(widths))

        return allocate(Problem(axes, variables, cutter.model, loss, gates, self.round_to, ctx.seed, ctx.progress), self.goal, bench)

    def _batches(self, model: Model, ctx: PassContext, samples: int) -> Batches:
        return partial(calibration_batches, model, ctx.need_data(format_pass(self)).train, samples, ctx.seed)

    def _shared(self, cutter: Cutter, groups: Sequence[PruneGroup], ctx: PassContext) -> Widths:
        """The widths that shares of groups, or of all groups of a structure, leave; of the blocks those that move their stream least go."""
        shares = {group.name: self._ratio(group) for group in groups}
        if self.ranking != "group":
            for members in alike(cutter.axes, groups):
                gone = lowest(members, cutter.scores, self._ratio(members[0]), self._least)
                shares |= {group.name: gone[group.name] / group.size for group in members}
        widths = {group.name: group.size - self._share_of(group, shares[group.name]) for group in groups}
        count = int((RATIO if self.ratio is None else self.ratio) * len(cutter.branches) + 0.5)
        return widths | (dict.fromkeys(self._least_influential(cutter, ctx)[:count], 0) if count else {})

    def _least_influential(self, cutter: Cutter, ctx: PassContext) -> list[str]:
        """The names of the blocks, the one that moves its stream least first."""
        model = cutter.axes.model
        (batch,) = islice(self._batches(model, ctx, self.samples)(), 1)
        seen = with_influence(model, list(cutter.branches.values()), batch)
        influence = {name: branch.influence for name, branch in zip(cutter.branches, seen, strict=True)}
        return sorted(influence, key=influence.__getitem__)

    def _ratio(self, group: PruneGroup) -> float:
        if group.kind == "heads" and self.heads is not None:
            return self.heads
        return RATIO if self.ratio is None else self.ratio

    @property
    def _least(self) -> int:
        return 1 if self.least is None else self.least

    def _share_of(self, group: PruneGroup, ratio: float) -> int:
        """How many units go: the nearest whole number, then fewer where that is needed to keep enough."""
        keep = group.size - int(ratio * group.size + 0.5)
        if not keep and group.size > 1 and self.least is None:
            nearest = (1000 * (2 * group.size - 1) - 1) // (2 * group.size) / 1000
            raise UnsupportedError(
                f"a share of {ratio:.3g} leaves nothing of {group.name}",
                where=group.name,
                why=f"of its {group.size} {group.kind} all would go, to the nearest whole number",
                hint=f"at most {nearest:.3f} leaves one; or say how many each group keeps, least=1, or exclude it",
            )
        if group.kind in IN_MULTIPLES:
            keep = -(-keep // self.round_to) * self.round_to
        return group.size - min(group.size, max(keep, self._least))


def _summary(groups: Sequence[PruneGroup], removals: Mapping[str, Sequence[int]]) -> Iterable[Diagnostic]:
    total: Counter[str] = Counter()
    count: Counter[str] = Counter()
    of_kind: Counter[str] = Counter()
    for group in groups:
        total[group.kind] += group.size
        count[group.kind] += len(removals.get(group.name, ()))
        of_kind[group.kind] += 1
    for kind in sorted(total):
        yield Diagnostic(Severity.INFO, "prune.removed", "", f"{count[kind]} of {total[kind]} {kind} removed, in {of_kind[kind]} groups")


def _blocks(branches: Mapping[str, Branch], dropped: Sequence[Branch]) -> Iterable[Diagnostic]:
    if branches:
        which = f": {', '.join(branch.source for branch in dropped)}" if dropped else ""
        yield Diagnostic(Severity.INFO, "prune.removed", "", f"{len(dropped)} of {len(branches)} blocks removed{which}")


def _fits(fits: Sequence[Refit]) -> Iterable[Diagnostic]:
    if fits:
        before, after = (statistics.median(values) for values in ([f.before for f in fits], [f.after for f in fits]))
        message = f"{len(fits)} layers refitted; median error of their outputs on samples held out {before:.3g} before, {after:.3g} after"
        yield Diagnostic(Severity.INFO, "prune.reconstructed", "", message)
