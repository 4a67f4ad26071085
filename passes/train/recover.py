"""Recovery: the accuracy that pruning took, learned back from the model before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult
from edgesmith.passes.train.loop import Schedule, train
from edgesmith.passes.train.objective import Objective
from edgesmith.passes.train.options import check_training_options
from edgesmith.passes.train.remarks import labels_unused, outcome, refuse_quantized


@dataclass(frozen=True)
class Recover(Pass):
    """Distillation from the model before the first pass, on the captured graph, all weights at once.

    After pruning the damage is spread over the whole depth, so nothing is frozen. The checkpoint that is best on the validation split is
    kept, and the model that came in where none is better. ``loss`` is one of ``edgesmith.passes.train.losses.LOSSES``; ``label_weight`` is that
    of cross-entropy with the labels beside it, 0 for data without labels. ``lr`` is the peak learning rate. The model's dropouts stay off
    unless ``dropout`` says so.
    """

    name: ClassVar[str] = "recover"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    trains: ClassVar[bool] = True

    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 64
    loss: str = "standardized-kl"
    label_weight: float = 0.5
    dropout: bool = False

    def __post_init__(self) -> None:
        check_training_options(self.epochs, self.lr, self.batch_size, self.loss, self.label_weight)

    def requires(self, model: Model) -> Iterable[Diagnostic]:
        """A quantized model's grids would no longer fit its weights."""
        return refuse_quantized(self.name, model)

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        """The recovered model, or ``model`` with a warning where training did not help."""
        data, teacher = ctx.need_data(self.name), ctx.need_teacher(self.name)
        objective = Objective(teacher, data, self.loss, self.label_weight)
        schedule = Schedule(self.epochs, self.lr, self.batch_size, dropout=self.dropout)
        trained = train(model, objective, schedule, ctx)
        remarks = (*labels_unused(self.name, self.label_weight, objective), *outcome(self.name, trained, self.epochs, scored=ctx.evaluate is not None))
        return PassResult(trained.model, trained.best_epoch > 0, remarks)
