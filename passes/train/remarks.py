"""What a pass that trains has to say."""

from __future__ import annotations

from collections.abc import Iterator

from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.model import Model
from edgesmith.passes.train.loop import Trained
from edgesmith.passes.train.objective import Objective


def refuse_quantized(who: str, model: Model) -> tuple[Diagnostic, ...]:
    """An ERROR where ``model`` is quantized: its grids would not fit weights that move."""
    if model.quant is None:
        return ()
    return (Diagnostic(Severity.ERROR, f"{who}.quantized", "", f"{who} trains, and the model is already quantized", f"put {who} before quantize"),)


def labels_unused(who: str, label_weight: float, objective: Objective) -> tuple[Diagnostic, ...]:
    """An INFO where labels were asked for and teach nothing."""
    if label_weight == 0 or objective.uses_labels:
        return ()
    message = "labels are not used: they are all the same, or no class numbers of an output"
    return (Diagnostic(Severity.INFO, f"{who}.no-labels", "", message, "label_weight=0 says so"),)


def outcome(who: str, trained: Trained, epochs: int, *, scored: bool) -> Iterator[Diagnostic]:
    """What training gained: an INFO, or a WARNING where that is nothing; a WARNING where it diverged. ``scored``: scores hold what ``evaluate`` said."""
    (value, loss), (value_before, loss_before) = trained.score, trained.before
    figures = f"validation loss {-loss_before:.4g} -> {-loss:.4g}"
    if scored:
        figures = f"validation score {value_before:.4g} -> {value:.4g}, {figures}"
    if trained.best_epoch == 0:
        message = f"no epoch of {epochs} was better than the model that came in ({figures})"
        yield Diagnostic(Severity.WARNING, f"{who}.no-gain", "", message, "try another lr or more epochs")
    else:
        yield Diagnostic(Severity.INFO, f"{who}.gain", "", f"best after epoch {trained.best_epoch} of {epochs}: {figures}")
    if trained.diverged:
        yield Diagnostic(Severity.WARNING, f"{who}.diverged", "", "the loss became infinite and training stopped", "try a lower lr")
