"""Student selection: several smaller models cut from the teacher, priced, ranked after a short distillation, the winner distilled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from edgesmith.compiler.candidate import Candidate
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult
from edgesmith.passes.distill.candidates import TEACHER, students
from edgesmith.passes.distill.scores import Entry, by_cheapness, over_budget, standard_error, winner
from edgesmith.passes.train.loop import Schedule, train
from edgesmith.passes.train.objective import Objective
from edgesmith.passes.train.options import check_training_options
from edgesmith.passes.train.remarks import labels_unused, outcome, refuse_quantized


@dataclass(frozen=True)
class SelectStudent(Pass):
    """The cheapest of several students that keeps up with the best.

    ``candidates`` students are cut from the teacher by depth (residual branches) and width (units), with inherited weights. Those over
    the budget, as the context's ``cost`` prices them, are dropped; if all are, the cheapest is kept. The rest, and the teacher itself where it fits,
    are scored on validation data after ``rank_epochs`` of distillation (the teacher as it is). The winner is the one with the fewest multiply-accumulates
    whose score is within ``slack`` of the best; left out, ``slack`` is one standard error of the best score (Breiman et al. 1984,
    "Classification and Regression Trees", section 3.4.3) where that is a fraction, and 0 elsewhere. It is distilled for another ``epochs``.
    """

    name: ClassVar[str] = "select-student"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    trains: ClassVar[bool] = True

    candidates: int = 4
    rank_epochs: int = 4
    epochs: int = 20
    slack: float | None = None
    lr: float = 1e-3
    batch_size: int = 64
    loss: str = "standardized-kl"
    label_weight: float = 0.5

    def __post_init__(self) -> None:
        check_training_options(min(self.epochs, self.rank_epochs), self.lr, self.batch_size, self.loss, self.label_weight)
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates} must be at least 1")
        if self.slack is not None and self.slack < 0:
            raise ValueError(f"slack={self.slack} must be at least 0")

    def requires(self, model: Model) -> Iterable[Diagnostic]:
        """A quantized model's grids would no longer fit its weights."""
        return refuse_quantized(self.name, model)

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        """The distilled winner; ``model`` itself where that wins.

        Raises:
            UnsupportedError: there is no data, or nothing can be cut.
        """
        data = ctx.need_data(self.name)
        made, remarks = students(model, ctx, self.candidates)
        if not made:
            raise UnsupportedError(
                "select-student can cut nothing", why="the model has no residual branches and no width that may go", hint="leave select-student out"
            )
        entries = [Entry(TEACHER, model), *(Entry(s.name, s.model) for s in made)]
        affordable, dropped = _priced(entries, ctx)
        objective = Objective(ctx.teacher or model, data, self.loss, self.label_weight)
        ranked = self._ranked(affordable, objective, ctx)
        won = winner(ranked, self._slack(ranked, ctx, len(data.validation)))
        candidates = _verdicts(ranked, won, dropped, accurate=ctx.evaluate is not None)
        remarks = (*remarks, *dropped.remarks, *map(_remark, candidates))
        if won.name == TEACHER:
            return PassResult(model, False, remarks, candidates)
        trained = train(won.model, objective, Schedule(self.epochs, self.lr, self.batch_size), _telling(ctx, f"distil {won.name}"))
        remarks = (
            *remarks,
            *labels_unused(self.name, self.label_weight, objective),
            *outcome(self.name, trained, self.epochs, scored=ctx.evaluate is not None),
        )
        return PassResult(trained.model, True, remarks, candidates)

    def _ranked(self, entries: Sequence[Entry], objective: Objective, ctx: PassContext) -> list[Entry]:
        """The entries with their scores, each student after a short distillation."""
        ranked = []
        for entry in entries:
            if entry.name == TEACHER:
                model = entry.model
                score = ctx.evaluate(model) if ctx.evaluate else -objective.on_validation(model)
            else:
                trained = train(entry.model, objective, Schedule(self.rank_epochs, self.lr, self.batch_size), _telling(ctx, f"rank {entry.name}"))
                model, score = trained.model, trained.score[0] if ctx.evaluate else trained.score[1]
            ranked.append(replace(entry, model=model, score=score))
        return ranked

    def _slack(self, ranked: Sequence[Entry], ctx: PassContext, samples: int) -> float:
        if self.slack is not None:
            return self.slack
        best = max(entry.score for entry in ranked if entry.score is not None)
        return standard_error(best, samples) if ctx.evaluate else 0.0


def _telling(ctx: PassContext, what: str) -> PassContext:
    """``ctx`` with ``what`` before every progress text."""

    def progress(done: int, total: int, text: str) -> None:
        ctx.progress(done, total, f"{what}: {text}")

    return replace(ctx, progress=progress)


@dataclass(frozen=True)
class _Dropped:
    """Entries that are over budget, with the reason of each."""

    entries: tuple[tuple[Entry, str], ...]
    remarks: tuple[Diagnostic, ...]


def _priced(entries: Sequence[Entry], ctx: PassContext) -> tuple[list[Entry], _Dropped]:
    """Entries within the budget, the cheapest alone if none is, and the others."""
    if not ctx.benches:
        remark = Diagnostic(Severity.INFO, "select-student.not-priced", "", "no cost is known here: no candidate is dropped for its cost")
        return list(entries), _Dropped((), (remark,))
    priced, bench = [], ctx.need_bench(SelectStudent.name)
    for done, entry in enumerate(entries):
        ctx.progress(done, len(entries), f"price {entry.name}")
        priced.append(replace(entry, cost=bench.cost(entry.model)))
    reasons = {entry.name: over_budget(entry.cost, ctx.budget) for entry in priced if entry.cost}
    affordable = [entry for entry in priced if not reasons[entry.name]]
    remarks = []
    if not affordable:
        cheapest = min(priced, key=by_cheapness)
        message = f"every candidate is over budget; the cheapest, {cheapest.name}, is kept: {reasons[cheapest.name]}"
        remarks.append(Diagnostic(Severity.WARNING, "select-student.all-over-budget", "", message, "more candidates=, or a larger budget"))
        affordable = [cheapest]
    dropped = tuple((entry, reasons[entry.name]) for entry in priced if entry not in affordable)
    return affordable, _Dropped(dropped, tuple(remarks))


def _verdicts(ranked: Sequence[Entry], won: Entry, dropped: _Dropped, *, accurate: bool) -> tuple[Candidate, ...]:
    best = max(ranked, key=lambda entry: entry.score if entry.score is not None else float("-inf"))
    found = []
    for entry in ranked:
        if entry is won:
            reason = "the best" if won is best else f"the cheapest that keeps up with {best.name}"
        else:
            reason = f"{won.name} is cheaper and keeps up" if by_cheapness(won) <= by_cheapness(entry) else f"does not keep up with {best.name}"
        found.append(entry.candidate(accurate=accurate, kept=entry is won, reason=reason))
    return (*found, *(entry.candidate(accurate=accurate, kept=False, reason=reason) for entry, reason in dropped.entries))


def _remark(candidate: Candidate) -> Diagnostic:
    figures = [f"{candidate.params} parameters", f"{candidate.macs} MACs"]
    if candidate.latency_ms is not None and candidate.size_bytes is not None:
        figures.append(f"{candidate.latency_ms:.4g} ms and {candidate.size_bytes} bytes at the end of the line")
    if candidate.accuracy is not None:
        figures.append(f"score {candidate.accuracy:.4g}")
    verdict = "kept" if candidate.kept else "dropped"
    return Diagnostic(Severity.INFO, "select-student.candidate", candidate.name, f"{', '.join(figures)}: {verdict}, {candidate.reason}")
