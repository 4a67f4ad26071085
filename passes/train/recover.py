"""Recovery: the accuracy that pruning took, learned back from the model before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult
from edgesmith.passes.train.loop import Schedule, Trained, train
from edgesmith.passes.train.objective import Objective
from edgesmith.passes.train.options import check_training_options, refuse_quantized


@dataclass(frozen=True)
class Recover(Pass):
    """Distillation from the model before the first pass, on the captured graph, all weights at once.

    After pruning the damage is spread over the whole depth, so nothing is frozen. The checkpoint that is best on the validation split is
    kept, and the model that came in where none is better. ``loss`` is one of ``edgesmith.passes.train.losses.LOSSES``; ``label_weight`` is that
    of cross-entropy with the labels beside it, 0 for data without labels. ``lr`` is the peak learning rate.
    """

    name: ClassVar[str] = "recover"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    trains: ClassVar[bool] = True

    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 64
    loss: str = "standardized-kl"
    label_weight: float = 0.5

    def __post_init__(self) -> None:
        check_training_options(self.epochs, self.lr, self.batch_size, self.loss, self.label_weight)

    def requires(self, model: Model) -> Iterable[Diagnostic]:
        """A quantized model's grids would no longer fit its weights."""
        return refuse_quantized(self.name, model)

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        """The recovered model, or ``model`` with a warning where training did not help."""
        data, teacher = ctx.need_data(self.name), ctx.need_teacher(self.name)
        objective = Objective(teacher, data, self.loss, self.label_weight)
        schedule = Schedule(self.epochs, self.lr, self.batch_size)
        trained = train(model, objective, schedule, ctx)
        remarks = [*_labels_unused(self, objective), _outcome(trained, self.epochs, scored=ctx.evaluate is not None)]
        if trained.diverged:
            remarks.append(Diagnostic(Severity.WARNING, "recover.diverged", "", "the loss became infinite and training stopped", f"lower lr={self.lr:g}"))
        return PassResult(trained.model, trained.best_epoch > 0, tuple(remarks))


def _labels_unused(step: Recover, objective: Objective) -> tuple[Diagnostic, ...]:
    if step.label_weight == 0 or objective.uses_labels:
        return ()
    message = "labels are not used: they are all the same, or no class numbers of an output"
    return (Diagnostic(Severity.INFO, "recover.no-labels", "", message, "label_weight=0 says so"),)


def _outcome(trained: Trained, epochs: int, *, scored: bool) -> Diagnostic:
    (value, loss), (value_before, loss_before) = trained.score, trained.before
    figures = f"validation loss {-loss_before:.4g} -> {-loss:.4g}"
    if scored:
        figures = f"validation score {value_before:.4g} -> {value:.4g}, {figures}"
    if trained.best_epoch == 0:
        return Diagnostic(
            Severity.WARNING, "recover.no-gain", "", f"no epoch of {epochs} was better than the model that came in ({figures})", "try another lr or more epochs"
        )
    return Diagnostic(Severity.INFO, "recover.gain", "", f"best after epoch {trained.best_epoch} of {epochs}: {figures}")
