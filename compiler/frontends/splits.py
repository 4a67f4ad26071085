"""Parts that the user's data does not have are split off from its training samples: stratified, seeded, disjoint."""

from __future__ import annotations

import numpy as np

from edgesmith.compiler.data import Data, Split
from edgesmith.compiler.errors import DataError

TEST_FRACTION = 0.2
VALIDATION_FRACTION = 0.15
"""Of the training samples that are left once the test samples are gone."""


def complete(train: Split, validation: Split | None, test: Split | None, seed: int, where: str) -> Data:
    """Data with the missing parts taken from ``train``; only ``train`` is augmented.

    Raises:
        DataError: too few samples to split.
    """
    if test is None:
        train, test = split_off(train, TEST_FRACTION, seed, f"{where}: test")
    if validation is None:
        train, validation = split_off(train, VALIDATION_FRACTION, seed + 1, f"{where}: validation")
    return Data(train, validation, test)


def split_off(split: Split, fraction: float, seed: int, where: str = "") -> tuple[Split, Split]:
    """``split`` in two, the second with ``fraction`` of every class (rounded; a class of one sample stays in the first).

    Raises:
        DataError: no class has enough samples to give one away.
    """
    order = np.random.default_rng(seed).permutation(len(split))
    labels = split.labels[order]
    taken = np.zeros(len(split), dtype=bool)
    for label in np.unique(labels) if labels.ndim == 1 and labels.dtype.kind in "iu" else [None]:
        members = np.flatnonzero(labels == label) if label is not None else np.arange(len(split))
        taken[members[: round(len(members) * fraction)]] = True
    if not taken.any() or taken.all():
        raise DataError(f"{len(split)} training samples are too few to split some off", where=where, hint="give this part samples of its own")
    return split.take(np.sort(order[~taken])), split.take(np.sort(order[taken]))
