"""What a student is asked for: to agree with a teacher, and with the labels where they fit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from edgesmith.compiler.data import Array, PassData, Split
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.suggest import did_you_mean
from edgesmith.passes.train.forward import Tensors, batch_size, flat, label_output, learnable, outputs_of, rows
from edgesmith.passes.train.losses import LOSSES, Distance, mse

CACHE_BYTES = 1 << 29
"""Teacher outputs of a whole split are kept in memory up to this size."""

_BATCH = 128


class Objective:
    """Distance to ``teacher``'s outputs plus ``label_weight`` times cross-entropy.

    The teacher's outputs are computed once where training does not augment and they fit in memory, else batch by batch. ``uses_labels`` is False
    where ``label_weight`` is 0 or the labels are not class numbers of an output.

    Raises:
        UnsupportedError: no output to learn from, or no loss of that name.
    """

    def __init__(self, teacher: Model, data: PassData, loss: str, label_weight: float) -> None:
        if loss not in LOSSES:
            raise UnsupportedError(f"there is no loss {loss!r}", hint=did_you_mean(loss, LOSSES))
        self._outputs = learnable(teacher)
        if not self._outputs:
            raise UnsupportedError("the model has no output to learn from", why="a floating-point output with classes is needed")
        self._teacher = teacher
        self.data = data
        self._distance: Distance = LOSSES[loss]
        self._label_weight = label_weight
        self._label_output = label_output(teacher, data.train.labels) if label_weight > 0 else None
        self._train = self._cached(data.train) if data.train.augment is None else None
        self._validation = self._cached(data.validation)

    @property
    def uses_labels(self) -> bool:
        """Whether labels take part."""
        return self._label_output is not None

    def wanted(self, inputs: Tensors, index: Array) -> Tensors:
        """The teacher's outputs on ``inputs``, which are the training samples at ``index``."""
        return flat(self._teacher(*inputs)) if self._train is None else tuple(t[index] for t in self._train)

    def on_train(self, outputs: Tensors, wanted: Tensors, index: Array) -> torch.Tensor:
        """The loss of a batch: ``outputs`` of the student, and those ``wanted``, of the training samples at ``index``."""
        return self._loss(outputs, wanted, self.data.train.labels[index])

    def on_validation(self, model: Model) -> float:
        """The mean loss of ``model`` over the validation split."""
        split, total = self.data.validation, 0.0
        said = self._said_of_validation()
        for (index, outputs), wanted in zip(outputs_of(model, split, _BATCH), said, strict=True):
            with torch.no_grad():
                total += float(self._loss(outputs, wanted, split.labels[index])) * len(split.labels[index])
        return total / len(split)

    def _said_of_validation(self) -> Iterator[Tensors]:
        """The teacher's outputs over the validation split, in the batches of ``outputs_of``."""
        split = self.data.validation
        if self._validation is None:
            return (outputs for _, outputs in outputs_of(self._teacher, split, _BATCH))
        size = batch_size(self._teacher, _BATCH)
        kept = self._validation
        return (tuple(t[start : start + size] for t in kept) for start in range(0, len(split), size))

    def _cached(self, split: Split) -> Tensors | None:
        per_sample = sum(4 * math.prod(size or 1 for size in spec.shape[1:]) for spec in self._teacher.outputs)
        if per_sample * len(split) > CACHE_BYTES:
            return None
        return tuple(torch.cat(output) for output in zip(*(outputs for _, outputs in outputs_of(self._teacher, split, _BATCH)), strict=True))

    def _loss(self, outputs: Tensors, wanted: Tensors, labels: Array) -> torch.Tensor:
        total = torch.zeros(())
        for position in self._outputs:
            ours, theirs = rows(outputs[position]), rows(wanted[position])
            distance = self._distance if ours.shape[1] > 1 else mse  # one number has no distribution
            total = total + distance(ours, theirs)
        if self._label_output is not None:
            total = total + self._label_weight * F.cross_entropy(outputs[self._label_output].float(), torch.from_numpy(labels).long())
        return total
