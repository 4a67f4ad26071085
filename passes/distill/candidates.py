"""Students cut from the teacher: by depth, by width, by both; every weight inherited."""

from __future__ import annotations

from dataclasses import dataclass

from edgesmith.compiler.axes import Axes, prove, remove
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.passes.prune.branches import Branch, prove_without, residual_branches, with_influence, without
from edgesmith.passes.prune.candidates import independent
from edgesmith.passes.prune.cutter import Cutter
from edgesmith.passes.prune.importance import IMPORTANCES
from edgesmith.passes.train.forward import as_tensors, batch_size

TEACHER = "teacher"

_SAMPLES = 128
_WHOLE = 1.0
_KINDS = frozenset({"channels", "heads", "hidden", "residual"})


@dataclass(frozen=True)
class Cut:
    """Which share of the residual branches and of the units of every width stay."""

    depth: float
    width: float

    def __str__(self) -> str:
        parts = [f"{what}-{round(100 * share)}" for what, share in (("depth", self.depth), ("width", self.width)) if share < _WHOLE]
        return "-".join(parts) or TEACHER


CUTS = (
    Cut(0.75, _WHOLE),
    Cut(_WHOLE, 0.75),
    Cut(0.5, _WHOLE),
    Cut(_WHOLE, 0.5),
    Cut(0.75, 0.75),
    Cut(_WHOLE, 0.875),
    Cut(0.875, _WHOLE),
    Cut(0.5, 0.75),
    Cut(0.75, 0.5),
    Cut(0.5, 0.5),
    Cut(_WHOLE, 0.375),
    Cut(_WHOLE, 0.25),
)
"""In the order in which they are tried, where only some are wanted."""


@dataclass(frozen=True)
class Student:
    """A model that the teacher may be replaced by."""

    name: str
    model: Model


def students(teacher: Model, ctx: PassContext, count: int) -> tuple[tuple[Student, ...], tuple[Diagnostic, ...]]:
    """``count`` different students, the teacher not counted, and what could not be cut.

    Depth goes where the residual branches move their stream least; width goes by the second-order rise of the divergence to the teacher (``prune``'s
    ``taylor``), by one share from every group of channels, hidden units, heads and residual width. A width cut is proved as in ``prune``.

    Raises:
        NumericsError: a removal is proved wrong.
    """
    found: list[Student] = []
    remarks: list[Diagnostic] = []
    known = {teacher.fingerprint}
    branches = _ranked_branches(teacher, ctx)
    if not branches:
        remarks.append(Diagnostic(Severity.INFO, "select-student.no-depth", "", "the model has no residual branches; students differ in width alone"))
    for cut in CUTS:
        if len(found) == count:
            break
        try:
            model = _cut(teacher, cut, branches, ctx)
        except UnsupportedError as error:
            remarks.append(Diagnostic(Severity.WARNING, "select-student.cannot-cut", error.where, f"{cut} cannot be cut: {error.what}", error.why))
            continue
        if model is not None and model.fingerprint not in known:
            known.add(model.fingerprint)
            found.append(Student(str(cut), model))
    return tuple(found), tuple(remarks)


def _cut(teacher: Model, cut: Cut, branches: tuple[Branch, ...], ctx: PassContext) -> Model | None:
    """The student, or None where the teacher has nothing of what is to be cut."""
    shallow = teacher
    if cut.depth < _WHOLE:
        gone = min(len(branches) - 1, round((1 - cut.depth) * len(branches)))
        if gone < 1:
            return None
        shallow = without(teacher, branches[:gone])
        prove_without(teacher, shallow, branches[:gone])
    return _narrowed(shallow, cut.width, ctx) if cut.width < _WHOLE else shallow


def _ranked_branches(teacher: Model, ctx: PassContext) -> tuple[Branch, ...]:
    """The residual branches, the least influential first; of equals the earlier."""
    found = residual_branches(teacher)
    if not found:
        return ()
    train = ctx.need_data("select-student").train
    size = batch_size(teacher, min(_SAMPLES, len(train)))
    measured = with_influence(teacher, found, as_tensors(train.batch(slice(0, size))))
    return tuple(sorted(measured, key=lambda b: b.influence))


def _narrowed(model: Model, keep: float, ctx: PassContext) -> Model | None:
    """``model`` with the share ``keep`` of the units of every group, at least one of each."""
    axes = Axes.of(model)
    widths = {g.name: max(1, round(keep * g.size)) for g in independent([g for g in axes.groups if g.kind in _KINDS])}
    groups = [axes.group(name) for name, width in widths.items() if width < axes.group(name).size]
    if not groups:
        return None
    cutter = Cutter(axes, IMPORTANCES["taylor"](axes, groups, ctx, _SAMPLES))
    removals = cutter.removals({group.name: widths[group.name] for group in groups})
    narrow = remove(model, removals, axes=axes)
    prove(model, narrow, removals, axes=axes)
    return narrow
