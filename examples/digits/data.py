"""scikit-learn's handwritten digits, split once and for all: 800 to train on, 199 to choose by, 798 to judge by."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesmith import Data, Split

Images = npt.NDArray[Any]


def data() -> Data:
    """Stratified, disjoint and the same on every call. Images are stored as uint8 [n, 1, 8, 8] with 17 grey levels."""
    table = np.loadtxt(digits_file(), delimiter=",", dtype=np.uint8)
    table = np.random.default_rng(0).permutation(table)
    table = table[np.argsort(table[:, 64], kind="stable")]
    ninth = np.arange(len(table)) % 9
    return Data(
        train=Split(*images_and_labels(table[ninth < 4]), normalise, shift),
        validation=Split(*images_and_labels(table[ninth == 8]), normalise),
        test=Split(*images_and_labels(table[(ninth >= 4) & (ninth < 8)]), normalise),
    )


def digits_file() -> Path:
    """The table that scikit-learn brings along: 64 grey levels and the digit, a line per image. Importing the library to read it takes seconds."""
    library = find_spec("sklearn")
    if library is None or library.origin is None:
        raise SystemExit("the digits come with scikit-learn: pip install scikit-learn")
    return Path(library.origin).with_name("datasets") / "data" / "digits.csv.gz"


def images_and_labels(table: Images) -> tuple[tuple[Images], Images]:
    """One row per image -> ([n, 1, 8, 8], [n])."""
    return (table[:, :64].reshape(-1, 1, 8, 8),), table[:, 64].astype(np.int64)


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
