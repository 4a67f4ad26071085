"""The options that every pass which trains has."""

from __future__ import annotations

from edgesmith.compiler.suggest import did_you_mean
from edgesmith.passes.train.losses import LOSSES


def check_training_options(epochs: int, lr: float, batch_size: int, loss: str, label_weight: float) -> None:
    """Refuse what cannot be trained with.

    Raises:
        ValueError: naming the option.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs={epochs} and batch_size={batch_size} must be at least 1")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr={lr} must be greater than 0 and finite")
    if not 0 <= label_weight < float("inf"):
        raise ValueError(f"label_weight={label_weight} must be at least 0 and finite")
    if loss not in LOSSES:
        raise ValueError(f"there is no loss {loss!r}; {did_you_mean(loss, LOSSES)}")
