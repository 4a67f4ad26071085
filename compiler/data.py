"""Data as passes and judges see it: splits of arrays, and who may look at which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgesmith.compiler.errors import DataError

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Split:
    """Samples in memory: one array per model input, first dimension the sample, and integer labels.

    ``transform`` turns a batch of stored arrays into a batch of model inputs (stored uint8 images into normalised
    float32, say); without one the arrays are the inputs. ``augment`` is applied to stored arrays while training only.
    """

    inputs: tuple[Array, ...]
    labels: Array
    transform: Callable[[tuple[Array, ...]], tuple[Array, ...]] | None = None
    augment: Callable[[tuple[Array, ...], np.random.Generator], tuple[Array, ...]] | None = None

    def __post_init__(self) -> None:
        if not self.inputs or len(self.labels) == 0:
            raise DataError("a split holds no samples")
        for position, array in enumerate(self.inputs):
            if len(array) != len(self.labels):
                raise DataError(f"input {position} holds {len(array)} samples but there are {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Array | slice, rng: np.random.Generator | None = None) -> tuple[Array, ...]:
        """Model inputs of the samples at ``index``; augmented when ``rng`` is given."""
        arrays = tuple(array[index] for array in self.inputs)
        if rng is not None and self.augment is not None:
            arrays = self.augment(arrays, rng)
        return self.transform(arrays) if self.transform else arrays

    def batches(self, size: int) -> Iterator[tuple[tuple[Array, ...], Array]]:
        """Every sample once, in order: (model inputs, labels) of at most ``size`` samples."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self.batch(part), self.labels[part]

    def take(self, index: Array) -> Split:
        """The samples at ``index``, in that order."""
        return replace(self, inputs=tuple(array[index] for array in self.inputs), labels=self.labels[index])


@dataclass(frozen=True)
class PassData:
    """What a pass may look at: ``train`` to learn and calibrate from, ``validation`` to choose by."""

    train: Split
    validation: Split


@dataclass(frozen=True)
class Data:
    """Everything there is. ``test`` is for the judge of the finished artifact alone; no pass sees it."""

    train: Split
    validation: Split
    test: Split

    def for_passes(self) -> PassData:
        """The part that passes may look at."""
        return PassData(self.train, self.validation)
