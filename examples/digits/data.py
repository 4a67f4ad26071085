"""scikit-learn's handwritten digits, split once and for all: 800 to train on, 200 to choose by, 797 to judge by."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from edgesmith import Data, Split

Images = npt.NDArray[Any]


def data() -> Data:
    """Stratified, disjoint and the same on every call. Images are stored as uint8 [n, 1, 8, 8] with 17 grey levels."""
    digits = load_digits()
    images = digits.images.astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    cut = partial(train_test_split, random_state=0)
    images, test_images, labels, test_labels = cut(images, labels, test_size=797, stratify=labels)
    images, validation_images, labels, validation_labels = cut(images, labels, test_size=200, stratify=labels)
    return Data(
        train=Split((images,), labels, normalise, shift),
        validation=Split((validation_images,), validation_labels, normalise),
        test=Split((test_images,), test_labels, normalise),
    )


def normalise(arrays: tuple[Images, ...]) -> tuple[Images, ...]:
    """Grey levels 0 to 16 -> float32 in [-1, 1]."""
    return (arrays[0].astype(np.float32) / 8 - 1,)


def shift(arrays: tuple[Images, ...], rng: np.random.Generator) -> tuple[Images, ...]:
    """Move every image by up to one pixel each way; what comes in at the edge is background."""
    (images,) = arrays
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows, columns = rng.integers(0, 3, (2, len(images), 1, 1))
    at = np.arange(8)
    moved = padded[np.arange(len(images))[:, None, None], 0, rows + at[:, None], columns + at]
    return (moved[:, None],)
